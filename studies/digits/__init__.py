"""A small study: handwritten digits, which every machine with scikit-learn already has."""
