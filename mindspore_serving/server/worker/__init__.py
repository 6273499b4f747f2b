"""The versions of a servable on disk."""

from inflight.dropin import get_newest_version_number

__all__ = ["get_newest_version_number"]
