"""Rewrites of ONNX files for the kernels of a runtime, applied when a file is deployed."""
