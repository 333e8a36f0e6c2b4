"""ONNX models; see `varstore.formats.onnx.model` and `varstore.formats.onnx.tensors` for the format."""

from varstore.formats.onnx.model import read, write

__all__ = ["read", "write"]
