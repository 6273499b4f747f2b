"""`inflight client`: sends one request to a running server."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from inflight.commands.options import Command, Option
from inflight.commands.target import OPTIONS, Target, build_target
from inflight.commands.values import printable
from inflight.config import seconds

EXAMPLES = """\
examples:
  inflight client 127.0.0.1:8081 digits predict --input image=@digit.npy
  inflight client http://127.0.0.1:8080 resnet classify --input image=@cat.png
  inflight client 127.0.0.1:8081 add add_common --input x1=[[1.0,2.0]] --input x2:float32=[[3,4]]
"""


def run(values: Mapping[str, Any]) -> int:
    """Prints the answer as JSON; returns 1 if it holds an error."""
    target = build_target(values)
    answer, failed = _rest(target, values["timeout"]) if target.rest else _grpc(target, values["timeout"])
    print(answer)
    return int(failed)


def _rest(target: Target, timeout: float) -> tuple[str, bool]:
    request = urllib.request.Request(target.url, target.body(), {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout, context=target.ssl_context()) as reply:
            text = reply.read().decode(errors="replace")
            return text, failed_reply(text)
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode(errors="replace"), True
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        print(f"inflight client: {target.address} cannot be reached: {reason}; is the server running?", file=sys.stderr)
        return json.dumps({"error": str(reason)}), True


def failed_reply(text: str) -> bool:
    """Whether a REST answer holds an error of the request or of an instance."""
    try:
        reply = json.loads(text)
    except ValueError:
        return True
    if not isinstance(reply, dict) or "error_msg" in reply:
        return True
    return any("error_msg" in item for item in reply.get("instances", ()))


def _grpc(target: Target, timeout: float) -> tuple[str, bool]:
    from inflight.client import AsyncClient  # imports gRPC, which REST does without

    async def call() -> Any:
        async with AsyncClient(**target.grpc_arguments(), timeout=timeout) as client:
            return await client.infer(target.instance)

    result = asyncio.run(call())
    failed = isinstance(result, dict) or any("error" in item for item in result)
    return json.dumps(printable(result), ensure_ascii=False), failed


COMMAND = Command(
    name="client",
    summary="send one request to a running server",
    description="Sends one instance to a method of a servable and prints the answer as JSON.",
    examples=EXAMPLES,
    options=(
        *OPTIONS,
        Option("timeout", seconds, "Seconds to wait for the answer.", default=60.0, metavar="SECONDS"),
    ),
    run=run,
)
