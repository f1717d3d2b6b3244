"""TensorRT: engines, CUDA, and what the inspector reports."""
