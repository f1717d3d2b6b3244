"""Operations on ONNX graphs: export, simplification, slicing, cutting into stages, reading of inner tensors."""
