"""Language models in the servable world: every classic door, streaming, methods that mix, MindSpore Serving 2.1."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.e2e.curls import answered, curls
from tests.e2e.running import (
    Background,
    Served,
    connect,
    crowd,
    eventually,
    metrics,
    request,
    serve,
    workers,
    write_servable,
)

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
JSON = {"Content-Type": "application/json"}
PROMPT = "Once upon a time, there was a young cat called Mia."

MIXED = f"""
import numpy as np
from inflight.servable import add_stage, declare_generator, declare_model, register_method

pocket = declare_generator({str(POCKET)!r}, kv_cache_memory=32 << 20, max_total_tokens=512)

def double(x):
    return x * np.float32(2)

model = declare_model(double)

def measure(name):
    return np.array([len(name)], np.float32)

def ask(name, size):
    animal = "cat" if size[0] > 6 else "dog"
    prompt = f"<|begin|><|user|>Tell me a story about a {{animal}} called {{name}}.<|end|><|assistant|>"
    return prompt, '{{"max_new_tokens": 60, "add_special_tokens": false, "do_sample": true}}'

def finish(name, size, story):
    return f"{{name}} {{size[0]:g}}", story.upper()

@register_method(output_names=("title", "story"))
def tell(name):
    size = add_stage(measure, name, outputs_count=1)
    size = add_stage(model, size, outputs_count=1)
    prompt, parameters = add_stage(ask, name, size, outputs_count=2)
    story = add_stage(pocket, prompt, parameters, outputs_count=1)
    return add_stage(finish, name, size, story, outputs_count=2)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The pocket model under its own name, and a servable that mixes."""
    root = tmp_path_factory.mktemp("mixed")
    folder = write_servable(root, "mixed", MIXED)
    options = ["--kv-cache-memory", "32m", "--max-total-tokens", "512"]
    with serve(root, str(POCKET), str(folder), *options) as one:
        yield one


@pytest.mark.parametrize("command", curls("generation"))
def test_what_the_page_shows(served: Served, command: str) -> None:
    assert len(answered(served, command)) > 20


def post(address: str, path: str, body: Any, headers: Mapping[str, str] = {}) -> tuple[int, Any]:
    status, data = request(address, "POST", path, json.dumps(body).encode(), {**JSON, **headers})
    try:
        return status, json.loads(data)
    except ValueError:
        return status, data.decode()


def events(address: str, path: str, body: Any, headers: Mapping[str, str] = {}) -> list[Any]:
    status, data = request(address, "POST", path, json.dumps(body).encode(), {**JSON, **headers})
    assert status == 200, data
    frames = data.decode().split("\n\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


@pytest.fixture(scope="module")
def wanted(served: Served) -> str:
    """What the model goes on with, by TGI's route."""
    _, answer = post(served.http, "/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}})
    return str(answer["generated_text"])


PARAMETERS = '{"max_new_tokens": 20}'

# The model alone


def test_predict_over_grpc(served: Served, wanted: str) -> None:
    from inflight.client import Client

    with Client(served.grpc, "pocket", "generate") as client:
        one, other = client.infer([{"inputs": PROMPT, "parameters": PARAMETERS}, {"inputs": "Once"}])
        assert one["generated_text"] == wanted
        assert one["finish_reason"] == "length"
        assert one["generated_tokens"] == 20
        assert other["generated_text"]
        wrong = client.infer([{"inputs": PROMPT, "parameters": '{"top_p": 7}'}])
    assert "top_p" in str(wrong)


def test_open_inference_rest(served: Served, wanted: str) -> None:
    body = {
        "inputs": [
            {"name": "inputs", "datatype": "BYTES", "shape": [1], "data": [PROMPT]},
            {"name": "parameters", "datatype": "BYTES", "shape": [1], "data": [PARAMETERS]},
        ]
    }
    _, answer = post(served.http, "/v2/models/pocket/infer", body)
    outputs = {each["name"]: each["data"][0] for each in answer["outputs"]}
    assert outputs == {"generated_text": wanted, "finish_reason": "length", "generated_tokens": 20}
    _, answer = post(served.http, "/v2/models/pocket/versions/1/infer", {"inputs": body["inputs"][:1]})
    assert answer["outputs"][0]["data"][0]
    about = request(served.http, "GET", "/v2/models/pocket")[1]
    assert {each["name"] for each in json.loads(about)["inputs"]} == {"inputs", "parameters"}


def test_generate_extension(served: Served, wanted: str) -> None:
    body = {"id": "7", "text_input": PROMPT, "parameters": {"max_tokens": 20, "stream": False}}
    status, answer = post(served.http, "/v2/models/pocket/generate", body)
    assert status == 200
    assert answer["text_output"] == wanted
    assert answer["id"] == "7"
    assert answer["details"] == {"finish_reason": "length", "generated_tokens": 20}
    frames = events(served.http, "/v2/models/pocket/versions/1/generate_stream", body)
    assert "".join(frame["text_output"] for frame in frames) == wanted
    assert len(frames) > 5
    assert frames[-1]["details"]["generated_tokens"] == 20
    for wrong in (
        {},
        {"text_input": 3},
        [],
        {"text_input": "a", "parameters": {"x": 1}},
        {"text_input": "a", "parameters": 3},
    ):
        status, answer = post(served.http, "/v2/models/pocket/generate_stream", wrong)
        assert status == 400
        assert answer["error"]
    assert post(served.http, "/v2/models/nobody/generate", body)[0] == 404


def test_tritonclient(served: Served, wanted: str) -> None:
    import tritonclient.grpc as triton
    import tritonclient.http as triton_http

    def tensors(module: Any) -> list[Any]:
        made = []
        for name, text in (("inputs", PROMPT), ("parameters", PARAMETERS)):
            tensor = module.InferInput(name, [1], "BYTES")
            tensor.set_data_from_numpy(np.array([text.encode()], np.object_))
            made.append(tensor)
        return made

    with contextlib.closing(triton_http.InferenceServerClient(served.http)) as plain:
        assert plain.is_model_ready("pocket")
        found = plain.infer("pocket", tensors(triton_http))
        assert found.as_numpy("generated_text")[0].decode() == wanted
    with contextlib.closing(triton.InferenceServerClient(served.grpc)) as client:
        found = client.infer("pocket", tensors(triton))
        assert found.as_numpy("generated_text")[0].decode() == wanted
        results: queue.Queue[Any] = queue.Queue()
        client.start_stream(callback=lambda result, error: results.put(error or result))
        client.async_stream_infer("pocket", tensors(triton), parameters={"stream": True}, request_id="9")
        parts: list[str] = []
        while True:
            result = results.get(timeout=30)
            response = result.get_response()
            assert response.id == "9"
            if response.parameters["triton_final_response"].bool_param:
                break
            parts.append(result.as_numpy("text_output")[0].decode())
        assert len(parts) > 5
        assert "".join(parts) == wanted == result.as_numpy("generated_text")[0].decode()
        client.async_stream_infer("pocket", tensors(triton))
        assert results.get(timeout=30).as_numpy("generated_text")[0].decode() == wanted
        client.stop_stream()


# Methods that mix Python, a classic model and a language model


def mixed(address: str, name: str) -> Any:
    _, answer = post(address, "/model/mixed:tell", {"instances": [{"name": name}]})
    return answer["instances"][0]


def test_a_method_that_mixes_streams_through_every_door(served: Served) -> None:
    import tritonclient.grpc as triton

    whole = mixed(served.http, "Mia")
    assert whole["title"] == "Mia 6"
    accept = {"Accept": "text/event-stream"}
    body = {"instances": [{"name": "Mia"}, {"name": "Bruno"}]}
    frames = events(served.http, "/model/mixed:tell", body, accept)
    *parts, last = frames
    for index, title in enumerate(("Mia 6", "Bruno 10")):
        text = "".join(one["text"] for frame in parts for one in frame["instances"] if one["index"] == index)
        assert last["instances"][index]["title"] == title
        assert last["instances"][index]["story"] == text.upper()
    frames = events(served.http, "/v2/models/mixed.tell/generate_stream", {"name": "Leo"})
    assert "".join(frame.get("text_output", "") for frame in frames).upper() == frames[-1]["story"]
    status, answer = post(served.http, "/v2/models/mixed.tell/generate", {"name": "Leo"})
    assert (status, answer["title"]) == (200, "Leo 6")
    with contextlib.closing(triton.InferenceServerClient(served.grpc)) as client:
        tensor = triton.InferInput("name", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"Ada"], np.object_))
        results: queue.Queue[Any] = queue.Queue()
        client.start_stream(callback=lambda result, error: results.put(error or result))
        client.async_stream_infer("mixed.tell", [tensor], parameters={"stream": True})
        text = ""
        while True:
            result = results.get(timeout=30)
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
            text += result.as_numpy("text_output")[0].decode()
        assert result.as_numpy("story")[0].decode() == text.upper()
        client.stop_stream()
    status, answer = post(served.http, "/model/mixed:tell", {"instances": [{"x": 1}]}, accept)
    assert "Cannot find input name" in answer["error_msg"]


