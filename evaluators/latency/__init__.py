"""Latency, which layers are slower in a lower precision, which widths than wider ones, and what was timed before."""
