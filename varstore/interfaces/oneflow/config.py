"""OneFlow's ``config``: what its scripts call before anything else."""

from __future__ import annotations

__all__ = ["config"]


class _Config:
    """OneFlow's ``config``, of which scripts that save and load variables use one function.

    >>> vs.config.enable_legacy_model_io(False)
    """

    def enable_legacy_model_io(self, val: bool = True) -> None:
        """Accept the choice between OneFlow's two ways to save; it has no effect, since varstore has one."""


config = _Config()
