"""A stand-in of the Hugging Face hub on loopback: what huggingface_hub asks for when it lists and fetches a model.

with HubServer({"org/name": folder}) as hub:
    subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1 << 16
"""Files of so many bytes are kept apart, as the hub does with LFS: their address redirects to a store."""


@dataclass
class Repository:
    """One model of the hub.

    Attributes:
        files: contents by name.
        token: needed to see it at all; None: it is public.
        gated: a token is needed for its files.
        branches: commits by branch or tag.
        sizes: what is told of files, where it is not the truth.
    """

    files: dict[str, bytes]
    token: str | None = None
    gated: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    sizes: dict[str, int] = field(default_factory=dict)


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class HubServer:
    """Serves repositories; a context manager.

    Attributes:
        cuts: by file name, at which of its bytes the connection is cut, once for each number.
        asked: paths that were asked for, by method, how often.
        ranges: `Range` headers of requests for files.
        sent: how often a file was sent, by name.
        down: every request is answered with this status.
        hold: files are answered once this is set.
    """

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories = dict(repositories)
        self.cuts: dict[str, list[int]] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.ranges: list[str] = []
        self.sent: dict[str, int] = {}
        self.down: int | None = None
        self.hold = threading.Event()
        self.hold.set()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables of a process that is to use this hub, with a cache of its own and no account."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "no_proxy": "127.0.0.1",
            **more,
        }

    @property
    def fetched(self) -> list[str]:
        """Names of files that were sent, sorted."""
        return sorted(self.sent)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is none of a test's."""


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        def __init__(self, *arguments: Any) -> None:
            self.hub = hub
            super().__init__(*arguments)

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked[self.command, path] += 1
        if self.hub.down is not None:
            return self._error(self.hub.down, "", "down")
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models" if api else "").lstrip("/").split("/")
        repo = self.hub.repositories.get("/".join(parts[:2]))
        shown = self.headers.get("Authorization", "")
        if shown and shown != "Bearer right":
            return self._error(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.token is not None and shown != f"Bearer {repo.token}"):
            return self._error(401 if not shown else 404, "RepoNotFound", "Repository not found")
        rest = parts[2:]
        if api:
            return self._listing("/".join(parts[:2]), repo, rest)
        if repo.gated and shown != "Bearer right":
            return self._error(401, "GatedRepo", "Access to this model is restricted")
        return self._file("/".join(parts[:2]), repo, rest)

    def _listing(self, name: str, repo: Repository, rest: list[str]) -> None:
        what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        commit = repo.branches.get(revision) or (revision if revision in repo.branches.values() else None)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "tree":
            return self._json(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                        **({"lfs": _lfs(data)} if len(data) >= LARGE else {}),
                    }
                    for path, data in repo.files.items()
                ]
            )
        siblings = [{"rfilename": path, "size": repo.sizes.get(path, len(data))} for path, data in repo.files.items()]
        return self._json(
            {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        )

    def _file(self, name: str, repo: Repository, rest: list[str]) -> None:
        kind, revision, path = rest[0], rest[1], "/".join(rest[2:])
        data = repo.files.get(path)
        commit = repo.branches.get(revision, revision)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if kind == "resolve" and len(data) >= LARGE:
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            location = f"{self.hub.address}/{name}/content/{revision}/{path}"
            return self._send(302, b"", {**headers, **linked, "Location": location})
        return self._body(path, data, {**headers, "ETag": f'"{etag}"'})

    def _body(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        status, begin = 200, 0
        if wanted:
            self.hub.ranges.append(wanted)
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            status = 206
        if self.command == "GET":
            self.hub.hold.wait(60)
            self.hub.sent[path] = self.hub.sent.get(path, 0) + 1
        cuts = self.hub.cuts.get(path, [])
        if self.command == "GET" and cuts:
            self._send(status, data[begin : cuts.pop(0)], headers, len(data) - begin)
            self.close_connection = True
            return
        self._send(status, data[begin:], headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, text: str, headers: Mapping[str, str] = {}) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._send(status, json.dumps({"error": text}).encode(), {"X-Error-Message": text, **named, **headers})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _lfs(data: bytes) -> dict[str, Any]:
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
