"""The version of minti, in one place."""

__version__ = "0.1.0"
