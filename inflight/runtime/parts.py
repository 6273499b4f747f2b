"""MindIR files of one rank of a distributed model: ONNX Runtime runs what lies between exchanges with other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from inflight.contract import Array, GraphSpec, TensorSpec
from inflight.errors import StartError
from inflight.mindir import ConvertedGraph, Exchange, Parts
from inflight.runtime.base import Exchanges, LoadedModel, LoadRequest
from inflight.runtime.onnx import OnnxModel
from inflight.runtime.support import zero_batch


class PartsModel(LoadedModel):
    """The parts of each sub-graph as sessions, with the exchanges between them.

    Args:
        hand_over: gives ONNX Runtime a graph: the model's bytes, or the path of a file that is there as long as this
            call lasts.

    Raises:
        StartError: a part does not run, or the ranks do not meet.
    """

    def __init__(
        self,
        graphs: Sequence[Parts],
        request: LoadRequest,
        exchanges: Exchanges,
        hand_over: Callable[[ConvertedGraph, str], bytes | str],
    ) -> None:
        self._exchanges = exchanges
        self._graphs = tuple(graphs)
        sources: list[bytes | str] = []
        self._sessions: list[list[int]] = []  # of each sub-graph's steps: the number of the part, -1 for an exchange
        for number, graph in enumerate(graphs):
            sessions: list[int] = []
            for step in graph.steps:
                if isinstance(step, ConvertedGraph):
                    sessions.append(len(sources))
                    sources.append(hand_over(step, f"graph_{number}_{len(sessions)}"))
                else:
                    sessions.append(-1)
            self._sessions.append(sessions)
        self._parts = OnnxModel.from_bytes(sources, replace(request, trial=None))
        self.device_type = self._parts.device_type
        self.graphs = tuple(
            GraphSpec(
                tuple(TensorSpec(item.name, item.dtype, item.shape) for item in graph.inputs),
                tuple(
                    TensorSpec(f"output_{index}", item.dtype, item.shape) for index, item in enumerate(graph.outputs)
                ),
            )
            for graph in graphs
        )
        if request.trial is not None:
            with request.trial():
                self._warm_up()

    def _warm_up(self) -> None:
        """Runs every sub-graph once: the ranks do so together."""
        for number, graph in enumerate(self.graphs):
            batch = zero_batch(graph)
            if batch is not None:
                try:
                    self.run(batch, number)
                except (RuntimeError, ValueError) as error:
                    raise StartError(
                        f"Load model failed, the model does not run on inputs filled with zeros: {error}"
                    ) from error

    def run(self, inputs: Sequence[Array], subgraph: int = 0) -> list[Array]:
        graph = self._graphs[subgraph]
        if len(inputs) != len(graph.inputs):
            raise ValueError(f"The model takes {len(graph.inputs)} inputs, not {len(inputs)}")
        values: dict[str, Array] = {
            spec.name: _fitting(array, spec.name, spec.dtype, spec.shape)
            for spec, array in zip(graph.inputs, inputs, strict=True)
        }
        for step, session in zip(graph.steps, self._sessions[subgraph], strict=True):
            if isinstance(step, Exchange):
                result = self._exchange(step, values)
                if result is not None:
                    values[step.result.name] = result
            else:
                outputs = self._parts.run([values[item.name] for item in step.inputs], session)
                values.update({item.name: output for item, output in zip(step.outputs, outputs, strict=True)})
        self._exchanges.finish()
        given = {id(array) for array in inputs}
        results = [values[item.name] for item in graph.outputs]
        return [result.copy() if id(result) in given else result for result in results]

    def _exchange(self, step: Exchange, values: dict[str, Array]) -> Array | None:
        exchanges, group = self._exchanges, step.group
        if step.kind == "Receive":
            assert step.result.shape is not None
            return exchanges.receive(step.result.dtype, step.result.shape, step.peer, step.tag, group)
        array = np.ascontiguousarray(values[step.given]).reshape(values[step.given].shape)
        if step.kind == "Send":
            exchanges.send(array, step.peer, step.tag, group)
            return None
        if step.kind == "AllReduce":
            return exchanges.all_reduce(array, step.reduction, group)
        if step.kind == "AllGather":
            return exchanges.all_gather(array, group)
        if step.kind == "ReduceScatter":
            return exchanges.reduce_scatter(array, step.reduction, group)
        assert step.kind == "Broadcast"
        return exchanges.broadcast(array, step.peer, group)

    def close(self) -> None:
        self._parts.close()


def _fitting(array: Array, name: str, dtype: str, shape: tuple[int, ...] | None) -> Array:
    """The input, if it is one: a rank that stops in the middle would leave the others waiting in an exchange."""
    wrong = shape is not None and (
        len(shape) != array.ndim or any(want not in (-1, have) for want, have in zip(shape, array.shape, strict=True))
    )
    if wrong or array.dtype != dtype:
        raise ValueError(
            f"input '{name}' is {array.dtype.name} {list(array.shape)}, it has to be {dtype} {list(shape or ())}"
        )
    return array
