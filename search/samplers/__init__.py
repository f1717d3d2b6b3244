"""What to try next: Optuna's samplers and our own."""
