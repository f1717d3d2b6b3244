"""Ranges and the lower precisions that are written into ONNX files."""
