"""The message of a server that has started: what it serves, and a command to try it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import numpy as np

from inflight.commands.values import PLAIN, rest_value
from inflight.config import TlsConfig
from inflight.contract import DTYPE_CODES, MethodInfo, ServableStatus, TensorSpec, reads_images

SHOWN_ELEMENTS = 16
"""The largest number of elements of an input that the command to try it writes out."""

RED_CIRCLE = (
    "iVBORw0KGgoAAAANSUhEUgAAADAAAAAwAQMAAABtzGvEAAAABlBMVEX////cFB4F8PUcAAAAY0lEQVR42qXPsQ2DQABD0ReLgiJSGIERskEYLaMxCiNc"
    "SXGCFKfk2ki4sX7xJZureRTC8w7Ok7jxFmERA7MYmcTEKM2NmaHTolmN/q+Vo9NG7VTYxU4RlU0crN+5eNXflYv5AKVpFCWAVX+DAAAAAElFTkSuQmCC"
)
"""A PNG of 48 x 48 pixels, to try a model that reads images with."""


def describe(
    statuses: Sequence[ServableStatus],
    http: str | None,
    grpc: str | None,
    tls: TlsConfig | None = None,
    requests: Mapping[str, str] = MappingProxyType({}),
    generators: Sequence[str] = (),
) -> str:
    """Several lines: every method with its inputs and outputs, the doors, and commands to try the first method, the
    first language model, and the first one that reads images.

    Args:
        requests: by servable, a file that holds a REST request for its first method. Without one the command sends
            zeros, because the meaning of an input is not known.
        generators: names of the language models.
    """
    lines = []
    for status in statuses:
        if status.name in generators:
            lines.append(f"{status.name}, language model{' that reads images' if _seeing(status) else ''}")
            continue
        replicas = "1 replica" if status.replicas == 1 else f"{status.replicas} replicas"
        lines.append(f"{status.name} version {status.version}, {replicas}")
        lines += [f"  {_signature(method)}" for method in status.methods]
    scheme = "https" if tls else "http"
    if http:
        lines.append(f"REST  {scheme}://{http}")
    if grpc:
        lines.append(f"gRPC  {grpc}")
    classic = [status for status in statuses if status.name not in generators]
    method = next((method for status in classic for method in status.methods), None)
    if method is not None:
        url = f"{scheme}://{http}" if http else None
        lines.append(f"try   {_line(method, url, grpc, tls, requests.get(method.servable))}")
    if http:
        models = [status for status in statuses if status.name in generators]
        lines += [f"try   {line}" for line in _tries(models, f"{scheme}://{http}", _tls_flags(tls) if tls else "")]
    return "\n".join(lines)


def _tries(models: Sequence[ServableStatus], url: str, flags: str) -> list[str]:
    """Commands to try the first language model that reads text only, and the first that reads images."""
    text = next((status for status in models if not _seeing(status)), None)
    seeing = next((status for status in models if _seeing(status)), None)
    lines = []
    if text is not None:
        message = {"role": "user", "content": "Tell me a story."}
        body = shlex.quote(json.dumps({"model": text.name, "messages": [message], "stream": True}))
        lines.append(f"curl{flags} -N -H 'Content-Type: application/json' -d {body} {url}/v1/chat/completions")
    if seeing is not None:
        body = shlex.quote(json.dumps({"instances": {"image": {"b64": RED_CIRCLE}}}, separators=(",", ":")))
        lines.append(f"curl{flags} -X POST -d {body} {url}/model/{quote(seeing.name)}:generated_stream")
    return lines


def _seeing(status: ServableStatus) -> bool:
    return any(reads_images(method) for method in status.methods)


def _tls_flags(tls: TlsConfig) -> str:
    return " --cacert ca.pem" + (" --cert cert.pem --key key.pem" if tls.verify_client else "")


def _signature(method: MethodInfo) -> str:
    inputs = ", ".join(_tensor(spec) for spec in method.inputs)
    outputs = ", ".join(_tensor(spec) for spec in method.outputs)
    return f"{method.name}({inputs}) -> {outputs}{', one request a call' if method.whole else ''}"


def _tensor(spec: TensorSpec) -> str:
    """A description like `x: float32[-1, 4]`, as far as it is known."""
    shape = "" if spec.shape is None else str(list(spec.shape))
    return f"{spec.name}: {spec.dtype}{shape}" if spec.dtype else spec.name


def _line(method: MethodInfo, url: str | None, grpc: str | None, tls: TlsConfig | None, file: str | None) -> str:
    """The command: curl if the body is in a file or small, else our own client with a file for each large input."""
    values = {spec.name: _example(spec) for spec in method.inputs}
    flags = _tls_flags(tls) if tls else ""
    if url and (file or all(value is not None for value in values.values())):
        instance = {} if file else {name: rest_value(value) for name, value in values.items()}
        body = f"@{file}" if file else json.dumps({"instances": [instance]})
        where = f"{url}/model/{quote(method.servable)}:{quote(method.name)}"
        return f"curl{flags} -d {shlex.quote(body)} {where}"
    inputs = " ".join(f"--input {_argument(name, value)}" for name, value in values.items())
    ours = (
        "" if not tls else " --tls-ca ca.pem" + (" --tls-cert cert.pem --tls-key key.pem" if tls.verify_client else "")
    )
    return f"inflight client {url or grpc} {method.servable} {method.name} {inputs}{ours}"


def _argument(name: str, value: Any) -> str:
    """An input on our client's command line; a file if it is long or bytes."""
    if value is None:
        return f"{name}=@{name}.npy"
    if isinstance(value, bytes):
        return f"{name}=@{name}.bin"
    if isinstance(value, str):
        return shlex.quote(f"{name}={json.dumps(value)}")
    dtype = "" if value.dtype.name in PLAIN else f":{value.dtype.name}"
    return shlex.quote(f"{name}{dtype}={json.dumps(value.tolist())}")


def _example(spec: TensorSpec) -> Any:
    """Zeros, or a text, that the input accepts; None if it would be long."""
    if spec.dtype == "str" or spec.dtype == "bytes":
        return "text" if spec.dtype == "str" else b"bytes"
    shape = tuple(max(1, size) for size in spec.shape or ())
    if math.prod(shape) > SHOWN_ELEMENTS:
        return None
    return np.zeros(shape, spec.dtype if spec.dtype in DTYPE_CODES else "float32")
