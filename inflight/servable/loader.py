"""Turns a servable's folder, or a bare model file, into a `ServableSpec`."""

from __future__ import annotations

import importlib
import keyword
import re
import sys
import zlib
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import cache_from_source, find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from inflight.errors import RegistrationError, StartError, describe
from inflight.servable.checks import check_int, check_strs
from inflight.servable.spec import DEFAULT_MAX_BATCH_SIZE, MethodSpec, ModelSpec, Ref, ServableSpec, StageSpec
from inflight.servable.trace import tracing
from inflight.servable.versions import check_config_location

BARE_METHOD = "predict"
_CONFIG_MODULE = "servable_config"
_OWN = "_servable_"
"""Start of the names of packages that are made for a folder whose own name cannot be imported."""


def load_servable(directory: Path, name: str) -> ServableSpec:
    """Imports `<directory>/<name>/servable_config.py` and collects what it declares.

    `directory` is appended to `sys.path`, and the file is imported as `<name>.servable_config`, so relative
    imports of its neighbours work. Where that name belongs to another package, or is not a Python name, the folder
    is imported as a package of its own instead. Loading it again runs the files again.

    Raises:
        ConfigError: the folder or the file is missing.
        StartError: the import failed, `import <name>.servable_config failed, <exc>`.
        RegistrationError: no method is registered.
    """
    directory = directory.absolute()
    config = check_config_location(directory, name)
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    importlib.invalidate_caches()
    try:
        package = _package_for(config, name)
        with tracing(name, config.parent, package) as registry:
            importlib.import_module(f"{package}.{_CONFIG_MODULE}")
    except BaseException as error:  # user code: it may call sys.exit() or raise anything else
        raise StartError(f"import {name}.{_CONFIG_MODULE} failed, {describe(error)}") from error
    if not registry.methods:
        raise RegistrationError(
            f"There is no method registered for servable '{name}': decorate a function in '{config}' "
            "with register_method"
        )
    return registry.spec()


def bare_model(
    path: Path,
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    fmt: str | None = None,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    *,
    with_batch_dim: bool = True,
    max_wait_ms: float = 0.0,
) -> ServableSpec:
    """A servable for a model file alone: one method, `predict`, that runs the model.

    Args:
        path: the model file.
        inputs, outputs: the model's own names, which become the method's.
        fmt: the model's format, or None to let the file's ending decide.
        max_batch_size: rows in one run where the model's batch dimension is dynamic.
        with_batch_dim: the first dimension of every input and output is the batch.
        max_wait_ms: as in `MethodSpec`.

    Raises:
        RegistrationError: no names, or names that are empty or repeated.
    """
    input_names = check_strs("inputs", list(inputs))
    output_names = check_strs("outputs", list(outputs))
    check_int("max_batch_size", max_batch_size, 1)
    key = path.name
    model = ModelSpec(key, (key,), fmt, with_batch_dim=with_batch_dim, max_batch_size=max_batch_size)
    refs = tuple(Ref(0, index) for index in range(len(input_names)))
    stage = StageSpec(1, "model", key, refs, len(output_names), None, f"Model '{key}'")
    returns = tuple(Ref(1, index) for index in range(len(output_names)))
    method = MethodSpec(BARE_METHOD, input_names, output_names, (stage,), returns, max_wait_ms)
    return ServableSpec(name, path.absolute().parent, {key: model}, {}, {BARE_METHOD: method})


def check_model_counts(spec: ServableSpec, key: str, inputs_count: int, outputs_count: int) -> None:
    """Compares every stage of model `key` with the loaded model's first sub-graph.

    Raises:
        RegistrationError: a stage gives the model another number of inputs, or takes another number of outputs.
    """
    for method in spec.methods.values():
        for stage in method.stages:
            if stage.kind != "model" or stage.key != key:
                continue
            pairs = (("inputs", len(stage.inputs), inputs_count), ("outputs", stage.outputs_count, outputs_count))
            for what, count, defined in pairs:
                # 0: the back end does not know.
                if defined and count != defined:
                    raise RegistrationError(
                        f"The {what} count {count} in register_method not equal to the count {defined} defined in "
                        f"model, model '{key}', method '{method.name}'"
                    )


def _package_for(config: Path, name: str) -> str:
    """Name of the package that `servable_config` is imported from, with nothing of an earlier load left."""
    _drop_stale(config.parent)
    if _is_plain(config, name):
        _forget(name)
        return name
    mangled = re.sub(r"\W", "_", name, flags=re.ASCII)
    package = f"{_OWN}{zlib.crc32(str(config).encode()):08x}_{mangled}"
    _forget(package)
    folder = str(config.parent)
    init = config.parent / "__init__.py"
    if init.is_file():
        spec = spec_from_file_location(package, init, submodule_search_locations=[folder])
    else:
        spec = ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [folder]
    if spec is None:
        raise ImportError(f"'{init}' is not a Python file")
    module = module_from_spec(spec)
    sys.modules[package] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)
    return package


def _drop_stale(folder: Path) -> None:
    """Deletes byte code that is older than its file. Python compares sizes and whole seconds, so it would run the old
    code of a file that was changed within a second."""
    for source in folder.glob("*.py"):
        compiled = Path(cache_from_source(str(source)))
        try:
            if compiled.stat().st_mtime_ns <= source.stat().st_mtime_ns:
                compiled.unlink()
        except OSError:  # there is none, or it is not ours
            continue


def _is_plain(config: Path, name: str) -> bool:
    """Whether an ordinary import of `<name>.servable_config` finds this file."""
    if not name.isidentifier() or keyword.iskeyword(name):
        return False
    try:
        package = find_spec(name)
    except ValueError:  # a module without a spec, as `__main__`
        return False
    if package is None or package.submodule_search_locations is None:
        return False
    found = PathFinder.find_spec(f"{name}.{_CONFIG_MODULE}", list(package.submodule_search_locations))
    return found is not None and found.origin is not None and Path(found.origin).resolve() == config.resolve()


def _forget(package: str) -> None:
    """Drops a package that an earlier load left behind, so that its files run again."""
    if f"{package}.{_CONFIG_MODULE}" in sys.modules or package.startswith(_OWN):
        for module in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
            del sys.modules[module]
