"""Winning accuracy back after pruning, at the level of effort that a study names: a file each."""
