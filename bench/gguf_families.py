"""Shapes of families with states, sinks, experts and tables by layer, for `bench/gguf_files.py`.

Sizes are those of Qwen3.5-0.8B, LFM2-1.2B, gpt-oss-20b (12 of its 24 layers) and Gemma 4 E2B; names and metadata those
of llama.cpp's converter, types llama-quantize's choice: of a Q4_K_M, or of MXFP4 for gpt-oss's experts and Q8_0 for the
rest, as it is published. Tables of predictors of further tokens, images and sounds are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]
Draw = np.random.Generator


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: the last dimension is that of inputs.
        kind: its type in GGUF.
        values: float32 [shape]; None: random blocks.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    values: Floats | None = None


@dataclass(frozen=True)
class Family:
    """A file: its architecture by GGUF's name, its metadata without that name in front, its tensors."""

    kind: str
    vocabulary: int
    metadata: dict[str, Any]
    tensors: Callable[[Draw], Iterator[Tensor]]


def more_bits(place: int, places: int) -> bool:
    """llama-quantize's `use_more_bits`: the first eighth, the last eighth, every third between them."""
    eighth = places // 8
    return place < eighth or place >= 7 * places // 8 or (place - eighth) % 3 == 2


def _mixed(name: str, rows: int, inputs: int, more: bool = False) -> Tensor:
    return Tensor(f"{name}.weight", (rows, inputs), "Q6_K" if more else "Q4_K")


def _floats(name: str, values: Any) -> Tensor:
    found = np.asarray(values, np.float32)
    return Tensor(name, found.shape, "F32", found)


def _norms(at: str, width: int, *names: str) -> Iterator[Tensor]:
    for name in names:
        yield _floats(f"{at}{name}.weight", np.ones(width))


def _mlp(at: str, hidden: int, mlp: int, more: bool) -> Iterator[Tensor]:
    yield _mixed(f"{at}ffn_gate", mlp, hidden)
    yield _mixed(f"{at}ffn_up", mlp, hidden)
    yield _mixed(f"{at}ffn_down", hidden, mlp, more)


_QWEN35_LAYERS, _QWEN35_HEADS = 24, 16


def _qwen35(draw: Draw) -> Iterator[Tensor]:
    hidden, inner, heads = 1024, 2048, _QWEN35_HEADS
    yield _mixed("token_embd", 248_320, hidden, more=True)
    yield from _norms("", hidden, "output_norm")
    for layer in range(_QWEN35_LAYERS):
        at, more = f"blk.{layer}.", more_bits(layer, _QWEN35_LAYERS)
        yield from _norms(at, hidden, "attn_norm", "post_attention_norm")
        if layer % 4 == 3:
            yield _mixed(f"{at}attn_q", 4096, hidden)  # with the gate of the output
            yield _mixed(f"{at}attn_k", 512, hidden)
            yield _mixed(f"{at}attn_v", 512, hidden, more)
            yield _mixed(f"{at}attn_output", hidden, inner)
            yield from _norms(at, 256, "attn_q_norm", "attn_k_norm")
        else:
            yield _mixed(f"{at}attn_qkv", 3 * inner, hidden, more)
            yield _mixed(f"{at}attn_gate", inner, hidden)
            yield _mixed(f"{at}ssm_alpha", heads, hidden)
            yield _mixed(f"{at}ssm_beta", heads, hidden)
            yield _mixed(f"{at}ssm_out", hidden, inner)
            yield _floats(f"{at}ssm_conv1d.weight", draw.normal(0, 0.3, (3 * inner, 4)))
            yield _floats(f"{at}ssm_dt.bias", draw.normal(0, 0.5, heads))
            yield _floats(f"{at}ssm_a", -draw.uniform(0.1, 4, heads))
            yield from _norms(at, 128, "ssm_norm")
        yield from _mlp(at, hidden, 3584, more)


_LFM2_ATTENTION = (2, 5, 8, 10, 12, 14)
_LFM2_LAYERS = 16


def _lfm2(draw: Draw) -> Iterator[Tensor]:
    hidden = 2048
    yield _mixed("token_embd", 65_536, hidden, more=True)
    yield from _norms("", hidden, "token_embd_norm")
    for layer in range(_LFM2_LAYERS):
        at = f"blk.{layer}."
        yield from _norms(at, hidden, "attn_norm", "ffn_norm")
        if layer in _LFM2_ATTENTION:
            more = more_bits(_LFM2_ATTENTION.index(layer), len(_LFM2_ATTENTION))
            yield _mixed(f"{at}attn_q", hidden, hidden)
            yield _mixed(f"{at}attn_k", 512, hidden)
            yield _mixed(f"{at}attn_v", 512, hidden, more)
            yield _mixed(f"{at}attn_output", hidden, hidden)
            yield from _norms(at, 64, "attn_q_norm", "attn_k_norm")
        else:
            yield _mixed(f"{at}shortconv.in_proj", 3 * hidden, hidden)
            yield _mixed(f"{at}shortconv.out_proj", hidden, hidden)
            yield _floats(f"{at}shortconv.conv.weight", draw.normal(0, 0.5, (hidden, 3)))
        yield from _mlp(at, hidden, 8192, more_bits(layer, _LFM2_LAYERS))


_GPT_OSS_LAYERS = 12


