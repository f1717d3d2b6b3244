"""What may vary: channels per group, precision per layer, thresholds per exit and gate, zeros inside layers."""
