"""MegEngine's checkpoints and dumped graphs (``.mge``).

See `varstore.formats.megengine.states` and `varstore.formats.megengine.program` for the formats.
"""

from varstore.formats.megengine.states import read, write

__all__ = ["read", "write"]
