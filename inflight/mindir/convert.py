"""Walks a MindIR graph from its outputs and maps every primitive on the way to ONNX."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inflight.errors import StartError
from inflight.mindir import (  # noqa: F401 - importing a family enters its mappings into the table
    ops_activation,
    ops_conv,
    ops_index,
    ops_math,
    ops_norm,
    ops_pool,
    ops_reduce,
)
from inflight.mindir.emitter import Emitter, Shape, Tensor
from inflight.mindir.model import MONAD, ConversionRefused, MindIR, Node, Opaque, TensorType
from inflight.mindir.op import MAPPINGS, Op, Value, find_mapping
from inflight.mindir.ops_create import ALIASES
from inflight.mindir.signature import input_names

_UPDATE = "UpdateState"
# They only write to the log; serving leaves that out.
_HARMLESS = frozenset({_UPDATE, "Print", "Assert"})

# fmt: off
COLLECTIVES = frozenset({
    "AllGather", "AllGatherMatmul", "AllGatherV", "AllReduce", "AllToAllV", "AlltoAll", "AlltoAllV",
    "AlltoAllVC", "AlltoAllVGE", "BatchISendIRecv", "Barrier", "Broadcast", "CollectiveGather",
    "CollectiveScatter", "MatMulAllReduce", "MatmulAllReduceAddRmsNorm", "MatmulReduceScatter",
    "NeighborExchange", "NeighborExchangeV2", "Receive", "Reduce", "ReduceScatter", "ReduceScatterV", "Send",
    "_AllSwap", "_HostAllGather", "_HostReduceScatter",
})
# fmt: on
"""Primitives that talk to other processes; loading them without a started group kills the process."""
_COLLECTIVE_FAMILIES = ("DistComm", "InnerComm")


@dataclass(frozen=True)
class ConvertedGraph:
    """An ONNX graph with its inputs and outputs, in the order of the file."""

    emitter: Emitter
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def weight_bytes(self) -> int:
        return self.emitter.weight_bytes

    def to_bytes(self) -> bytes:
        """The serialised ModelProto; for weights below 2 GB."""
        return bytes(self.emitter.model(self.inputs, self.outputs).SerializeToString())

    def save(self, folder: Path, stem: str) -> Path:
        """Writes `<stem>.onnx` and `<stem>.weights` into a folder; the path of the first."""
        return self.emitter.save(self.inputs, self.outputs, folder, stem)


def supported_primitives() -> tuple[str, ...]:
    """Names of all primitives that can be converted, sorted."""
    return tuple(sorted({*MAPPINGS, *_HARMLESS}))


def collectives_in(model: MindIR) -> tuple[str, ...]:
    """Names of the primitives in the file that talk to other processes."""
    return tuple(name for name in model.primitives if name in COLLECTIVES or name.startswith(_COLLECTIVE_FAMILIES))


def convert(model: MindIR) -> ConvertedGraph:
    """Converts the main graph.

    Raises:
        ConversionRefused: primitives without a mapping (all named in the text), sub-graphs, or arguments that have
            no counterpart in ONNX.
        StartError: the graph refers to values that do not exist, or runs in a circle.
    """
    order = reachable(model)
    refuse_unknown(model, order)
    emitter = Emitter()
    inputs = tuple(
        Tensor(name, input_dtype(name, port.type), port.type.shape)
        for name, port in zip(input_names([port.name for port in model.inputs]), model.inputs, strict=True)
    )
    values: dict[str, Value] = dict(model.values)
    values.update({port.name: tensor for port, tensor in zip(model.inputs, inputs, strict=True)})
    for name in order:
        node = model.nodes[name]
        values[name] = map_node(node, values, emitter)
    outputs: list[Tensor] = []
    taken = {tensor.name for tensor in inputs}
    for name, declared in model.outputs:
        # Of a tuple the exporter sometimes leaves the shapes out; those of its parts are known by now.
        result = values[name] if isinstance(values[name], tuple) else adopt(values[name], declared, emitter)
        for value in flat(result):
            outputs.append(_named_output(value, len(outputs), taken, emitter))
    return ConvertedGraph(emitter, inputs, tuple(outputs))


def data_inputs(node: Node) -> tuple[str, ...]:
    """The inputs that a node computes from."""
    if node.primitive in ALIASES:
        return node.inputs[:1]
    return () if node.primitive == _UPDATE else node.inputs


def reachable(model: MindIR, further: Iterable[str] = ()) -> list[str]:
    """Names of the nodes that the outputs, and the nodes `further`, are computed from, each after its inputs."""
    constants_and_inputs = {*model.values, *(port.name for port in model.inputs)}
    order: list[str] = []
    done: set[str] = set()
    open_nodes: set[str] = set()
    for output in (*(name for name, _ in model.outputs), *further):
        stack = [(output, False)]
        while stack:
            name, finished = stack.pop()
            if finished:
                open_nodes.discard(name)
                done.add(name)
                order.append(name)
            elif name in done or name in constants_and_inputs:
                continue
            elif name in open_nodes:
                raise StartError("Load model failed, the graph of the model runs in a circle: export it again")
            elif name not in model.nodes:
                raise StartError(f"Load model failed, the model refers to '{name}', which it does not hold")
            else:
                open_nodes.add(name)
                stack.append((name, True))
                # An open node among them closes a circle, which is noticed when it is popped.
                stack.extend((item, False) for item in data_inputs(model.nodes[name]) if item not in done)
    return order


def refuse_unknown(model: MindIR, order: Iterable[str], exchanges: Container[str] = ()) -> None:
    """Raises ConversionRefused for what cannot be converted.

    Args:
        exchanges: primitives that talk to other processes and are carried out between the parts of the graph.
    """
    collectives = [name for name in collectives_in(model) if name not in exchanges]
    if collectives:
        raise ConversionRefused(f"it exchanges data with other processes ({', '.join(collectives)})")
    if model.functions:
        raise ConversionRefused(f"it has control flow or calls ({len(model.functions)} sub-graphs)")
    if model.calls:
        raise ConversionRefused(f"it calls what the file does not hold ({', '.join(sorted(set(model.calls)))})")
    computed = set(order)
    names = [model.nodes[name].primitive for name in order]
    # Nodes reached by side effects only: unless they are known to be harmless, they would change the results.
    names += [node.primitive for name, node in model.nodes.items() if name not in computed]
    known = {*_HARMLESS, *(name for name in names if name in exchanges)}
    unknown = sorted({name for name in names if find_mapping(name) is None and name not in known})
    if unknown:
        raise ConversionRefused(f"it uses primitives that have no ONNX mapping: {', '.join(unknown)}")


def map_node(node: Node, values: dict[str, Value], emitter: Emitter) -> Value:
    if node.primitive in _HARMLESS:
        return MONAD
    mapping = find_mapping(node.primitive)
    assert mapping is not None
    inputs = [values[name] for name in data_inputs(node)]
    op = Op(node.primitive, [value for value in inputs if value is not MONAD], node.attributes, node.result, emitter)
    try:
        return adopt(mapping(op), node.result, emitter)
    except ConversionRefused:
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as failure:
        # A file may hold arguments of any kind; those that the mapping does not expect are not supported.
        raise ConversionRefused(f"{node.primitive}: its arguments are not understood ({failure})") from failure


def adopt(value: Value, result: Any, emitter: Emitter) -> Value:
    """The value with the dtype and shape that the exporter inferred, which are exact where they are known."""
    if isinstance(value, tuple) and isinstance(result, tuple) and len(value) == len(result):
        return tuple(adopt(item, kind, emitter) for item, kind in zip(value, result, strict=True))
    if not isinstance(value, Tensor) or not isinstance(result, TensorType):
        return value
    if result.dtype is not None:
        value = emitter.cast(value, result.dtype)
    return Tensor(value.name, value.dtype, _better_shape(value.shape, result.shape))


def _better_shape(computed: Shape, inferred: Shape) -> Shape:
    # The exporter writes the shape of a Python scalar as (0,).
    if inferred is None or (inferred == (0,) and computed is not None):
        return computed
    if computed is None or len(computed) != len(inferred):
        return None if inferred == (0,) else inferred
    return tuple(size if size != -1 else other for size, other in zip(inferred, computed, strict=True))


def input_dtype(name: str, kind: TensorType) -> str:
    if kind.dtype is None:
        raise ConversionRefused(f"its input '{name}' is no tensor of numbers")
    return kind.dtype


def flat(value: Value) -> Iterable[Value]:
    if isinstance(value, tuple):
        for item in value:
            yield from flat(item)
    else:
        yield value


def _named_output(value: Value, index: int, taken: set[str], emitter: Emitter) -> Tensor:
    if isinstance(value, Opaque) or value is None:
        raise ConversionRefused(f"its output {index} is no tensor")
    op = Op("output", [value], {}, None, emitter)
    name = f"output_{index}"
    while name in taken:
        name += "_"
    taken.add(name)
    return emitter.output(op.tensor(0), name)
