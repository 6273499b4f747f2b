"""The servable that the calling servable_config.py declares."""

from inflight.servable import current_registry

__all__ = ["current_registry", "get_servable_dir"]


def get_servable_dir() -> str:
    """Name of the folder that holds the running servable_config.py, which is the servable's name."""
    return current_registry().name
