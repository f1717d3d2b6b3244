"""The contest: this program's fronts beside those of other tools, at equal processor time."""
