"""Kills the processes of a server that runs as it does by default, at any time, and looks what its clients see of it.

    python -m tests.chaos --kills 200
    python -m tests.chaos --kills 0 --answers 100000      # the server's memory after 10^3, 10^4, ... answers

The server has a classic servable (`examples/digits`), a language model whose context is so long that free memory
decides its cache, and a servable with such a model between its functions. Clients ask over REST, gRPC and in streams,
greedily and with seeds, and compare every answer with the one from before the kills. In the end the server itself is
killed, and nothing may be left of it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from inflight.client import Client
from tests.e2e.running import Served, connect, eventually, request, serve, shared_memory, write_servable

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "models" / "pocket"
IMAGES = sorted((ROOT / "examples" / "digits" / "images").glob("*.png"))[:5]
NAMES = ("Mia", "Bruno", "Ada", "Leo", "Zoe")
JSON = {"Content-Type": "application/json"}
PATIENCE = 300.0
"""Seconds a client waits for one answer: it waits while processes are killed again and again."""
YOUNG = 1.0
"""Seconds after its start in which a process surely still loads."""

TALES = """
    import json
    from inflight.servable import add_stage, declare_generator, register_method

    writer = declare_generator({folder!r})

    def greedy_prompt(name):
        return f"{{name}} went for a walk.", json.dumps({{"max_new_tokens": 60}})

    def seeded_prompt(name):
        return f"{{name}} went for a walk.", json.dumps({{"max_new_tokens": 60, "temperature": 0.9, "seed": 5}})

    def title(name, story):
        return "About " + name, story

    @register_method(output_names=("title", "story"))
    def greedy(name):
        prompt, parameters = add_stage(greedy_prompt, name, outputs_count=2)
        return add_stage(title, name, add_stage(writer, prompt, parameters, outputs_count=1), outputs_count=2)

    @register_method(output_names=("title", "story"))
    def seeded(name):
        prompt, parameters = add_stage(seeded_prompt, name, outputs_count=2)
        return add_stage(title, name, add_stage(writer, prompt, parameters, outputs_count=1), outputs_count=2)
