"""A group of ranks: rank tables, who is let in, what a batch does, faults. The ranks are threads of the test."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from inflight.config import RanksConfig
from inflight.contract import GraphSpec, TensorSpec
from inflight.distributed import AgentsConfig, GroupModel, Launcher, Loss, RankGroup, check_ranks, read_rank_table
from inflight.distributed import agent as agent_module
from inflight.distributed import gathering as gathering_module
from inflight.distributed import group as group_module
from inflight.distributed import launcher as launcher_module
from inflight.distributed import messages as messages_module
from inflight.distributed.agent import Agent, AgentJob
from inflight.distributed.connection import Connection, connect
from inflight.distributed.messages import (
    PREFIX,
    PROTOCOL,
    Acquire,
    AgentsFailed,
    AnyMessage,
    Exit,
    GroupConfig,
    Meet,
    Ping,
    Pong,
    Predict,
    Predicted,
    ProtocolError,
    RankEnded,
    RankPlace,
    Refused,
    Register,
    Registered,
    WireGraph,
    WireTensor,
    arrays_of,
    describe,
    encode,
)
from inflight.distributed.signature import group_signature
from inflight.errors import ConfigError, PredictFailed, StartError
from inflight.link import Guard
from inflight.runtime import LoadRequest
from inflight.version import __version__
from tests.e2e.running import eventually, free_port

X = TensorSpec("x", "float32", (2, 2))
ADD = GraphSpec((X, X), (X,))
LATER = GraphSpec((), (X,))


def servers(ips: dict[str, list[int]]) -> dict[str, Any]:
    """A rank table of the first form: device ids by address."""
    rank = iter(range(1000))
    return {
        "server_list": [
            {"server_id": ip, "device": [{"device_id": str(item), "rank_id": str(next(rank))} for item in devices]}
            for ip, devices in ips.items()
        ]
    }


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


# Rank tables


def test_both_forms_of_a_rank_table(tmp_path: Path) -> None:
    ranks = [RankPlace("10.0.0.1", 0), RankPlace("10.0.0.1", 1), RankPlace("10.0.0.2", 0)]
    content = {**servers({"10.0.0.1": [0, 1], "10.0.0.2": [0]}), "status": "completed", "device_ip": 5}
    table = read_rank_table(write(tmp_path, content))
    assert list(table.ranks) == ranks
    assert json.loads(table.text) == content
    instances = [
        {"server_id": place.ip, "rank_id": str(rank), "devices": [{"device_id": str(place.device_id)}]}
        for rank, place in enumerate(ranks)
    ]
    assert list(read_rank_table(write(tmp_path, {"group_list": [{"instance_list": instances}]})).ranks) == ranks


DEVICE = {"device_id": "0", "rank_id": "0"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "parse error:"),
        ("[]", "is not json object"),
        ({}, "server_list attr is empty in"),
        ({"server_list": []}, "server_list attr is empty in"),
        ({"server_list": [{"device": [DEVICE]}]}, "server_id attr is empty in"),
        ({"server_list": [{"server_id": "a", "device": [{**DEVICE, "device_id": 0}]}]}, "device_id attr is empty in"),
        ({"server_list": [{"server_id": "a", "device": [{**DEVICE, "device_id": "00"}]}]}, "device_idattr is invalid"),
        ({"server_list": [{"server_id": "a", "device": [{**DEVICE, "rank_id": "x"}]}]}, "rank_idattr is invalid"),
        (
            {"server_list": [{"server_id": "a", "device": [{**DEVICE, "rank_id": "1"}]}]},
            "device size not match rank_id",
        ),
        ({"group_list": [{"instance_list": [{"server_id": "a", "rank_id": "0"}]}]}, "devices attr is empty in"),
    ],
)
def test_bad_rank_tables(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(StartError, match=re.escape(text)):
        read_rank_table(write(tmp_path, content))


def test_a_missing_rank_table(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="failed to get realpath of：/no/such"):
        read_rank_table(Path("/no/such"))


@pytest.mark.parametrize(
    ("ips", "sizes", "text"),
    [
        ({"a": [0, 1, 2]}, (3, 2), "Rank size must be an integral multiple of stage size"),
        ({"a": [0, 1]}, (8, 1), "Rank size 2 declared in rank table file '.*' not equal to 8 declared in servable"),
        ({"a": [0, 1, 1]}, (3, 1), "rank 2 device id repeatedly used by rank 1 in device ip a"),
        ({"a": [0, 8]}, (2, 1), "rank 1 device id cannot larger than 8"),
        ({"a": [0, 1]}, (2, 2), "Rank size 2 must be >= card count 8"),
        ({"a": [0, 1, 2, 3, 4, 5, 7, 6]}, (8, 2), "expected device id of rank 6 to be 6"),
        ({"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}, (8, 2), "expected device ip b of rank 4"),
        ({"a": [0, 1], "b": [0, 1]}, (4, 1), ""),
        ({"a": list(range(8)), "b": list(range(8))}, (16, 2), ""),
    ],
)
def test_ranks_against_the_declaration(tmp_path: Path, ips: dict[str, list[int]], sizes: Any, text: str) -> None:
    table = read_rank_table(write(tmp_path, servers(ips)))
    if not text:
        check_ranks(table, *sizes)
        return
    with pytest.raises(StartError, match=text):
        check_ranks(table, *sizes)


# The whole model's signature

SMALL = GraphSpec((X,), (X,))
OTHER = GraphSpec((X, X), (TensorSpec("y", "float32", (4,)),))


@pytest.mark.parametrize(
    ("ranks", "stages", "text"),
    [
        ([[ADD], [ADD, ADD]], 1, "Rank 1 sub-graph count 2 not match"),
        ([[LATER], [ADD]], 1, "Rank 0 has no inputs"),
        ([[ADD], [GraphSpec((X, X), ())]], 1, "Rank 1 has no outputs"),
        ([[ADD], [SMALL]], 1, "Rank 1 input infos not match rank 0.*you can check if the actual stage size"),
        ([[ADD], [SMALL]], 2, "Expect stage 0\\(other stages have empty inputs\\) or all stages have same inputs"),
        ([[ADD], [ADD], [LATER], [ADD]], 2, "Rank 3 input infos not match rank 0"),
        ([[ADD], [OTHER]], 1, "Rank 1 output infos not match rank 0"),
        ([[ADD], [OTHER]], 2, ""),
        ([[ADD], [ADD], [LATER], [LATER]], 2, ""),
    ],
)
def test_ranks_fit_together(ranks: list[list[GraphSpec]], stages: int, text: str) -> None:
    if text:
        with pytest.raises(StartError, match=text):
            group_signature(ranks, stages)
    else:
        graph = group_signature(ranks, stages)[0]
        assert (graph.inputs, graph.outputs) == (ADD.inputs, ranks[-1][0].outputs)


# Messages


def test_a_message_with_arrays_travels_whole() -> None:
    ours, theirs = (Connection(sock) for sock in socket.socketpair())
    theirs.known = True
    arrays = [np.arange(6, dtype=np.float16).reshape(2, 3), np.array(True), np.zeros((0, 4)), np.arange(8)[::2]]
    assert ours.send(Predict(1, 0, True, describe(arrays)), arrays)
    received = theirs.receive(10)
    assert received is not None
    message, blob = received
    assert isinstance(message, Predict)
    for array, other in zip(arrays, arrays_of(message.inputs, blob), strict=True):
        assert array.dtype == other.dtype
        assert np.array_equal(array, other)
    ours.release()
    assert theirs.receive(10) is None
    theirs.release()


@pytest.mark.parametrize(
    "tensors",
    [[WireTensor(99, (1,))], [WireTensor(11, (-1,))], [WireTensor(11, (5,))], [WireTensor(11, (1 << 62, 8))], []],
)
def test_tensors_that_do_not_fit_their_message(tensors: list[WireTensor]) -> None:
    with pytest.raises(ProtocolError):
        arrays_of(tensors, bytearray(16))


# A group


class FakeRank:
    """An agent: registers, and answers with `answer`, which gets the message and its inputs."""

    def __init__(
        self,
        address: str,
        rank: int,
        graph: GraphSpec = ADD,
        answer: Callable[[Predict, list[Any]], str | None] = lambda message, inputs: "",
        guard: Guard | None = None,
    ) -> None:
        self.batches: list[tuple[int, bool, int]] = []
        self.pings = 0
        self.left = threading.Event()
        self._answer = answer
        self.connection = connect(address, 10, guard)
        self.connection.known = True
        graphs = [WireGraph(list(graph.inputs), list(graph.outputs))]
        self.connection.send(Register(rank, f"127.0.0.1:{7000 + rank}", "cpu", graphs))
        self.rank = rank
        self.thread = threading.Thread(target=self._run, daemon=True)

    def welcome(self) -> AnyMessage:
        received = self.connection.receive(10)
        if received is not None and isinstance(received[0], Registered):
            self.thread.start()
        else:
            self.connection.release()
        assert received is not None
        return received[0]

    def _run(self) -> None:
        while (received := self.connection.receive()) is not None:
            message, blob = received
            if isinstance(message, Predict):
                inputs = arrays_of(message.inputs, blob)
                self.batches.append((message.number, message.return_result, len(inputs)))
                error = self._answer(message, inputs)
                if error is None:
                    continue
                wanted = message.return_result and not error
                outputs = [np.full((2, 2), 10.0 * self.rank, np.float32) + sum(inputs)] if wanted else []
                self.connection.send(Predicted(message.number, describe(outputs), error), outputs)
            elif isinstance(message, Ping):
                self.pings += 1
                self.connection.send(Pong())
            elif isinstance(message, Exit):
                break
        self.left.set()
        self.connection.release()


class Opened:
    """A group in the making, on a thread."""

    def __init__(
        self, tmp_path: Path, size: int, stages: int = 1, replay: bool = False, wait: float = 20, **secured: Any
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.losses: list[Loss] = []
        self.phases: list[str] = []
        self.ending = False
        self.result: RankGroup | Exception | None = None
        table = write(tmp_path, servers({"127.0.0.1": list(range(size))}))
        self._model = GroupModel("add", size, stages, False)
        self._config = RanksConfig(table, self.address, wait, replay, **secured)
        self._thread = threading.Thread(target=self._open, daemon=True)
        self._thread.start()
        eventually(lambda: self.phases or self.result)

    def _open(self) -> None:
        try:
            self.result = RankGroup(
                self._model, self._config, lambda: self.ending, self.phases.append, self.losses.append
            )
        except Exception as error:
            self.result = error

    def group(self) -> RankGroup:
        self._thread.join(30)
        assert isinstance(self.result, RankGroup), self.result
        return self.result

    def failure(self) -> str:
        self._thread.join(30)
        assert isinstance(self.result, StartError), self.result
        return str(self.result)

    def ranks(self, count: int, **arguments: Any) -> list[FakeRank]:
        ranks = [FakeRank(self.address, rank, **arguments) for rank in range(count)]
        assert all(isinstance(rank.welcome(), Registered) for rank in ranks)
        return ranks


Open = Callable[..., Opened]


def soon(value: Callable[[], Any]) -> Any:
    """A value as soon as it is there."""
    eventually(value)
    return value()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    made: list[Opened] = []

    def make(*arguments: Any, **named: Any) -> Opened:
        made.append(Opened(tmp_path, *arguments, **named))
        return made[-1]

    yield make
    for one in made:
        one.ending = True
        one._thread.join(10)
        if isinstance(one.result, RankGroup):
            one.result.close()


ONES = [np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)]


def test_a_batch_goes_to_every_rank_once_and_the_last_one_answers(opened: Open) -> None:
    making = opened(3)
    ranks = making.ranks(3)
    group = making.group()
    assert group.graphs == (ADD,)
    for _ in range(2):
        assert group.run(ONES)[0].tolist() == [[22.0, 22.0], [22.0, 22.0]]
    assert [rank.batches for rank in ranks] == [[(1, last, 2), (2, last, 2)] for last in (False, False, True)]
    group.close()
    assert all(rank.left.wait(10) for rank in ranks)
    assert making.losses == []


def test_later_stages_without_inputs_get_an_empty_request(opened: Open) -> None:
    making = opened(8, 2)
    ranks = [FakeRank(making.address, rank, ADD if rank < 4 else LATER) for rank in range(8)]
    assert all(isinstance(rank.welcome(), Registered) for rank in ranks)
    assert making.group().run(ONES)[0].tolist() == [[70.0, 70.0], [70.0, 70.0]]
    assert [rank.batches[0][2] for rank in ranks] == [2, 2, 2, 2, 0, 0, 0, 0]


def test_a_failed_run_that_all_ranks_ended_fails_alone(opened: Open) -> None:
    making = opened(2)
    failing = [True]
    making.ranks(2, answer=lambda message, inputs: "Predict Failed, no" if failing[0] else "")
    group = making.group()
    with pytest.raises(PredictFailed, match="Error happened on get result of rank 0: Predict Failed, no"):
        group.run(ONES)
    failing[0] = False
    assert group.run(ONES)[0][0, 0] == 12
    assert making.losses == []


def test_a_rank_that_does_not_answer_loses_the_group(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "RANK_SECONDS", 0.2)
    making = opened(2)
    ranks = making.ranks(2, answer=lambda message, inputs: None)
    with pytest.raises(PredictFailed, match="Failed to wait for result of rank 0"):
        making.group().run(ONES)
    assert [loss.outside for loss in soon(lambda: making.losses)] == [False]
    assert all(rank.left.wait(10) for rank in ranks)


@pytest.mark.parametrize(("status", "outside"), [(-9, True), (-11, False), (None, False)])
def test_an_agent_that_dies_loses_the_group_at_once(opened: Open, status: int | None, outside: bool) -> None:
    making = opened(2)
    ranks = making.ranks(2, answer=lambda message, inputs: None)
    group = making.group()

    def die() -> None:
        eventually(lambda: ranks[1].batches)
        if status is not None:
            launcher = connect(making.address, 10)
            launcher.send(RankEnded(1, status))
            launcher.release()
        ranks[1].connection.close()

    threading.Thread(target=die).start()
    with pytest.raises(PredictFailed, match=r"Error happened on get result of rank 1: agent 127.0.0.1:7001 is gone"):
        group.run(ONES)
    assert soon(lambda: making.losses)[0].outside is outside


def test_a_silent_agent_loses_the_group(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(group_module, "PING_SECONDS", 0.05)
    making = opened(1)
    rank = FakeRank(making.address, 0)
    received = rank.connection.receive(10)  # it registers and does nothing from then on
    assert received is not None
    assert isinstance(received[0], Registered)
    making.group()
    assert "does not answer" in soon(lambda: making.losses)[0].text
    rank.connection.release()


# Who is let in


def test_a_rank_that_waits_for_the_others_is_not_left_alone(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents end themselves when they hear nothing; the others may load for long."""
    monkeypatch.setattr(group_module, "PING_SECONDS", 0.05)
    making = opened(2)
    (first,) = making.ranks(1)
    eventually(lambda: first.pings > 2)
    assert isinstance(FakeRank(making.address, 1).welcome(), Registered)
    assert making.group().run(ONES)[0].tolist() == [[12.0, 12.0], [12.0, 12.0]]


