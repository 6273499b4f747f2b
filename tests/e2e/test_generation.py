"""`inflight serve models/pocket`: real clients, exact frames, killed ranks, callers that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inflight.kernels import native_reason
from tests.e2e.running import (
    Background,
    Served,
    connect,
    crowd,
    eventually,
    free_address,
    get,
    in_one_batch,
    metrics,
    process,
    request,
    serve,
    workers,
)

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
JSON = {"Content-Type": "application/json"}
PROMPT = "Once upon a time, there was a young cat called Mia."
CHAT = [{"role": "user", "content": "What is Inflight?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, light_python: str) -> Iterator[Served]:
    arguments = ["--kv-cache-memory", "64m", "--max-total-tokens", "512", "--max-concurrent-requests", "40"]
    with serve(tmp_path_factory.mktemp("pocket"), str(POCKET), *arguments, python=light_python) as one:
        yield one


def post(address: str, path: str, body: Any) -> tuple[int, Any]:
    status, data = request(address, "POST", path, json.dumps(body).encode(), JSON)
    try:
        return status, json.loads(data)
    except ValueError:
        return status, data.decode()


def generate(address: str, prompt: str = PROMPT, **parameters: Any) -> Any:
    status, answer = post(address, "/generate", {"inputs": prompt, "parameters": {"details": True, **parameters}})
    assert status == 200, answer
    return answer


def ids(answer: Any) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def scored(answer: Any) -> list[tuple[int, float]]:
    """Tokens with their log-probabilities, of which JSON keeps every bit."""
    return [(token["id"], token["logprob"]) for token in answer["details"]["tokens"]]


def tokens_of(pairs: list[tuple[int, float]]) -> list[int]:
    return [token for token, _ in pairs]


def events(address: str, path: str, body: Any) -> list[Any]:
    """All frames of a stream; `[DONE]` stays a text."""
    status, data = request(address, "POST", path, json.dumps(body).encode(), JSON)
    assert status == 200, data
    frames = data.decode().split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame[6:] if frame == "data: [DONE]" else json.loads(frame[6:]) for frame in frames]


# Clients


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_text_generation_client(served: Served) -> None:
    from text_generation import Client
    from text_generation.errors import ValidationError

    client = Client(f"http://{served.http}", timeout=60)
    answer = client.generate(PROMPT, max_new_tokens=20, decoder_input_details=True, top_n_tokens=2)
    assert answer.details.generated_tokens == 20
    assert answer.details.finish_reason == "length"
    assert answer.details.prefill[0].logprob is None
    assert answer.details.prefill[1].logprob < 0
    assert len(answer.details.top_tokens) == 20
    streamed = list(client.generate_stream(PROMPT, max_new_tokens=20))
    assert [one.token.id for one in streamed] == [token.id for token in answer.details.tokens]
    assert streamed[-1].generated_text == "".join(one.token.text for one in streamed)
    chat = client.chat(messages=[{"role": "user", "content": "What is prefill?"}], max_tokens=60, temperature=0.01)
    assert chat.choices[0].message.content
    with pytest.raises(ValidationError):
        client.generate(PROMPT, temperature=0.0)


def test_huggingface_hub(served: Served) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(f"http://{served.http}", timeout=60)
    text = client.text_generation(PROMPT, max_new_tokens=12, return_full_text=False)
    details = client.text_generation(PROMPT, max_new_tokens=12, details=True, return_full_text=False)
    assert details.generated_text == text
    assert details.details.finish_reason == "length"
    assert "".join(client.text_generation(PROMPT, max_new_tokens=12, stream=True)) == text
    *_, last = client.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True, return_full_text=False)
    assert last.generated_text == text
    assert last.details.generated_tokens == 12
    answer = client.chat_completion(CHAT, max_tokens=80, temperature=0)
    whole = answer.choices[0].message.content
    parts = client.chat_completion(CHAT, max_tokens=80, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
    assert answer.choices[0].finish_reason == "stop"


def test_openai(served: Served) -> None:
    import openai

    client = openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").id == "pocket"
    answer = client.chat.completions.create(
        model="pocket", messages=CHAT, temperature=0, max_completion_tokens=80, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "Inflight" in choice.message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert len(choice.logprobs.content[0].top_logprobs) >= 2
    stream = client.chat.completions.create(
        model="pocket",
        messages=CHAT,
        temperature=0,
        max_tokens=80,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == "stop"
    two = client.chat.completions.create(model="pocket", messages=CHAT, n=2, seed=3, max_tokens=9, temperature=1.5)
    assert [choice.index for choice in two.choices] == [0, 1]
    on = {"ignore_eos": True}
    completion = client.completions.create(
        model="pocket", prompt=["Once", "One day"], max_tokens=7, temperature=0, extra_body=on
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.usage.completion_tokens == 14
    parts = list(
        client.completions.create(
            model="pocket", prompt="Once", max_tokens=7, temperature=0, stream=True, extra_body=on
        )
    )
    assert "".join(part.choices[0].text for part in parts) == completion.choices[0].text
    biased = client.completions.create(
        model="pocket", prompt="Once", max_tokens=3, temperature=0, logit_bias={"300": 100}, logprobs=1
    )
    assert len(set(biased.choices[0].logprobs.tokens)) == 1
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model="pocket", messages=CHAT, top_p=3)


def test_stop_texts_of_both_worlds(served: Served) -> None:
    """TGI keeps the stop text, OpenAI cuts it off; neither shows anything after it."""
    whole = generate(served.http, max_new_tokens=60)["generated_text"]
    stop = whole[25:32]
    end = whole.index(stop)
    kept = generate(served.http, max_new_tokens=60, stop=["nowhere", stop])
    assert kept["generated_text"] == whole[: end + len(stop)]
    assert kept["details"]["finish_reason"] == "stop_sequence"
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60, "stop": stop, "stream": True}
    frames = events(served.http, "/v1/completions", body)
    assert frames.pop() == "[DONE]"
    assert "".join(frame["choices"][0]["text"] for frame in frames) == whole[:end]
    assert frames[-1]["choices"][0]["finish_reason"] == "stop"


# Frames, bodies and errors as TGI has them


def test_generate_without_parameters_samples(served: Served) -> None:
    """TGI's trap: no `parameters` at all means sampling."""
    answers = {
        post(served.http, "/generate", {"inputs": "Once", "parameters": None})[1]["generated_text"] for _ in "ab"
    }
    assert len(answers) == 2
    assert len({generate(served.http, "Once", max_new_tokens=20)["generated_text"] for _ in "ab"}) == 1


