"""Device options of a model: `Context`, the device infos and their deprecated spellings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

from inflight.errors import RegistrationError
from inflight.servable.checks import check_bool, check_int, check_ints, check_str
from inflight.servable.spec import DeviceOptions

logger = logging.getLogger("inflight")

_ANY: tuple[str, ...] = ()
"""Choices of an option that takes any non-empty text."""


class DeviceInfo:
    """Options for one device type.

    Attributes:
        context_map: `device_type` and the options that were set, all texts.

    Raises:
        RegistrationError: an unknown option, or a value outside the option's choices.
    """

    device_type: ClassVar[str]
    choices: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(self, **options: str) -> None:
        for option, value in options.items():
            if option not in self.choices:
                raise RegistrationError(
                    f"Set {self.device_type} device info failed, unsupported option {option}, "
                    f"supported are: {', '.join(self.choices)}"
                )
            check_str(option, value)
            allowed = self.choices[option]
            if allowed is not _ANY and value not in allowed:
                raise RegistrationError(
                    f"{self.device_type.capitalize()} device info '{option}' can only be "
                    f"{', '.join(map(repr, allowed))}, given '{value}'"
                )
        self.context_map: dict[str, str] = {**options, "device_type": self.device_type}


class CPUDeviceInfo(DeviceInfo):
    """CPU options: `precision_mode` (`origin` or `fp16`)."""

    device_type = "cpu"
    choices = {"precision_mode": ("origin", "fp16")}


class GPUDeviceInfo(DeviceInfo):
    """GPU options: `precision_mode` (`origin` or `fp16`)."""

    device_type = "gpu"
    choices = {"precision_mode": ("origin", "fp16")}


class AscendDeviceInfo(DeviceInfo):
    """Ascend options, as the ATC tool names them."""

    device_type = "ascend"
    choices = {
        "insert_op_cfg_path": _ANY,
        "input_format": ("ND", "NCHW", "NHWC", "CHWN", "NC1HWC0", "NHWC1C0"),
        "input_shape": _ANY,
        "output_type": ("FP32", "FP16", "UINT8"),
        "precision_mode": ("force_fp16", "allow_fp32_to_fp16", "must_keep_origin_dtype", "allow_mix_precision"),
        "op_select_impl_mode": ("high_performance", "high_precision"),
        "fusion_switch_config_path": _ANY,
        "buffer_optimize_mode": ("l1_optimize", "l2_optimize", "off_optimize", "l1_and_l2_optimize"),
    }


@dataclass
class ModelContext:
    """The options collected by a `Context`; -1 and empty lists: not set."""

    thread_num: int = -1
    thread_affinity_core_list: list[int] = field(default_factory=list)
    enable_parallel: int = -1
    device_list: list[dict[str, str]] = field(default_factory=list)


class Context:
    """How a model is run: threads, and one device info per device type.

    The info that matches the worker's device is used, the others are ignored.

    Args:
        thread_num: CPU threads, int >= 1.
        thread_affinity_core_list: tuple or list of distinct core numbers.
        enable_parallel: bool.

    Raises:
        RegistrationError: an unknown keyword, or a value of the wrong type or range.
    """

    def __init__(self, **options: object) -> None:
        self.model_context = ModelContext()
        for option, value in options.items():
            if option == "thread_num":
                self.model_context.thread_num = check_int(option, value, 1)
            elif option == "thread_affinity_core_list":
                self.model_context.thread_affinity_core_list = list(check_ints(option, value, 0, single=False))
            elif option == "enable_parallel":
                self.model_context.enable_parallel = int(check_bool(option, value))
            else:
                raise RegistrationError(
                    f"Set context failed, unsupported option {option}, supported are: thread_num, "
                    "thread_affinity_core_list, enable_parallel"
                )

    def append_device_info(self, device_info: DeviceInfo) -> None:
        """Adds the options of one device type.

        Raises:
            RegistrationError: not a device info, or that device type has one already.
        """
        if not isinstance(device_info, (CPUDeviceInfo, GPUDeviceInfo, AscendDeviceInfo)):
            raise RegistrationError(
                "Parameter 'device_info' should be instance of CPUDeviceInfo, GPUDeviceInfo, or AscendDeviceInfo, "
                f"but actually {type(device_info)}"
            )
        if any(info["device_type"] == device_info.device_type for info in self.model_context.device_list):
            raise RegistrationError(f"Device info of type {device_info.device_type} has already been appended")
        self.model_context.device_list.append(dict(device_info.context_map))

    @property
    def thread_num(self) -> int | None:
        """CPU threads asked for, or None."""
        return None if self.model_context.thread_num < 0 else self.model_context.thread_num

    def device_options(self) -> dict[str, DeviceOptions]:
        """The appended infos by device type."""
        collected: dict[str, DeviceOptions] = {}
        for info in self.model_context.device_list:
            options = {key: value for key, value in info.items() if key != "device_type"}
            collected[info["device_type"]] = DeviceOptions(info["device_type"], options)
        return collected


class _DeviceOptionsAlias:
    """A deprecated spelling of a Context with one device info."""

    info: ClassVar[type[DeviceInfo]]

    def __init__(self, **options: str) -> None:
        old, new = type(self).__name__, self.info.__name__
        logger.warning("'%s' is deprecated since 1.6.0, append a '%s' to a 'Context' instead", old, new)
        self.context = Context()
        self.context.append_device_info(self.info(**options))


class AclOptions(_DeviceOptionsAlias):
    """Deprecated: `Context` with an `AscendDeviceInfo`, in attribute `context`."""

    info = AscendDeviceInfo


class GpuOptions(_DeviceOptionsAlias):
    """Deprecated: `Context` with a `GPUDeviceInfo`, in attribute `context`."""

    info = GPUDeviceInfo
