"""Reports, comparisons and pictures of searches."""