def test_compatible_route_and_full_text(served: Served) -> None:
    body = {"inputs": "Once", "parameters": {"max_new_tokens": 5}}
    status, answer = post(served.http, "/", body)
    assert status == 200
    assert answer[0]["generated_text"].startswith("Once")
    frames = events(served.http, "/", {**body, "stream": True})
    assert frames[-1]["generated_text"] == answer[0]["generated_text"]
    status, plain = post(served.http, "/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 5}})
    assert "Once" + plain["generated_text"] == answer[0]["generated_text"]


def test_stream_frames(served: Served) -> None:
    frames = events(
        served.http, "/generate_stream", {"inputs": "Once", "parameters": {"max_new_tokens": 4, "details": True}}
    )
    assert [frame["index"] for frame in frames] == [1, 2, 3, 4]
    assert all(frame["generated_text"] is None and frame["details"] is None for frame in frames[:-1])
    assert set(frames[0]["token"]) == {"id", "text", "logprob", "special"}
    assert frames[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 4,
        "seed": None,
        "input_length": frames[-1]["details"]["input_length"],
    }


def test_best_of(served: Served) -> None:
    answer = generate(served.http, max_new_tokens=8, best_of=2, do_sample=True, temperature=1.5)
    losers = answer["details"]["best_of_sequences"]
    assert len(losers) == 1

    def mean(tokens: list[Any]) -> float:
        return sum(token["logprob"] for token in tokens) / len(tokens)

    assert mean(answer["details"]["tokens"]) >= mean(losers[0]["tokens"])


def test_a_seed_fixes_a_sample(served: Served) -> None:
    seeds = [7, 7, 8]
    texts = [generate(served.http, max_new_tokens=20, do_sample=True, seed=seed)["generated_text"] for seed in seeds]
    assert texts[0] == texts[1] != texts[2]


def test_tokenize_info_health_models(served: Served) -> None:
    _, pieces = post(served.http, "/tokenize", {"inputs": "Mia naïve 🙂"})
    assert pieces[-1]["stop"] == len("Mia naïve 🙂")
    assert all("Mia naïve 🙂"[one["start"] : one["stop"]] == one["text"] for one in pieces)
    info = get(served.http, "/info")
    assert info["max_total_tokens"] == 512
    assert info["max_input_tokens"] == 511
    assert info["model_id"] == str(POCKET)
    assert request(served.http, "GET", "/health") == (200, b"")
    assert get(served.http, "/health/ready")["ready"]
    assert request(served.http, "PUT", "/generate")[0] == 405


def test_metrics_have_tgis_names(served: Served) -> None:
    before = metrics(served.http)
    generate(served.http, "Once", max_new_tokens=7)
    post(served.http, "/generate", {"inputs": "a " * 2000})
    after = metrics(served.http)

    def grew(name: str, labels: tuple[str, ...] = ()) -> float:
        return after[name][labels] - before.get(name, {}).get(labels, 0)

    assert grew("tgi_request_success") == 1
    assert grew("tgi_request_failure", ("validation",)) == 1
    assert grew("tgi_request_count") == 2
    assert grew("tgi_request_generated_tokens_sum") == 7
    assert grew("tgi_request_duration_count") == 1
    assert grew("tgi_request_duration_sum") >= grew("tgi_request_inference_duration_sum") > 0
    assert after["tgi_queue_size"][()] == after["tgi_batch_current_size"][()] == 0
    assert after["tgi_batch_current_max_tokens"][()] == 0
    assert after["tgi_batch_max_total_tokens"][()] >= 512
    assert grew("tgi_batch_inference_count", ("prefill",)) >= 1
    assert grew("tgi_batch_inference_success", ("decode",)) >= 6
    assert grew("tgi_batch_forward_duration_count", ("decode",)) >= 6
    assert grew("tgi_request_max_new_tokens_sum") == 7
    assert grew("tgi_request_validation_duration_count") == 1


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"temperature": 0}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 3}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"truncate": 512}, "`truncate` must be strictly positive and less than 511. Given: 512"),
        ({"top_n_tokens": 9}, "`top_n_tokens` must be >= 0 and <= 5. Given: 9"),
        ({"max_new_tokens": 600}, "`inputs` tokens + `max_new_tokens` must be <= 512. Given:"),
    ],
)
def test_validation_in_tgis_words(served: Served, parameters: dict[str, Any], text: str) -> None:
    status, answer = post(served.http, "/generate", {"inputs": "Once", "parameters": parameters})
    assert status == 422
    assert answer["error_type"] == "validation"
    assert answer["error"].startswith(f"Input validation error: {text}")


