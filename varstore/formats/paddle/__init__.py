"""PaddlePaddle's files; see `varstore.formats.paddle.states` and `varstore.formats.paddle.program` for the formats."""

from varstore.formats.paddle.states import read, write

__all__ = ["read", "write"]
