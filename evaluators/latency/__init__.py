"""Latency, which layers are slower in a lower precision, and what was timed before."""