"""

Ask = Callable[[int], Any]
"""Asks for the answer to one of five questions."""


@dataclass
class Report:
    """What a run came to.

    Attributes:
        kills, young: processes killed, by servable and part; of them, those that had hardly begun to load.
        answers: right ones while processes were killed, by client.
        problems: what a client saw that was no right answer.
        memory: bytes that the server's process had resident, before the first kill and after each.
        grown: bytes that it had resident after so many answers.
        left: what was left after the server itself was killed.
    """

    kills: Counter[str] = field(default_factory=Counter)
    young: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    grown: dict[int, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """For people."""
        kills = sum(self.kills.values())
        yield f"{kills} kills, {self.young} of them within {YOUNG:g} s of a start: {dict(self.kills)}"
        yield f"{sum(self.answers.values())} answers: {dict(self.answers)}"
        yield f"{len(self.problems)} errors or other answers"
        yield from (f"  {problem[:500]}" for problem in self.problems[:20])
        points = [count for count in (0, 3, 10, 25, 50, 100, 150, 200) if count < len(self.memory)]
        told = ", ".join(f"{count} kills {self.memory[count] / (1 << 20):.1f}" for count in points)
        yield f"the server's memory, MiB: {told}, last {self.memory[-1] / (1 << 20):.1f}"
        if self.grown:
            told = ", ".join(f"{count} answers {size / (1 << 20):.1f}" for count, size in self.grown.items())
            yield f"and before the kills: {told}"
        yield f"left after kill -9 of the server: {self.left or 'nothing'}"


def long_context(folder: Path) -> Path:
    """The pocket model with a context of a million tokens."""
    shutil.copytree(POCKET, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 20}))
    return folder


# Clients


def post(address: str, path: str, body: Any, headers: dict[str, str] = JSON) -> bytes:
    connection = connect(address, PATIENCE)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read()
        assert response.status == 200, f"status {response.status}: {data[:300]!r}"
        return data


def digits_rest(address: str, number: int) -> Any:
    image = {"b64": base64.b64encode(IMAGES[number].read_bytes()).decode()}
    answer = json.loads(post(address, "/model/digits:classify", {"instances": [{"image": image}] * 3}))
    assert "instances" in answer, answer
    return answer["instances"]


def digits_grpc(client: Client, number: int) -> Any:
    found = client.infer([{"image": IMAGES[number].read_bytes()}] * 3)
    assert isinstance(found, list), found
    return [(int(one["label"]), float(one["score"])) for one in found]


def generated(address: str, sampled: bool, number: int) -> Any:
    """Tokens and their log-probabilities."""
    parameters: dict[str, Any] = {"max_new_tokens": 50, "details": True}
    if sampled:
        parameters |= {"do_sample": True, "seed": number, "temperature": 0.9}
    answer = json.loads(post(address, "/generate", {"inputs": f"{NAMES[number]} was", "parameters": parameters}))
    return [(token["id"], token["logprob"]) for token in answer["details"]["tokens"]]


def frames(data: bytes) -> list[str]:
    """What the events of a stream say; comments, which keep a connection open, are left out."""
    events = data.decode().split("\n\n")
    assert events.pop() == "", "the stream ends in the middle of an event"
    return [event.removeprefix("data: ") for event in events if not event.startswith(":")]


def chat(address: str, sampled: bool, number: int) -> Any:
    """The parts of a streamed answer, which must come to one text."""
    body: dict[str, Any] = {"stream": True, "max_tokens": 80, "temperature": 0.9 if sampled else 0}
    body |= {"messages": [{"role": "user", "content": f"Who is {NAMES[number]}?"}], "seed": number}
    *events, last = frames(post(address, "/v1/chat/completions", body))
    assert last == "[DONE]", last
    parts = [json.loads(event) for event in events]
    assert all("choices" in part for part in parts), parts[-1]
    return "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])


def tale_rest(address: str, method: str, number: int) -> Any:
    answer = json.loads(post(address, f"/model/tales:{method}", {"instances": [{"name": NAMES[number]}]}))
    assert "instances" in answer, answer
    return answer["instances"]


def tale_stream(address: str, method: str, number: int) -> Any:
    """The text while it is written, and the outputs."""
    body = {"instances": [{"name": NAMES[number]}]}
    streamed = post(address, f"/model/tales:{method}", body, {**JSON, "Accept": "text/event-stream"})
    *parts, last = [json.loads(event) for event in frames(streamed)]
    text = "".join(one["text"] for part in parts for one in part["instances"])
    (outputs,) = last["instances"]
    assert outputs["story"] == text, (outputs, text)
    return outputs["title"], outputs["story"]


def tale_grpc(client: Client, number: int) -> Any:
    found = client.infer([{"name": NAMES[number]}])
    assert isinstance(found, list), found
    assert "story" in found[0], found
    return found


def clients(server: Served, stack: contextlib.ExitStack) -> dict[str, Ask]:
    """Every kind of client, by name."""

    def over_grpc(servable: str, method: str) -> Client:
        return stack.enter_context(Client(server.grpc, servable, method, timeout=PATIENCE))

    return {
        "digits, REST": partial(digits_rest, server.http),
        "digits, gRPC": partial(digits_grpc, over_grpc("digits", "classify")),
        "generate, greedy": partial(generated, server.http, False),
        "generate, seeded": partial(generated, server.http, True),
        "chat stream, greedy": partial(chat, server.http, False),
        "chat stream, seeded": partial(chat, server.http, True),
        "tale, REST": partial(tale_rest, server.http, "greedy"),
        "tale, stream": partial(tale_stream, server.http, "seeded"),
        "tale, gRPC": partial(tale_grpc, over_grpc("tales", "seeded")),
    }


class Load:
    """Every client in a loop of its own, comparing what it gets with what it got before."""

    def __init__(self, asks: dict[str, Ask], report: Report) -> None:
        self._report = report
        self._ended = threading.Event()
        wanted = {name: [ask(number) for number in range(len(NAMES))] for name, ask in asks.items()}
        self._threads = [
            threading.Thread(target=self._loop, args=(name, ask, wanted[name]), daemon=True)
            for name, ask in asks.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Returns when every client has its last answer."""
        self._ended.set()
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in self._threads)
        if stuck:
            self._report.problems.append(f"{stuck} clients still wait {PATIENCE:g} seconds after the last kill")

    def _loop(self, name: str, ask: Ask, wanted: list[Any]) -> None:
        number = 0
        while not self._ended.is_set():
            number = (number + 1) % len(wanted)
            try:
                found = ask(number)
            except Exception as error:  # whatever it is, a client saw it
                self._report.problems.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if found == wanted[number]:
                self._report.answers[name] += 1
            else:
                self._report.problems.append(f"{name}: {found} instead of {wanted[number]}")


