"""Runs every other causal language model of transformers with our paged attention in place of its own.

transformers lets an attention function be registered by name. Ours takes the flat tokens of a step as one sequence, and
finds their rows and slots in the running batch. A model that carries state from token to token in other ways than
attention would give wrong results. So at load the model computes a short text once in its own way and once in chunks
over the paged cache, and is refused if the results differ.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from inflight.config import ModelConfig
from inflight.device import Ranks
from inflight.errors import StartError
from inflight.models.base import CausalLM
from inflight.models.bridge_rope import BridgeRope
from inflight.models.on_torch import TensorBatch, TorchLM, dtype_name
from inflight.nn import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache, make_attention

log = logging.getLogger("inflight")

NAME = "inflight"
_OWN_ATTENTION = "its code in transformers has attention of its own, which the paged cache cannot replace"
CHECKED = 11
"""Tokens of the text that `_check` computes in both ways."""


@dataclass
class _Step:
    """The running forward pass, which the attention function needs beside its arguments."""

    attention: AttentionBackend | None
    batch: AttentionBatch | None
    specs: dict[int, AttentionSpec] = field(default_factory=dict)


# A global, because transformers cannot pass our arguments through. One model runs at a time in a rank's process.
_running: _Step | None = None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' contract: query [1, H, T, D], key and value [1, KH, T, D]; returns [1, T, H, D]."""
    step = _running
    assert step is not None
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise StartError("its attention layers have no numbers")
    spec = step.specs.get(layer)
    if spec is None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        spec = step.specs[layer] = AttentionSpec(
            layer=layer,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            scale=float(scale),
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    if step.attention is None:  # the dry run, which only records the shapes of the layers
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    assert step.batch is not None
    return step.attention.forward(spec, step.batch, q, k, v)[None], None


class Bridged(TorchLM):
    """A model of transformers as a `CausalLM`. One rank only."""

    family = "transformers"

    def __init__(self, model: Any, longest: int) -> None:
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        self._attention: AttentionBackend | None = None
        # Embedding and head may differ in size: only tokens that both know are served.
        tables = model.get_input_embeddings(), model.get_output_embeddings()
        self.vocab_size = min(table.weight.shape[0] for table in tables)
        self._rope = BridgeRope(model, longest)
        self.max_positions = self._rope.longest
        self.switch, self.stretched = self._rope.switch, self._rope.stretched
        self.torch_dtype, self.device = model.dtype, model.device
        self.dtype = dtype_name(model.dtype)
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._specs: dict[int, AttentionSpec] = {}
        self._run(torch.zeros(2, dtype=torch.int64), torch.arange(2), None, None)
        count = model.config.get_text_config().num_hidden_layers
        if sorted(self._specs) != list(range(count)):
            raise StartError(f"{len(self._specs)} of its {count} layers use attention that can be replaced")
        self.layers = [self._specs[layer] for layer in range(count)]

    def bind(self, attention: AttentionBackend) -> None:
        self._attention = attention

    def compute(self, batch: TensorBatch) -> torch.Tensor:
        if self.switch or self.stretched:
            self._rope.reach = batch.positions.cpu() + 1 if batch.reach is None else batch.reach
        try:
            return self._run(batch.token_ids, batch.positions, batch.attention, batch.logits_at)
        finally:
            self._rope.reach = None

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch | None,
        logits_at: torch.Tensor | None,
    ) -> torch.Tensor:
        global _running
        device = self._model.device
        options: dict[str, Any] = {"use_cache": False}
        if self._positions:
            options["position_ids"] = positions.to(device)[None]
        if self._keeps and logits_at is not None:
            options["logits_to_keep"] = logits_at
        _running = _Step(self._attention if batch is not None else None, batch, self._specs)
        try:
            with torch.inference_mode():
                logits = self._model(tokens.to(device)[None], **options).logits[0]
        finally:
            _running = None
        if logits_at is not None and not self._keeps:
            logits = logits[logits_at]
        found: torch.Tensor = logits[:, : self.vocab_size].float()
        return found


