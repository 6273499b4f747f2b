"""A protocol of one's own: rows of JSON in, rows of JSON out.

PYTHONPATH=examples/protocol_rows inflight serve model.onnx --protocol rows_protocol:RowsRest
curl localhost:8080/rows/model/predict -H 'content-type: application/json' -d '{"rows": [{"x": [1, 2]}]}'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict

import msgspec
import numpy as np

from inflight.errors import InflightError
from inflight.frontends import Access, Call, Door, Route, predict
from inflight.wire import JSON, Refusal, error_json, respond_json

MAX_BODY = 1 << 20


class RowsBody(msgspec.Struct):
    """A request: the inputs of each row by name."""

    rows: list[dict[str, Any]]


class RowsAnswer(TypedDict):
    """The outputs of each row by name, or its error."""

    rows: list[dict[str, Any]]


class Offered(TypedDict):
    """`GET /rows`."""

    paths: list[str]


class RowsRest(Door):
    """Runs the methods of servables."""

    name = "Rows"
    below = ("/rows/",)
    error = dict[str, str]

    def refusal(self, error: InflightError) -> Refusal:
        return Refusal(error.http_status, [JSON, *error.headers], error_json(str(error)))

    def limit(self, call: Call) -> int:
        return MAX_BODY

    async def _offered(self, call: Call) -> None:
        paths = [f"/rows/{each.name}/{method.name}" for each in self._backend.servables() for method in each.methods]
        answer: Offered = {"paths": paths}
        await respond_json(call.send, answer)

    async def _run(self, call: Call) -> None:
        body: RowsBody = call.body()
        method = self._backend.method(call.names["servable"], 0, call.names["method"])
        rows = [method.row({name: _value(value) for name, value in row.items()}) for row in body.rows]
        outcomes = await call.run(predict(self._backend, method, rows))
        names = [spec.name for spec in method.outputs]
        answer: RowsAnswer = {"rows": [_told(names, outcome) for outcome in outcomes]}
        await respond_json(call.send, answer)

    routes: ClassVar[Sequence[Route]] = (
        Route("GET", "/rows", "What can be run", _offered, answer=Offered),
        Route(
            "POST", "/rows/{servable}/{method}", "Run a method", _run, RowsBody, answer=RowsAnswer, access=Access.KEY
        ),
    )


def _value(value: Any) -> Any:
    return value if isinstance(value, str) else np.array(value)


def _told(names: Sequence[str], outcome: Any) -> dict[str, Any]:
    if isinstance(outcome, InflightError):
        return {"error": str(outcome)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in zip(names, outcome)}
