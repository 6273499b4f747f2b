"""`text-generation-server serve`: ranks on unix sockets, driven by a router written after TGI's own loop."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

from inflight.commands.shard_server import Signals
from inflight.contract import Sampling
from inflight.llm import LLM
from inflight.proto import generate_pb2 as pb
from inflight.text import load_tokenizer
from tests.e2e.running import eventually

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SEES = POCKET.with_name("pocket_vision")
PROBE = (1 << 64) - 1
PROGRAM = Path(sys.executable).with_name("text-generation-server")


class Ranks:
    """Stubs of all ranks; every call goes to all of them, as a router does it."""

    def __init__(self, path: str, size: int) -> None:
        self.channels = [grpc.insecure_channel(f"unix:{path}-{rank}") for rank in range(size)]

    def call(self, name: str, request: Any, reply: Any) -> list[Any]:
        stubs = [
            channel.unary_unary(
                f"/generate.v3.TextGenerationService/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=reply.FromString,
            )
            for channel in self.channels
        ]
        futures = [stub.future(request, timeout=60) for stub in stubs]
        return [future.result() for future in futures]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


@contextlib.contextmanager
def started(tmp_path: Path, size: int, model: Path = POCKET) -> Iterator[tuple[Ranks, str, list[Any]]]:
    path = str(tmp_path / "shard")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "MAX_BATCH_SIZE": "40",
        }  # fmt: skip
        command = [str(PROGRAM), "serve", str(model), "--uds-path", path, "--kv-cache-memory", "8m", "--json-output"]
        command += ["--speculate", "4"]
        log = (tmp_path / f"rank{rank}.log").open("w")
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        log.close()
    ranks = Ranks(path, size)
    try:
        eventually(lambda: all(Path(f"{path}-{rank}").exists() for rank in range(size)), 60)
        yield ranks, path, processes
    finally:
        ranks.close()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            assert process.wait(30) == 0
        assert not list(tmp_path.glob("shard-*")), "the sockets are removed"


@dataclass
class Wanted:
    """One request as the router knows it."""

    id: int
    text: str
    new: int
    parameters: dict[str, Any] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    whole: Any = None
    prefill: Any = None
    leaves_at: int | None = None


class Router:
    """Section 2 of the specification: warm up, prefill, concatenate, filter, decode to the end."""

    def __init__(self, ranks: Ranks, seed: int = 0) -> None:
        self.ranks = ranks
        self.info = ranks.call("Info", pb.InfoRequest(), pb.InfoResponse)[-1]
        ranks.call("ClearCache", pb.ClearCacheRequest(), pb.ClearCacheResponse)
        warm = pb.Batch(id=0, size=2, max_tokens=64)
        for _ in range(2):
            warm.requests.append(self._request(Wanted(0, "_test " * 30, 2), []))
        asked = pb.WarmupRequest(batch=warm, max_prefill_tokens=200, max_total_tokens=500, max_input_tokens=400)
        found = ranks.call("Warmup", asked, pb.WarmupResponse)[0]
        assert (found.max_input_tokens, found.max_total_tokens) == (400, 500)
        self.free = list(range(1, found.max_supported_total_tokens // self.info.block_size))
        self.total = len(self.free)
        self.tokenizer = load_tokenizer(POCKET)
        self.batches: dict[int, list[Wanted]] = {}
        self.next_batch = 1
        self.draw = random.Random(seed)

    def _request(self, wanted: Wanted, blocks: list[int], **more: Any) -> pb.Request:
        neutral: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
        size = self.info.block_size
        made = pb.Request(
            id=wanted.id, inputs=wanted.text, truncate=400, top_n_tokens=more.pop("top", 0), add_special_tokens=True,
            parameters=pb.NextTokenChooserParameters(**{**neutral, **wanted.parameters}),
            stopping_parameters=pb.StoppingCriteriaParameters(
                max_new_tokens=wanted.new, stop_sequences=wanted.stop, ignore_eos_token=not wanted.stop
            ),
            blocks=blocks, slots=[block * size + offset for block in blocks for offset in range(size)], **more,
        )  # fmt: skip
        made.input_chunks.chunks.add(text=wanted.text)
        return made

    def prefill(self, many: list[Wanted], **more: Any) -> None:
        size = self.info.block_size
        batch = pb.Batch(id=self.next_batch, size=len(many))
        self.next_batch += 1
        for one in many:
            length = len(self.tokenizer.encode(one.text)) + one.new - 1
            one.blocks = [self.free.pop() for _ in range(-(-length // size))]
            batch.requests.append(self._request(one, one.blocks, **more))
        self._take(self.ranks.call("Prefill", pb.PrefillRequest(batch=batch), pb.PrefillResponse), many, [batch.id])

    def decode(self) -> None:
        ids = list(self.batches)
        many = [one for id in ids for one in self.batches[id]]
        cached = [
            pb.CachedBatch(id=id, request_ids=[one.id for one in self.batches[id]], size=len(self.batches[id]))
            for id in ids
        ]
        self._take(self.ranks.call("Decode", pb.DecodeRequest(batches=cached), pb.DecodeResponse), many, ids)

    def _take(self, replies: list[Any], many: list[Wanted], ids: list[int]) -> None:
        generations = [one for reply in replies for one in reply.generations]
        known = {one.id: one for one in many}
        assert sorted(one.request_id for one in generations) == sorted(known), "exactly one for every live request"
        for generation in generations:
            one = known[generation.request_id]
            tokens = generation.tokens
            assert len(tokens.ids) == len(tokens.logprobs) == len(tokens.texts) == len(tokens.is_special)
            assert 1 <= len(tokens.ids) <= 1 + self.info.speculate
            assert len(generation.top_tokens) in (0, len(tokens.ids))
            one.tokens += tokens.ids
            one.texts += ["" if hidden else text for hidden, text in zip(tokens.is_special, tokens.texts)]
            if generation.HasField("prefill_tokens"):
                one.prefill = generation.prefill_tokens
            if generation.HasField("generated_text"):
                one.whole = generation.generated_text
        going = [one for one in many if one.whole is None]
        for reply in replies:  # identical metadata everywhere
            assert reply.HasField("batch") == bool(going)
            if going:
                assert (reply.batch.id, reply.batch.size) == (ids[0], len(going))
                assert list(reply.batch.request_ids) == [one.id for one in going]
            assert reply.total_ns >= reply.forward_ns > 0
        for id in ids:
            self.batches.pop(id, None)
        for one in many:
            if one.whole is not None:
                self.free += one.blocks
        staying = [one for one in going if one.leaves_at is None or len(one.tokens) < one.leaves_at]
        for one in going:
            if one not in staying:
                self.free += one.blocks  # before the shard is told
        if staying and len(staying) < len(going):
            request = pb.FilterBatchRequest(batch_id=ids[0], request_ids=[one.id for one in staying])
            for reply in self.ranks.call("FilterBatch", request, pb.FilterBatchResponse):
                assert list(reply.batch.request_ids) == [one.id for one in staying]
        elif going and not staying:
            self.ranks.call("ClearCache", pb.ClearCacheRequest(id=ids[0]), pb.ClearCacheResponse)
        if staying:
            self.batches = {ids[0]: staying, **self.batches}

    def probe(self) -> None:
        """The liveness check: one token that keeps nothing."""
        request = self._request(Wanted(PROBE, "liveness", 1), [0])
        request.truncate, request.add_special_tokens = 1, False
        batch = pb.Batch(id=PROBE, size=1, requests=[request])
        replies = self.ranks.call("Prefill", pb.PrefillRequest(batch=batch), pb.PrefillResponse)
        assert sum(len(reply.generations) for reply in replies) == 1
        assert not any(reply.HasField("batch") for reply in replies)

    def run(self, requests: list[Wanted], most: int) -> None:
        """Random arrivals: prefill between decodes, batches concatenated by the next one."""
        waiting = list(requests)
        while waiting or self.batches:
            rows = sum(map(len, self.batches.values()))
            if waiting and (not self.batches or self.draw.random() < 0.4):
                count = min(self.draw.randint(1, 4), most - rows, len(waiting))
                if count > 0:
                    self.prefill([waiting.pop(0) for _ in range(count)])
            if self.draw.random() < 0.1:
                self.probe()
            if self.batches:
                self.decode()
        assert sorted(self.free) == list(range(1, self.total + 1))


def requests(count: int) -> list[Wanted]:
    made = []
    for number in range(count):
        sampled: dict[str, Any] = {"do_sample": True, "seed": number, "temperature": 0.8} if number % 2 else {}
        more: list[dict[str, Any]] = [
            {},
            {"top_k": 20, "top_p": 0.9},
            {"repetition_penalty": 1.3},
            {"frequency_penalty": 0.5},
        ]
        parameters = {**sampled, **more[number % 4]}
        text = f"{number}. Once upon a time" + " there was a cat" * (number % 5)
        made.append(Wanted(number + 10, text, 5 + number * 7 % 30, parameters))
    return made


@pytest.fixture(scope="module")
def alone() -> dict[int, list[int]]:
    """What each request gets from our own engine."""
    all = requests(24)
    names = ("do_sample", "seed", "temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty")
    samplings = [Sampling(**{name: one.parameters[name] for name in names if name in one.parameters}) for one in all]
    with LLM(POCKET, kv_cache_memory=16 << 20, threads=2) as llm:
        found = llm.generate(
            [one.text for one in all], samplings, max_new_tokens=[one.new for one in all], ignore_eos=True
        )
    return {one.id: result.token_ids for one, result in zip(all, found)}


def refused(call: Callable[[], Any], code: grpc.StatusCode, text: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code  # type: ignore[attr-defined]
    assert text in caught.value.details()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("size", "rounds"), [(2, 1), *(pytest.param(n, 2, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_foreign_router(size: int, rounds: int, tmp_path: Path, alone: dict[int, list[int]]) -> None:
    with started(tmp_path, size) as (ranks, path, _):
        urls = ranks.call("ServiceDiscovery", pb.ServiceDiscoveryRequest(), pb.ServiceDiscoveryResponse)
        assert all(list(one.urls) == [f"unix://{path}-{rank}" for rank in range(size)] for one in urls)
        ranks.call("Health", pb.HealthRequest(), pb.HealthResponse)
        for seed in range(rounds):
            router = Router(ranks, seed)
            assert router.info.block_size == 16
            assert router.info.speculate == (4 if size == 1 else 0)
            assert not router.info.requires_padding
            traffic = requests(24)
            for one in traffic[::5]:
                one.leaves_at = 4
            router.run(traffic, 12)
            for one in traffic:
                if one.leaves_at is not None and one.leaves_at < one.new:
                    assert one.tokens == alone[one.id][: max(4, len(one.tokens))]
                else:
                    assert one.tokens == alone[one.id]
                    assert one.whole.text == "".join(one.texts)
                    assert one.whole.generated_tokens == one.new
                    assert one.whole.finish_reason == pb.FINISH_REASON_LENGTH
                    assert one.whole.HasField("seed") == bool(one.parameters.get("do_sample"))


def test_what_a_request_may_ask(tmp_path: Path, alone: dict[int, list[int]]) -> None:
    with started(tmp_path, 1) as (ranks, _, processes):
        router = Router(ranks)
        assert router.info.speculate == 4
        some = requests(24)[:8]
        router.run(some, 12)
        assert all(one.tokens == alone[one.id] for one in some)
        # Log-probabilities of the prompt, top tokens, a shared prefix that is not computed again.
        first = Wanted(1, "Once upon a time there was a young cat called Mia, and she was brave.", 3)
        router.prefill([first], prefill_logprobs=True, top=3)
        assert math.isnan(first.prefill.logprobs[0])
        assert all(value < 0 for value in first.prefill.logprobs[1:])
        while router.batches:
            router.decode()
        shared = first.blocks[:1]
        second = Wanted(2, first.text, 3)
        length = len(router.tokenizer.encode(second.text)) + 2
        second.blocks = [*shared, *(router.free.pop() for _ in range(-(-length // 16) - 1))]
        batch = pb.Batch(id=99, size=1, requests=[router._request(second, second.blocks, cache_len=16)])
        reply = ranks.call("Prefill", pb.PrefillRequest(batch=batch), pb.PrefillResponse)[0]
        assert reply.generations[0].tokens.ids[0] == first.tokens[0]
        ranks.call("ClearCache", pb.ClearCacheRequest(), pb.ClearCacheResponse)
        # Stop texts, end tokens, grammars.
        stop = Wanted(3, "Once upon a time", 60, stop=["."])
        bound = Wanted(
            4, "Once", 20, {"grammar": "(yes|no) [0-9]{3}", "grammar_type": pb.GRAMMAR_TYPE_REGEX}, stop=["never"]
        )
        router.prefill([stop, bound])
        while router.batches:
            router.decode()
        assert stop.whole.text.endswith(".")
        assert stop.whole.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
        assert bound.whole.text[:3] in ("yes", "no ")
        assert bound.whole.finish_reason == pb.FINISH_REASON_EOS_TOKEN
        # Errors are told, and nothing is left of a call that failed.
        none = pb.CachedBatch(id=7, request_ids=[1], size=1)
        refused(
            lambda: ranks.call("Decode", pb.DecodeRequest(batches=[none]), pb.DecodeResponse),
            grpc.StatusCode.NOT_FOUND,
            "Batch ID 7",
        )
        refused(
            lambda: ranks.call("Decode", pb.DecodeRequest(), pb.DecodeResponse),
            grpc.StatusCode.INVALID_ARGUMENT,
            "at least one batch",
        )
        few = pb.Batch(id=8, size=1, requests=[router._request(Wanted(5, "Once " * 30, 5), [1])])
        refused(
            lambda: ranks.call("Prefill", pb.PrefillRequest(batch=few), pb.PrefillResponse),
            grpc.StatusCode.INVALID_ARGUMENT,
            "do not fit 1 blocks",
        )
        wrong = Wanted(6, "Once", 5, {"grammar": "(", "grammar_type": pb.GRAMMAR_TYPE_REGEX})
        refused(lambda: router.prefill([wrong]), grpc.StatusCode.INVALID_ARGUMENT, "regex grammar")
        router.probe()
        good = Wanted(9, "Once", 4)
        router.prefill([good])
        while router.batches:
            router.decode()
        assert len(good.tokens) == 4
        assert processes[0].poll() is None


def test_download_weights_and_wrong_flags(tmp_path: Path) -> None:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(PROGRAM), *arguments], capture_output=True, text=True, timeout=60,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )  # fmt: skip

    done = run(
        "download-weights", str(POCKET), "--extension", ".safetensors", "--logger-level", "INFO", "--json-output"
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["record"]["level"]["name"] == "INFO"
    absent = run("download-weights", "nobody/nothing")
    assert absent.returncode == 1
    assert "HF_HUB_OFFLINE is set, and 'hf.co/nobody/nothing' is not in its cache" in absent.stderr
    assert run("serve", str(POCKET), RANK="2", WORLD_SIZE="2").returncode == 2
    assert run("serve", str(tmp_path)).returncode == 1


def test_images_in_chunks(tmp_path: Path) -> None:
    """Texts and images in turn, as TGI's router sends them: the tokens are those of our own engine."""
    pictures = [_picture(colour) for colour in ("red", "blue")]
    with LLM(SEES, kv_cache_memory=8 << 20, threads=1) as llm:
        mark = llm.engine.info.image_placeholder
        texts = ["<|im_start|>User:", "What is it?<end_of_utterance>\nAssistant:"]
        prompt = f"{texts[0]}{mark}{texts[1]}{mark}"
        wanted = llm.generate({"prompt": prompt, "images": pictures}, max_new_tokens=6, ignore_eos=True)[0]

    def batch(id: int, *chunks: str | bytes, blocks: int = 40, **more: Any) -> pb.PrefillRequest:
        asked = pb.Request(
            id=id, truncate=more.pop("truncate", 600), add_special_tokens=True, blocks=range(1, 1 + blocks),
            stopping_parameters=pb.StoppingCriteriaParameters(max_new_tokens=6, ignore_eos_token=True), **more,
        )  # fmt: skip
        for chunk in chunks:
            if isinstance(chunk, str):
                asked.input_chunks.chunks.add(text=chunk)
            else:
                asked.input_chunks.chunks.add(image=pb.Image(data=chunk, mimetype="image/png"))
        return pb.PrefillRequest(batch=pb.Batch(id=id, size=1, requests=[asked]))

    with started(tmp_path, 1, SEES) as (ranks, _, _):
        assert not ranks.call("Info", pb.InfoRequest(), pb.InfoResponse)[0].use_prefix_caching
        asked = batch(1, texts[0], pictures[0], texts[1], pictures[1], prefill_logprobs=True)
        (reply,) = ranks.call("Prefill", asked, pb.PrefillResponse)
        assert len(reply.generations[0].prefill_tokens.ids) == wanted.prompt_length
        found = list(reply.generations[0].tokens.ids)
        while reply.HasField("batch"):
            (reply,) = ranks.call("Decode", pb.DecodeRequest(batches=[reply.batch]), pb.DecodeResponse)
            found += reply.generations[0].tokens.ids
        assert found == wanted.token_ids
        for call, text in (
            (batch(2, "a", b"no image"), "invalid image: The image format could not be determined"),
            (batch(2, f"a{mark}", pictures[0]), "write `<image>` once for each image"),
            (batch(2, "a", pictures[0], truncate=9), "`truncate` would cut an image"),
            (batch(2, "a", pictures[0], blocks=1), "do not fit 1 blocks"),
            (batch(2, "a", pictures[0], cache_len=16), "`cache_len` must be 0"),
        ):
            refused(partial(ranks.call, "Prefill", call, pb.PrefillResponse), grpc.StatusCode.INVALID_ARGUMENT, text)


def _picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (70, 90), colour).save(file, "PNG")
    return file.getvalue()


def test_a_signal_that_another_thread_takes_ends_the_wait() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signals = Signals()

        def take() -> None:
            time.sleep(0.1)  # the main thread waits by then
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        taker = threading.Thread(target=take)
        taker.start()
        start = time.monotonic()
        signals.wait()
        assert time.monotonic() - start < 10, "0.5 s on an idle machine"
        taker.join(10)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