def test_framework_errors_are_plain(served: Served) -> None:
    assert request(served.http, "POST", "/generate", b"{}")[0] == 415
    assert request(served.http, "POST", "/generate", b"{", JSON)[0] == 400
    for body in (b"{}", b'{"inputs": 3}', b'{"inputs": "a", "parameters": {"stop": null}}', b"[]"):
        status, text = request(served.http, "POST", "/generate", body, JSON)
        assert status == 422
        assert text.startswith(b"Failed to deserialize the JSON body")
    status, text = request(served.http, "POST", "/generate", b"a" * 2_100_000, JSON)
    assert status == 413


def test_long_prompts(served: Served) -> None:
    status, answer = post(served.http, "/generate", {"inputs": "story " * 700})
    assert status == 422
    assert "must have less than 511 tokens" in answer["error"]
    short = generate(served.http, "story " * 700, truncate=20, max_new_tokens=3, decoder_input_details=True)
    assert len(short["details"]["prefill"]) == 20


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/generate", "/generate_stream", "/", "/v1/chat/completions", "/v1/completions", "/tokenize"]),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "inputs",
                        "parameters",
                        "messages",
                        "role",
                        "content",
                        "prompt",
                        "stream",
                        "n",
                        "stop",
                        "max_tokens",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=8,
    ),
    st.dictionaries(
        st.sampled_from(["max_new_tokens", "top_k", "seed", "stop", "temperature", "best_of", "truncate", "grammar"]),
        st.none() | st.integers(-5, 2**65) | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2),
        max_size=4,
    ),
)
def test_no_body_breaks_it(served: Served, path: str, body: Any, parameters: Any) -> None:
    if isinstance(body, dict) and "parameters" not in body:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 2, **parameters}, "max_tokens": 2, **body}
    status, _ = request(served.http, "POST", path, json.dumps(body).encode(), JSON)
    assert status < 500


