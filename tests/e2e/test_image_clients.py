"""Real clients send images: a server of the pocket vision model, of a servable that feeds it, and of a text model."""

from __future__ import annotations

import base64
import http.server
import io
import json
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.e2e.compatibility import tried_here
from tests.e2e.running import Served, request, serve, write_servable

ROOT = Path(__file__).resolve().parents[2]
POCKET, SEES = ROOT / "models" / "pocket", ROOT / "models" / "pocket_vision"
IMAGES = "Images"
"""The part of docs/compatibility.md that the tests of this file make."""
TEXT_ONLY = "model 'pocket' reads text only; it has no image input"
JSON = {"Content-Type": "application/json"}

SERVABLE = f"""
import numpy as np
from inflight.servable import add_stage, declare_generator, declare_model, register_method

sees = declare_generator({str(SEES)!r}, kv_cache_memory=16 << 20, max_total_tokens=512, threads=1, vision_threads=1)

def left_half(pixels):
    return pixels[:, :, : pixels.shape[2] // 2]

crop = declare_model(left_half)

def ask(picture):
    return "", '{{"max_new_tokens": 30}}'

@register_method(output_names=("text",))
def describe(picture):
    prompt, _ = add_stage(ask, picture, outputs_count=2)
    return add_stage(sees, prompt, picture, outputs_count=1)

@register_method(output_names=("text",))
def left(picture):
    prompt, parameters = add_stage(ask, picture, outputs_count=2)
    part = add_stage(crop, picture, outputs_count=1)
    return add_stage(sees, prompt, part, parameters, outputs_count=1)

def both(pictures):
    half = pictures.shape[1] // 2
    parts = [pictures[:, :half], pictures[:, half:]]
    one = sees.call("", parts[0], '{{"max_new_tokens": 30}}')
    several = sees.call([["", part, '{{"max_new_tokens": 30}}'] for part in parts])
    try:
        sees.call("What is it? <image>", '{{"max_new_tokens": 30}}')
    except RuntimeError as error:
        return one, several[0][0], several[1][0], str(error)

@register_method(output_names=("one", "left", "right", "error"))
def calls(pictures):
    return add_stage(both, pictures, outputs_count=4)
"""


def drawn(shape: str, colour: str) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)((14, 14, 50, 50), fill=colour)
    return picture


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


PICTURES = [drawn("circle", "red"), drawn("square", "blue")]
FILES = [png(picture) for picture in PICTURES]
DATA = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in FILES]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("images")
    folder = write_servable(root, "seen", SERVABLE)
    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "512", "--media-domains", "127.0.0.1"]
    with serve(root, str(SEES), str(POCKET), str(folder), *options) as one:
        yield one


def post(served: Served, path: str, body: Any) -> tuple[int, Any]:
    status, data = request(served.http, "POST", path, json.dumps(body).encode(), JSON)
    return status, json.loads(data)


@pytest.fixture(scope="module")
def wanted(served: Served) -> list[str]:
    """What the model says about each picture, by MindSpore Serving's route."""
    images = [{"image": {"b64": data.partition(",")[2]}} for data in DATA]
    answer = [post(served, "/model/pocket_vision:generate", {"instances": one})[1] for one in images]
    texts = [each["instances"][0]["generated_text"] for each in answer]
    assert texts[0] != texts[1], "different pictures, different answers"
    assert all(text.strip().endswith(".") for text in texts)
    return texts


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A server of pictures: `/0.png`, `/1.png`."""

    class Pictures(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = FILES[int(self.path[1])]
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@tried_here(
    IMAGES, "curl", "`/model/NAME:generated_stream` with `{instances: {image: {b64}}}`, no text, no content type"
)
def test_the_line_that_the_server_prints(served: Served, wanted: list[str]) -> None:
    """The mission's own call: curl, its content type, one object, no text."""
    lines = [
        line for line in served.stdout.read_text().splitlines() if "generated_stream" in line and '"image"' in line
    ]
    command = shlex.split(lines[0][lines[0].index("curl") :])
    printed = subprocess.run([*command, "-s"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "generated_text" in printed
    address = f"http://{served.http}/model/pocket_vision:generated_stream"
    for data, text in zip(DATA, wanted):
        line = f"""curl -s -X POST -d '{{"instances":{{"image":{{"b64":"{data.partition(",")[2]}"}}}}}}' {address}"""
        out = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60, check=True).stdout
        frames = [json.loads(frame.removeprefix("data: "))["instances"][0] for frame in out.split("\n\n") if frame]
        assert len(frames) > 2
        assert "".join(frame["text"] for frame in frames) == frames[-1]["generated_text"] == text


def parts(address: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "Describe the image."}]


