"""Starts worker processes, and a rank's process early: as the first thing that a command does, beside taking signals
and making garbage collection rare.

A rank needs as long to be imported as the server that it belongs to. `inflight serve` begins its process before it
imports anything itself; all that is known then is what was written, so that is done only where it says plainly which
model is served. `inflight.place` takes the process over where it needs just that one; else the process is ended.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

DUMP = signal.SIGQUIT
"""The signal at which a worker writes the stacks of its threads to its output, as a Java process does."""

STDERR = 2
"""The file descriptor that workers write to; `sys.stderr` may have been replaced by an object that has none."""

_DECISIVE = (
    "cluster",
    "config",
    "help",
    "log-dir",
    "log-level",
    "print-config",
    "tensor-parallel",
    "threads",
    "version",
)
"""Flags of `inflight serve` that change how a rank is started, or whether one is."""
_USUAL = gc.get_threshold()
_RARELY = (50_000, 10, 10)
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class Spawned(NamedTuple):
    """A process and this end of the socket pair to it."""

    process: subprocess.Popen[bytes]
    socket: socket.socket


_begun: dict[tuple[str, ...], Spawned] = {}
"""Processes that were begun and not taken over yet, by label."""


def spawn(
    label: Sequence[str], inbox: int, outbox: int, environment: Mapping[str, str] = {}, output: int | None = None
) -> Spawned:
    """Starts `python -m inflight.worker` as a session of its own.

    Args:
        label: its first arguments, also for people who read a process list.
        inbox, outbox: arena files to inherit.
        environment: added to this process's own.
        output: file that it writes to; None: this process's own stderr.

    Raises:
        OSError: it could not be started.
    """
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "inflight.worker", *label]
    command += [f"--fd={theirs.fileno()}", f"--inbox={inbox}", f"--outbox={outbox}"]
    if output is not None:
        command.append("--own-log")
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output if output is not None else STDERR,
            stderr=output,
            pass_fds=(theirs.fileno(), inbox, outbox),
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Spawned(process, ours)


def rank_label(model: str, place: str) -> tuple[str, ...]:
    """The label of a rank. Args: place: names it among the model's ranks, as `rank0`."""
    return "--rank", f"--servable_name={model}", f"--device_id={place}"


def spawn_rank(label: Sequence[str], environment: Mapping[str, str] = {}, output: int | None = None) -> Spawned:
    """As `spawn`, with files that are never used: ranks get tokens, which need no shared memory.

    Raises:
        OSError: it could not be started.
    """
    file = os.memfd_create("inflight-unused", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, 4096)
        return spawn(label, file, file, environment, output)
    finally:
        os.close(file)


def collect_rarely() -> None:
    """Makes garbage collection rare while a program starts.

    Modules make hundreds of thousands of objects and hardly any garbage. To look through them again and again takes a
    sixth of the imports' processor time.
    """
    gc.set_threshold(*_RARELY)


def collect_as_usual() -> None:
    """Ends what `collect_rarely` began."""
    gc.set_threshold(*_USUAL)


def stop_cleanly() -> None:
    """Makes SIGINT and SIGTERM end the process with 0, until a server replaces the handlers: it serves nothing yet."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(0))


def begin(written: Sequence[str], environment: Mapping[str, str]) -> None:
    """Begins the rank of the model that `inflight serve` serves with these arguments, where `plain_model` finds one.

    A process that cannot be started is no error here: the place that needs it starts it again and reports why not."""
    name = plain_model(written, environment)
    if name is None or not hasattr(os, "memfd_create"):
        return
    label = rank_label(name, "rank0")
    try:
        _begun[label] = spawn_rank(label)
    except OSError:
        pass


def take(label: Sequence[str]) -> Spawned | None:
    """Hands over the process that was begun with this label; the caller ends it from now on."""
    return _begun.pop(tuple(label), None)


def end() -> None:
    """Ends the processes that were begun and not taken over."""
    while _begun:
        process, sock = _begun.popitem()[1]
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()
        sock.close()


def plain_model(written: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The served name of the only model among the arguments.

    Returns:
        None where the arguments alone do not decide that name, or how the model's rank is started.
    """
    if any(f"INFLIGHT_{flag.replace('-', '_').upper()}" in environment for flag in (*_DECISIVE, "name", "paths")):
        return None
    name: str | None = None
    models: list[str] = []
    for index, argument in enumerate(written):
        flag, _, value = argument.partition("=")
        if flag == "--name":
            name = value or next(iter(written[index + 1 : index + 2]), None)
        elif flag.removeprefix("--") in _DECISIVE or argument == "-h":
            return None
        elif not argument.startswith("-"):
            model = _name_of(argument)
            models += [model] if model else []
    return (name or models[0]) if len(models) == 1 else None


def _name_of(path: str) -> str | None:
    if path.endswith(".gguf"):
        return os.path.basename(path)[: -len(".gguf")] if os.path.isfile(path) and not _PART.search(path) else None
    files = [os.path.isfile(os.path.join(path, name)) for name in ("config.json", "tokenizer.json")]
    return os.path.basename(os.path.realpath(path)) if all(files) else None
