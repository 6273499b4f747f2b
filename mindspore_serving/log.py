"""Log lines of a script, under MindSpore Serving's environment variables."""

from inflight.dropin import debug as debug
from inflight.dropin import error as error
from inflight.dropin import get_level, get_log_config
from inflight.dropin import info as info
from inflight.dropin import warning as warning

__all__ = ["get_level", "get_log_config"]
