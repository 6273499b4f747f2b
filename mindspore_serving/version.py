"""The release of MindSpore Serving that this package is compatible with."""

__version__ = "2.0.2"