@tried_here(IMAGES, "openai", "`responses.create` with `input_image`")
@tried_here(IMAGES, "openai", "`chat.completions.create` with `image_url`, `data:` and `http:`, plain and streamed")
def test_openai(served: Served, wanted: list[str], web: str) -> None:
    import openai

    with openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0) as client:

        def chat(address: str, model: str = "pocket_vision", **more: Any) -> Any:
            messages: Any = [{"role": "user", "content": parts(address)}]
            return client.chat.completions.create(model=model, messages=messages, temperature=0, **more)

        for index, text in enumerate(wanted):
            answer = chat(DATA[index])
            assert answer.choices[0].message.content == text
            assert answer.usage.prompt_tokens > 16, "the image's tokens are counted"
            assert chat(f"{web}/{index}.png").choices[0].message.content == text
            chunks = [chunk.choices[0].delta.content or "" for chunk in chat(DATA[index], stream=True)]
            assert "".join(chunks) == text
            items: Any = [{"role": "user", "content": [
                {"type": "input_image", "image_url": DATA[index], "detail": "auto"},
                {"type": "input_text", "text": "Describe the image."},
            ]}]  # fmt: skip
            response = client.responses.create(model="pocket_vision", input=items, temperature=0)
            assert response.output_text == text
        cached = chat(DATA[0]).usage.prompt_tokens_details.cached_tokens
        assert cached > 0, "an equal image is not computed again"
        with pytest.raises(openai.BadRequestError, match="reads text only"):
            chat(DATA[0], "pocket")
        with pytest.raises(openai.BadRequestError, match="invalid image: "):
            chat("data:image/png;base64,aGVsbG8=")
        many: Any = [{"role": "user", "content": parts(DATA[0])[:1] * 9}]
        with pytest.raises(openai.BadRequestError, match="has 9 images; at most 8 are read"):
            client.chat.completions.create(model="pocket_vision", messages=many)
        file: Any = [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]
        with pytest.raises(openai.BadRequestError, match="stores none"):
            client.responses.create(model="pocket_vision", input=file)


@tried_here(IMAGES, "huggingface_hub", "`text_generation` with `![](data:...)`, plain, streamed, return_full_text")
@tried_here(IMAGES, "huggingface_hub", "`chat_completion` with `image_url`")
def test_huggingface_hub(served: Served, wanted: list[str]) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=f"http://{served.http}")
    for data, text in zip(DATA, wanted):
        messages: Any = [{"role": "user", "content": parts(data)}]
        assert client.chat_completion(messages, model="pocket_vision", temperature=0).choices[0].message.content == text
    client = InferenceClient(f"http://{served.http}")
    asked = "<|im_start|>User:![]({})Describe the image.<end_of_utterance>\nAssistant:"
    for data, text in zip(DATA, wanted):
        prompt = asked.format(data)
        answer = client.text_generation(prompt, max_new_tokens=40, do_sample=False, return_full_text=False)
        assert answer.strip() == text.strip()
        stream = client.text_generation(prompt, max_new_tokens=40, do_sample=False, stream=True)
        assert "".join(stream).strip().startswith(text.strip())
        whole = client.text_generation(prompt, max_new_tokens=40, do_sample=False, return_full_text=True)
        assert whole.startswith(prompt), "as in TGI"


def test_errors_of_tgi(served: Served) -> None:
    for image, text in (
        ("data:image/png;base64,!", "base64 encoding is invalid: Invalid symbol 33, offset 0."),
        ("data:image/png,x", "invalid image content: image/png,x"),
        ("ftp://a/b", "invalid image content: ![](ftp://a/b)"),
        ("http://169.254.169.254/x", "Could not fetch image: "),
        ("file:///etc/passwd", "invalid image content: "),
        ("data:image/png;base64,aGVsbG8=", "invalid image: "),
    ):
        status, answer = post(served, "/generate", {"inputs": f"![]({image})x"})
        assert (status, answer["error_type"]) == (422, "validation")
        assert answer["error"].startswith(f"Input validation error: {text}"), answer