def _gpt_oss(draw: Draw) -> Iterator[Tensor]:
    hidden, queries, keys, experts = 2880, 4096, 512, 32
    yield Tensor("token_embd.weight", (201_088, hidden), "Q8_0")
    yield Tensor("output.weight", (201_088, hidden), "Q8_0")
    yield from _norms("", hidden, "output_norm")
    for layer in range(_GPT_OSS_LAYERS):
        at = f"blk.{layer}."
        yield from _norms(at, hidden, "attn_norm", "post_attention_norm")
        for name, rows, inputs in (
            ("attn_q", queries, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, queries),
        ):
            yield Tensor(f"{at}{name}.weight", (rows, inputs), "Q8_0")
            yield _floats(f"{at}{name}.bias", draw.normal(0, 0.05, rows))
        yield _floats(f"{at}attn_sinks.weight", draw.normal(0, 1, 64))
        yield _floats(f"{at}ffn_gate_inp.weight", draw.normal(0, 0.02, (experts, hidden)))
        yield _floats(f"{at}ffn_gate_inp.bias", draw.normal(0, 0.05, experts))
        for name in ("gate", "up", "down"):
            yield Tensor(f"{at}ffn_{name}_exps.weight", (experts, hidden, hidden), "MXFP4")
            yield _floats(f"{at}ffn_{name}_exps.bias", draw.normal(0, 0.05, (experts, hidden)))


_GEMMA4_LAYERS, _GEMMA4_SHARED = 35, 20
_GEMMA4_SLIDES = [layer % 5 != 4 for layer in range(_GEMMA4_LAYERS)]


def _gemma4(draw: Draw) -> Iterator[Tensor]:
    hidden, of_layer, own = 1536, 256, _GEMMA4_LAYERS - _GEMMA4_SHARED
    yield _mixed("token_embd", 262_144, hidden, more=True)
    yield _mixed("per_layer_token_embd", 262_144, of_layer * _GEMMA4_LAYERS, more=True)
    yield _floats("per_layer_model_proj.weight", draw.normal(0, 0.02, (of_layer * _GEMMA4_LAYERS, hidden)))
    yield from _norms("", of_layer, "per_layer_proj_norm")
    yield from _norms("", hidden, "output_norm")
    yield _floats("rope_freqs.weight", [1.0] * 64 + [1e30] * 192)
    for layer, slides in enumerate(_GEMMA4_SLIDES):
        at, head = f"blk.{layer}.", 256 if slides else 512
        names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm")
        yield from _norms(at, hidden, *names)
        yield _mixed(f"{at}attn_q", 8 * head, hidden)
        yield from _norms(at, head, "attn_q_norm")
        if layer < own:
            yield _mixed(f"{at}attn_k", head, hidden)
            yield _mixed(f"{at}attn_v", head, hidden, more_bits(layer, own))
            yield from _norms(at, head, "attn_k_norm")
        yield _mixed(f"{at}attn_output", hidden, 8 * head)
        yield _floats(f"{at}layer_output_scale.weight", [1.0])
        yield _mixed(f"{at}inp_gate", of_layer, hidden)
        yield _mixed(f"{at}proj", hidden, of_layer)
        yield from _mlp(at, hidden, 6144 if layer < own else 12_288, more_bits(layer, _GEMMA4_LAYERS))


FAMILIES = {
    "qwen3.5-0.8b-q4_k_m": Family(
        "qwen35",
        248_320,
        {
            "block_count": _QWEN35_LAYERS,
            "embedding_length": 1024,
            "feed_forward_length": 3584,
            "attention.head_count": 8,
            "attention.head_count_kv": 2,
            "attention.key_length": 256,
            "attention.value_length": 256,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.dimension_count": 64,
            "rope.dimension_sections": [11, 11, 10, 0],
            "rope.freq_base": 1e7,
            "full_attention_interval": 4,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 128,
            "ssm.group_count": _QWEN35_HEADS,
            "ssm.time_step_rank": _QWEN35_HEADS,
            "ssm.inner_size": 2048,
        },
        _qwen35,
    ),
    "lfm2-1.2b-q4_k_m": Family(
        "lfm2",
        65_536,
        {
            "block_count": _LFM2_LAYERS,
            "embedding_length": 2048,
            "feed_forward_length": 8192,
            "attention.head_count": 32,
            "attention.head_count_kv": [8 * (layer in _LFM2_ATTENTION) for layer in range(_LFM2_LAYERS)],
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 1e6,
            "shortconv.l_cache": 3,
        },
        _lfm2,
    ),
    "gpt-oss-20b-12-layers-mxfp4": Family(
        "gpt-oss",
        201_088,
        {
            "block_count": _GPT_OSS_LAYERS,
            "embedding_length": 2880,
            "feed_forward_length": 2880,
            "expert_feed_forward_length": 2880,
            "expert_count": 32,
            "expert_used_count": 4,
            "attention.head_count": 64,
            "attention.head_count_kv": 8,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.sliding_window": 128,
            "rope.dimension_count": 64,
            "rope.freq_base": 150_000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        },
        _gpt_oss,
    ),
    "gemma-4-e2b-q4_k_m": Family(
        "gemma4",
        262_144,
        {
            "block_count": _GEMMA4_LAYERS,
            "embedding_length": 1536,
            "feed_forward_length": [6144] * (_GEMMA4_LAYERS - _GEMMA4_SHARED) + [12_288] * _GEMMA4_SHARED,
            "attention.head_count": 8,
            "attention.head_count_kv": 1,
            "attention.key_length": 512,
            "attention.value_length": 512,
            "attention.key_length_swa": 256,
            "attention.value_length_swa": 256,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.sliding_window": 512,
            "attention.sliding_window_pattern": _GEMMA4_SLIDES,
            "attention.shared_kv_layers": _GEMMA4_SHARED,
            "embedding_length_per_layer_input": 256,
            "final_logit_softcapping": 30.0,
            "rope.dimension_count": 512,
            "rope.dimension_count_swa": 256,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 10_000.0,
        },
        _gemma4,
    ),
}
