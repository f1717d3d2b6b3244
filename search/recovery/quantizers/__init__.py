"""How int8 is felt in training: a method of fake quantization is a file each."""
