"""What README.md and docs/ say is true: their servables are served, their calls are sent, their answers compared.

A fenced block says by the words after its language what it is: `servable=<name>` is a servable_config.py,
`file=<name>` a module beside the server, `client` a program that prints what its comments say, `script=<name>` one
that is run on its own. In a `console` block, commands follow `$` and are followed by what they print.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest

from inflight.cli import build_parser
from inflight.commands import COMMANDS
from inflight.errors import WIRE_ERRORS, InflightError
from tests.e2e.running import Served, eventually, free_address, process, request, serve

ROOT = Path(__file__).resolve().parents[2]
DOCS = ("servables", "serving", "generation", "images", "clients", "mindspore")
IMAGES = "inflight_image"
"""How the names of metrics of images begin."""
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS)]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    number: int
    language: str
    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for number, (info, text) in enumerate(FENCE.findall(page.read_text())):
            language, _, rest = info.partition(" ")
            kind, _, name = rest.partition("=")
            yield Block(page.stem, number, language, kind, name, text)


BLOCKS = list(blocks())


def of(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


def console() -> list[Block]:
    return [block for block in BLOCKS if block.language == "console"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server with every servable of the pages, the model file of the README and the plug-in."""
    work = tmp_path_factory.mktemp("docs")
    for block in of("servable"):
        folder = work / "servables" / block.name
        folder.mkdir(parents=True)
        (folder / "servable_config.py").write_text(block.text)
    shutil.copytree(ROOT / "examples" / "digits" / "digits" / "1", work / "servables" / "digits" / "1")
    for block in of("file"):
        (work / block.name).write_text(block.text)
    np.save(work / "weights.npy", np.array([[1, 0, 1], [0, 1, 1]], np.float32))
    (line,) = re.findall(r"^INFLIGHT_RUNTIMES=(\S+) inflight serve weights\.npy$", page_text("servables"), re.MULTILINE)
    environment = {"PYTHONPATH": str(work), "INFLIGHT_RUNTIMES": line}
    onnx = ROOT / re.findall(r"inflight serve (examples\S+\.onnx)", page_text("README"))[0]
    with serve(work, str(work / "servables"), str(work / "weights.npy"), str(onnx), environment=environment) as server:
        yield server


def page_text(stem: str) -> str:
    return next(page for page in PAGES if page.stem == stem).read_text()


def at(served: Served, text: str) -> str:
    """The text with the addresses of this server."""
    return text.replace("127.0.0.1:8080", served.http).replace("127.0.0.1:8081", served.grpc)


