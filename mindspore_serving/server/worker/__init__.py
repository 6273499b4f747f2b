"""What a worker finds on disk."""

from inflight.dropin import get_newest_version_number

__all__ = ["get_newest_version_number"]