def processes(served: Served, servable: str, part: str) -> list[int]:
    """Those of a worker (`device0`) or rank (`rank0`) of a servable."""
    found: list[int] = []
    for one in workers(served.pid):
        with contextlib.suppress(psutil.Error):
            told = psutil.Process(one).cmdline()
            if f"--servable_name={servable}" in told and f"--device_id={part}" in told:
                found.append(one)
    return found


def test_who_waits_for_a_model_is_not_to_blame_for_kills(served: Served) -> None:
    """However often its worker is killed meanwhile; and what nobody waits for any more is not generated."""
    (rank,) = processes(served, "mixed", "rank0")

    def grew(name: str, labels: tuple[str, ...] = ()) -> float:
        return metrics(served.http).get(name, {}).get(labels, 0.0) - before.get(name, {}).get(labels, 0.0)

    before = metrics(served.http)
    os.kill(rank, signal.SIGSTOP)
    try:
        waiting = Background(mixed, served.http, "Mia")
        for kills in range(6):  # so many are proof against what a worker computes
            eventually(lambda: grew("tgi_request_max_new_tokens_count") == kills + 1)  # noqa: B023
            for worker in processes(served, "mixed", "device0"):
                os.kill(worker, signal.SIGKILL)
        eventually(lambda: grew("tgi_request_max_new_tokens_count") == 7)
    finally:
        os.kill(rank, signal.SIGCONT)
    answer = waiting.result()
    assert answer["title"] == "Mia 6"
    assert answer["story"]
    assert grew("tgi_request_failure", ("dropped",)) == 6
    assert grew("tgi_request_success") == 1


