"""Argument checks."""

from inflight.dropin import check_bool, check_int, check_ip_port, check_str
from inflight.dropin import check_files as check_and_as_tuple_with_str_list
from inflight.dropin import check_ints as check_and_as_int_tuple_list
from inflight.dropin import check_strs as check_and_as_str_tuple_list

__all__ = [
    "check_and_as_int_tuple_list",
    "check_and_as_str_tuple_list",
    "check_and_as_tuple_with_str_list",
    "check_bool",
    "check_int",
    "check_ip_port",
    "check_str",
]
