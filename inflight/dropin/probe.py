"""`python -m inflight.dropin.probe [--servable DIRECTORY NAME]`: questions that need a process of their own, as JSON.

Without arguments: which devices the installed model back ends can use. Asking a back end imports it, and the
server process imports none. With a servable: whether all its stages are models, which runs its servable_config.py.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from inflight.errors import StartError
from inflight.runtime import available_formats, devices_for
from inflight.servable import allow_formats, load_servable


def device_types() -> list[str]:
    """Device types that at least one back end can use: `ascend` before `gpu` before `cpu`."""
    types: list[str] = []
    for name in available_formats():
        try:
            usable = devices_for(name)
        except StartError:  # this back end is not installed
            continue
        types += [device for device in usable if device not in types]
    return sorted(types, key=("ascend", "gpu", "cpu").index)


def ascend_chip() -> str:
    """The name of the Ascend chip as CANN reports it (`Ascend910B1`), or an empty text."""
    try:
        acl = importlib.import_module("acl")
    except ImportError:
        return ""
    return str(acl.get_soc_name() or "")


def only_model_stages(directory: str, name: str) -> bool:
    allow_formats(available_formats())
    spec = load_servable(Path(directory), name)
    return not any(method.has_function_stage for method in spec.methods.values())


def answer(arguments: list[str]) -> dict[str, Any]:
    if arguments[:1] == ["--servable"]:
        return {"only_model_stages": only_model_stages(*arguments[1:])}
    return {"device_types": device_types(), "ascend_chip": ascend_chip()}


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1:])))
