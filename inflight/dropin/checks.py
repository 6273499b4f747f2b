"""Argument checks of the start-up functions, with the texts that MindSpore Serving's scripts match.

Every check raises `ConfigError`, a RuntimeError, as the originals raised RuntimeError for a wrong type too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inflight.errors import ConfigError

KEY_LENGTHS = (16, 24, 32)
DEC_MODES = ("AES-GCM", "AES-CBC")


def check_str(arg_name: str, str_val: object) -> None:
    if not isinstance(str_val, str):
        raise ConfigError(f"Parameter '{arg_name}' should be str, but actually {type(str_val)}")
    if not str_val:
        raise ConfigError(f"Parameter '{arg_name}' should not be empty str")


def check_bool(arg_name: str, bool_val: object) -> None:
    if not isinstance(bool_val, bool):
        raise ConfigError(f"Parameter '{arg_name}' should be bool, but actually {type(bool_val)}")


def check_int(
    arg_name: str,
    int_val: object,
    minimum: int | None = None,
    maximum: int | None = None,
    is_tuple_item: bool = False,
) -> None:
    """An int, not a bool, within the bounds that are given."""
    what = f"The item value '{int_val}' in parameter '{arg_name}'" if is_tuple_item else f"Parameter '{arg_name}'"
    if isinstance(int_val, bool) or not isinstance(int_val, int):
        raise ConfigError(f"{what} should be int, but actually {type(int_val)}")
    if minimum is not None and maximum is not None:
        if not minimum <= int_val <= maximum:
            raise ConfigError(f"{what} should be in range [{minimum},{maximum}]")
    elif minimum is not None and int_val < minimum:
        raise ConfigError(f"{what} should be >= {minimum}")
    elif maximum is not None and int_val > maximum:
        raise ConfigError(f"{what} should be <= {maximum}")


def check_ip_port(arg_name: str, port: object) -> None:
    check_int(arg_name, port, 1, 65535)


def check_ints(arg_name: str, ints: object, minimum: int | None = None, maximum: int | None = None) -> tuple[int, ...]:
    """One int, or a tuple or list of distinct ints, as a tuple."""
    items: Any = (ints,) if isinstance(ints, int) else ints
    if not isinstance(items, (tuple, list)):
        raise ConfigError(f"Parameter '{arg_name}' should be int or tuple/list of int, but actually {type(ints)}")
    accepted: list[int] = []
    for item in items:
        check_int(arg_name, item, minimum, maximum, is_tuple_item=True)
        if item in accepted:
            raise ConfigError(f"The item value '{item}' in parameter '{arg_name}' should not be repeated")
        accepted.append(item)
    return tuple(accepted)


def check_strs(arg_name: str, strs: object) -> tuple[str, ...]:
    """One str, or a tuple or list of distinct non-empty ones, as a tuple."""
    items: Any = (strs,) if isinstance(strs, str) else strs
    if not isinstance(items, (tuple, list)):
        raise ConfigError(f"Parameter '{arg_name}' should be str or tuple/list of str, but actually {type(strs)}")
    return _distinct(items, arg_name, "item")


def check_files(arg_name: str, files: object) -> tuple[tuple[str, ...], ...]:
    """File names: one, or a tuple or list where an item may be a list itself (the sub-graphs of one model)."""
    items: Any = (files,) if isinstance(files, str) else files
    if not isinstance(items, (tuple, list)):
        raise ConfigError(f"Parameter '{arg_name}' should be str or tuple/list of str, but actually {type(files)}")
    _distinct([item for item in items if not isinstance(item, list)], arg_name, "item")
    return tuple(_distinct(item, arg_name, "inner") if isinstance(item, list) else (item,) for item in items)


def _distinct(items: Sequence[object], arg_name: str, what: str) -> tuple[str, ...]:
    accepted: list[str] = []
    for item in items:
        if not isinstance(item, str):
            raise ConfigError(f"The {what} of parameter '{arg_name}' should be str, but actually {type(item)}")
        if not item:
            raise ConfigError(f"The {what} of parameter '{arg_name}' should not be empty str")
        if item in accepted:
            raise ConfigError(f"The {what} value '{item}' in parameter '{arg_name}' should not be repeated")
        accepted.append(item)
    return tuple(accepted)


def check_decryption(dec_key: object, dec_mode: object) -> None:
    """The key of encrypted model files, or None, and how they are encrypted."""
    if dec_key is not None:
        if not isinstance(dec_key, bytes):
            raise ConfigError(f"Parameter 'dec_key' should be bytes, but actually {type(dec_key)}")
        if not dec_key:
            raise ConfigError("Parameter 'dec_key' should not be empty bytes")
        if len(dec_key) not in KEY_LENGTHS:
            raise ConfigError(f"Parameter 'dec_key' length {len(dec_key)} expected to be 16, 24 or 32")
    check_str("dec_mode", dec_mode)
    if dec_mode not in DEC_MODES:
        raise ConfigError("Parameter 'dec_mode' expected to be 'AES-GCM' or 'AES-CBC'")
