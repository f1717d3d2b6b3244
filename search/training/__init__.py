"""Trains the parts of networks that a study names; knows no candidates."""