@tried_here(IMAGES, "tritonclient", "`http` and `grpc`: `infer` with BYTES (files) and UINT8 (pixels)")
def test_tritonclient(served: Served, wanted: list[str]) -> None:
    import tritonclient.grpc as over_grpc
    import tritonclient.http as over_http

    for module, address in ((over_http, served.http), (over_grpc, served.grpc)):
        with module.InferenceServerClient(address) as client:

            def infer(model: str, array: Any, kind: str, client: Any = client, module: Any = module) -> list[str]:
                image = module.InferInput("image", list(array.shape), kind)
                image.set_data_from_numpy(array)
                return [text.decode() for text in client.infer(model, [image]).as_numpy("generated_text")]

            assert infer("pocket_vision", np.array(FILES, np.object_), "BYTES") == wanted
            assert infer("pocket_vision", np.stack([np.asarray(each) for each in PICTURES]), "UINT8") == wanted
            assert infer("pocket_vision", np.asarray(PICTURES[1]), "UINT8") == [wanted[1]]
            with pytest.raises(Exception, match="reads text only"):
                infer("pocket", np.array(FILES[:1], np.object_), "BYTES")


@tried_here(IMAGES, "inflight.client", "`MindsporeInferenceClient.generate`, `generate_stream` with `images`")
@tried_here(IMAGES, "inflight.client", "`Client.infer` with `image`: a file, an array")
def test_our_own_clients(served: Served, wanted: list[str]) -> None:
    from inflight.client import Client, MindsporeInferenceClient

    with Client(served.grpc, "pocket_vision", "generate") as client:
        assert [one["generated_text"] for one in client.infer([{"image": file} for file in FILES])] == wanted
        (found,) = client.infer([{"image": np.asarray(PICTURES[0])}])
        assert found["generated_text"] == wanted[0]
    with Client(served.grpc, "pocket", "generate") as client:
        refusal: Any = client.infer([{"image": FILES[0]}])
        assert refusal["error"].startswith(TEXT_ONLY)
    script = MindsporeInferenceClient("pocket_vision", f"http://{served.http}")
    for file, text in zip(FILES, wanted):
        assert script.generate("", images=[file], do_sample=False).generated_text == text
        words = [token.token.text for token in script.generate_stream("", images=[file], do_sample=False)]
        assert len(words) > 2


def test_the_metrics_of_images_are_those_of_the_docs(served: Served, wanted: list[str]) -> None:
    table = re.findall(r"^\| `(inflight_image\w+)` \|", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE)
    text = request(served.http, "GET", "/metrics")[1].decode()
    assert set(re.findall(r"^# TYPE (inflight_image\w+)", text, re.MULTILINE)) == set(table)


def test_arrays_of_a_stage(served: Served, wanted: list[str]) -> None:
    """What another stage computed goes in as it is: two pictures side by side, of which a model cuts the left one."""
    from inflight.client import Client

    side_by_side = np.concatenate([np.asarray(PICTURES[1]), np.asarray(PICTURES[0])], axis=1)
    with Client(served.grpc, "seen", "describe") as client:
        pictures = [FILES[0], np.asarray(PICTURES[1]), DATA[0]]
        assert [one["text"] for one in client.infer([{"picture": each} for each in pictures])] == [*wanted, wanted[0]]
    with Client(served.grpc, "seen", "left") as client:
        assert [one["text"] for one in client.infer([{"picture": side_by_side}])] == [wanted[1]]
    with Client(served.grpc, "seen", "calls") as client:
        (found,) = client.infer([{"pictures": side_by_side}])
        assert (found["one"], found["left"], found["right"]) == (wanted[1], wanted[1], wanted[0])
        assert found["error"].startswith("Model(pocket_vision).call() failed: the prompt has 1 places for images")


def test_a_script(wanted: list[str], tmp_path: Path) -> None:
    from inflight.llm import LLM

    (tmp_path / "a.png").write_bytes(FILES[0])
    with LLM(SEES, kv_cache_memory=16 << 20, threads=1, max_total_tokens=512) as llm:
        forms: list[Any] = [FILES[0], PICTURES[0], np.asarray(PICTURES[0]), str(tmp_path / "a.png"), DATA[0]]
        forms.append(PICTURES[0].convert("RGBA"))
        asked: list[Any] = [{"prompt": "Describe the image.", "images": [form]} for form in forms]
        found = llm.generate([*asked, {"images": PICTURES[1]}], max_new_tokens=40)
        assert [one.text for one in found] == [wanted[0]] * len(forms) + [wanted[1]]
        content = [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "Describe the image."}]
        assert llm.chat([{"role": "user", "content": content}], max_new_tokens=40).text == wanted[1]
        assert llm.chat([{"role": "user", "content": parts(DATA[0])}], max_new_tokens=40).text == wanted[0]
