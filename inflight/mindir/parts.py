"""One rank's share of a distributed model: its graph is cut where tensors are exchanged with other ranks.

What lies between two exchanges becomes an ONNX graph. Each node belongs to the first part in which all of its inputs
are known: exchanges that do not depend on each other follow the same part, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from inflight.mindir.convert import (
    ConvertedGraph,
    adopt,
    data_inputs,
    flat,
    input_dtype,
    map_node,
    reachable,
    refuse_unknown,
)
from inflight.mindir.emitter import Emitter, Shape, Tensor
from inflight.mindir.model import ConversionRefused, MindIR, Node, TensorType
from inflight.mindir.op import Op, Value
from inflight.mindir.signature import input_names

EXCHANGES = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast", "Send", "Receive")
"""Primitives that can be carried out between parts."""

REDUCTIONS = ("sum", "max", "min", "prod")


@dataclass(frozen=True)
class Exchange:
    """One exchange with other ranks.

    Attributes:
        kind: of `EXCHANGES`.
        given: the name of the value that is sent; empty for `Receive`.
        result: the name of what comes out; nothing does of `Send`.
        group: the name of the group of ranks.
        reduction: of `REDUCTIONS`, for `AllReduce` and `ReduceScatter`.
        peer: the other rank, or the root, as its number within the group.
        tag: pairs a `Send` with a `Receive`.
    """

    kind: str
    given: str
    result: Tensor
    group: str
    reduction: str
    peer: int
    tag: int


@dataclass(frozen=True)
class Parts:
    """The graph in the order in which it is run. Values have names, and `inputs` and `outputs` are some of them."""

    steps: tuple[ConvertedGraph | Exchange, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def exchanges(self) -> Iterator[Exchange]:
        return (step for step in self.steps if isinstance(step, Exchange))


def convert_parts(model: MindIR) -> Parts:
    """Cuts the main graph at its exchanges and converts the parts.

    Raises:
        ConversionRefused, StartError: as `convert`; or an exchange that cannot be carried out.
    """
    return _Cutter(model).cut()


@dataclass
class _Part:
    """A part while it is made."""

    emitter: Emitter = field(default_factory=Emitter)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)


class _Cutter:
    def __init__(self, model: MindIR) -> None:
        self._model = model
        sends = [name for name, node in model.nodes.items() if node.primitive == "Send"]
        self._order = reachable(model, sends)
        refuse_unknown(model, self._order, EXCHANGES)
        self._levels = self._assign()
        self._parts = [_Part() for _ in range(max([0, *self._levels.values()]) + 1)]
        names = input_names([port.name for port in model.inputs])
        self._inputs = tuple(
            Tensor(name, input_dtype(name, port.type), port.type.shape)
            for name, port in zip(names, model.inputs, strict=True)
        )
        self._values: dict[str, Value] = dict(model.values)
        self._values.update({port.name: tensor for port, tensor in zip(model.inputs, self._inputs, strict=True)})
        self._shared: dict[str, Tensor] = {tensor.name: tensor for tensor in self._inputs}  # known to every later part
        self._homes: dict[str, int] = {}  # the part that computes a node

    def _assign(self) -> dict[str, int]:
        """The part of each node; of an exchange, the part that it follows."""
        levels: dict[str, int] = {}
        for name in self._order:
            node = self._model.nodes[name]
            before = [
                levels[item] + (self._model.nodes[item].primitive in EXCHANGES)
                for item in data_inputs(node)
                if item in levels
            ]
            levels[name] = max(before, default=0)
        return levels

    def cut(self) -> Parts:
        # Sorted is stable: within a part the nodes keep their order.
        for name in sorted(self._order, key=lambda name: self._levels[name]):
            node, level = self._model.nodes[name], self._levels[name]
            if node.primitive in EXCHANGES:
                self._values[name] = self._exchange(node, level)
            else:
                local = {item: self._local(item, level) for item in data_inputs(node)}
                self._values[name] = map_node(node, local, self._parts[level].emitter)
                self._homes[name] = level
        outputs: list[Tensor] = []
        for name, declared in self._model.outputs:
            outputs += self._output(name, declared)
        steps: list[ConvertedGraph | Exchange] = []
        for part in self._parts:
            if part.outputs:
                steps.append(ConvertedGraph(part.emitter, tuple(part.inputs.values()), tuple(part.outputs.values())))
            # What is sent does not wait, and others may wait for it.
            steps += [exchange for exchange in part.exchanges if exchange.kind == "Send"]
            steps += [exchange for exchange in part.exchanges if exchange.kind != "Send"]
        return Parts(tuple(steps), self._inputs, tuple(outputs))

    def _local(self, name: str, level: int) -> Value:
        """The value of a node, an input or a constant as the part `level` sees it."""
        return self._seen(self._values[name], self._homes.get(name, -1), level)

    def _seen(self, value: Value, home: int, level: int) -> Value:
        if isinstance(value, tuple):
            return tuple(self._seen(item, home, level) for item in value)
        if not isinstance(value, Tensor) or home == level:
            return value
        shared = value if home < 0 else self._share(value, home)
        return self._parts[level].inputs.setdefault(shared.name, shared)

    def _share(self, value: Tensor, home: int) -> Tensor:
        """Makes a value of a part known to the later ones."""
        part = self._parts[home]
        if value.name not in part.outputs:
            name = f"value_{len(self._shared)}"
            while name in self._shared:
                name += "_"
            part.outputs[value.name] = self._shared[name] = part.emitter.output(value, name)
        return part.outputs[value.name]

    def _output(self, name: str, declared: object) -> Iterator[Tensor]:
        last = len(self._parts) - 1
        home = self._homes.get(name, -1)
        value = self._values[name]
        level = home if home >= 0 else last
        if not isinstance(value, tuple) and home >= 0:
            value = adopt(value, declared, self._parts[level].emitter)
        for item in flat(value):
            if home < 0 and isinstance(item, Tensor):
                yield item
            else:
                op = Op("output", [item], {}, None, self._parts[level].emitter)
                yield self._share(op.tensor(0), level)

    # Exchanges

    def _exchange(self, node: Node, level: int) -> Value:
        part = self._parts[level]
        local = [self._local(item, level) for item in data_inputs(node)]
        op = Op(node.primitive, local, node.attributes, node.result, part.emitter)
        given = None if node.primitive == "Receive" else self._given(op, level)
        dtype, shape = _result(op, given)
        result = Tensor(f"exchanged_{len(self._shared)}", dtype, shape)
        self._shared[result.name] = result
        reduction = str(node.attributes.get("op", "sum")).lower()
        if reduction not in REDUCTIONS:
            op.refuse(f"the reduction '{reduction}' is not supported, only {', '.join(REDUCTIONS)}")
        peer = node.attributes.get({"Send": "dest_rank", "Receive": "src_rank"}.get(node.primitive, "root_rank"), 0)
        part.exchanges.append(
            Exchange(
                node.primitive,
                given.name if given is not None else "",
                result,
                str(node.attributes.get("group", "")),
                reduction,
                int(peer),
                int(node.attributes.get("sr_tag", 0)),
            )
        )
        return (result,) if isinstance(node.result, tuple) else result

    def _given(self, op: Op, level: int) -> Tensor:
        tensors = op.tensors()
        if len(tensors) != 1:
            op.refuse(f"it has {len(tensors)} tensors, only one is supported")
        (tensor,) = tensors
        return tensor if tensor.name in self._shared else self._share(tensor, level)


def _result(op: Op, given: Tensor | None) -> tuple[str, Shape]:
    """Type and shape of what comes out of an exchange."""
    if op.primitive in ("AllReduce", "Broadcast", "Send") and given is not None:
        return given.dtype, given.shape
    first = op.result[0] if isinstance(op.result, tuple) and op.result else op.result
    if not isinstance(first, TensorType) or (first.dtype is None and given is None):
        raise ConversionRefused(f"{op.primitive}: the type of its result is not known")
    if op.primitive == "Receive" and (first.shape is None or -1 in first.shape):
        raise ConversionRefused(f"{op.primitive}: the shape of its result is open, it has to be known")
    dtype = given.dtype if given is not None else str(first.dtype)
    return dtype, first.shape