def test_an_agent_that_loads_for_long_is_let_in(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a stranger may be silent."""
    monkeypatch.setattr(gathering_module, "STRANGER_SECONDS", 0.2)
    model = SimpleNamespace(graphs=(ADD,), device_type="cpu")

    class Slow:
        def devices(self) -> list[str]:
            return ["cpu"]

        def load(self, request: LoadRequest) -> Any:
            time.sleep(0.5)
            return model

    monkeypatch.setattr(agent_module, "find_runtime", lambda *_: Slow())
    making = opened(1)
    job = AgentJob(0, 0, 1, 0, None, making.address, "127.0.0.1:7000", ["add.mindir"], None, 1, None, "AES-GCM", None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        agent = Agent(ours, job)
        loaded = agent._load()
        agent._register(agent._connected(), loaded)
        assert making.group().graphs == (ADD,)
        agent._connected().release()


def test_a_batch_that_no_message_holds_is_refused_alone(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    making = opened(1)
    making.ranks(1)
    group = making.group()
    monkeypatch.setattr(messages_module, "MAX_BLOB", 64)
    with pytest.raises(ValueError, match="use a smaller max_batch_size"):
        group.run([np.ones((5, 5), np.float32)] * 2)
    assert group.run(ONES[:1])[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_strangers_are_turned_away_and_ranks_come_all_the_same(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering_module, "STRANGER_SECONDS", 0.3)
    making = opened(2)
    host, port = making.address.split(":")
    garbage = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        PREFIX.pack(8, 1 << 40) + bytes(8),
        PREFIX.pack(4, 0) + b"\xff\xff\xff\xff",
        PREFIX.pack(1 << 31, 0),
        b"".join(encode(Ping())),
        b"".join(encode(Predicted(1, []))),
        b"",
        b"\x00",
    ]
    for data in garbage:
        with socket.create_connection((host, int(port)), 10) as stranger:
            stranger.sendall(data)
            stranger.settimeout(10)
            try:
                assert stranger.recv(100) == b""
            except ConnectionResetError:
                pass
    making.ranks(2)
    assert making.group().run(ONES)[0][0, 0] == 12


def ended(stranger: socket.socket) -> bool:
    """Whether the other side has closed the connection."""
    stranger.settimeout(0)
    try:
        return stranger.recv(1 << 16, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_agents_find_room_among_strangers(opened: Open) -> None:
    """Those who say nothing go first, the oldest before the others; then those who said that they load, though not
    for as long as there is room."""
    making = opened(2)
    host, port = making.address.split(":")
    loading = connect(making.address, 10)
    loading.send(Meet(""))
    strangers = [socket.create_connection((host, int(port)), 10) for _ in range(2 * gathering_module.MAX_GUESTS)]
    began = time.monotonic()
    making.ranks(2)
    assert making.group().run(ONES)[0][0, 0] == 12
    assert time.monotonic() - began < gathering_module.STRANGER_SECONDS, "they waited for the strangers' end"
    assert ended(strangers[0])
    assert not ended(strangers[-1])
    assert not ended(loading._sock)
    for stranger in strangers:
        stranger.close()
    others = [connect(making.address, 10) for _ in range(gathering_module.MAX_GUESTS + 2)]
    for one in others:
        one.send(Meet(""))
    eventually(lambda: ended(loading._sock))
    for one in (loading, *others):
        one.release()


def test_nobody_stays_by_asking_again_and_again(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering_module, "STRANGER_SECONDS", 0.3)
    monkeypatch.setattr(gathering_module, "LOAD_SECONDS", 0.3)
    monkeypatch.setattr(gathering_module, "MEET_SECONDS", 0.3)  # for when the first has left before the other
    making = opened(2)
    first = connect(making.address, 10)
    first.send(Meet("127.0.0.1:1"))
    asking = connect(making.address, 10)
    began = time.monotonic()
    while asking.send(Meet("")) and asking.receive(5) is not None:
        assert time.monotonic() - began < 5
        time.sleep(0.02)
    for one in (first, asking):
        one.release()


def test_versions_that_differ_are_named(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On whichever side somebody reads, at once."""
    making = opened(1)
    wanted = [f"version {PROTOCOL} (Inflight {__version__})", "install one version of Inflight on both sides"]
    for message in (Acquire(PROTOCOL + 1, "9.9"), Register(0, "127.0.0.1:7000", "cpu", [], PROTOCOL + 1, "9.9")):
        connection = connect(making.address, 10)
        connection.known = True
        connection.send(message)
        received = connection.receive(10)
        assert received is not None
        assert isinstance(received[0], Refused)
        for text in (f"version {PROTOCOL + 1} of the protocol for agents (Inflight 9.9)", *wanted):
            assert text in received[0].text
        connection.release()
    assert "version 2 of the protocol" in caplog.text
    launcher = Launcher(AgentsConfig(making.address, ((str(tmp_path),),)))
    monkeypatch.setattr(launcher_module, "PROTOCOL", PROTOCOL + 1)
    with pytest.raises(StartError, match="the agents' side speaks version 2 of the protocol"):
        launcher.start()
    monkeypatch.setattr(launcher_module, "PROTOCOL", PROTOCOL)
    monkeypatch.setattr(messages_module, "PROTOCOL", PROTOCOL + 1)  # of this side; the worker has said its own
    with pytest.raises(StartError, match="speaks version 1 of the protocol"):
        launcher_module._checked(GroupConfig("add", "", []), making.address)
    monkeypatch.undo()
    making.ranks(1)  # whose messages say nothing of a version, as those before it was compared
    making.group()


TOKEN = "a token that nobody guesses"


@pytest.mark.parametrize("tls", [True, False])
def test_a_group_with_a_token_hears_only_who_knows_it(opened: Open, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering_module, "STRANGER_SECONDS", 1.0)
    making = opened(2, token=TOKEN, tls=tls)
    with connect(making.address, 10)._sock as plain:  # who knows the protocol alone
        plain.sendall(b"".join(encode(Register(0, "127.0.0.1:7000", "cpu", []))))
        plain.settimeout(10)
        try:
            while plain.recv(4096):
                pass
        except ConnectionResetError:
            pass
    with pytest.raises(StartError, match=r"need the same token \(INFLIGHT_AGENTS_TOKEN\), or none both"):
        FakeRank(making.address, 0, guard=Guard(TOKEN + "!", tls))
    assert making.result is None
    making.ranks(
        2,
        guard=Guard(TOKEN, tls),
        answer=lambda message, inputs: "" if inputs[0].size == 4 else f"{inputs[1].sum():g} in all",
    )
    assert making.group().run(ONES)[0].tolist() == [[12.0, 12.0], [12.0, 12.0]]
    with pytest.raises(PredictFailed, match=r"1e\+06 in all"):
        making.group().run([np.ones((1000, 1000), np.float32)] * 2)


def test_a_launcher_says_at_once_that_it_needs_the_token(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for asked, given in ((TOKEN, None), (TOKEN, TOKEN + "!"), (None, TOKEN)):
        making = opened(2, token=asked)
        caplog.clear()
        launcher = Launcher(AgentsConfig(making.address, ((str(tmp_path),),), token=given))
        with pytest.raises(StartError, match=r"Failed to acquire agent config.*need the same token"):
            launcher.start(tries=1)
        assert "no configuration from the worker" in caplog.text


def test_ranks_that_do_not_belong_are_refused(opened: Open) -> None:
    making = opened(2)
    first = FakeRank(making.address, 0)
    assert isinstance(first.welcome(), Registered)
    for rank, text in ((0, "rank 0 has already been registered"), (2, "Invalid rank id 2"), (-1, "Invalid rank id -1")):
        refusal = FakeRank(making.address, rank).welcome()
        assert isinstance(refusal, Refused)
        assert text in refusal.text
    first.connection.close()  # another one may come in its place
    eventually(lambda: "0 of 2" in making.phases[-1])
    making.ranks(2)
    making.group()
    refusal = FakeRank(making.address, 0).welcome()
    assert isinstance(refusal, Refused)
    assert "Distributed servable has ended up registration" in refusal.text


def test_starts_that_fail(opened: Open) -> None:
    waiting = opened(2, wait=1)
    assert waiting.failure() == "Failed to wait for ready of all agents, current agents count: 0, rank size: 2"
    failing = opened(2)
    launcher = connect(failing.address, 10)
    launcher.send(AgentsFailed("no memory"))
    launcher.release()
    assert failing.failure() == "Failed to starting all agents, maybe some error reported"
    stopping = opened(2)
    stopping.ending = True
    assert stopping.failure() == "Worker or Agents has stopped"
    different = opened(2)
    ranks = [FakeRank(different.address, 0), FakeRank(different.address, 1, SMALL)]
    assert "Rank 1 input infos not match rank 0" in different.failure()
    assert [isinstance(rank.welcome(), Registered) for rank in ranks] == [True, True]
    assert all(rank.left.wait(10) for rank in ranks)


def test_a_rank_counts_once_it_was_told_so(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails when the last rank has come does not take its connection away before that."""
    send = Connection.send

    def slow(self: Connection, message: AnyMessage, *more: Any) -> bool:
        if isinstance(message, Registered):
            time.sleep(0.3)  # longer than the waiting worker sleeps
        return send(self, message, *more)

    monkeypatch.setattr(Connection, "send", slow)
    different = opened(2)
    ranks = [FakeRank(different.address, 0), FakeRank(different.address, 1, SMALL)]
    assert [isinstance(rank.welcome(), Registered) for rank in ranks] == [True, True]
    assert "Rank 1 input infos not match rank 0" in different.failure()
    assert all(rank.left.wait(10) for rank in ranks)


# A launcher, up to the first process


def test_what_a_launcher_checks(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    making = opened(2)
    monkeypatch.chdir(tmp_path)
    there = str(write(tmp_path, "{}"))
    missing = str(tmp_path / "missing.mindir")
    port = free_port()

    def refusal(models: Any, groups: Any = (), **arguments: Any) -> str:
        launcher = Launcher(AgentsConfig(making.address, models, groups, port, **arguments))
        with pytest.raises((ConfigError, StartError)) as caught:
            launcher.start()
        assert launcher.ended.is_set()
        return str(caught.value)

    assert "Card count [0, 1] described rank table does not equal to model files size 1" in refusal(((there,),))
    assert "please check the number of  model files" in refusal(((there,), (there, there)))
    assert "Model files count 2 does not equal to group config files count 1" in refusal(((there,),) * 2, ((there,),))
    assert "please check the number of  model files" in refusal(((there,),) * 2, ((there, there),) * 2)
    assert refusal(((missing,), (there,))) == f"Cannot access model file '{missing}'"
    assert refusal(((there,),) * 2, ((missing,),) * 2) == f"Cannot access group config file '{missing}'"
    assert "'rank_start' 2 should be less than" in refusal(((there,),) * 2, agent_ip="127.0.0.1", rank_start=2)
    assert "Check ip 'agent_ip' valid failed" in refusal(((there,),) * 2, agent_ip="203.0.113.1", rank_start=0)
    with socket.create_server(("127.0.0.1", port)):
        assert "Get local machine ip failed, rank table ips: ['127.0.0.1']" in refusal(((there,),) * 2)
    # The worker still waits: a second, correct launcher may follow.
    assert making.result is None
    asking = connect(making.address, 10)
    asking.known = True
    asking.send(Acquire())
    answer = asking.receive(10)
    asking.release()
    assert answer is not None
    assert isinstance(answer[0], GroupConfig)
    assert json.loads(answer[0].rank_table) == servers({"127.0.0.1": [0, 1]})


def test_a_launcher_that_finds_no_worker(tmp_path: Path) -> None:
    launcher = Launcher(AgentsConfig(f"127.0.0.1:{free_port()}", ((str(tmp_path),),)))
    threading.Timer(0.2, launcher.stop).start()
    began = time.monotonic()
    with pytest.raises(StartError, match="because of Ctrl"):
        launcher.start()
    assert time.monotonic() - began < 30
