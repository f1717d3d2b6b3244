"""What is rewritten in an ONNX file for the kernels of a runtime when it is loaded."""
