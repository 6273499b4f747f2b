"""What a group of ranks is as one model: the first rank's inputs, the last rank's outputs, if all agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from inflight.contract import GraphSpec, TensorSpec
from inflight.errors import StartError

_Tensors = tuple[TensorSpec, ...]


def group_signature(ranks: Sequence[Sequence[GraphSpec]], stage_size: int) -> tuple[GraphSpec, ...]:
    """The sub-graphs of the whole model.

    Args:
        ranks: the sub-graphs of each rank.
        stage_size: stages of the pipeline; the ranks are divided between them evenly, in order.

    Raises:
        StartError: the ranks do not fit together; the texts are MindSpore Serving's.
    """
    for rank, graphs in enumerate(ranks):
        if len(graphs) != len(ranks[0]):
            raise StartError(
                f"Rank {rank} sub-graph count {len(graphs)} not match rank 0 sub-graph count {len(ranks[0])}"
            )
    return tuple(
        _one_graph([graphs[index] for graphs in ranks], len(ranks) // stage_size) for index in range(len(ranks[0]))
    )


def _one_graph(graphs: Sequence[GraphSpec], stage: int) -> GraphSpec:
    first = graphs[0]
    if not first.inputs:
        raise StartError("Rank 0 has no inputs, the inputs of the first stage are those of the model")
    if not graphs[-1].outputs:
        raise StartError(f"Rank {len(graphs) - 1} has no outputs, the last rank's outputs are those of the model")
    for rank, graph in enumerate(graphs):
        if rank < stage:
            if not _same(graph.inputs, first.inputs):
                raise StartError(
                    f"Rank {rank} input infos not match rank 0, {_texts(graph.inputs, first.inputs)}, you can check if "
                    "the actual stage size is equal to the one declared in servable config"
                )
        elif bool(graph.inputs) != bool(graphs[stage].inputs) or (
            graph.inputs and not _same(graph.inputs, first.inputs)
        ):
            raise StartError(
                f"Rank {rank} input infos not match rank 0, {_texts(graph.inputs, first.inputs)}. Expect stage 0(other "
                "stages have empty inputs) or all stages have same inputs, you can check if the actual stage size is "
                "equal to the one declared in servable config"
            )
        leader = rank - rank % stage
        if not _same(graph.outputs, graphs[leader].outputs):
            raise StartError(
                f"Rank {rank} output infos not match rank {leader}, {_texts(graph.outputs, graphs[leader].outputs)}"
            )
    return GraphSpec(first.inputs, graphs[-1].outputs)


def _same(ones: _Tensors, others: _Tensors) -> bool:
    return [_kind(tensor) for tensor in ones] == [_kind(tensor) for tensor in others]


def _kind(tensor: TensorSpec) -> tuple[str | None, tuple[int, ...] | None]:
    return tensor.dtype, tensor.shape


def _texts(ones: _Tensors, others: _Tensors) -> str:
    return f"{[_text(tensor) for tensor in ones]} and {[_text(tensor) for tensor in others]}"


def _text(tensor: TensorSpec) -> str:
    size = None
    if tensor.shape is not None and tensor.dtype is not None and -1 not in tensor.shape:
        size = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    return f"shape: {None if tensor.shape is None else list(tensor.shape)}, dtype: {tensor.dtype}, size: {size}"
