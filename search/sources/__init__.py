"""Where a study's network and images come from."""
