"""Device options: what a Context shows, and the texts of wrong options."""

from __future__ import annotations

from typing import Any

import pytest

from inflight.servable import AclOptions, AscendDeviceInfo, Context, CPUDeviceInfo, GPUDeviceInfo, GpuOptions

CONTEXT_ERRORS: list[tuple[Any, dict[str, Any], str]] = [
    (Context, {"thread_num": "1"}, "Parameter 'thread_num' should be int, but actually <class 'str'>"),
    (Context, {"thread_num": True}, "Parameter 'thread_num' should be int, but actually <class 'bool'>"),
    (Context, {"thread_num": 0}, "Parameter 'thread_num' should be >= 1"),
    (
        Context,
        {"thread_affinity_core_list": 1},
        "Parameter 'thread_affinity_core_list' should be tuple/list of int, but actually <class 'int'>",
    ),
    (Context, {"thread_affinity_core_list": [-1]}, "The item value '-1' in parameter 'thread_affinity_core_list'"),
    (Context, {"enable_parallel": 1}, "Parameter 'enable_parallel' should be bool, but actually <class 'int'>"),
    (Context, {"threads": 1}, "Set context failed, unsupported option threads"),
    (GPUDeviceInfo, {"precision_mode": "fp32"}, "Gpu device info 'precision_mode' can only be 'origin', 'fp16'"),
    (CPUDeviceInfo, {"precision_mode": "fp32"}, "Cpu device info 'precision_mode' can only be 'origin', 'fp16'"),
    (GPUDeviceInfo, {"precision_mode": 3}, "Parameter 'precision_mode' should be str, but actually <class 'int'>"),
    (GPUDeviceInfo, {"mode": "fp16"}, "Set gpu device info failed, unsupported option mode"),
    (CPUDeviceInfo, {"mode": "fp16"}, "Set cpu device info failed, unsupported option mode"),
    (AscendDeviceInfo, {"mode": "fp16"}, "Set ascend device info failed, unsupported option mode"),
    (AscendDeviceInfo, {"input_format": "NCWH"}, "Ascend device info 'input_format' can only be 'ND', 'NCHW'"),
    (AscendDeviceInfo, {"input_shape": ""}, "Parameter 'input_shape' should not be empty str"),
    (AclOptions, {"output_type": "INT8"}, "Ascend device info 'output_type' can only be 'FP32', 'FP16', 'UINT8'"),
    (GpuOptions, {"precision_mode": "x"}, "Gpu device info 'precision_mode' can only be 'origin', 'fp16'"),
]


@pytest.mark.parametrize(("kind", "options", "text"), CONTEXT_ERRORS)
def test_wrong_device_options_say_what_is_wrong(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeError) as failure:
        kind(**options)
    assert text in str(failure.value)


def test_a_context_shows_what_it_collected() -> None:
    empty = Context().model_context
    assert (empty.thread_num, empty.thread_affinity_core_list) == (-1, [])
    assert (empty.enable_parallel, empty.device_list) == (-1, [])
    context = Context(thread_num=1, thread_affinity_core_list=(0, 1), enable_parallel=False)
    context.append_device_info(CPUDeviceInfo())
    context.append_device_info(AscendDeviceInfo(op_select_impl_mode="high_precision"))
    assert context.model_context.thread_affinity_core_list == [0, 1]
    assert context.model_context.enable_parallel == 0
    assert context.model_context.device_list == [
        {"device_type": "cpu"},
        {"device_type": "ascend", "op_select_impl_mode": "high_precision"},
    ]
    with pytest.raises(RuntimeError, match="Device info of type ascend has already been appended"):
        context.append_device_info(AscendDeviceInfo())
    with pytest.raises(RuntimeError, match="Parameter 'device_info' should be instance of"):
        context.append_device_info("cpu")  # type: ignore[arg-type]
