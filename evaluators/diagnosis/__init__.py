"""Where and why a deployed artifact differs from the trained network."""
