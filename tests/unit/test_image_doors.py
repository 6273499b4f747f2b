"""Images at the doors: every form of every protocol, what a model that reads text only says, limits, errors."""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from inflight.config import RestConfig
from inflight.contract.plan import StateSize
from inflight.frontends.app import http_app
from inflight.metrics import Metrics
from tests.seeing import Seeing, SeeingBackend
from tests.unit.http_fakes import serve

PNG = b"\x89PNG\r\n\x1a\nnot looked at here"
B64 = base64.b64encode(PNG).decode()
DATA = f"data:image/png;base64,{B64}"
FILE = f"{len(PNG)} bytes"
URL = "http://a.example/cat.png"
ASKED = "<|im_start|>User:<image>{}<end_of_utterance>\nAssistant:"
TEXT_ONLY = "model 'plain' reads text only; it has no image input (serve a vision checkpoint, e.g. "


class Doors(NamedTuple):
    address: str
    backend: SeeingBackend

    def post(self, path: str, body: Any, kind: str = "application/json") -> tuple[int, Any]:
        host, _, port = self.address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"Content-Type": kind})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text.decode()


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    backend = SeeingBackend(Seeing("LLaMA"), Seeing("plain", sees=False), Seeing("bare", template=None))
    app = http_app(backend, max_body_bytes=100 << 20, rest=RestConfig(), metrics=Metrics())
    with serve(app=app) as served:
        yield Doors(served.address, backend)


def said(doors: Doors, instance: Any, model: str = "LLaMA") -> str:
    status, answer = doors.post(f"/model/{model}:generate", {"instances": instance})
    assert status == 200
    assert "instances" in answer, answer
    return str(answer["instances"][0]["generated_text"])


def refused(doors: Doors, instance: Any, model: str = "LLaMA") -> str:
    _, answer = doors.post(f"/model/{model}:generate", {"instances": instance})
    return str(answer["error_msg"])


# MindSpore Serving


def test_the_line_of_the_mission(doors: Doors, tmp_path: Path) -> None:
    """The mission's own call, unchanged: curl, its content type, no list, no text."""
    line = f"""curl -s -X POST -d '{{"instances":{{"image":{{"b64":"{B64}"}}}}}}' http://{doors.address}/model/LLaMA"""
    for method in ("generate", "generated_stream"):
        command = f"{line}:{method}"
        body = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
        answer = json.loads(body.strip().splitlines()[-1].removeprefix("data: "))
        assert answer["instances"][0]["generated_text"] == f"{ASKED.format('Describe the image.')} + {FILE}"


def test_forms_of_an_image(doors: Doors) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    b64 = base64.b64encode(pixels.tobytes()).decode()
    asked = ASKED.format("What?")
    array = f"{asked} + uint8 [2, 4, 3] 276"
    forms: list[tuple[Any, str]] = [
        ({"image": {"b64": B64, "type": "bytes"}}, f"{asked} + {FILE}"),
        ({"image": DATA}, f"{asked} + {FILE}"),
        ({"image": URL}, f"{asked} + {URL}"),
        ({"image_url": URL}, f"{asked} + {URL}"),
        ({"image_url": {"url": DATA, "detail": "low"}}, f"{asked} + {FILE}, low"),
        ({"image": {"b64": b64, "type": "uint8", "shape": [2, 4, 3]}}, array),
        ({"image": pixels.tolist()}, array),
        ({"images": [{"b64": B64}]}, f"{asked} + {FILE}"),
        ({"images": {"b64": b64, "type": "uint8", "shape": [1, 2, 4, 3]}}, array),
    ]
    for image, told in forms:
        assert said(doors, {**image, "prompt": "What?"}) == told
        assert said(doors, [{**image, "inputs": "What?", "parameters": {"max_new_tokens": 3}}]) == told
    assert doors.backend.generators["LLaMA"].seen[-1].max_new_tokens == 3
    assert not doors.backend.generators["LLaMA"].seen[-1].add_special_tokens, "the template has written them"


