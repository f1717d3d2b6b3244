"""The sampler of expected hypervolume improvement, with Gaussian processes."""