def test_no_stream_is_lost_when_a_worker_dies(served: Served) -> None:
    """The Python worker is killed in the middle of the language model's stage: the text goes on where it was."""
    body = json.dumps({"instances": [{"name": "Mia"}]})
    (worker,) = processes(served, "mixed", "device0")
    with contextlib.closing(connect(served.http, 60)) as connection:
        connection.request("POST", "/model/mixed:tell", body, {**JSON, "Accept": "text/event-stream"})
        response = connection.getresponse()
        text, last, seen = "", None, 0
        for line in response:
            if not line.startswith(b"data: "):
                continue
            (part,) = json.loads(line[6:])["instances"]
            if "text" not in part:
                last = part
                continue
            text += part["text"]
            seen += 1
            if seen == 5:
                os.kill(worker, signal.SIGKILL)
    assert last is not None
    assert last["story"] == text.upper()


def test_a_client_that_leaves_ends_the_generation(served: Served) -> None:
    body = json.dumps({"instances": [{"name": "Mia"}] * 8})
    connections = []
    for _ in range(10):
        connection = connect(served.http, 60)
        connection.request("POST", "/model/mixed:tell", body, {**JSON, "Accept": "text/event-stream"})
        connections.append(connection)
    time.sleep(0.3)
    for connection in connections:
        connection.close()

    def calm() -> bool:
        page = request(served.http, "GET", "/metrics")[1].decode()
        lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line and line[0] != "#")
        return float(lines["tgi_batch_current_size"]) == float(lines["tgi_queue_size"]) == 0

    eventually(calm)
    assert crowd(lambda number: mixed(served.http, "Leo")["title"], 4) == ["Leo 6"] * 4