def run(command: list[str]) -> str:
    """What a command prints, in the root of the project, with this Python's commands on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected(program: str) -> list[str]:
    """What the comments of a program say that it prints: whole lines, and those behind a print."""
    lines = program.splitlines()
    behind = (line.partition("  # ")[2] if "print(" in line else "" for line in lines)
    return [
        whole[2:] if whole.startswith("# ") else said for whole, said in zip(lines, behind) if whole[:2] == "# " or said
    ]


def matches(wanted: str, printed: str) -> bool:
    """Equal, where `...` stands for anything within a line."""
    pattern = ".*".join(re.escape(part) for part in wanted.strip().split("..."))
    return re.fullmatch(pattern, printed.strip()) is not None


@pytest.mark.parametrize("block", of("client"), ids=str)
def test_a_program_prints_what_its_comments_say(served: Served, block: Block) -> None:
    printed = run([sys.executable, "-c", at(served, block.text)])
    assert matches("\n".join(expected(block.text)), printed), printed


@pytest.mark.parametrize("block", console(), ids=str)
def test_a_command_prints_what_follows_it(served: Served, block: Block) -> None:
    for part in block.text.split("$ ")[1:]:
        command, _, answer = part.partition("\n")
        if command.startswith("curl") and shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        printed = run(["sh", "-c", at(served, command)])
        assert matches(answer, printed), f"{command}\n{printed}"


def test_the_script_that_starts_a_server(served: Served, tmp_path: Path) -> None:
    (block,) = (block for block in of("script") if block.page == "serving")
    servables = served.cwd.parent / "servables"
    text = block.text.replace('"servables"', repr(str(servables))).replace(
        "server.wait()", "print(http, flush=True)\nserver.wait()"
    )
    text = text.replace("server.start_http", "http = server.start_http")
    for address in ("0.0.0.0:8080", "0.0.0.0:8081"):
        assert address in text
        text = text.replace(address, "127.0.0.1:0")
    (tmp_path / block.name).write_text(text)
    with process(tmp_path, str(tmp_path / block.name)) as started:
        http = "127.0.0.1:" + started.line("127.0.0.1:")
        assert request(http, "GET", "/health/ready")[0] == 200
        assert b'"replicas":2' in request(http, "GET", "/")[1]
        assert started.end() == 0, started.stderr.read_text()


def test_the_scripts_of_mindspore_serving(served: Served, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "tensor_add" / "old_style" / "tensor_add", tmp_path / "tensor_add")
    start, call = (block for block in of("script") if block.page == "mindspore")
    grpc, http = f"unix:{tmp_path}/grpc.sock", free_address()
    for block in (start, call):
        assert "127.0.0.1:5500" in block.text
        text = block.text.replace("127.0.0.1:5500", grpc).replace("127.0.0.1:1500", http)
        (tmp_path / block.name).write_text(text)
    with process(tmp_path, str(tmp_path / start.name)) as started:
        started.line("Serving: Serving RESTful server start success")
        assert matches("\n".join(expected(call.text)), run([sys.executable, str(tmp_path / call.name)]))
        assert started.end() == 0, started.stderr.read_text()


def test_the_script_with_a_language_model(tmp_path: Path) -> None:
    (block,) = (block for block in of("script") if block.page == "generation")
    (tmp_path / block.name).write_text(block.text.replace('"models/pocket"', repr(str(ROOT / "models" / "pocket"))))
    lines = run([sys.executable, str(tmp_path / block.name)]).splitlines()
    assert len(lines) >= 3
    assert lines[0].endswith(("length", "eos_token"))


def test_every_servable_is_called() -> None:
    calls = "".join(block.text for block in (*console(), *of("client")))
    silent = [
        block.name for block in of("servable") if f"/{block.name}:" not in calls and f'"{block.name}"' not in calls
    ]
    assert silent == []


def test_all_python_is_python() -> None:
    for block in BLOCKS:
        if block.language == "python":
            ast.parse(block.text, str(block))
            assert block.kind in ("servable", "file", "client", "script"), f"{block} is not tried by any test"


def test_commands_have_the_flags_that_are_shown() -> None:
    lines = [
        line for block in BLOCKS for line in block.text.splitlines() if re.match(r"(\$ |\w+=\S+ )?inflight ", line)
    ]
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        _, left = build_parser().parse_known_args(words[words.index("inflight") + 1 :])
        assert not [word for word in left if word.startswith("-")], line


def test_the_table_of_options_is_complete_and_has_the_defaults() -> None:
    (command,) = (command for command in COMMANDS if command.name == "serve")
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", page_text("serving"), re.MULTILINE)
    shown = {flag: default for flags, default in rows for flag in re.findall(r"--([a-z-]+)", flags)}
    named = {option.name: option for option in command.options if not option.positional}
    assert set(shown) == {*named, "config", "print-config"}
    for name, option in named.items():
        if option.default not in (None, False):
            default = option.default
            text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).removesuffix(".0")
            assert text in shown[name], name


def test_the_table_of_metrics_is_complete(served: Served) -> None:
    for body in (b'{"instances":{"x":1.0,"weight":2.0}}', b"{}"):
        request(served.http, "POST", "/model/calc:scale", body)
    with grpc.insecure_channel(served.grpc) as channel:
        channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10)

    def scraped() -> dict[str, set[str]]:
        text = request(served.http, "GET", "/metrics")[1].decode()
        found: dict[str, set[str]] = {name: set() for name in re.findall(r"^# TYPE (inflight_\w+)", text, re.MULTILINE)}
        for name, labels in re.findall(r"^(inflight_\w+?)(?:_bucket|_sum|_count)?\{(.*)\}", text, re.MULTILINE):
            found[name] |= set(re.findall(r'(\w+)="', labels)) - {"le"}
        return found

    table = re.findall(r"^\| `(inflight_\w+)` \| (.*?) \|", page_text("serving"), re.MULTILINE)
    # Those of images exist where a model reads images (test_image_clients.py), those of keys where there are keys
    # (test_keys.py).
    others = (IMAGES, "inflight_key_")
    wanted = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in table if not name.startswith(others)}
    request(served.http, "POST", "/model/calc:scale", b'{"instances":{"x":"text","weight":"text"}}')
    eventually(lambda: scraped() == wanted, 5, f"{scraped()} is not {wanted}")


def test_the_causes_are_complete() -> None:
    (listed,) = re.findall(r"A `cause` is one of (.*?)\.\n", page_text("serving"), re.DOTALL)
    kinds: list[type[InflightError]] = [InflightError, *WIRE_ERRORS.values()]
    causes = {kind.cause for kind in kinds}
    assert set(re.findall(r"`(\w+)`", listed)) == causes - {"registration", "config", "start"}


def test_links_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"(?<!!\[)\]\(([^)#]+)\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