# Kills


def children(pid: int) -> dict[int, str]:
    """The server's workers and ranks, and what they are."""
    found: dict[int, str] = {}
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            told = dict(part[2:].split("=", 1) for part in child.cmdline() if part.startswith("--") and "=" in part)
            if child.status() != psutil.STATUS_ZOMBIE and "servable_name" in told:
                found[child.pid] = f"{told['servable_name']}/{told['device_id']}"
    return found


def kill_at_random(server: Served, kills: int, most: float, draw: random.Random, report: Report) -> None:
    """Kills one after the other, whatever it does; between two pass up to `most` seconds, as loading may take."""
    process = psutil.Process(server.pid)
    report.memory.append(process.memory_info().rss)
    while sum(report.kills.values()) < kills:
        time.sleep(draw.uniform(0, most))
        running = children(server.pid)
        if not running:
            continue
        victim = draw.choice(sorted(running))
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            age = time.time() - psutil.Process(victim).create_time()
            os.kill(victim, signal.SIGKILL)
            report.kills[running[victim]] += 1
            report.young += age < YOUNG
            report.memory.append(process.memory_info().rss)


def ask_only(server: Served, answers: int, report: Report) -> None:
    """Lets the clients ask until they have so many answers, and looks at the server's memory at each power of ten."""
    process, wanted = psutil.Process(server.pid), 1000
    while (wanted := min(wanted, answers)) not in report.grown:
        if sum(report.answers.values()) >= wanted:
            report.grown[wanted] = process.memory_info().rss
            print(f"{wanted} answers, {report.grown[wanted] / (1 << 20):.1f} MiB", flush=True)
            wanted *= 10
        elif report.problems:
            return
        time.sleep(0.05)


def end_by_kill(server: Served, before: list[str], report: Report) -> None:
    """`kill -9` of the server, and what is left of it after 15 seconds."""
    family = psutil.Process(server.pid).children(recursive=True)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(15)
    _, alive = psutil.wait_procs(family, 15)
    report.left += [f"process {' '.join(one.cmdline())}" for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    report.left += [f"shared memory {name}" for name in shared_memory() if name not in before and "inflight" in name]
    folder = server.cwd.parent
    report.left += [f"socket {path}" for path in folder.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
    sockets = Path("/proc/net/unix")
    if sockets.exists():
        report.left += [line for line in sockets.read_text().splitlines() if str(folder) in line]


def run(folder: Path, kills: int, most: float, seed: int, *, alone: bool = True, answers: int = 0) -> Report:
    """Starts a server below `folder`, kills its processes, and the server itself in the end.

    Args:
        answers: to so many requests, before anything is killed.
        alone: a language model stands beside the one of the servable, and answers what asks for no servable.
    """
    report, draw = Report(), random.Random(seed)
    model = long_context(folder / "long")
    write_servable(folder / "servables", "tales", TALES.format(folder=str(model)))
    paths = [str(ROOT / "examples" / "digits" / "digits"), str(folder / "servables" / "tales")]
    paths += [str(model)] if alone else []
    before = shared_memory()
    temporary = folder / "tmp"
    temporary.mkdir()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve(folder, *paths, environment={"TMPDIR": str(temporary)}))
        load = Load(clients(server, stack), report)
        load.start()
        if answers:
            ask_only(server, answers, report)
        kill_at_random(server, kills, most, draw, report)
        load.end()
        try:
            eventually(lambda: request(server.http, "GET", "/health/ready")[0] == 200, 60, "it is not ready again")
        except AssertionError as error:
            report.problems.append(str(error))
        report.memory.append(psutil.Process(server.pid).memory_info().rss)
        end_by_kill(server, before, report)
        if report.problems:
            report.problems.append(f"the server's log ends with {server.stderr.read_text()[-3000:]}")
    return report


def main() -> int:
    """0 where nobody saw anything and nothing is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--answers", type=int, default=0, help="to so many requests before the first kill")
    parser.add_argument("--most", type=float, default=3.0, help="seconds between two kills at most")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="repeats a run's draws")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        report = run(Path(folder), given.kills, given.most, given.seed, answers=given.answers)
        print(f"{time.monotonic() - began:.0f} seconds")
    print("\n".join(report.lines()))
    return int(bool(report.problems or report.left))


if __name__ == "__main__":
    sys.exit(main())
