"""OneFlow's ``config``, which its scripts call first."""

from __future__ import annotations

__all__ = ["config"]


class _Config:
    """OneFlow's ``config``, with the function that scripts call to save and load variables.

    Example:
        >>> vs.config.enable_legacy_model_io(False)
    """

    def enable_legacy_model_io(self, val: bool = True) -> None:
        """Accept the choice between OneFlow's two ways to save; it has no effect, because varstore has one way."""


config = _Config()
