"""Channel pruning: dependency groups, criteria and slicing."""
