"""MindSpore's checkpoints (``.ckpt``); see `varstore.formats.mindspore.messages` for the format."""

from varstore.formats.mindspore.messages import read, write

__all__ = ["read", "write"]
