"""What a user writes: models, methods, stages; and how a servable's folder becomes a `ServableSpec`."""

from inflight.servable.builtin import BUILTIN_FUNCTIONS
from inflight.servable.declare import BUILTIN_FORMATS, allow_formats, declare_generator, declare_model
from inflight.servable.deprecated import (
    call_postprocess,
    call_postprocess_pipeline,
    call_preprocess,
    call_preprocess_pipeline,
    call_servable,
    declare_servable,
)
from inflight.servable.device import (
    AclOptions,
    AscendDeviceInfo,
    Context,
    CPUDeviceInfo,
    GPUDeviceInfo,
    GpuOptions,
)
from inflight.servable.distributed import declare_distributed
from inflight.servable.loader import BARE_METHOD, bare_model, check_model_counts, load_servable
from inflight.servable.method import add_stage, register_method
from inflight.servable.model import Model, install_model_caller
from inflight.servable.spec import (
    DEFAULT_MAX_BATCH_SIZE,
    DeviceOptions,
    FunctionSpec,
    MethodSpec,
    ModelSpec,
    Ranks,
    Ref,
    ServableSpec,
    StageSpec,
)
from inflight.servable.trace import CONFIG_FILE, Registry, current_registry, tracing
from inflight.servable.versions import Version, check_config_location, find_versions, resolve_version

__all__ = [
    "BARE_METHOD",
    "BUILTIN_FORMATS",
    "BUILTIN_FUNCTIONS",
    "CONFIG_FILE",
    "DEFAULT_MAX_BATCH_SIZE",
    "AclOptions",
    "AscendDeviceInfo",
    "CPUDeviceInfo",
    "Context",
    "DeviceOptions",
    "FunctionSpec",
    "GPUDeviceInfo",
    "GpuOptions",
    "MethodSpec",
    "Model",
    "ModelSpec",
    "Ranks",
    "Ref",
    "Registry",
    "ServableSpec",
    "StageSpec",
    "Version",
    "add_stage",
    "allow_formats",
    "bare_model",
    "call_postprocess",
    "call_postprocess_pipeline",
    "call_preprocess",
    "call_preprocess_pipeline",
    "call_servable",
    "check_config_location",
    "check_model_counts",
    "current_registry",
    "declare_distributed",
    "declare_generator",
    "declare_model",
    "declare_servable",
    "find_versions",
    "install_model_caller",
    "load_servable",
    "register_method",
    "resolve_version",
    "tracing",
]