def test_places_of_images(doors: Doors) -> None:
    two = {"images": [{"b64": B64}, URL]}
    tail = f" + {FILE} + {URL}"
    assert said(doors, {**two, "text": "Which?"}) == ASKED.format("<image>Which?") + tail
    assert (
        said(doors, {"image": {"b64": B64}, "image_url": URL, "text": "Which?"}) == ASKED.format("<image>Which?") + tail
    )
    assert said(doors, {**two, "text": "a<image>b<image>c"}) == f"a<image>b<image>c{tail}"
    assert doors.backend.generators["LLaMA"].seen[-1].add_special_tokens
    assert said(doors, f"![]({URL})What?") == f"<image>What? + {URL}"
    assert "not both are possible" in refused(doors, {**two, "text": f"![]({URL})What?"})
    assert said(doors, {"image": URL, "text": "What?"}, "bare") == f"<image>\nWhat? + {URL}"
    assert said(doors, {**two}, "bare") == f"<image><image>\nDescribe the image.{tail}"
    assert said(doors, {"text": "no image"}) == "no image"
    _, answer = doors.post("/model/LLaMA:generate", {"instances": [{"image": URL}, {"text": "b"}, {"image": DATA}]})
    texts = [each["generated_text"] for each in answer["instances"]]
    assert [text.rpartition("+ ")[2] for text in texts] == [URL, "b", FILE]


