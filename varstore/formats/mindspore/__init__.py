"""MindSpore's checkpoints (``.ckpt``) and programs (``.mindir``).

See `varstore.formats.mindspore.messages` and `varstore.formats.mindspore.program` for the formats.
"""

from varstore.formats.mindspore.messages import read, write

__all__ = ["read", "write"]
