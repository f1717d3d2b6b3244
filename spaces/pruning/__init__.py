"""Which channels hang together, which of them matter, and how they are cut."""
