"""MindSpore's checkpoints."""

from varstore.formats.mindspore.messages import read, write

__all__ = ["read", "write"]