@pytest.mark.parametrize("route", ["tgi", "openai"])
def test_inflight_bench(served: Served, tmp_path: Path, route: str) -> None:
    out, plot = tmp_path / "figures.json", tmp_path / "times.png"
    command = [sys.executable, "-m", "inflight.cli", "bench", f"http://{served.http}", "--json", "--route", route]
    command += ["--requests", "12", "--connections", "4", "--prompt-tokens", "8-30", "--output-tokens", "6"]
    done = subprocess.run(
        [*command, "--out", str(out), "--plot", str(plot)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["requests"] == 12
    assert figures["errors"] == 0
    if route == "openai":  # the other route stops where the model does
        assert figures["output_tokens"] == 72
    assert 0 < figures["ttft_ms"]["p50"] <= figures["ttft_ms"]["p99"] <= figures["request_ms"]["p99"]
    assert len(json.loads(out.read_text())["all"]) == 12
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "12/12 generations" in done.stderr


# MindSpore Serving's form


def test_mindspore_form(served: Served) -> None:
    first = generate(served.http, max_new_tokens=9)["generated_text"]
    body = {
        "instances": [
            {"inputs": PROMPT, "parameters": {"max_new_tokens": 9}},
            {"prompt": "Once", "max_new_tokens": 3},
        ]
    }
    _, answer = post(served.http, "/model/pocket:generate", body)
    assert answer["instances"][0]["generated_text"] == first
    assert answer["instances"][1]["generated_tokens"] == 3
    frames = [frame["instances"][0] for frame in events(served.http, "/model/pocket:generated_stream", body)]
    assert "".join(frame["text"] for frame in frames if frame["index"] == 0) == first
    _, error = post(served.http, "/model/pocket:generate", {"instances": [{"x": 1}]})
    assert "give it by the key 'inputs'" in error["error_msg"]


def test_a_language_model_between_python_functions(tmp_path: Path) -> None:
    """`examples/storyteller`: over REST and gRPC, by itself under the servable's name, and many at once."""
    from inflight.client import Client

    folder = POCKET.parents[1] / "examples" / "storyteller" / "storyteller"
    with serve(tmp_path, str(folder)) as server:
        body = json.loads((folder / "request.json").read_text())
        status, answer = post(server.http, "/model/storyteller:tell", body)
        assert status == 200
        (story,) = answer["instances"]
        assert story["title"] == "The story of Mia"
        assert "Mia" in story["story"]
        assert story["story"].endswith((".", '"'))
        with Client(server.grpc, "storyteller", "tell") as client:
            found = client.infer([{"animal": "cat", "name": name} for name in ("Mia", "Leo", "Ada")])
        assert found[0]["story"] == story["story"]
        assert [one["title"] for one in found] == ["The story of Mia", "The story of Leo", "The story of Ada"]
        alone = {"instances": [{"inputs": "Once upon a time", "parameters": {"max_new_tokens": 5}}]}
        assert post(server.http, "/model/storyteller:generate", alone)[1]["instances"][0]["generated_tokens"] == 5
        assert get(server.http, "/info")["max_total_tokens"] == 512
        os.kill(ranks(server.pid)[0], signal.SIGKILL)
        status, answer = post(server.http, "/model/storyteller:tell", body)
        assert answer["instances"] == [story]
        assert server.end() == 0


# Crowds, losses, callers that leave


def prompts(count: int) -> list[str]:
    return [f"{number}. {PROMPT}" for number in range(count)]


def parameters(number: int) -> dict[str, Any]:
    sampled = {"do_sample": True, "seed": number, "temperature": 0.9} if number % 2 else {}
    return {"max_new_tokens": 60, **sampled}


def test_alone_and_in_a_crowd_with_random_arrivals(served: Served) -> None:
    texts = prompts(32)
    alone = [scored(generate(served.http, text, **parameters(n))) for n, text in enumerate(texts)]

    def late(number: int) -> list[tuple[int, float]]:
        time.sleep((number * 37 % 32) / 100)
        return scored(generate(served.http, texts[number], **parameters(number)))

    assert crowd(late, 32) == alone


def ranks(pid: int) -> list[int]:
    return [one for one in workers(pid) if "--device_id=rank" in " ".join(psutil.Process(one).cmdline())]


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_loses_no_stream(size: int, tmp_path: Path, served: Served) -> None:
    texts = prompts(6)
    wanted = [scored(generate(served.http, text, **parameters(n))) for n, text in enumerate(texts)]
    cache = ["--kv-cache-memory", "32m", "--max-total-tokens", "512"] if size == 1 else []
    kept = ["--prompt-cache", str(tmp_path / "kept")]
    with serve(tmp_path, str(POCKET), "--tensor-parallel", str(size), *cache, *kept) as server:
        assert len(ranks(server.pid)) == size
        first = tokens_of(scored(generate(server.http, PROMPT * 24, max_new_tokens=4)))
        eventually(lambda: prompt_cache(server.http, "written_bytes") > 0)
        seen = threading.Event()

        def stream(number: int) -> list[tuple[int, float]]:
            found: list[tuple[int, float]] = []
            body = {"inputs": texts[number], "parameters": parameters(number)}
            with contextlib.closing(connect(server.http, 120)) as connection:
                connection.request("POST", "/generate_stream", json.dumps(body), JSON)
                with connection.getresponse() as response:
                    for line in response:
                        if line.startswith(b"data: "):
                            frame = json.loads(line[6:])
                            assert "error" not in frame
                            found.append((frame["token"]["id"], frame["token"]["logprob"]))
                            if len(found) == 10:
                                seen.set()
            return found

        calls = [Background(stream, number) for number in range(6)]
        assert seen.wait(60)
        os.kill(ranks(server.pid)[-1], signal.SIGKILL)
        found = [call.result(120) for call in calls]
        # One rank runs on the CPU engine, bit for bit the same; two run on torch's operators.
        exact = size == 1 and native_reason() is None
        assert found == wanted if exact else [*map(tokens_of, found)] == [*map(tokens_of, wanted)]
        eventually(lambda: len(ranks(server.pid)) == size)
        # New ranks read what those before have written, each its own part.
        assert tokens_of(scored(generate(server.http, PROMPT * 24, max_new_tokens=4))) == first
        assert prompt_cache(server.http, "tokens") >= 256
        assert len(list((tmp_path / "kept").iterdir())) == size
        assert server.end() == 0


def prompt_cache(address: str, name: str) -> float:
    """A counter of the prompt cache."""
    return sum(metrics(address)[f"inflight_prompt_cache_{name}_total"].values())


def dropped(address: str) -> float:
    """Generations whose client left, so far."""
    return metrics(address).get("tgi_request_failure", {}).get(("dropped",), 0.0)


def test_a_client_that_leaves_frees_its_row(served: Served) -> None:
    host, _, port = served.http.rpartition(":")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n"
    sockets = []
    for _ in range(39):
        one = socket.create_connection((host, int(port)))
        one.sendall(head.encode() + b"\r\n" + body)
        sockets.append(one)
    for one in sockets:  # all begin together, so that none ends before the last has begun
        assert one.recv(4096).startswith(b"HTTP/1.1 200")
    before = dropped(served.http)
    for one in sockets:
        one.close()
    eventually(lambda: dropped(served.http) == before + 39)  # none of them ran to its end
    # Forty fit: all of them can come again at once only when the rows are free.
    assert len(crowd(lambda number: generate(served.http, "Once", max_new_tokens=2), 40)) == 40


def test_overload(tmp_path: Path) -> None:
    arguments = ["--kv-cache-memory", "16m", "--max-concurrent-requests", "2", "--max-total-tokens", "512"]
    with serve(tmp_path, str(POCKET), *arguments) as server:
        body = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}
        calls = in_one_batch(server.http, lambda: Background(post, server.http, "/v1/completions", body), 2, least=2)
        small = json.dumps({"inputs": "Once", "parameters": {"max_new_tokens": 2}}).encode()
        with contextlib.closing(connect(server.http, 60)) as connection:
            connection.request("POST", "/generate", small, JSON)
            answer = connection.getresponse()
            read = json.loads(answer.read())
        if all(not call.done for call in calls):
            assert (answer.status, read["error_type"]) == (429, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
        for call in calls:
            call.result()
        assert post(server.http, "/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 2}})[0] == 200


# The server's process


def test_no_process_has_torch_and_the_server_starts_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    address = free_address()
    with process(tmp_path, "-m", "inflight.cli", "serve", str(POCKET), "--http", address, "--grpc", "off") as server:

        def up() -> bool:
            try:
                return request(address, "GET", "/health/live")[0] == 200
            except OSError:
                return False

        eventually(up, 20)
        assert time.monotonic() - began < 10, "2 s on an idle machine; this one may be busy"
        assert request(address, "GET", "/health")[0] in (200, 503)
        server.line("try ")
        assert "pocket, weights: " in server.stderr.read_text()
        assert generate(address, max_new_tokens=4)["details"]["generated_tokens"] == 4
        for pid in (server.pid, *workers(server.pid)):  # neither the server nor the rank, though torch is installed
            maps = Path(f"/proc/{pid}/maps")
            if maps.exists():
                assert "libtorch" not in maps.read_text()
        assert server.end() == 0
        assert not psutil.pid_exists(server.pid) or psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE


def test_a_folder_that_cannot_be_served(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in POCKET.iterdir():
        (folder / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    done = subprocess.run(
        [sys.executable, "-m", "inflight.cli", "serve", str(folder), "--http", "127.0.0.1:0", "--grpc", "off"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "model.safetensors' cannot be read" in done.stderr


def test_sigterm_lets_streams_finish(tmp_path: Path) -> None:
    with serve(tmp_path, str(POCKET), "--kv-cache-memory", "16m", "--max-total-tokens", "512") as server:
        body = {"prompt": PROMPT, "max_tokens": 450, "ignore_eos": True}
        (call,) = in_one_batch(server.http, lambda: Background(post, server.http, "/v1/completions", body), 1, least=1)
        assert server.end() == 0
        status, answer = call.result()
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 450


def test_many_openai_streams_at_once(served: Served) -> None:
    import openai

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="pocket", prompt=prompts(20)[number], max_tokens=40, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(20)))

    found = asyncio.run(main())
    assert found == [generate(served.http, text, max_new_tokens=40)["generated_text"] for text in prompts(20)]
