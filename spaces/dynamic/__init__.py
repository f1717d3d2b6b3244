"""Networks whose path depends on the input: exits, gates around blocks, masks inside them."""
