"""The study, its sections and its budget, as they are read; imports no torch."""
