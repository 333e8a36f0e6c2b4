"""PaddlePaddle's files."""

from varstore.formats.paddle.states import read, write

__all__ = ["read", "write"]
