"""ONNX models."""

from varstore.formats.onnx.model import read, write

__all__ = ["read", "write"]
