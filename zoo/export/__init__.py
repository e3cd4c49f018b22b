"""Models that leave: a folder that transformers loads without this package, a traced program, ONNX."""