@pytest.mark.parametrize(
    ("instance", "text"),
    [
        ({"image": 3}, "instance 0: 'image' has no image; write {\"b64\": "),
        ({"image": "cat.png"}, "instance 0: 'image' has no image; write"),
        ({"image": None}, "instance 0 has no text"),
        ({"image": {"b64": "!"}}, "instance 0: 'image': Parser request failed, '!' is illegal b64 encode string"),
        ({"image": {"b64": ""}}, "instance 0: 'image': the image is empty"),
        ({"image": "data:image/png;base64,!"}, "'image': base64 encoding is invalid: Invalid symbol 33, offset 0."),
        ({"image": "data:image/png,x"}, "instance 0: 'image': invalid image content: image/png,x"),
        (
            {"image": {"b64": "AAAAAA==", "type": "float32", "shape": [1]}},
            "pixels must be uint8, 0 to 255",
        ),
        ({"image": [[[1, 2, 300]]]}, "'image': Parser request failed, json integer 300 is out of the range of uint8"),
        ({"image": [[[1, 2]]]}, "must have the shape [height, width, 3], or [n, height, width, 3]"),
        ({"image_url": {"url": URL, "detail": "very"}}, "'detail' must be one of auto, low, high"),
        ({"images": URL}, "instance 0: 'images' must be a list of images"),
        ({"picture": {"b64": B64}}, "instance 0: 'picture' is no key of an image; use 'image', 'images' (a list) or"),
        ({"image_urls": [URL]}, "instance 0: 'image_urls' is no key of an image"),
        ({"image": URL, "prompt": 3}, "instance 0 has no text; give it by the key 'inputs', 'prompt' or 'text'"),
        ({"image": URL, "max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ],
)
def test_what_is_no_image(doors: Doors, instance: dict[str, Any], text: str) -> None:
    assert text in refused(doors, instance)


def test_a_model_that_reads_text_only(doors: Doors) -> None:
    for image in ({"image": {"b64": B64}}, {"image_url": URL}, {"images": []}, {"picture": {"b64": B64}}):
        for instance in (image, {**image, "prompt": "What?"}):
            assert refused(doors, instance, "plain").startswith(TEXT_ONLY)
    assert said(doors, f"![]({URL})What?", "plain") == f"![]({URL})What?"
    status, answer = doors.post("/v2/models/plain/generate", {"text_input": "What?", "image": {"b64": B64}})
    assert (status, answer["error"].startswith(TEXT_ONLY)) == (400, True)


def test_the_size_of_a_body(doors: Doors) -> None:
    photo = base64.b64encode(b"\x89" * (5 << 20)).decode()
    assert said(doors, {"image": {"b64": photo}}).endswith(f" + {5 << 20} bytes")
    told = "bytes, the limit of this server: send less in a request, or raise --payload-limit of the server"
    assert refused(doors, {"image": {"b64": photo * 6}}).endswith(f"33554432 {told}")
    assert refused(doors, {"text": photo}, "plain").endswith(f"2000000 {told}")
    assert refused(doors, {"image": {"b64": photo}}, "plain").startswith(TEXT_ONLY), "not its size"


def test_a_conversation_as_an_instance(doors: Doors) -> None:
    chat = [{"role": "user", "content": [part("What?"), image(DATA)]}]
    assert said(doors, {"messages": chat}) == f"<|im_start|>User: What?<image><end_of_utterance>\nAssistant: + {FILE}"
    assert "write these in them" in refused(doors, {"messages": chat, "image": URL})
    assert "write these in them" in refused(doors, {"messages": chat, "text": "a"})
    assert refused(doors, {"messages": chat}, "plain").startswith(TEXT_ONLY)


def test_routes_of_mindspore_serving_2(doors: Doors) -> None:
    for body in ({"inputs": "What?", "image": {"b64": B64}}, {"inputs": "What?", "image_url": DATA}):
        status, answer = doors.post("/models/LLaMA/generate", body)
        assert (status, answer["generated_text"]) == (200, f"{ASKED.format('What?')} + {FILE}")
        status, answer = doors.post("/models/plain/generate", body)
        assert (status, answer["error"].startswith(f"Input validation error: {TEXT_ONLY}")) == (422, True)
    status, answer = doors.post("/models/LLaMA/generate", {"inputs": f"What?![]({DATA})"})
    assert (status, answer["generated_text"]) == (200, f"What?<image> + {FILE}")
    assert doors.post("/models/LLaMA/generate", {"images": [URL]})[1]["generated_text"].endswith(URL)
    assert "not both" in doors.post("/models/LLaMA/generate", {"image": URL, "inputs": f"![]({URL})"})[1]["error"]


# OpenAI


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def chat(doors: Doors, *contents: Any, model: str = "LLaMA", **more: Any) -> tuple[int, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    status, answer = doors.post("/v1/chat/completions", {"model": model, "messages": messages, **more})
    return status, answer["choices"][0]["message"]["content"] if status == 200 else answer["error"]


def test_parts_of_a_chat(doors: Doors) -> None:
    turn = "<|im_start|>User: {}<end_of_utterance>\nAssistant:"
    assert chat(doors, [part("a"), image(DATA), part("b")]) == (200, f"{turn.format('a<image>b')} + {FILE}")
    bare = {"type": "image_url", "image_url": URL}
    two = [part("a"), bare, part("b"), image(DATA, detail="low"), part("c")]
    assert chat(doors, two) == (200, f"{turn.format('a<image>b<image>c')} + {URL} + {FILE}, low")
    status, text = chat(doors, [image(DATA)], "ja", "and", "ja", [image(URL), part("this?")])
    places = "User:<image><end_of_utterance>\nAssistant: ja<end_of_utterance>\nUser: and<end_of_utterance>\n"
    assert (status, text) == (
        200,
        f"<|im_start|>{places}Assistant: ja<end_of_utterance>\nUser:<image>this?<end_of_utterance>\nAssistant:"
        f" + {FILE} + {URL}",
    )
    assert chat(doors, "no image") == (200, turn.format("no image"))
    status, answer = doors.post("/chat_tokenize", {"messages": [{"role": "user", "content": two}]})
    assert (status, answer["templated_text"]) == (200, turn.format("a<image>b<image>c"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (image("ftp://a.example/x.png"), "invalid image content: ftp://a.example/x.png"),
        (image("data:image/png;base64,!AAA"), "base64 encoding is invalid: Invalid symbol 33, offset 0."),
        (image(URL, detail="very"), "messages[0].content[0]: 'detail' must be one of auto, low, high"),
        ({"type": "image_url"}, '`messages[0].content[0]` has no image; write {"type": "image_url"'),
        ({"type": "video_url", "video_url": {"url": URL}}, "`messages[0].content[0]` has the type 'video_url'; the"),
        ({"type": "input_audio", "input_audio": {}}, "`messages[0].content[0]` has the type 'input_audio'"),
        ({"type": 3}, "this model reads texts and images"),
        ("x", "this model reads texts and images"),
    ],
)
def test_parts_that_are_no_images(doors: Doors, given: Any, text: str) -> None:
    status, error = chat(doors, [given])
    assert (status, error["message"][: len(text)]) == (400, text)


def test_chats_with_a_model_that_reads_text_only(doors: Doors) -> None:
    status, error = chat(doors, [image(DATA), part("a")], model="plain")
    assert (status, error["message"].startswith(TEXT_ONLY)) == (400, True)
    assert chat(doors, f"![]({URL})", model="plain")[0] == 200


def test_responses(doors: Doors) -> None:
    def answer(content: Any, **more: Any) -> tuple[int, Any]:
        items = [{"role": "user", "content": content}, *more.pop("items", [])]
        status, found = doors.post("/v1/responses", {"model": "LLaMA", "input": items, **more})
        return status, found["output"][0]["content"][0]["text"] if status == 200 else found["error"]["message"]

    shown = {"type": "input_image", "image_url": DATA, "detail": "low"}
    turn = "User: a<image><end_of_utterance>\n"
    asked = {"type": "input_text", "text": "a"}
    assert answer([asked, shown]) == (200, f"<|im_start|>{turn}Assistant: + {FILE}, low")
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": URL}]}
    status, text = answer([asked, shown], items=[call, output])
    turn = f"User: Result of the function: <image><end_of_utterance>\nAssistant: + {FILE}, low + {URL}"
    assert (status, text[-len(turn) :]) == (200, turn)
    assert answer([{"type": "input_image", "file_id": "file-1"}])[0] == 400
    assert "stores none" in answer([{"type": "input_image", "file_id": "file-1"}])[1]
    assert answer([{"type": "input_image"}])[0] == 400
    assert answer([{"type": "input_file"}]) == (400, "`input[0].content[0]` must be of type input_text or input_image")


# Text Generation Inference


def generate(doors: Doors, inputs: str, path: str = "/generate") -> tuple[int, Any]:
    status, answer = doors.post(path, {"inputs": inputs, "parameters": {"max_new_tokens": 3}})
    return status, (answer[0] if isinstance(answer, list) else answer)


def test_images_in_inputs(doors: Doors) -> None:
    inputs = f"User:![]({DATA})and ![]({URL})What?\n"
    text = f"User:<image>and <image>What?\n + {FILE} + {URL}"
    assert generate(doors, inputs) == (200, {"generated_text": text})
    assert doors.backend.generators["LLaMA"].seen[-1].add_special_tokens
    status, answer = generate(doors, inputs, "/")
    assert (status, answer["generated_text"]) == (200, inputs + text), "clients cut off as much as they sent"
    status, stream = doors.post("/generate_stream", {"inputs": inputs})
    assert (status, json.loads(stream.strip().removeprefix("data:"))["generated_text"]) == (200, text)
    assert generate(doors, f"![a cat]({URL})") == (200, {"generated_text": f"![a cat]({URL})"})
    status, answer = doors.post("/vertex", {"instances": [{"inputs": inputs}]})
    assert (status, answer["predictions"]) == (200, [text])
    _, answer = doors.post("/invocations", {"inputs": inputs})
    assert answer[0]["generated_text"].endswith(text)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ("a ![](ftp://a.example/x) b", "invalid image content: ![](ftp://a.example/x)"),
        ("![]()", "invalid image content: ![]()"),
        ("![](data:image/png,AAAA)", "invalid image content: image/png,AAAA"),
        ("![](data:image/png;a=b;base64,AAAA)", "invalid image content: image/png;a=b;base64,AAAA"),
        ("![](data:image/png;base64,!AAA)", "base64 encoding is invalid: Invalid symbol 33, offset 0."),
        ("![](data:image/png;base64,AAAAA)", "base64 encoding is invalid: Invalid input length: 5"),
        ("![](data:image/png;base64,AAA)", "base64 encoding is invalid: Invalid padding"),
    ],
)
def test_tgis_own_words(doors: Doors, inputs: str, text: str) -> None:
    status, answer = generate(doors, inputs)
    assert (status, answer) == (422, {"error": f"Input validation error: {text}", "error_type": "validation"})


# Open Inference Protocol


def tensor(name: str, datatype: str, shape: list[int], data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def infer(doors: Doors, *inputs: dict[str, Any], model: str = "LLaMA") -> Any:
    status, answer = doors.post(f"/v2/models/{model}/infer", {"inputs": inputs})
    if status != 200:
        return status, answer["error"]
    return next(each["data"] for each in answer["outputs"] if each["name"] == "generated_text")


def test_tensors_with_images(doors: Doors) -> None:
    asked = ASKED.format("What?")
    text = tensor("inputs", "BYTES", [1], ["What?"])
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    array = f"{asked} + uint8 [2, 4, 3] 276"
    assert infer(doors, text, tensor("image", "BYTES", [1], [B64])) == [f"{asked} + {FILE}"]
    assert infer(doors, text, tensor("image", "BYTES", [1], [DATA])) == [f"{asked} + {FILE}"]
    assert infer(doors, text, tensor("image", "BYTES", [1], [URL])) == [f"{asked} + {URL}"]
    assert infer(doors, text, tensor("image", "UINT8", [2, 4, 3], pixels.tolist())) == [array]
    assert infer(doors, text, tensor("image", "UINT8", [1, 2, 4, 3], [pixels.tolist()])) == [array]
    several = ASKED.format("<image>What?")
    assert infer(doors, text, tensor("images", "BYTES", [2], [B64, URL])) == [f"{several} + {FILE} + {URL}"]
    default = ASKED.format("Describe the image.")
    assert infer(doors, tensor("image", "BYTES", [2], [B64, URL])) == [f"{default} + {FILE}", f"{default} + {URL}"]
    both = tensor("inputs", "BYTES", [2], ["a", "b"])
    found = infer(doors, both, tensor("image", "BYTES", [2], [B64, URL]))
    assert found == [f"{ASKED.format('a')} + {FILE}", f"{ASKED.format('b')} + {URL}"]
    found = infer(doors, both, tensor("images", "UINT8", [2, 2, 2, 4, 3], [[pixels.tolist()] * 2] * 2))
    assert found[1] == f"{ASKED.format('<image>b')} + uint8 [2, 4, 3] 276 + uint8 [2, 4, 3] 276"
    assert infer(doors, text) == ["What?"]
    assert infer(doors, both, tensor("image", "BYTES", [3], [URL] * 3))[0] == 400
    assert "uint8" in infer(doors, text, tensor("image", "FP32", [2, 4, 3], pixels.tolist()))[1]
    status, error = infer(doors, text, tensor("image", "BYTES", [1], [B64]), model="plain")
    assert (status, error.startswith(TEXT_ONLY)) == (400, True)
    body = {"text_input": "What?", "image": {"b64": B64}, "parameters": {"max_tokens": 4}}
    assert doors.post("/v2/models/LLaMA/generate", body)[1]["text_output"] == f"{ASKED.format('What?')} + {FILE}"
    stream = doors.post("/v2/models/LLaMA/generate_stream", {"image_url": {"url": URL, "detail": "low"}})[1]
    assert f"{default} + {URL}, low" in stream.replace("\\n", "\n")


def test_metadata_lists_the_image(doors: Doors) -> None:
    def inputs(model: str) -> list[str]:
        host, _, port = doors.address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("GET", f"/v2/models/{model}")
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return [each["name"] for each in answer["inputs"]]

    assert inputs("LLaMA") == ["inputs", "parameters", "image"]
    assert inputs("plain") == ["inputs", "parameters"]


# gRPC


@pytest.fixture(scope="module")
def rpc() -> Iterator[str]:
    from inflight.frontends.grpc import grpc_app
    from tests.grpc_server import serving

    backend = SeeingBackend(Seeing("LLaMA"), Seeing("plain", sees=False))
    with serving(grpc_app(backend, max_message_bytes=100 << 20), "grpcio") as where:
        yield where


def test_calls_over_grpc(rpc: str) -> None:
    from inflight.client import Client

    asked, default = ASKED.format("What?"), ASKED.format("Describe the image.")
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    forms: list[tuple[dict[str, Any], str]] = [
        ({"inputs": "What?", "image": PNG}, f"{asked} + {FILE}"),
        ({"inputs": "What?", "image": B64}, f"{asked} + {FILE}"),
        ({"inputs": "What?", "image": URL, "parameters": '{"detail": "low"}'}, f"{asked} + {URL}, low"),
        ({"inputs": "What?", "image": pixels}, f"{asked} + uint8 [2, 4, 3] 276"),
        ({"images": np.stack([pixels, pixels])}, f"{ASKED.format('<image>Describe the image.')} + uint8 [2, 4, 3] 276"),
        ({"image": PNG}, f"{default} + {FILE}"),
        ({"inputs": "What?"}, "What?"),
    ]
    with Client(rpc, "LLaMA", "generate") as client:
        for instance, text in forms:
            (found,) = client.infer([instance])
            assert found["generated_text"].startswith(text), found
        good, bad = client.infer([{"image": PNG}, {"image": pixels.astype(np.float32)}])
        assert good["generated_text"] == f"{default} + {FILE}"
        assert "pixels must be uint8" in bad["error"]
    with Client(rpc, "plain", "generate") as client:
        for instance, error in (({"inputs": "What?", "image": PNG}, TEXT_ONLY), ({}, "Cannot find input inputs")):
            refusal: Any = client.infer([instance])
            assert refusal["error"].startswith(error)


def test_tensors_over_grpc(rpc: str) -> None:
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(rpc) as client:
        text, image = triton.InferInput("inputs", [1], "BYTES"), triton.InferInput("image", [1], "BYTES")
        text.set_data_from_numpy(np.array(["What?"], np.object_))
        image.set_data_from_numpy(np.array([PNG], np.object_))
        (found,) = client.infer("LLaMA", [text, image]).as_numpy("generated_text")
        assert found.decode() == f"{ASKED.format('What?')} + {FILE}"
        assert [each.name for each in client.get_model_metadata("LLaMA").inputs] == ["inputs", "parameters", "image"]
        with pytest.raises(triton.InferenceServerException, match="reads text only"):
            client.infer("plain", [text, image])


# Ranks


def test_a_rank_refuses_images_of_a_model_that_reads_them() -> None:
    from inflight.errors import InvalidRequest
    from inflight.proto import generate_pb2 as pb
    from inflight.tgi_shard.service import Service

    asked = pb.Request(id=1, inputs="a", add_special_tokens=True)
    asked.input_chunks.chunks.add(text="a")
    asked.input_chunks.chunks.add().image.data = PNG
    words: Any = type("Words", (), {"encode": lambda self, text, special: [len(text)]})()
    runner: Any = SimpleNamespace(offer=SimpleNamespace(states=StateSize(), model=SimpleNamespace(drafts=False)))
    assert Service(runner, words, 0, [])._asked(asked).tokens == [1], "TGI's text models drop them"
    with pytest.raises(InvalidRequest, match=r"this shard reads .*text only"):
        Service(runner, words, 0, [], sees=True)._asked(asked)


def test_what_a_server_tells_of_its_models(doors: Doors) -> None:
    host, _, port = doors.address.rpartition(":")
    found = []
    for path in ("/", "/info"):
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("GET", path)
        found.append(json.loads(connection.getresponse().read()))
        connection.close()
    assert [each["reads_images"] for each in found[0]["servables"]] == [True, False, True]
    assert found[1]["model_pipeline_tag"] == "image-text-to-text"
