"""`inflight models`: loads, unloads and lists the models of a running server."""

from __future__ import annotations

import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from inflight.commands.options import Command, Option, UsageError
from inflight.config import existing_file, seconds, switch, whole
from inflight.errors import InflightError

EXAMPLES = """\
examples:
  inflight models list                           what the server on 127.0.0.1:8080 knows, and in which state it is
  inflight models load digits                    load a model of its folders (serve --repository DIR --admin)
  inflight models load digits --version 2
  inflight models load pirate --adapter-of tales --path adapters/pirate
  inflight models unload digits --address https://models.example:443 --tls-ca ca.pem
"""

ACTIONS = ("load", "unload", "list")
_DEFAULT = "http://127.0.0.1:8080"
_LOOKED = 0.1
"""Seconds between two looks whether a model has ended."""


class Refused(InflightError):
    """The server refused, or cannot be reached."""


def run(values: Mapping[str, Any]) -> int:
    """Does what is asked and prints the outcome; returns 1 if the server refuses."""
    action, name = values["action"], values["model"]
    if action not in ACTIONS:
        raise UsageError(f"write one of: {', '.join(f'inflight models {each}' for each in ACTIONS)}")
    if action != "list" and not name:
        raise UsageError(f"MODEL is missing; write for example: inflight models {action} digits")
    server = _Server(values)
    try:
        if action == "list":
            _show(server.index())
        elif action == "load":
            given = {key: values[key] for key in ("version", "path", "rolling", "adapter_of") if values[key]}
            server.ask(f"models/{quote(name, safe='')}/load", {"parameters": given} if given else {})
            print(f"{name} is loaded")
        else:
            server.ask(f"models/{quote(name, safe='')}/unload", {})
            server.wait_for_end(name)
            print(f"{name} is unloaded")
    except Refused as error:
        print(f"inflight models: {error}", file=sys.stderr)
        return 1
    return 0


def _show(models: list[dict[str, str]]) -> None:
    rows = [("MODEL", "VERSION", "STATE", "WHY")]
    rows += [
        (each["name"], each.get("version", "-"), each.get("state", "not loaded"), each.get("reason", ""))
        for each in models
    ]
    widths = [max(len(row[at]) for row in rows) for at in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip())


class _Server:
    """The repository of a running server, by HTTP."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        address: str = values["address"]
        address = address if "://" in address else f"http://{address}"
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"'{address}' cannot be reached; write http://host:port or https://host:port")
        self._url = f"{parts.scheme}://{parts.netloc}/v2/repository"
        self._key: str | None = values["api_key"]
        self._timeout: float = values["timeout"]
        self._context = ssl.create_default_context(cafile=values["tls_ca"]) if parts.scheme == "https" else None

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Sends one request; returns the answer's document.

        Raises:
            Refused: with the server's text.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self._url}/{path}", json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout, context=self._context) as reply:
                return json.loads(reply.read() or b"{}")
        except urllib.error.HTTPError as error:
            with error:
                raise Refused(_text(error.read(), error.code)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Refused(f"{self._url} cannot be reached: {reason}; is the server running?") from None

    def index(self) -> list[dict[str, str]]:
        """The entries of the index."""
        found: list[dict[str, str]] = self.ask("index", {})
        return found

    def wait_for_end(self, name: str) -> None:
        """Waits until a model's processes have ended.

        Raises:
            Refused: it takes longer than the time-out.
        """
        end = time.monotonic() + self._timeout
        while any(each["name"] == name and each.get("state") == "UNLOADING" for each in self.index()):
            if time.monotonic() > end:
                raise Refused(f"{name} still answers requests that it has; it is unloaded when they are done")
            time.sleep(_LOOKED)


def _text(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers with status {status}"


COMMAND = Command(
    name="models",
    summary="load, unload and list the models of a running server",
    description="Changes which models a running server serves, and lists those that it knows.",
    examples=EXAMPLES,
    options=(
        Option("action", str, "load, unload or list.", metavar="ACTION", positional=True),
        Option("model", str, "Name of the model.", metavar="MODEL", positional=True),
        Option("version", whole(1), "Version to load. Default: the newest.", metavar="N"),
        Option("path", str, "Path on the server of a model in one of its folders, to load as MODEL.", metavar="PATH"),
        Option(
            "adapter-of",
            str,
            "Load a LoRA adapter as MODEL, for the language model NAME that serves.",
            metavar="NAME",
        ),
        Option(
            "rolling",
            switch,
            "Load a language model's files again, one replica after the other, instead of a second copy beside it.",
            default=False,
        ),
        Option("address", str, f"HTTP address of the server. Default {_DEFAULT}.", default=_DEFAULT, metavar="ADDRESS"),
        Option("api-key", str, "API key to show, where the server asks for one.", metavar="KEY", secret=True),
        Option("timeout", seconds, "Seconds to wait. Default 1800.", default=1800.0, metavar="SECONDS"),
        Option("tls-ca", existing_file, "PEM file of the authority to trust.", metavar="FILE"),
    ),
    run=run,
)
