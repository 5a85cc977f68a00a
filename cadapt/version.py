"""The version, by itself so that any layer may write it into what it makes."""

__version__ = "0.1.0"
