"""FLOPs as fvcore counts them."""
