"""Surgery on ONNX graphs: export, slicing, cutting at exits, simplification, more outputs."""
