"""Chooses the runtime of a model format or file: built in, from a plug-in, or named by the operator.

Nothing heavy is imported before a format is asked for. A format's runtime is looked up in this order:

1. the overrides given to `configure` (the worker's entry reads them from `INFLIGHT_RUNTIMES`);
2. the entry points of the group `inflight.runtimes`, named after the format;
3. the runtimes of this package.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from inflight.errors import ConfigError, StartError
from inflight.runtime.base import Runtime

ENTRY_POINT_GROUP = "inflight.runtimes"
OVERRIDES_VARIABLE = "INFLIGHT_RUNTIMES"

_ONNX = "inflight.runtime.onnx:OnnxRuntime"
_TORCH = "inflight.runtime.torch:TorchRuntime"
_MINDIR = "inflight.runtime.mindir:MindIRRuntime"
_MINDSPORE = "inflight.runtime.mindspore:MindSporeRuntime"
_CALLABLE = "inflight.runtime.callable:CallableRuntime"

# As data, so that a format can be found without importing its back end; a test compares it with the classes.
BUILTINS: dict[str, str] = {
    "onnx": _ONNX,
    "torch": _TORCH,
    "torchscript": _TORCH,
    "pt2": _TORCH,
    "mindir": _MINDIR,
    "mindir_lite": _MINDIR,
    "mindir_opt": _MINDIR,
    "mindspore": _MINDSPORE,
    "callable": _CALLABLE,
}
SUFFIXES: dict[str, str] = {  # of model files, with the format that each stands for
    ".onnx": "onnx",
    ".ort": "onnx",
    ".pt": "torch",
    ".pth": "torch",
    ".ts": "torch",
    ".jit": "torch",
    ".torchscript": "torch",
    ".pt2": "torch",
    ".mindir": "mindir",
}

# Package that a runtime imports, and the extra of this distribution that brings it.
_EXTRAS = {"torch": "torch", "mindspore": "mindspore"}

_ENTRY = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*=\s*([A-Za-z_][\w.]*:[A-Za-z_]\w*)\s*")

_overrides: dict[str, str] = {}


def parse_overrides(text: str | None) -> dict[str, str]:
    """`format=module:Class,…` as a mapping from lower-case format to `module:Class`.

    Raises:
        ConfigError: an entry is malformed, or a format is named twice.
    """
    chosen: dict[str, str] = {}
    for item in (text or "").split(","):
        if not item.strip():
            continue
        match = _ENTRY.fullmatch(item)
        if match is None:
            raise ConfigError(
                f"{OVERRIDES_VARIABLE}: '{item.strip()}' is not of the form format=module:Class; "
                "write for example onnx=my_package.runtime:MyRuntime, several separated by commas"
            )
        name, target = match[1].lower(), match[2]
        if name in chosen:
            raise ConfigError(f"{OVERRIDES_VARIABLE}: format '{name}' is named twice; keep one of the entries")
        chosen[name] = target
    return chosen


def configure(overrides: str | None) -> None:
    """Sets the operator's overrides for this process; None or an empty text removes them.

    Written once, by the process's entry, before any runtime is looked up.

    Raises:
        ConfigError: as `parse_overrides`.
    """
    chosen = parse_overrides(overrides)
    _overrides.clear()
    _overrides.update(chosen)
    _plugins.cache_clear()


@cache
def _plugins() -> dict[str, str]:
    plugins: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        plugins.setdefault(point.name.lower(), point.value)
    return plugins


def _table() -> dict[str, str]:
    return {**BUILTINS, **_plugins(), **_overrides}


def available_formats() -> tuple[str, ...]:
    """Every format that `declare_model(model_format=...)` may name, sorted."""
    return tuple(sorted(_table()))


def _import_runtime(name: str, target: str) -> type[Runtime]:
    module_name, _, attribute = target.partition(":")
    try:
        runtime = getattr(import_module(module_name), attribute.strip())
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package in _EXTRAS:
            hint = f"install it with: pip install 'inflight-serving[{_EXTRAS[package]}]'"
        else:
            hint = "install the package that holds it, or correct the name"
        raise StartError(
            f"The runtime of format '{name}' ({target}) needs the Python module '{missing.name}', which is not "
            f"installed; {hint}"
        ) from missing
    except (ImportError, AttributeError) as failure:
        raise StartError(f"The runtime of format '{name}' ({target}) cannot be imported: {failure}") from failure
    if not (isinstance(runtime, type) and issubclass(runtime, Runtime)):
        raise StartError(
            f"The runtime of format '{name}' ({target}) is not a runtime; name a class derived from "
            "inflight.runtime.Runtime"
        )
    return runtime


def _format_of(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    # The endings of a plug-in's files are an attribute of its class.
    for name, target in _table().items():
        if name not in BUILTINS and suffix in _import_runtime(name, target).suffixes:
            return name
    raise StartError(
        f"No runtime is known for the model file '{file.name}'; name its format, one of: "
        f"{', '.join(available_formats())}"
    )


def find_runtime(fmt: str | None, file: Path | None = None) -> type[Runtime]:
    """The runtime of a format (in any case), or of a file's ending where no format is named.

    Raises:
        StartError: the format or the ending is unknown, or the runtime cannot be imported here.
    """
    if fmt is None:
        if file is None:
            raise StartError(f"Name a model file or a format, one of: {', '.join(available_formats())}")
        fmt = _format_of(file)
    name = fmt.lower()
    target = _table().get(name)
    if target is None:
        raise StartError(f"Unknown model format '{fmt}'; use one of: {', '.join(available_formats())}")
    return _import_runtime(name, target)


def devices_for(fmt: str | None, file: Path | None = None) -> tuple[str, ...]:
    """Device types that the runtime of this format can use on this machine, preferred first.

    Raises:
        StartError: as `find_runtime`.
    """
    return find_runtime(fmt, file).devices()
