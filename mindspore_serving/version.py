"""The release of MindSpore Serving whose surface this is."""

__version__ = "2.0.2"
