"""What may vary: channels kept per group, precision per layer, thresholds per exit, zeros inside layers."""
