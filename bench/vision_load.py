"""What images cost those who read text: streams of tokens with and without images beside them.

    python -m bench.vision_load [--streams 32] [--rate 1] [--seconds 20] [--detail low] [--model FOLDER]
        [--nice 0,10,19] [-- OPTIONS]

Random weights in SmolVLM-256M's shape unless a folder is given; OPTIONS go to `inflight serve`. The streams run all
the time; images come at their rate whether or not the last one was answered, each another picture of 640 x 480, in a
chat of its own that gets one token. An interval is the time between two events of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.checkpoints import whole
from bench.load import percentile
from bench.procs import Server, free_port
from bench.servers import RESULTS, answers

ROOT = Path(__file__).parent.parent
LENGTH = 1000
"""Tokens of one stream; then it begins again."""
WORDS = 49152


@dataclass
class Figures:
    """Attributes:
    intervals: seconds between two events of one stream.
    images: seconds of each image's request.
    refused: images that were answered 429.
    """

    seconds: float = 0.0
    intervals: list[float] = field(default_factory=list)
    images: list[float] = field(default_factory=list)
    refused: int = 0

    def row(self, name: str) -> str:
        ordered = sorted(self.intervals)
        times = " | ".join(f"{percentile(ordered, percent) * 1e3:.0f}" for percent in (50, 90, 99, 100))
        image = f"{statistics.median(self.images):.1f}" if self.images else ""
        rate = f"{len(self.images) / self.seconds:.2f}"
        return f"| {name} | {times} | {len(ordered) / self.seconds:.0f} | {rate} | {image} | {self.refused} |"


HEAD = (
    "| | 50th | 90th | 99th | longest | tokens/s | images/s | an image, median s | refused |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def make_checkpoint(folder: Path) -> None:
    """Random weights in SmolVLM-256M's shape, and a tokenizer in which every token is a word."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    special = ["<fake_token_around_image>", "<global-img>", "<image>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "initializer_range": 0.05,
    }
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    config = transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=WORDS + 2, bos_token_id=1, eos_token_id=2
    )
    transformers.SmolVLMForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": "w2", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message.content is string %}{{ message.content }} {% else %}"
        "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}"
        "{% endif %}{% endfor %}"
    )
    processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 2048},
        "max_image_size": {"longest_edge": 512},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 1,
        "rescale_factor": 1 / 255,
        **{f"do_{step}": True for step in ("convert_rgb", "image_splitting", "normalize", "pad", "rescale", "resize")},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


async def post(port: int, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def stream(port: int, number: int, figures: Figures) -> None:
    """One stream after the other; the first token of each ends no interval."""
    while True:
        text = " ".join(f"w{(number * 997 + position * 31) % WORDS}" for position in range(16))
        body = {"inputs": text, "parameters": {"max_new_tokens": LENGTH}}
        reader, writer = await post(port, "/generate_stream", json.dumps(body).encode())
        try:
            before: float | None = None
            while line := await reader.readline():
                if not line.startswith(b"data:"):
                    continue
                now = time.perf_counter()
                if before is not None:
                    figures.intervals.append(now - before)
                before = now
        finally:
            writer.close()


def chats(count: int, detail: str) -> list[bytes]:
    """Bodies of chats with a picture each, made ahead: making one would hold up the clients that take the time."""
    from PIL import Image

    draw = np.random.default_rng(time.time_ns())
    bodies = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (15, 20, 3), np.uint8)).resize((640, 480)).save(file, "JPEG")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url, "detail": detail}}, {"type": "text", "text": "w7"}]
        body = {"model": "bench", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        bodies.append(json.dumps(body).encode())
    return bodies


async def image(port: int, body: bytes, figures: Figures) -> None:
    began = time.perf_counter()
    reader, writer = await post(port, "/v1/chat/completions", body)
    try:
        answer = await reader.read()
    finally:
        writer.close()
    status = answer.split(b" ", 2)[1]
    if status == b"200":
        figures.images.append(time.perf_counter() - began)
    elif status == b"429":
        figures.refused += 1
    else:
        raise RuntimeError(answer.decode(errors="replace"))


async def measure(port: int, streams: int, rate: float, seconds: float, detail: str) -> Figures:
    """Measures for `seconds`, when every stream has run for two."""
    figures = Figures()
    bodies = chats(int(rate * seconds) + 1, detail)
    running = [asyncio.ensure_future(stream(port, number, figures)) for number in range(streams)]
    images: list[asyncio.Task[None]] = []
    try:
        await asyncio.sleep(2)
        began = time.perf_counter()
        figures.intervals.clear()
        while (now := time.perf_counter() - began) < seconds:
            if rate and now >= len(images) / rate and len(images) < len(bodies):
                images.append(asyncio.ensure_future(image(port, bodies[len(images)], figures)))
            await asyncio.sleep(0.005)
        figures.seconds = time.perf_counter() - began
        figures = Figures(figures.seconds, list(figures.intervals), list(figures.images), figures.refused)
    finally:
        for task in (*running, *images):
            task.cancel()
        for result in await asyncio.gather(*running, *images, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
    return figures


def stand_back(server: int, nice: str) -> None:
    """Gives the process that encodes images, a child of the server's, another nice value, and its session too."""
    for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        if b"--vision" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            for thread in Path(f"/proc/{child}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), int(nice))
            group = Path(f"/proc/{child}/autogroup")
            if group.exists():
                group.write_text(nice)


def main() -> None:
    own, _, options = " ".join(sys.argv[1:]).partition("-- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.0, help="images a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--detail", default="low", choices=("low", "high"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--nice", default="", help="values of the encoder, in turn, such as 0,10,19")
    given = parser.parse_args(own.split())
    folder = given.model or Path(tempfile.gettempdir()) / "inflight-bench-checkpoints" / "smolvlm-256m"
    if not folder.exists():
        with whole(folder) as target:
            target.mkdir()
            make_checkpoint(target)
    port = free_port()
    argv = [str(Path(sys.executable).with_name("inflight")), "serve", str(folder), "--http", f"127.0.0.1:{port}"]
    argv += ["--grpc", "off", "--name", "bench", "--kv-cache-memory", "1g", *options.split()]
    server = Server("Inflight", argv, RESULTS / "vision-load.log", answers(port, "/v2/health/ready"))
    print(f"{given.streams} streams, {given.rate:g} images a second, detail {given.detail} {options}\n\n{HEAD}")
    with server:
        for name in ("text alone", *(given.nice.split(",") if given.nice else ["images beside"])):
            if given.nice and name != "text alone":
                stand_back(server.pid, name)
            rate = 0.0 if name == "text alone" else given.rate
            figures = asyncio.run(measure(port, given.streams, rate, given.seconds, given.detail))
            print(figures.row(f"nice {name}, ms" if name.isdigit() else f"{name}, ms"), flush=True)


if __name__ == "__main__":
    main()
