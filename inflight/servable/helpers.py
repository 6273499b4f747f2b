"""Counts the outputs of the deprecated helpers from the source of a method.

`call_preprocess` and its companions have no argument for their number of outputs; it is the number of names that the
call is assigned to. The source of methods that use only `add_stage` is never read.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from inflight.errors import RegistrationError
from inflight.servable.trace import MethodTrace

HELPERS = (
    "call_preprocess",
    "call_preprocess_pipeline",
    "call_servable",
    "call_postprocess",
    "call_postprocess_pipeline",
)


def helper_targets(function: Callable[..., Any]) -> dict[str, int] | None:
    """How many names each deprecated helper's result is assigned to.

    Returns:
        Counts by helper name, empty if the method uses none; None if the source cannot be read.

    Raises:
        RegistrationError: a method with helpers has other statements than assignments, or no `call_servable`.
    """
    body = _body(function)
    if body is None:
        return None
    targets: dict[str, int] = {}
    simple = True
    for statement in body:
        if isinstance(statement, (ast.Return, ast.Expr)):
            continue
        if not isinstance(statement, ast.Assign):
            simple = False
            continue
        count = _target_count(statement)
        if count is None or not isinstance(statement.value, ast.Call):
            continue
        name = _called(statement.value)
        if name not in HELPERS:
            simple = False
            continue
        if len(statement.value.args) < 1 + (name != "call_servable"):
            raise RegistrationError(f"Invalid '{name}' invoke args in method '{function.__name__}', give its inputs")
        targets[name] = count
    if targets and not simple:
        raise complex_statements(function.__name__, ";".join(targets))
    if targets and "call_servable" not in targets:
        raise RegistrationError(f"Not find the invoke of 'call_servable' in method '{function.__name__}'")
    return targets


def outputs_count(trace: MethodTrace, helper: str) -> int:
    """How many outputs the running call of `helper` has."""
    if trace.targets is None:
        raise RegistrationError(
            f"Failed to parse method '{trace.name}', its source is not available, and '{helper}' learns its "
            "outputs count from there: use 'add_stage' with outputs_count"
        )
    if helper not in trace.targets:
        raise complex_statements(trace.name, helper)
    return trace.targets[helper]


def check_stages(trace: MethodTrace) -> None:
    """Refuses a method that uses the helpers and has other stages too, after its body ran."""
    if trace.targets and len(trace.stages) != len(trace.targets):
        raise complex_statements(trace.name, ";".join(trace.targets))


def complex_statements(method: str, helpers: str) -> RegistrationError:
    return RegistrationError(
        f"Failed to parse method '{method}', complex statements such as conditions and loops are not supported in "
        f"register_method when the interface '{helpers}' is used, use 'add_stage' to replace '{helpers}'"
    )


def _body(function: Callable[..., Any]) -> list[ast.stmt] | None:
    try:
        source = inspect.getsource(function)
        # An indented definition (in a block or a function) parses only inside a block.
        tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            return node.body
    return None


def _called(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None


def _target_count(statement: ast.Assign) -> int | None:
    target = statement.targets[0]
    if isinstance(target, ast.Name):
        return 1
    if isinstance(target, (ast.Tuple, ast.List)) and not any(isinstance(e, ast.Starred) for e in target.elts):
        return len(target.elts)
    return None
