"""The decoder on the CPU engine: the layers of `models/decoder.py` as one program of native operations.

Buffers between operations are float32; products round their inputs to the weight's format. A row's logits depend on the
row alone: they are bit for bit the same in any batch, in any chunks, on any number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from inflight.checkpoint import make_rope
from inflight.config import ModelConfig, processors
from inflight.errors import StartError
from inflight.kernels import (
    ACTIVATIONS,
    Activation,
    Cost,
    DecodeArrays,
    Format,
    KvType,
    Layer,
    NativeProgram,
    Norm,
    PackedAdapter,
    Precision,
    Routing,
    Saves,
    StepArrays,
    StepImages,
)
from inflight.models.adapter import Adapter
from inflight.models.adapter_products import adapted_products
from inflight.models.base import CausalLM, DecodeRows, ForwardBatch, KeptForms, reaches
from inflight.models.config import DecoderConfig
from inflight.models.decoder_tensors import XIELU, DecoderTensors
from inflight.models.native_gemma4 import Gemma4Layers
from inflight.models.native_kept import NativeKept
from inflight.models.native_latent import LatentLayers
from inflight.models.native_recurrent import RecurrentLayers
from inflight.models.states import LayerState, Paged, Shared, block_bytes
from inflight.models.weight_loader import WeightLoader
from inflight.tensors import BFLOAT16, FLOAT_DTYPES, Floats

log = logging.getLogger("inflight")


@dataclass(frozen=True)
class QuantConfig:
    """How float weights are packed.

    Attributes:
        layers: the weights of layers; None: as floats.
        vocabulary: embedding and head; None: as floats.
    """

    layers: Precision | None = None
    vocabulary: Precision | None = None


def quant_config(quantize: str) -> QuantConfig:
    """The packing for a value of `--quantize`: none, int8, int4 or int4-GROUP.

    With int4 the vocabulary has 8 bits, as in other engines: 4 bits there cost logits more than in all layers together.
    """
    if quantize == "none":
        return QuantConfig()
    int8 = Precision(Format.INT8)
    if quantize == "int8":
        return QuantConfig(int8, int8)
    return QuantConfig(Precision(Format.GROUP4, int(quantize.partition("-")[2] or 32)), int8)


class NativeDecoder(CausalLM):
    """A `CausalLM` on the CPU engine, see the module. `load_model` makes it.

    Args:
        config: the decoder.
        loader: of its weights, which are added one after the other.
        settings: threads, precision and cache.
        dtype: of weights that are not quantised.
    """

    def __init__(self, config: DecoderConfig, loader: WeightLoader, settings: ModelConfig, dtype: str) -> None:
        self.family = config.family
        self._layers = [
            Layer(config.heads, config.kv_heads, config.head_dim, config.scale, window, config.softcap)
            for window in config.windows
        ]
        if config.gemma4 is not None:
            self._layers = [
                replace(layer, kv_heads=shape.kv_heads, dim=shape.dim, source=shape.source, causal=layer.window is None)
                for layer, shape in zip(self._layers, config.gemma4.shapes, strict=True)
            ]
        if config.latent is not None:
            width, rank = config.latent.rank + config.latent.rotary, config.latent.rank
            self._layers = [replace(layer, kv_heads=1, dim=width, latent=rank) for layer in self._layers]
        self._recurrent: RecurrentLayers | None = None
        self.vocab_size = config.vocab_size
        self.max_positions = config.longest
        self.image_width = config.hidden if config.images else 0
        self.image_layers = config.deepstack
        self.dtype = dtype
        self._config = config
        self._kv = _kv_type(settings.kv_cache_dtype, dtype)
        self.threads = settings.threads or processors()
        self._names: dict[int, str] = {}
        self._shared = self._gate = -1  # buffers of a shared expert
        self._even = -1  # of norms that take the mean off
        self._rows: DecodeRows | None = None
        self._arrays: DecodeArrays | None = None
        try:
            self._program = NativeProgram(self.threads, settings.cpu_isa)
        except ValueError as error:
            raise StartError(f"the setting cpu_isa: {error}") from error
        self._build(loader, quant_config(settings.quantize))
        loader.finish(self._program)
        self.weight_bytes = self._program.bytes
        self.state_bytes = self._program.state_bytes
        self.drafts = True
        log.info("CPU engine: %s, %d threads, weights %d MB", self.isa, self.threads, self.weight_bytes // 1_000_000)

    def _build(self, loader: WeightLoader, quant: QuantConfig) -> None:
        """Adds the program's operations in the order in which a step runs them."""
        config, program = self._config, self._program
        ropes = [make_rope(rope, config.rope_dim(name), config.max_positions) for name, rope in config.ropes.items()]
        self.switch, self.stretched = reaches(ropes)
        for rope in ropes:
            far = None if rope.long_inverse is None else rope.long_inverse.tolist()
            program.rope(rope.inverse.tolist(), rope.factor, far, rope.original, rope.theta, rope.stretch, config.axes)
        numbers = {name: number for number, name in enumerate(config.ropes)}
        x = program.buffer(config.hidden)
        [table] = self._take(loader, "embedding", quant.vocabulary)
        # The embedding's scale as the models were trained: rounded to the weights' dtype.
        program.embed(table, x, self._rounded(config.embedding_scale))
        if config.gemma4 is not None:
            take = partial(self._take, loader)
            parts = Gemma4Layers(config, program, loader, take, quant.layers, numbers, x)
            parts.add(self._layers, self._rounded(config.gemma4.own_size**0.5))
        else:
            self._add_layers(loader, x, numbers, quant)
        self._last, self._logits = program.buffer(config.hidden), program.buffer(config.vocab_size)
        program.gather(x, self._last, self._norm(loader, "norm"))
        head = (table,) if config.tied else self._take(loader, "head", quant.vocabulary)
        program.multiply(self._last, self._logits, head)
        if config.logits_divider != 1.0 or config.final_softcap is not None:
            program.cap(self._logits, config.logits_divider, config.final_softcap)

    def _rounded(self, scale: float) -> float:
        return float(np.array(scale, FLOAT_DTYPES[self.dtype]))

    def _add_layers(self, loader: WeightLoader, x: int, numbers: Mapping[str, int], quant: QuantConfig) -> None:
        """Adds the operations of all layers. Args: numbers: of the rotations, by name."""
        config, program = self._config, self._program
        queries = config.heads * config.head_dim
        columns = queries + 2 * config.kv_heads * config.head_dim
        qkv = program.buffer(columns + queries * config.output_gate)
        recurrent: RecurrentLayers | None = None
        if config.recurrence is not None:
            take = partial(self._take, loader)
            recurrent = RecurrentLayers(program, config, config.recurrence, loader, take, quant.layers)
        self._recurrent = recurrent
        latent: LatentLayers | None = None
        if config.latent is not None:
            latent = LatentLayers(
                program, config.heads, config.latent, loader, partial(self._take, loader), quant.layers
            )
        attended = program.buffer(config.heads * config.head_dim) if latent is None else latent.values
        update = program.buffer(config.hidden)
        inner = program.buffer(config.intermediate)
        experts = config.experts
        routed = program.buffer(experts.count) if experts is not None else -1
        for index, spec in enumerate(self._layers):
            name = f"{index}."
            if config.recurrent(index) or config.attends(index):
                before = self._before(loader, f"{name}before_attention")
            if recurrent is not None and config.recurrent(index):
                recurrent.read(x, name, before)
            if config.attends(index) and latent is None:
                source, norm = self._normed(x, before)
                program.multiply(source, qkv, self._take(loader, f"{name}qkv", quant.layers), norm=norm)
            if recurrent is not None and config.recurrent(index):
                recurrent.write(x, name)
            if latent is not None:
                latent.attend(x, name, spec, numbers["all"], before)
            elif config.attends(index):
                self._attend(loader, spec, index, qkv, attended, numbers)
                if config.output_gate:
                    program.output_gate(qkv, columns, attended)
            if config.attends(index):
                scale = config.multipliers.attention
                self._join(loader, attended, x, update, f"{name}out", f"{name}after_attention", quant, scale)
            self._behind(loader, x, (update, inner, routed), index, quant)
            if index < config.deepstack:
                program.add_rows(x, index)

    def _attend(
        self, loader: WeightLoader, spec: Layer, index: int, qkv: int, attended: int, numbers: Mapping[str, int]
    ) -> None:
        """The layer's norms and rotation of queries and keys, and its attention."""
        config, program, heads = self._config, self._program, None
        layer = program.layer(spec, loader.array(program, f"{index}.sinks") if config.sinks else None)
        if config.qk_norm or config.wide_norm:
            heads = self._norm(loader, f"{index}.q_norm"), self._norm(loader, f"{index}.k_norm")
        if heads is not None and config.wide_norm:
            program.norm_part(qkv, 0, heads[0])
            program.norm_part(qkv, config.heads * config.head_dim, heads[1])
            heads = None
        rope = config.rope_of[index]
        number = None if rope is None else numbers[rope]
        program.rotate(qkv, layer, number, heads, rotated=config.norm_rotated, growth=config.growth)
        program.attend(qkv, attended, layer)

    def _normed(self, x: int, norm: Norm | None) -> tuple[int, Norm | None]:
        """What products read as norm(x): a buffer, and the norm that they still apply."""
        if norm is None or not norm.layered:
            return x, norm
        if self._even < 0:
            self._even = self._program.buffer(self._config.hidden)
        self._program.norm(x, self._even, norm)
        return self._even, None

    def _behind(
        self, loader: WeightLoader, x: int, buffers: tuple[int, int, int], index: int, quant: QuantConfig
    ) -> None:
        """The layer's MLP or mixture.

        Args:
            buffers: for updates, the MLP's inner rows, the router's logits.
        """
        update, inner, routed = buffers
        name, config = f"{index}.", self._config
        if not config.mixes(index) and not config.has_mlp(index):
            return
        if config.parallel:  # the buffer still holds the norm that attention read
            source, before = self._even, None
        else:
            source, before = self._normed(x, self._before(loader, f"{name}before_mlp"))
        if config.mixes(index):
            assert before is not None
            self._mixture(loader, x, routed, name, before, quant)
            return
        # A multiplier of the gate stands between the product and the activation.
        scale = config.multipliers.gate
        gate_up = self._take(loader, f"{name}gate_up", quant.layers, gated=config.gated and scale == 1.0)
        if config.xielu:
            program = self._program
            program.multiply(source, inner, gate_up, norm=before)
            program.xielu(inner, *(loader.array(program, f"{name}{kind}") for kind in XIELU))
        else:
            self._program.activated(source, inner, gate_up, self._act, norm=before, scale=scale)
        self._join(loader, inner, x, update, f"{name}down", f"{name}after_mlp", quant, config.multipliers.down)

    def _join(
        self,
        loader: WeightLoader,
        source: int,
        x: int,
        update: int,
        name: str,
        after: str,
        quant: QuantConfig,
        scale: float = 1.0,
    ) -> None:
        """x += scale * a product of `source`, through a norm in sandwich form."""
        config, program = self._config, self._program
        product, scale = self._take(loader, name, quant.layers), config.residual_scale * scale
        if not config.sandwich:
            program.multiply(source, x, product, add=True, scale=scale)
            return
        program.multiply(source, update, product)
        program.norm(update, x, self._norm(loader, after), add=True, scale=scale)

    def _mixture(self, loader: WeightLoader, x: int, routed: int, name: str, norm: Norm, quant: QuantConfig) -> None:
        config, program = self._config, self._program
        experts = config.experts
        assert experts is not None
        program.multiply(x, routed, self._take(loader, f"{name}router", None), norm=norm)
        shared = self._shared_expert(loader, x, name, norm, quant) if experts.shared else -1
        numbers = range(experts.count)
        program.mixture(
            x,
            routed,
            [self._take(loader, f"{name}gate_up.{n}", quant.layers, gated=config.gated)[0] for n in numbers],
            [self._take(loader, f"{name}down.{n}", quant.layers)[0] for n in numbers],
            norm=norm,
            routing=Routing(
                experts.chosen,
                experts.sigmoid,
                experts.normalise,
                loader.array(program, f"{name}expert_bias") if experts.bias else -1,
                experts.groups,
                experts.kept,
                experts.floor,
                experts.scale,
                experts.single,
            ),
            act=self._act,
            scale=config.residual_scale,
        )
        if shared >= 0:
            product = self._take(loader, f"{name}shared_down", quant.layers)
            program.multiply(shared, x, product, add=True, scale=config.residual_scale)

    def _shared_expert(self, loader: WeightLoader, x: int, name: str, norm: Norm | None, quant: QuantConfig) -> int:
        """The inner rows of the expert that every token takes, times its gate if it has one.

        Returns:
            A buffer, which the mixture leaves.
        """
        program, experts = self._program, self._config.experts
        assert experts is not None
        if self._shared < 0:
            self._shared, self._gate = program.buffer(experts.shared), program.buffer(1)
        if experts.shared_gated:
            program.multiply(x, self._gate, self._take(loader, f"{name}shared_router", None), norm=norm)
        gate_up = self._take(loader, f"{name}shared_gate_up", quant.layers, gated=self._config.gated)
        program.activated(x, self._shared, gate_up, self._act, norm=norm)
        if experts.shared_gated:
            program.output_gate(self._gate, 0, self._shared)
        return self._shared

    @property
    def _act(self) -> Activation:
        return Activation[ACTIVATIONS[self._config.activation]]

    def _take(
        self, loader: WeightLoader, name: str, precision: Precision | None, *, gated: bool = False
    ) -> tuple[int, ...]:
        """A product's numbers: several if its tensors have several formats."""
        numbers = loader.product(self._program, name, precision, gated=gated)
        self._names.update(dict.fromkeys(numbers, name))
        return numbers

    def _before(self, loader: WeightLoader, name: str) -> Norm | None:
        return self._norm(loader, name) if self._config.norm_first else None

    def _norm(self, loader: WeightLoader, name: str) -> Norm:
        config = self._config
        return Norm(loader.norm(self._program, name), config.eps, config.centered_norm, config.layer_norm)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._program.isa

    def measure(self, on: bool) -> None:
        """Switches the measurement of operations' costs on (from zero) or off."""
        self._program.measure(on)

    def costs(self) -> list[Cost]:
        """The cost of each operation, in order; products have the name of their weight."""
        costs = self._program.costs()
        names = {number: name.lstrip("0123456789.") for number, name in self._names.items()}
        named = [replace(c, name=names[c.product]) if c.name == "product" else c for c in costs]
        if named[-1].name == "embedding" or named[-2].name == "embedding":  # a tied head
            named = [replace(c, name="head") if c.name == "embedding" else c for c in named]
        return named

    def read_adapter(self, adapter: Adapter) -> PackedAdapter:
        modules = adapted_products(adapter, DecoderTensors(self._config), self._program.multiplied, self._names)
        dtype = np.dtype(np.float32) if self.dtype == "float32" else BFLOAT16
        packed = self._program.pack_adapter(modules, dtype)
        log.info("adapter '%s': %d products, %.1f MB", adapter.name, len(modules), packed.bytes / 1e6)
        return packed

    def add_adapter(self, number: int, factors: PackedAdapter) -> None:
        self._program.add_adapter(number, factors)
        super().add_adapter(number, factors)

    def drop_adapter(self, number: int) -> None:
        self._program.drop_adapter(number)
        super().drop_adapter(number)

    def block_bytes(self, block_size: int) -> int:
        return block_bytes(self.layer_states(block_size))

    def layer_states(self, block_size: int) -> list[LayerState]:
        """What the layers keep of a sequence, in their order; a layer may have several states, or none."""
        states: list[LayerState] = []
        for index, layer in enumerate(self._layers):
            if self._recurrent is not None and self._config.recurrent(index):
                states.append(self._recurrent.state)
            if layer.source is not None:
                states.append(Shared(layer.source))
            elif self._config.attends(index):
                states.append(Paged(layer.block_bytes(block_size, self._kv)))
        return states

    def make_states(self, slots: int) -> int:
        self._program.make_states(slots)
        return slots * self.state_bytes

    def copy_state(self, source: int, to: int) -> None:
        self._program.copy_state(source, to)

    def kept(self) -> KeptForms:
        return NativeKept(self._program)

    def make_cache(self, blocks: int, block_size: int) -> int:
        return self._program.make_caches(blocks, block_size, self._kv)

    def decode(self, rows: DecodeRows, greedy: bool) -> Floats:
        if rows is not self._rows or self._arrays is None:
            count = len(rows.ids)
            self._rows = rows
            self._arrays = DecodeArrays(
                rows.tokens[:count],
                rows.blocks[:count],
                rows.known[:count],
                rows.computed[:count],
                rows.shift,
                rows.states if self._recurrent is not None else None,
                rows.adapters,
            )
        output = self._program.decode(self._arrays, greedy, self._logits, self._last)
        self.hidden, self.best = output.hidden, output.best
        return output.logits

    def forward(self, batch: ForwardBatch) -> Floats:
        wanted, order = batch.logits_at, None
        decoding = batch.num_decode == len(batch.query_lens)
        if not decoding and len(wanted) > 1 and bool((wanted[1:] < wanted[:-1]).any()):
            order = np.argsort(wanted, kind="stable")
            wanted = wanted[order]
        images = None if batch.images is None else StepImages(batch.images.at, batch.images.rows, batch.images.added)
        step = StepArrays(
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.query_lens,
            batch.block_tables,
            wanted,
            batch.reach,
            images,
            batch.places,
            batch.until,
            batch.states if self._recurrent is not None else None,
            None if batch.save_at is None or batch.save_to is None else Saves(batch.save_at, batch.save_to),
            batch.adapters,
        )
        output = self._program.run(step, self._logits, self._last)
        if order is None:
            self.hidden, self.best = output.hidden, output.best
            return output.logits
        back = np.argsort(order)
        self.hidden, self.best = output.hidden[back], output.best[back]
        return output.logits[back]


def _kv_type(asked: str, dtype: str) -> KvType:
    if asked == "int8":
        return KvType.INT8
    return KvType.FLOAT if dtype == "float32" else KvType.BF16
