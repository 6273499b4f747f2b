"""Fetching images: what a server must not be led to, whoever writes the address."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from inflight.config import VisionConfig
from inflight.errors import InvalidRequest
from inflight.vision.addresses import public, resolve
from inflight.vision.fetch import Fetcher, read_url

PUBLIC = "93.184.216.34"
IMAGE = b"\x89PNG" + bytes(1000)
NAMES = {
    "public.example": [PUBLIC],
    "dual.example": ["2606:2800:21f:cb07:6820:80da:af6b:8b2c", PUBLIC],
    "half.example": [PUBLIC, "10.0.0.1"],
    "private.example": ["192.168.1.1"],
    "loopback.example": ["127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
}


class Web:
    """A server on loopback that stands for all public addresses, and what was asked of it.

    Attributes:
        answers: bytes for each target; a function may write them itself.
        asked: the requests' heads.
        connected: (address, port, the server's name for TLS).
    """

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]] = {}
        self.asked: list[str] = []
        self.connected: list[tuple[str, int, str | None]] = []
        self.resolved: list[str] = []
        self.names = dict(NAMES)
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head)
            answer = self.answers.get(head.split(" ")[1], b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def connect(
        self, address: str, port: int, tls: ssl.SSLContext | None, name: str | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.connected.append((address, port, name))
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=name)

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        if host not in self.names:
            return await resolve(host, port)
        return self.names[host]


def answer(body: bytes = IMAGE, *headers: str, status: str = "200 OK", length: int | None = -1) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return answer(b"", f"Location: {to}", status=status)


@asynccontextmanager
async def web(context: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    served = Web()
    server = await asyncio.start_server(served.handle, "127.0.0.1", 0, ssl=context)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()


Body = Callable[[Web, Fetcher], Coroutine[Any, Any, None]]


def fetching(body: Body, tls: ssl.SSLContext | None = None, seconds: float = 10.0, **limits: Any) -> None:
    async def run() -> None:
        async with web() as served:
            config = VisionConfig(**limits)
            await body(served, Fetcher(config, served.resolve, served.connect, tls, seconds))

    asyncio.run(run())


async def refused(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await fetcher(url)
    return str(caught.value)


def test_a_file_is_fetched_from_the_address_that_was_checked() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        served.answers["/a%20%C3%A4.png?x=1"] = answer()
        assert await fetcher("http://Public.Example./a%20ä.png?x=1#part") == IMAGE
        assert served.resolved == ["public.example"]
        assert served.connected == [(PUBLIC, 80, None)]
        head = served.asked[0].lower()
        assert "\r\nhost: public.example\r\n" in head
        assert "\r\naccept-encoding: identity\r\n" in head
        assert "cookie" not in head
        assert "authorization" not in head
        served.answers["/"] = answer()
        await fetcher("http://public.example:8080")
        assert served.connected[-1] == (PUBLIC, 8080, None)
        assert "\r\nhost: public.example:8080\r\n" in served.asked[-1].lower()

    fetching(body)


def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        connect = served.connect

        async def broken(address: str, *rest: Any) -> Any:
            if ":" in address:
                served.connected.append((address, *rest[:1], None))
                raise OSError("no route")
            return await connect(address, *rest)

        fetcher._connect = broken
        served.answers["/"] = answer()
        assert await fetcher("http://dual.example/") == IMAGE
        assert [address for address, *_ in served.connected] == NAMES["dual.example"]

    fetching(body)


@pytest.mark.parametrize(
    "url",
    [
        *(f"http://{name}.example/" for name in ("half", "private", "loopback", "metadata")),
        "http://127.0.0.1/",
        "http://localhost/",
        "http://localhost./",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://017700000001/",
        "http://①②⑦.⓪.⓪.①/",
        "http://0.0.0.0/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[::7f00:1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "http://100.64.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://255.255.255.255/",
        "http://224.0.0.1/",
    ],
)
def test_addresses_that_are_not_public_are_not_connected_to(url: str) -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        text = await refused(fetcher, url)
        assert text.startswith("Could not fetch image: ")
        assert "not public" in text or "cannot be resolved" in text
        assert "10.0.0.1" not in text
        assert not served.connected

    fetching(body)


@pytest.mark.parametrize(
    ("address", "good"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("127.9.9.9", False),
        ("100.127.255.255", False),
        ("192.0.0.8", False),
        ("192.88.99.1", False),
        ("198.18.0.1", False),
        ("203.0.113.1", False),
        ("240.0.0.1", False),
        ("239.1.1.1", False),
        ("0.1.2.3", False),
        ("::ffff:8.8.8.8", False),
        ("64:ff9b::808:808", False),
        ("64:ff9b:1::1", False),
        ("2002:808:808::1", False),
        ("2001:0:1::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("fe80::1%eth0", False),
        ("2606:4700::1%eth0", False),
        ("name.example", False),
        ("", False),
    ],
)
def test_which_addresses_are_public(address: str, good: bool) -> None:
    assert public(address) is good


def test_a_name_that_changes_its_address_meanwhile_gains_nothing() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        answers = iter([[PUBLIC], ["127.0.0.1"]])

        async def rebinding(host: str, port: int) -> list[str]:
            return next(answers)

        fetcher._resolve = rebinding
        served.answers["/"] = answer()
        assert await fetcher("http://rebinding.example/") == IMAGE
        assert served.connected == [(PUBLIC, 80, None)]
        assert "not public" in await refused(fetcher, "http://rebinding.example/")
        assert len(served.connected) == 1

    fetching(body)


def test_redirects_are_checked_like_the_first_address() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        served.answers |= {
            "/good": redirect("/next?a=b"),
            "/next?a=b": redirect("//dual.example/last", "301 Moved Permanently"),
            "/last": answer(),
            "/metadata": redirect("http://169.254.169.254/latest"),
            "/loopback": redirect("http://loopback.example/"),
            "/port": redirect("http://127.0.0.1:22/"),
            "/secure": redirect("https://public.example/last"),
            "/file": redirect("file:///etc/passwd"),
            "/data": redirect("data:image/png;base64,AAAA"),
            "/user": redirect("http://user:secret@public.example/"),
            "/odd": redirect("http://[::1"),
            "/loop": redirect("/loop"),
            "/none": answer(b"", status="302 Found"),
        }
        assert await fetcher("http://public.example/good") == IMAGE
        assert served.resolved == ["public.example", "public.example", "dual.example"]
        for target in ("metadata", "loopback", "port"):
            before = len(served.connected)
            assert "not public" in await refused(fetcher, f"http://public.example/{target}")
            assert len(served.connected) == before + 1
        for target in ("secure", "file", "data"):
            text = await refused(fetcher, f"http://public.example/{target}")
            assert "redirects from http to" in text
        assert "user name" in await refused(fetcher, "http://public.example/user")
        assert "no address" in await refused(fetcher, "http://public.example/odd")
        before = len(served.asked)
        assert "more than 3 redirects" in await refused(fetcher, "http://public.example/loop")
        assert len(served.asked) == before + 4
        assert "status 302" in await refused(fetcher, "http://public.example/none")

    fetching(body)


def test_a_body_is_read_up_to_the_limit_whatever_its_headers_say() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(4096))
            await writer.drain()

    async def endless_chunks(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
            await writer.drain()

    async def endless_head(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-Filler: %s\r\n" % (b"a" * 1000))
            await writer.drain()

    async def endless_hints(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")
            await writer.drain()

    async def body(served: Web, fetcher: Fetcher) -> None:
        large = "exceeds maximum allowed size of 2000 bytes"
        served.answers |= {
            "/endless": endless,
            "/chunks": endless_chunks,
            "/head": endless_head,
            "/hints": endless_hints,
            "/announced": answer(b"", length=2001),
            "/most": answer(bytes(2000)),
            "/closed": answer(bytes(1500), length=None),
            "/hinted": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
            "/chunked": answer(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=None),
        }
        assert await refused(fetcher, "http://public.example/announced") == f"Image size 2001 bytes {large}"
        for target in ("endless", "chunks"):
            assert (await refused(fetcher, f"http://public.example/{target}")).endswith(large)
        for target in ("head", "hints"):
            assert "bytes of headers" in await refused(fetcher, f"http://public.example/{target}")
        assert await fetcher("http://public.example/most") == bytes(2000)
        assert await fetcher("http://public.example/closed") == bytes(1500)
        assert await fetcher("http://public.example/hinted") == IMAGE
        assert await fetcher("http://public.example/chunked") == b"abcde"

    fetching(body, image_max_bytes=2000)


def test_answers_that_are_no_whole_file_are_refused() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        cases = {
            "/short": (
                answer(IMAGE, length=2000),
                "Failed to read image data: the connection ended after 1004 of 2000",
            ),
            "/cut": (
                answer(b"ff\r\nabc", "Transfer-Encoding: chunked", length=None),
                "Failed to read image data: the connection ended after 3 bytes",
            ),
            "/gzip": (answer(gzip.compress(IMAGE), "Content-Encoding: gzip"), "answers with content-encoding gzip"),
            "/both": (answer(b"0\r\n\r\n", "Transfer-Encoding: chunked"), "does not answer in HTTP"),
            "/silent": (b"", "ended the connection without an answer"),
            "/half": (b"HTTP/1.1 200 OK\r\nConte", "ended the connection without an answer"),
            "/noise": (b"\0\xff" * 100, "does not answer in HTTP"),
            "/negative": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "does not answer in HTTP"),
            "/upgrade": (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", ""),
            "/missing": (answer(b"gone", status="404 Not Found"), "'public.example' answers with status 404"),
        }
        for target, (content, text) in cases.items():
            served.answers[target] = content
            assert text in await refused(fetcher, f"http://public.example{target}"), target
        served.answers["/long"] = answer(IMAGE + b"more", length=len(IMAGE))
        assert await fetcher("http://public.example/long") == IMAGE

    fetching(body)


def test_slow_servers_cost_the_time_of_one_image() -> None:
    async def dripping(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(3600)
        return []

    async def body(served: Web, fetcher: Fetcher) -> None:
        served.answers["/"] = dripping
        assert "took longer than 0.2 s" in await refused(fetcher, "http://public.example/")
        fetcher._resolve = never
        assert "took longer than 0.2 s" in await refused(fetcher, "http://public.example/")

    fetching(body, seconds=0.2)


def test_who_leaves_leaves_no_connection() -> None:
    """Whenever they leave: while a name is resolved, while a connection is made, while a body comes."""

    async def body(served: Web, fetcher: Fetcher) -> None:
        closed = 0

        async def waiting(writer: asyncio.StreamWriter) -> None:
            nonlocal closed
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await writer.drain()
            try:
                while True:
                    writer.write(b".")
                    await writer.drain()
                    await asyncio.sleep(0)
            finally:
                closed += 1

        served.answers["/"] = waiting
        for turns in range(40):
            call = asyncio.ensure_future(fetcher("http://public.example/"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
        deadline = time.monotonic() + 20
        while closed < len(served.asked) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert closed == len(served.asked) > 0
        others = [task for task in asyncio.all_tasks() if "Web.handle" not in repr(task)]
        assert others == [asyncio.current_task()]

    fetching(body)


def test_few_images_are_fetched_at_one_time() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        open_now, most = 0, 0
        gate = asyncio.Event()

        async def slow(writer: asyncio.StreamWriter) -> None:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            if open_now == 16:
                gate.set()
            await gate.wait()
            await asyncio.sleep(0.01)
            open_now -= 1
            writer.write(answer())
            await writer.drain()

        served.answers["/"] = slow
        await asyncio.gather(*(fetcher("http://public.example/") for _ in range(40)))
        assert most == 16

    fetching(body)


def test_named_hosts_are_the_only_ones_and_may_be_private() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        served.answers |= {"/": answer(), "/away": redirect("http://public.example/")}
        assert await fetcher("http://loopback.example/") == IMAGE
        assert served.connected == [("127.0.0.1", 80, None)]
        for url in ("http://public.example/", "http://sub.loopback.example/", "http://loopback.example/away"):
            assert "(--media-domains)" in await refused(fetcher, url)

    fetching(body, media_domains=("loopback.example", "private.example"))


def test_nothing_is_fetched_where_that_is_said() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        assert "--media-domains none" in await refused(fetcher, "http://public.example/")
        assert not served.resolved

    fetching(body, media_domains=("none",))


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://user@public.example/",
        "http://:pass@public.example/",
        "http://@public.example/",
        "http://public.example\\@127.0.0.1/",
        "http://public.example:99999/",
        "http://public.example:0/",
        "http://public.example:x/",
        "http://public.example/a b",
        "http://public.example/\r\nX: y",
        "http://public.example/\x00",
        "http://pub\tlic.example/",
        "http://[::1/",
        "http://[public.example]/",
        "http://a..b/",
        "http://" + "a" * 300 + ".example/",
        "http://" + "a." * 200 + "example/",
        "http://public.example/" + "a" * 9000,
        "http://public.example/\ud800",
        "http://%31%32%37.0.0.1/",
        "http://public.example%00.x/",
        "ftp://public.example/",
        "gopher://public.example/",
        "javascript:alert(1)",
    ],
)
def test_malformed_addresses_are_refused(url: str) -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        text = await refused(fetcher, url)
        assert text.startswith("Could not fetch image: ")
        text.encode()
        assert len(text) < 300
        assert not served.connected

    fetching(body)


def test_tls_is_checked_for_the_name(tmp_path: Path) -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("public.example").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def run() -> None:
        async with web(server) as served:
            served.answers |= {"/": answer(), "/plain": redirect("http://public.example/")}
            fetcher = Fetcher(VisionConfig(), served.resolve, served.connect, trusting)
            assert await fetcher("https://public.example/") == IMAGE
            assert served.connected == [(PUBLIC, 443, "public.example")]
            assert "redirects from https to" in await refused(fetcher, "https://public.example/plain")
            assert "certificate is not valid" in await refused(fetcher, "https://dual.example/")
            doubting = Fetcher(VisionConfig(), served.resolve, served.connect)
            assert "certificate is not valid" in await refused(doubting, "https://public.example/")

    asyncio.run(run())


def test_names_are_resolved_by_the_system() -> None:
    assert "127.0.0.1" in asyncio.run(resolve("127.0.0.1", 80))
    with pytest.raises(OSError):
        asyncio.run(resolve("no-such-name.invalid", 80))
    with pytest.raises(OSError):
        asyncio.run(resolve("a" * 70 + ".invalid", 80))


def test_files_are_read_below_the_folder_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "media", tmp_path / "secret"
    (folder / "sub").mkdir(parents=True)
    outside.write_bytes(b"secret")
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "x").write_bytes(b"secret")
    (folder / "a ä.png").write_bytes(IMAGE)
    (folder / "large").write_bytes(bytes(2001))
    (folder / "out").symlink_to(outside)
    (folder / "up").symlink_to("..")
    (folder / "in").symlink_to(folder / "a ä.png")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    base = f"file://{folder}"

    async def body(served: Web, fetcher: Fetcher) -> None:
        assert await fetcher(f"{base}/a%20%C3%A4.png") == IMAGE
        assert await fetcher(f"FILE://localhost{folder}/in") == IMAGE
        outside = "does not lie below --media-path"
        for url, text in (
            (f"{base}/out", outside),
            (f"{base}/up/secret", outside),
            (f"{base}/../secret", outside),
            (f"{base}/%2e%2e/secret", outside),
            (f"{base}-too/x", outside),
            (f"{base}/../missing", outside),
            ("file:///etc/passwd", outside),
            (f"{base}/missing", "No such file"),
            (f"{base}/sub", "Is a directory"),
            (f"{base}/pipe", "is no file"),
            (f"{base}/loop", "Failed to read image data: "),
            (f"{base}/a%00", "Failed to read image data: "),
            (f"{base}/large", "Image size 2001 bytes exceeds maximum allowed size of 2000 bytes"),
            (f"file://host{folder}/in", "names no file"),
            ("file:in", "names no file"),
            ("file://[", "is no address"),
        ):
            assert text in await refused(fetcher, url), url

    fetching(body, media_path=folder, image_max_bytes=2000)


def test_without_a_folder_no_file_is_read() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        text = await refused(fetcher, "file:///etc/passwd")
        assert text.startswith("invalid image content: ")
        assert "--media-path" in text

    fetching(body)


def test_random_addresses_are_read_or_refused() -> None:
    draw = random.Random(1)
    pieces = [
        "http://",
        "https://",
        "//",
        "a.example",
        "@",
        ":",
        "80",
        "[::1]",
        "/",
        "?",
        "#",
        "%",
        "\\",
        "ä",
        "\0",
        "①",
    ]
    for _ in range(3000):
        url = "http" + "".join(draw.choices([*pieces, chr(draw.randrange(0x500))], k=draw.randrange(10)))
        try:
            place = read_url(url)
        except InvalidRequest:
            continue
        assert place.scheme in ("http", "https")
        assert f"{place.target}{place.origin}".isascii()
        assert place.target.startswith(("/", "?")) or not place.target
        assert not any(char <= " " for char in place.target + place.host)


def test_random_answers_are_read_or_refused() -> None:
    async def body(served: Web, fetcher: Fetcher) -> None:
        draw = random.Random(2)
        sound = answer(b"4\r\nabcd\r\n0\r\n\r\n", "Transfer-Encoding: chunked", "X: y", length=None)
        for _ in range(150):
            mutated = bytearray(sound)
            for _ in range(draw.randrange(1, 6)):
                mutated[draw.randrange(len(mutated))] = draw.randrange(256)
            served.answers["/"] = bytes(mutated[: draw.randrange(len(mutated) + 1)])
            try:
                await fetcher("http://public.example/")
            except InvalidRequest:
                continue

    fetching(body)
