"""Argument checks of the registration functions, with the texts that scripts written for MindSpore Serving match.

Every check returns the value it accepted and raises `RegistrationError` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inflight.config import SETTINGS
from inflight.errors import RegistrationError


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RegistrationError(f"Parameter '{name}' should be bool, but actually {type(value)}")
    return value


def check_int(name: str, value: object, minimum: int | None = None) -> int:
    return _check_int(f"Parameter '{name}'", value, minimum)


def check_seconds(name: str, value: object, minimum: float = 0.0, *, exclusive: bool = False) -> float:
    """A duration: int or float, finite, at least `minimum` (or above it)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RegistrationError(f"Parameter '{name}' should be int or float, but actually {type(value)}")
    if exclusive and not minimum < value < float("inf"):
        raise RegistrationError(f"Parameter '{name}' should be > {minimum:g} and finite, but actually {value}")
    if not minimum <= value < float("inf"):
        raise RegistrationError(f"Parameter '{name}' should be >= {minimum:g} and finite, but actually {value}")
    return float(value)


def check_str(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RegistrationError(f"Parameter '{name}' should be str, but actually {type(value)}")
    if not value:
        raise RegistrationError(f"Parameter '{name}' should not be empty str")
    return value


def check_strs(name: str, value: object) -> tuple[str, ...]:
    """One str, or a tuple or list of distinct non-empty ones; at least one."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (tuple, list)):
        raise RegistrationError(f"Parameter '{name}' should be str or tuple/list of str, but actually {type(value)}")
    if not items:
        raise RegistrationError(f"Parameter '{name}' should not be empty, give at least one name")
    accepted: list[str] = []
    for item in items:
        if not isinstance(item, str):
            raise RegistrationError(f"The item of parameter '{name}' should be str, but actually {type(item)}")
        if not item:
            raise RegistrationError(f"The item of parameter '{name}' should not be empty str")
        if item in accepted:
            raise RegistrationError(f"The item value '{item}' in parameter '{name}' should not be repeated")
        accepted.append(item)
    return tuple(accepted)


def check_ints(name: str, value: object, minimum: int, *, single: bool = True) -> tuple[int, ...]:
    """A tuple or list of distinct ints; with `single` also one int."""
    items = (value,) if single and isinstance(value, int) else value
    if not isinstance(items, (tuple, list)):
        expected = "int or tuple/list of int" if single else "tuple/list of int"
        raise RegistrationError(f"Parameter '{name}' should be {expected}, but actually {type(value)}")
    accepted: list[int] = []
    for item in items:
        _check_int(f"The item value '{item}' in parameter '{name}'", item, minimum)
        if item in accepted:
            raise RegistrationError(f"The item value '{item}' in parameter '{name}' should not be repeated")
        accepted.append(item)
    return tuple(accepted)


def _check_int(what: str, value: object, minimum: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RegistrationError(f"{what} should be int, but actually {type(value)}")
    if minimum is not None and value < minimum:
        raise RegistrationError(f"{what} should be >= {minimum}")
    return value


def check_settings(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Checks and parses the arguments that are settings of a language model.

    Arguments with several values (`lora_adapters`) are left to the caller.

    Returns:
        Values by the settings' names.
    """
    settings: dict[str, Any] = {}
    for field in SETTINGS:
        value = arguments.get(field.key)
        if field.key not in arguments or field.kind not in _CHECKS:
            continue
        if value is None and field.value is None:
            continue
        _CHECKS[field.kind](field.key, value)
        try:
            settings[field.key] = field.setting.parse(str(value))
        except ValueError as error:
            raise RegistrationError(f"Parameter '{field.key}': {error}") from None
    return settings


_CHECKS: dict[Any, Callable[[str, Any], Any]] = {
    str: check_str,
    int: check_int,
    int | None: check_int,
    str | None: check_str,
    bool: check_bool,
    float: check_seconds,
}
