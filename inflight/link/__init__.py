"""The connection between the server and its workers."""

from inflight.link.arena import LARGE, Arena, ArenaReader, create_file, physical_memory
from inflight.link.board import BOARD_BYTES, Board, BoardReader, Run, Runner
from inflight.link.channel import ServerChannel, WorkerChannel
from inflight.link.codec import (
    AnyMessage,
    Blob,
    Call,
    CallDone,
    Done,
    Drop,
    Failed,
    Leaving,
    Load,
    Packer,
    Ready,
    Stop,
    Trial,
    Unpacker,
    Work,
)
from inflight.link.offer import GeneratorOffer, GraphOffer, MethodOffer, ModelOffer, Offer, WorkerJob
from inflight.link.step import LoadShard, Progress, ShardReady

__all__ = [
    "BOARD_BYTES",
    "LARGE",
    "AnyMessage",
    "Arena",
    "ArenaReader",
    "Blob",
    "Board",
    "BoardReader",
    "Call",
    "CallDone",
    "Done",
    "Drop",
    "Failed",
    "GeneratorOffer",
    "GraphOffer",
    "Leaving",
    "Load",
    "LoadShard",
    "MethodOffer",
    "ModelOffer",
    "Offer",
    "Packer",
    "Progress",
    "Ready",
    "Run",
    "Runner",
    "ServerChannel",
    "ShardReady",
    "Stop",
    "Trial",
    "Unpacker",
    "Work",
    "WorkerChannel",
    "WorkerJob",
    "create_file",
    "physical_memory",
]
