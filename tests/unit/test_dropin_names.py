"""Every module and name that scripts and servables written for MindSpore Serving import."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

NAMES = {
    "mindspore_serving": ["__version__"],
    "mindspore_serving.version": ["__version__"],
    "mindspore_serving.default_config": ["__backend__", "__package_name__"],
    "mindspore_serving.log": ["info", "warning", "error", "debug", "get_level", "get_log_config"],
    "mindspore_serving.client": ["Client", "SSLConfig"],
    "mindspore_serving.client.python.client": [
        "Client",
        "SSLConfig",
        "ClientGrpcAsyncResult",
        "ClientGrpcAsyncError",
    ],
    "mindspore_serving.proto.ms_service_pb2": [
        "PredictRequest",
        "PredictReply",
        "ServableSpec",
        "ErrorMsg",
        "Instance",
        "Tensor",
        "TensorShape",
        "ShmTensorData",
        "TensorInfo",
        "DataType",
        "MS_UNKNOWN",
        "MS_BOOL",
        "MS_FLOAT64",
        "MS_STRING",
        "MS_BYTES",
        "DESCRIPTOR",
    ],
    "mindspore_serving.proto.ms_service_pb2_grpc": [
        "MSServiceStub",
        "MSServiceServicer",
        "add_MSServiceServicer_to_server",
    ],
    "mindspore_serving.server": [
        "start_servables",
        "ServableStartConfig",
        "start_grpc_server",
        "start_restful_server",
        "stop",
        "SSLConfig",
        "register",
        "distributed",
        "master",
        "worker",
        "common",
    ],
    "mindspore_serving.server.master": [
        "start_grpc_server",
        "start_restful_server",
        "stop",
        "stop_on_except",
        "SSLConfig",
        "start_master_server",
        "at_stop_list",
        "only_model_stage",
        "context",
    ],
    "mindspore_serving.server.master.context": ["set_max_enqueued_requests"],
    "mindspore_serving.server.register": [
        "declare_model",
        "Model",
        "Context",
        "AscendDeviceInfo",
        "CPUDeviceInfo",
        "GPUDeviceInfo",
        "register_method",
        "add_stage",
        "AclOptions",
        "GpuOptions",
        "declare_servable",
        "call_preprocess",
        "call_preprocess_pipeline",
        "call_servable",
        "call_postprocess",
        "call_postprocess_pipeline",
        "model",
        "method",
        "stage_function",
        "utils",
    ],
    "mindspore_serving.server.register.model": ["Model"],
    "mindspore_serving.server.distributed": ["start_servable", "startup_agents", "declare_servable"],
    "mindspore_serving.server._servable_local": ["merge_config", "ServableStartConfig"],
    "mindspore_serving.server.common": ["check_type", "get_abs_path"],
    "mindspore_serving.server.worker": ["get_newest_version_number"],
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there(module: str) -> None:
    found = import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_message_numbers_are_those_of_the_wire() -> None:
    pb2 = import_module("mindspore_serving.proto.ms_service_pb2")
    assert pb2.PredictRequest.DESCRIPTOR.fields_by_name["instances"].number == 2
    assert pb2.PredictReply.DESCRIPTOR.fields_by_name["instances"].number == 3
    assert pb2.ServableSpec.DESCRIPTOR.fields_by_name["method_name"].number == 2
    assert pb2.ServableSpec.DESCRIPTOR.fields_by_name["version_number"].number == 3
    assert pb2.MS_BYTES == pb2.DataType.Value("MS_BYTES") == 14


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_star_imports_work() -> None:
    modules = [name for name in NAMES if name != "mindspore_serving"]
    assert run("\n".join(f"from {name} import *" for name in modules) + "\nprint(start_servables.__name__)")


def test_a_servable_config_imports_neither_grpc_nor_the_server_nor_a_back_end() -> None:
    code = """
import sys
from mindspore_serving.server import register, distributed
heavy = {"grpc", "uvicorn", "onnx", "onnxruntime", "torch", "mindspore", "google"}
print(sorted({name.split(".")[0] for name in sys.modules} & heavy), "inflight.server" in sys.modules)
"""
    assert run(code) == "[] False"


def test_nothing_is_printed_or_configured_by_importing() -> None:
    code = "import logging, mindspore_serving.server\nprint(logging.getLogger('inflight').handlers)"
    assert run(code) == "[]"
