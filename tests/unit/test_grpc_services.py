"""Health and reflection, asked by grpcio's own client packages."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from inflight.proto import health_pb2 as own_health
from inflight.proto import reflection_pb2 as own_reflection
from tests.grpc_server import FakeBackend, served

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
ALL_SERVICES = {
    "mindspore.serving.proto.MSService",
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def channel(backend: FakeBackend, engine: str) -> Iterator[grpc.Channel]:
    with served(backend, engine) as address, grpc.insecure_channel(address) as made:
        yield made


def test_own_protocols_are_the_public_ones() -> None:
    for own, public in ((own_health, health_pb2), (own_reflection, reflection_pb2)):
        for name, message in own.DESCRIPTOR.message_types_by_name.items():
            other = public.DESCRIPTOR.message_types_by_name[name]
            assert {each.name: (each.number, each.type) for each in message.fields} == {
                each.name: (each.number, each.type) for each in other.fields
            }


def test_health_follows_readiness(backend: FakeBackend, channel: grpc.Channel) -> None:
    check = health_pb2_grpc.HealthStub(channel).Check

    def status(service: str) -> int:
        return check(health_pb2.HealthCheckRequest(service=service), timeout=5).status

    names = ("", "mindspore.serving.proto.MSService", "inference.GRPCInferenceService", "add", "multi.sub")
    assert [status(name) for name in names] == [SERVING] * 5
    backend.ready = False
    assert [status(name) for name in names] == [NOT_SERVING] * 5
    backend.ready = True
    assert status("") == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        status("nothing")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_health_list(backend: FakeBackend, channel: grpc.Channel) -> None:
    statuses = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=5).statuses
    assert {"", "add", "multi", "mindspore.serving.proto.MSService"} <= set(statuses)
    assert {each.status for each in statuses.values()} == {SERVING}


def test_watch_tells_changes_and_ends_with_the_server(backend: FakeBackend, channel: grpc.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
    assert next(watch).status == SERVING
    backend.ready = False
    assert next(watch).status == NOT_SERVING
    backend.ready = True
    assert next(watch).status == SERVING
    backend.live = False
    assert next(watch).status == NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        next(watch)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_watch_of_an_unknown_service_waits(channel: grpc.Channel) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="nothing"), timeout=10)
    assert next(watch).status == UNKNOWN
    watch.cancel()


def test_reflection_describes_every_service(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == ALL_SERVICES
    pool = DescriptorPool(database)
    predict = pool.FindServiceByName("mindspore.serving.proto.MSService").FindMethodByName("Predict")
    assert predict.input_type.fields_by_name["instances"].number == 2
    assert predict.output_type.fields_by_name["instances"].number == 3
    infer = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
    assert infer.input_type.fields_by_name["raw_input_contents"].number == 7
    alpha = pool.FindServiceByName("grpc.reflection.v1alpha.ServerReflection")
    assert alpha.methods[0].input_type.full_name == "grpc.reflection.v1alpha.ServerReflectionRequest"
    assert (
        pool.FindMessageTypeByName("inference.ModelInferRequest.InferInputTensor").fields_by_name["contents"].number
        == 5
    )


def test_reflection_answers_one_by_one(channel: grpc.Channel) -> None:
    asked = [
        reflection_pb2.ServerReflectionRequest(host="h", list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="nothing.Here"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="nothing.proto"),
        reflection_pb2.ServerReflectionRequest(all_extension_numbers_of_type="a.B"),
        reflection_pb2.ServerReflectionRequest(),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="mindspore.serving.proto.DataType"),
    ]
    for package in ("v1", "v1alpha"):
        call = channel.stream_stream(
            f"/grpc.reflection.{package}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        replies = list(call(iter(asked), timeout=5))
        assert [each.original_request for each in replies] == asked
        kinds = [each.WhichOneof("message_response") for each in replies]
        assert kinds == ["list_services_response", *["error_response"] * 4, "file_descriptor_response"]
        assert [each.error_response.error_code for each in replies[1:5]] == [5, 5, 5, 12]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    assert len(list(stub.ServerReflectionInfo(iter(asked[:1]), timeout=5))) == 1
