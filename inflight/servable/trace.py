"""The declarations of a servable_config.py while it runs.

A `Registry` collects one servable. It lives in a context variable, so that threads that trace at the same time do
not see each other. The loader sets it (`tracing`); without a loader the servable is the folder of the nearest
servable_config.py on the Python stack, as MindSpore Serving found it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from inflight.errors import RegistrationError
from inflight.servable.spec import FunctionSpec, MethodSpec, ModelSpec, Ref, ServableSpec, StageSpec

CONFIG_FILE = "servable_config.py"


class _TensorDef:
    """A placeholder for one value while a method is traced. Python's unpacking errors show the class's name."""

    __slots__ = ("ref", "trace")

    def __init__(self, trace: MethodTrace, ref: Ref) -> None:
        self.trace = trace
        self.ref = ref

    def __bool__(self) -> bool:
        raise RegistrationError(
            "A value has no truth while the method is registered: its body runs once, with placeholders. "
            "Move the condition on data into a function and add it with add_stage"
        )


@dataclass
class MethodTrace:
    """One method while its body runs.

    Attributes:
        name: of the method.
        stages: added so far.
        targets: how many outputs each deprecated helper is assigned to, by helper name; None: source not readable.
        helpers: deprecated helpers called so far, in order.
    """

    name: str
    stages: list[StageSpec] = field(default_factory=list)
    targets: dict[str, int] | None = None
    helpers: list[str] = field(default_factory=list)


@dataclass
class Registry:
    """One servable while it is declared.

    Attributes:
        name: of the servable.
        directory: holds servable_config.py.
        package: the Python package that servable_config.py was imported into, or None.
        model_counts: inputs and outputs count of each model, as all stages must agree on them.
        method: the method being traced.
    """

    name: str
    directory: Path
    package: str | None = None
    models: dict[str, ModelSpec] = field(default_factory=dict)
    functions: dict[str, FunctionSpec] = field(default_factory=dict)
    methods: dict[str, MethodSpec] = field(default_factory=dict)
    model_counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    method: MethodTrace | None = None

    def spec(self) -> ServableSpec:
        """A snapshot of the declarations so far."""
        return ServableSpec(self.name, self.directory, dict(self.models), dict(self.functions), dict(self.methods))


_loading: ContextVar[Registry | None] = ContextVar("inflight_loading", default=None)
_found: ContextVar[Registry | None] = ContextVar("inflight_found", default=None)


@contextmanager
def tracing(name: str, directory: Path, package: str | None = None) -> Iterator[Registry]:
    """Collects every declaration of the block (of this thread) as the servable `name`."""
    registry = Registry(name, directory, package)
    token = _loading.set(registry)
    try:
        yield registry
    finally:
        _loading.reset(token)


def current_registry() -> Registry:
    """The servable that the calling code declares.

    Raises:
        RegistrationError: neither a loader nor a servable_config.py is calling.
    """
    loading = _loading.get()
    if loading is not None:
        return loading
    directory = _calling_directory()
    registry = _found.get()
    if registry is None or registry.directory != directory:
        registry = Registry(directory.name, directory)
        _found.set(registry)
    return registry


def _calling_directory() -> Path:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(CONFIG_FILE):
            return Path(frame.f_code.co_filename).absolute().parent
        if frame.f_back is None:
            break
        frame = frame.f_back
    raise RegistrationError(
        f"Models and methods can only be declared while a {CONFIG_FILE} is imported: put the declaration into "
        f"<servable_directory>/<servable_name>/{CONFIG_FILE}"
    )


def current_method(caller: str) -> tuple[Registry, MethodTrace]:
    """The method whose body is calling `caller`.

    Raises:
        RegistrationError: no method is being traced.
    """
    registry = current_registry()
    if registry.method is None:
        raise RegistrationError(
            f"'{caller}' can only be called in the body of a function decorated with register_method"
        )
    return registry, registry.method
