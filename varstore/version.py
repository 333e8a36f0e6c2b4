"""The version, in one place: pyproject, the manifest's writer field and ``varstore --version`` read it here."""

__version__ = "0.2.0"
