"""ONNX bundles for onnxruntime-genai and plain onnxruntime, with a heterogeneous cache of fixed size."""