def load_bridged(
    settings: ModelConfig,
    ranks: Ranks,
    device: torch.device,
    dtype: str,
    config: Mapping[str, Any],
    progress: Callable[[float], None] | None,
) -> CausalLM:
    """Loads a model through transformers.

    Raises:
        StartError: it cannot be served this way; the text says why.
    """
    import transformers

    kind = config.get("model_type", "unknown")
    if ranks.size > 1:
        raise StartError(f"models of type '{kind}' run on one rank only; leave --tensor-parallel out")
    _check_kind(kind, config)
    transformers.AttentionInterface.register(NAME, _attend)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model_dir,
            dtype=getattr(torch, dtype),
            attn_implementation=NAME,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=None if settings.allow_pickle else True,
            local_files_only=True,
        )
    except ImportError as error:  # of a library that reads quantised weights
        quantisation = config.get("quantization_config")
        if not isinstance(quantisation, Mapping):
            raise StartError(f"transformers cannot load the model of type '{kind}': {error}") from error
        raise StartError(
            f"weights quantised by {quantisation.get('quant_method')} are not read for models of type '{kind}'; use "
            "the checkpoint that is not quantised"
        ) from error
    except KeyError as error:  # its table of kinds of attention
        if error.args == (NAME,):
            raise StartError(f"a model of type '{kind}' cannot be served: {_OWN_ATTENTION}") from error
        raise StartError(f"transformers cannot load the model of type '{kind}': it misses {error}") from error
    except Exception as error:  # transformers raises anything
        raise StartError(f"transformers cannot load the model of type '{kind}': {error}") from error
    model = model.to(device).eval()
    if progress is not None:
        progress(1.0)
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
    try:
        bridged = Bridged(model, int(longest))
        _check(bridged, model)
    except StartError as error:
        raise StartError(f"a model of type '{kind}' cannot be served: {error}") from error
    except Exception as error:  # an architecture that breaks our assumptions may raise anything
        log.debug("the model of type '%s' fails with paged attention", kind, exc_info=error)
        raise StartError(f"a model of type '{kind}' cannot be served: {_OWN_ATTENTION}") from error
    return bridged


def _check_kind(kind: str, config: Mapping[str, Any]) -> None:
    """Raises StartError for a model with an encoder: what transformers says of it names neither model nor cause."""
    if config.get("is_encoder_decoder"):
        raise StartError(
            f"models of type '{kind}' are an encoder and a decoder; only models of one decoder write texts here"
        )


def _check(bridged: Bridged, model: Any) -> None:
    """Computes one text whole in the model's own way, and in chunks with a neighbour over the paged cache."""
    tokens = (torch.arange(CHECKED) * 7 + 3) % bridged.vocab_size
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            own = model(tokens.to(model.device)[None], use_cache=False).logits[0, :, : bridged.vocab_size].float()
    finally:
        model.set_attn_implementation(NAME)
    if not bool(torch.isfinite(own).all()):
        raise StartError("its logits are no numbers; are its weights whole, and of a form that transformers reads?")
    size, blocks = 4, -(-CHECKED // 4)
    caches = [
        LayerCache(
            torch.zeros(2 * blocks, size, spec.num_kv_heads, spec.head_dim, dtype=model.dtype, device=model.device),
            torch.zeros(2 * blocks, size, spec.num_kv_heads, spec.value_dim, dtype=model.dtype, device=model.device),
        )
        for spec in bridged.layers
    ]
    bridged.bind(make_attention(caches, size))
    tables = torch.stack([torch.arange(blocks), torch.arange(blocks) + blocks]).int().to(model.device)
    found = []
    for first, end in ((0, 5), (5, 9), (9, 10), (10, CHECKED)):
        rows = [_row(tokens, first, end, 0), _row(tokens.flip(0), first, end, blocks * size)]
        attention = AttentionBatch(
            query_lens=[end - first] * 2,
            context_lens=[end] * 2,
            block_tables=tables,
            slots=torch.cat([row[2] for row in rows]).to(model.device),
            block_size=size,
            num_decode=2 if end - first == 1 else 0,
        )
        batch = TensorBatch(
            torch.cat([row[0] for row in rows]).to(model.device),
            torch.cat([row[1] for row in rows]).to(model.device),
            attention,
            torch.arange(end - first, device=model.device),
        )
        found.append(bridged.compute(batch))
    difference = (torch.cat(found) - own).abs().max().item()
    allowed = (1e-3 if model.dtype == torch.float32 else 0.08) * own.abs().max().item()
    if difference > allowed:
        raise StartError(
            "computed in chunks over the paged cache its logits are different: it remembers something beside keys and "
            "values, or hides tokens in a way of its own"
        )


def _row(tokens: torch.Tensor, first: int, end: int, offset: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.arange(first, end)
    return tokens[first:end], positions, positions + offset
