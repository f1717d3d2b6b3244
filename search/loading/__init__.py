"""Networks, weights and images, from wherever users keep them."""
