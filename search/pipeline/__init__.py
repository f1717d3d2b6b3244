"""From a candidate to its measurements; knows no Optuna."""
