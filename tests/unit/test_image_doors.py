"""Images at the doors: every form of every protocol, what a model that reads text only says, limits, errors."""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from inflight.config import RestConfig
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
    assert "has 1 places of images (<image>) and the request 2 images" in refused(doors, {**two, "text": "a<image>b"})
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
        ({"image": None}, "instance 0: 'image' has no image; write"),
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
        (
            {"images": [URL] * 9},
            "the request has 9 images and the model takes 8 in one; send fewer, or raise --",
        ),
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
