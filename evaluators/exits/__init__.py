"""Thresholds of exits; numpy alone."""
