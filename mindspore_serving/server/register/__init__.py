"""MindSpore Serving's registration functions: what a servable_config.py imports."""

from inflight.servable import (
    AclOptions,
    AscendDeviceInfo,
    Context,
    CPUDeviceInfo,
    GPUDeviceInfo,
    GpuOptions,
    Model,
    add_stage,
    call_postprocess,
    call_postprocess_pipeline,
    call_preprocess,
    call_preprocess_pipeline,
    call_servable,
    declare_model,
    declare_servable,
)
from mindspore_serving.server.register import method, model, stage_function, utils
from mindspore_serving.server.register.method import register_method

__all__ = [
    "AclOptions",
    "AscendDeviceInfo",
    "CPUDeviceInfo",
    "Context",
    "GPUDeviceInfo",
    "GpuOptions",
    "Model",
    "add_stage",
    "call_postprocess",
    "call_postprocess_pipeline",
    "call_preprocess",
    "call_preprocess_pipeline",
    "call_servable",
    "declare_model",
    "declare_servable",
    "method",
    "model",
    "register_method",
    "stage_function",
    "utils",
]
