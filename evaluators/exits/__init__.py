"""The solver of exit thresholds; numpy only."""