# MindSpore Serving 2.1


def test_mindspore_llm_client(served: Served) -> None:
    from mindspore_serving.client import MindsporeInferenceClient

    client = MindsporeInferenceClient("pocket", served.http)
    greedy: Any = {"do_sample": False, "max_new_tokens": 20}
    answer = client.generate(PROMPT, **greedy, top_n_tokens=2)
    _, plain = post(served.http, "/generate", {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}})
    assert answer.generated_text == plain["generated_text"]
    assert (answer.finish_reason, answer.generated_tokens) == ("length", 20)
    assert len(answer.tokens) == len(answer.top_tokens) == 20
    stream = list(client.generate_stream(PROMPT, **greedy))
    assert [one.token.id for one in stream] == [token.id for token in answer.tokens]
    assert stream[-1].generated_text == answer.generated_text
    assert stream[-1].finish_reason == "length"
    assert all(one.generated_text is None for one in stream[:-1])
    other = list(MindsporeInferenceClient("pocket", served.http).generate_stream(PROMPT, **greedy, return_protocol="x"))
    assert other == stream
    seeded = [client.generate("Once", seed=5, max_new_tokens=12).generated_text for _ in range(2)]
    assert seeded[0] == seeded[1]
    odd = client.generate("Once", top_k=-4, top_p=7.0, temperature=-1, max_new_tokens=5)
    assert odd.generated_tokens <= 5
    long = client.generate("Once", max_new_tokens=100_000)
    assert long.finish_reason in ("eos", "length")
    with pytest.raises(RuntimeError, match="max_new_tokens"):
        client.generate("Once", max_new_tokens=0)
    with pytest.raises(RuntimeError, match="does not exist"):
        MindsporeInferenceClient("llama2", served.http).generate("Once")


def test_mindspore_llm_routes(served: Served) -> None:
    body = {"inputs": "Once", "parameters": {"do_sample": False, "max_new_tokens": 4}}
    _, plain = post(served.http, "/models/pocket", body)
    assert set(plain) == {
        "generated_text",
        "finish_reason",
        "generated_tokens",
        "prefill",
        "seed",
        "tokens",
        "top_tokens",
        "details",
    }
    frames = events(served.http, "/models/pocket", {**body, "stream": True})
    assert all((frame["event"], frame["retry"]) == ("message", 30000) for frame in frames)
    assert frames[-1]["data"][0]["generated_text"] == plain["generated_text"]
    for name in ("get_bs", "get_request_numbers", "get_serverd_model_info"):
        status, data = request(served.http, "GET", f"/serving/{name}")
        assert status == 200
        assert "data" in json.loads(data.decode().removeprefix("data: "))
    assert post(served.http, "/models/pocket/what", body)[0] == 404


# The first call that anybody wrote down for this server


def curl(served: Served, path: str, data: str, *options: str) -> tuple[int, str]:
    """As it stands in a shell: curl says that the body is a form. Status and body."""
    command = ["curl", "-sS", "-X", "POST", *options, "-d", data, "-w", "\n%{http_code}", f"http://{served.http}{path}"]
    body, _, status = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.rpartition(
        "\n"
    )
    return int(status), body


