"""Methods of fake quantization for training in int8, one per file."""
