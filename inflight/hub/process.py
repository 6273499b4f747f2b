"""Fetches in a process of its own, which ends with the process that started it.

The server's loop goes on meanwhile, a fetch can be cancelled at any time, and processes that serve do not import
huggingface_hub with its HTTP client.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from inflight.errors import StartError
from inflight.hub.address import HubModel
from inflight.hub.choose import Wanted
from inflight.hub.download import Fetched


async def fetch(
    model: HubModel, *, adapter: bool = False, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Fetched:
    """Fetches the model if it is not on this disk. Progress goes to stderr. Cancelling ends the fetch.

    Args:
        adapter: it is a LoRA adapter.
        allow_pickle: fetch pytorch_model.bin if there are no safetensors.
        trust_remote_code: fetch its Python files too.

    Raises:
        StartError: it cannot be fetched; one line that says why and what to do.
    """
    wanted = Wanted(model.file, adapter, allow_pickle, trust_remote_code)
    asked = json.dumps({"model": asdict(model), "wanted": asdict(wanted)})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "inflight.hub", asked), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        answer = await process.stdout.read()
        await process.wait()
    finally:
        process.stdin.close()  # the process then removes half-fetched files and ends
    try:
        found = json.loads(answer)
    except ValueError:
        raise StartError(f"fetching '{model}' ended with exit code {process.returncode} before it was done") from None
    if "error" in found:
        raise StartError(found["error"])
    return Fetched(Path(found["path"]), found["commit"])