@pytest.mark.parametrize("options", [(), ("-H", "Content-Type: text/plain"), ("-H", "Content-Type:")])
def test_curl_streams_from_one_object(served: Served, options: tuple[str, ...]) -> None:
    status, body = curl(
        served, "/model/pocket:generated_stream", '{"instances": {"prompt": "Once", "max_new_tokens": 5}}', *options
    )
    frames = [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n") if line]
    assert status == 200
    assert len(frames) > 1
    text = frames[-1]["instances"][0]["generated_text"]
    assert "".join(frame["instances"][0]["text"] for frame in frames) == text
    for instances in ('{"inputs": "Once", "max_new_tokens": 5}', '[{"text": "Once", "max_new_tokens": 5}]'):
        _, body = curl(served, "/model/pocket:generate", f'{{"instances": {instances}}}', *options)
        assert json.loads(body)["instances"][0]["generated_text"] == text
    assert json.loads(curl(served, "/model/pocket:generate", '{"instances": "Once"}', *options)[1])["instances"]
    assert curl(served, "/models/pocket/generate", '{"inputs": "Once", "parameters": {"max_new_tokens": 3}}')[0] == 200


def test_curl_with_an_image_is_told_about_the_image(served: Served) -> None:
    image = '{"image": {"b64": "iVBORw0KGgo="}}'
    for path in ("/model/pocket:generated_stream", "/model/pocket:generate", "/model/pocket/version/1:generate"):
        for instances in (image, f"[{image}]", image.replace("{", '{"prompt": "What is it?", ', 1)):
            status, body = curl(served, path, f'{{"instances": {instances}}}')
            assert status == 200, "MindSpore Serving's manner"
            assert "model 'pocket' reads text only; it has no image input" in json.loads(body)["error_msg"]
    photo = Path(served.cwd, "photo.json")
    photo.write_text('{"instances": {"image": {"b64": "%s"}}}' % ("A" * (3 << 20)))
    status, body = curl(served, "/model/pocket:generated_stream", f"@{photo}")
    assert (status, "reads text only" in body) == (200, True), "not its size"
    photo.write_text('{"instances": {"inputs": "%s"}}' % ("A" * (3 << 20)))
    assert "2000000 bytes" in curl(served, "/model/pocket:generate", f"@{photo}")[1]
    body = '{"text_input": "What is it?", "image": {"b64": "iVBORw0KGgo="}}'
    status, body = curl(served, "/v2/models/pocket/generate", body)
    assert status == 400
    assert "reads text only" in json.loads(body)["error"]


def test_curl_to_a_classic_method(served: Served) -> None:
    for instances in ('{"name": "Mia"}', '[{"name": "Mia"}]'):
        status, body = curl(served, "/model/mixed:tell", f'{{"instances": {instances}}}')
        assert (status, json.loads(body)["instances"][0]["title"]) == (200, "Mia 6")


@pytest.mark.parametrize("body", ["", "x", "[]", "{}", '{"instances": null}', '{"instances": []}', '{"instances": {}}'])
def test_curl_with_a_wrong_body(served: Served, body: str) -> None:
    status, answer = curl(served, "/model/pocket:generate", body)
    assert (status, list(json.loads(answer))) == (200, ["error_msg"])
    for path in ("/model/pocket:nothing", "/model/pocket/version/7:generate"):
        assert "not available" in json.loads(curl(served, path, '{"instances": [{"inputs": "x"}]}')[1])["error_msg"]


def test_background_streams_share_the_batch(served: Served) -> None:
    """Streams of every door at once say what each says alone."""
    body = {"instances": [{"name": "Mia"}]}
    alone = events(served.http, "/model/pocket:generated_stream", {"instances": [PROMPT]})

    def call(number: int) -> Any:
        if number % 2:
            return events(served.http, "/model/pocket:generated_stream", {"instances": [PROMPT]})
        return events(served.http, "/model/mixed:tell", body, {"Accept": "text/event-stream"})[-1]["instances"][0][
            "title"
        ]

    found = [Background(call, number) for number in range(8)]
    assert [one.result(60) for one in found] == [alone if number % 2 else "Mia 6" for number in range(8)]
