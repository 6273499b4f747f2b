"""Weights of a GGUF file under the names that Hugging Face's checkpoints have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from inflight.errors import StartError
from inflight.models.files import Part
from inflight.models.gguf.blocks import BLOCKS, quantised
from inflight.models.gguf.file import GgufFile, TensorInfo, whole_number
from inflight.models.quantised import floats
from inflight.tensors import Quantised

_ROWS = 4096  # that are decoded at a time
_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_KNOWN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHERS = {"gemma2": _GEMMA, "gemma3": _GEMMA, "phi3": {"ffn_up": "mlp.gate_up_proj"}}
_IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GgufWeights:
    """See `inflight.models.weights.Source`. Rows are put into Hugging Face's order before anything is decoded.

    Args:
        tell: called with the bytes of each tensor that was read.

    Raises:
        StartError: a broken file.
    """

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        self._file = GgufFile(path)
        self._tell = tell
        self._architecture = str(self._file.metadata.get("general.architecture"))
        self._infos = {
            hf_name(name, self._architecture): info
            for name, info in self._file.tensors.items()
            if name not in _IN_CONFIG
        }
        self.size = sum(info.size for info in self._infos.values())

    @property
    def names(self) -> list[str]:
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def pieces(self, name: str) -> list[str]:
        return [name]

    def idle(self, name: str) -> bool:
        return False

    def close(self) -> None:
        """The map goes with the last tensor that looks into it."""

    def check(self, name: str, wanted: Sequence[int]) -> None:
        self._info(name, wanted)

    def read(self, name: str, shape: Sequence[int], part: Part | None = None) -> torch.Tensor:
        info = self._info(name, shape)
        rows = self._rows(info, part)
        if info.type in _FLOATS:
            tensor = torch.from_numpy(rows).view(_FLOATS[info.type])
        elif info.type is Type.Q6_K:
            parts = [dequantize(rows[at : at + _ROWS], info.type) for at in range(0, rows.shape[0], _ROWS)]
            tensor = torch.from_numpy(np.concatenate(parts))
        else:
            tensor = floats(quantised(rows, info.type), None)
        if len(shape) == 1:
            tensor = tensor[0] if part is None else tensor[0, part[1] : part[2]]
        elif part is not None and part[0] == 1:
            tensor = tensor[:, part[1] : part[2]]
        if self._architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor - 1  # llama.cpp keeps the factor itself
        return tensor

    def integers(self, name: str, shape: Sequence[int]) -> Quantised | None:
        info = self._info(name, shape)
        if info.type not in BLOCKS or len(shape) != 2:
            return None
        return quantised(self._rows(info, None), info.type)

    def _info(self, name: str, shape: Sequence[int]) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise StartError(f"tensor '{name}' is missing in '{self._file.path}'; is the file complete?")
        where = f"tensor '{info.name}' in '{self._file.path}'"
        if info.type not in _FLOATS and info.type not in BLOCKS and info.type is not Type.Q6_K:
            raise StartError(
                f"{where} is of type {info.type.name}, which is not read; use a file of {', '.join(_KNOWN)} "
                "(llama-quantize makes them), for example one that is called Q4_K_M or Q8_0"
            )
        if list(info.shape) != list(shape):
            raise StartError(f"{where} has shape {list(info.shape)}, its metadata wants {list(shape)}; is it broken?")
        return info

    def _rows(self, info: TensorInfo, part: Part | None) -> np.ndarray:
        """The bytes [rows, bytes of a row] of a tensor; of a part of the rows, those only. A copy."""
        matrix = self._file.bytes_of(info).reshape(info.shape[0] if len(info.shape) > 1 else 1, -1)
        order = self._order(info)
        rowwise = part if part is not None and part[0] == 0 and len(info.shape) > 1 else None
        if order is not None:
            order = order if rowwise is None else order[rowwise[1] : rowwise[2]]
            found: np.ndarray = matrix[order]
        else:
            found = (matrix if rowwise is None else matrix[rowwise[1] : rowwise[2]]).copy()
        self._tell(found.nbytes)
        return found

    def _order(self, info: TensorInfo) -> np.ndarray | None:
        """Where in the file the rows are: llama.cpp's rotation pairs neighbours in Llama's queries and keys."""
        if self._architecture != "llama" or len(info.shape) != 2:
            return None
        key = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(_part_name(info))
        if key is None:
            return None
        metadata = self._file.metadata
        heads = whole_number(metadata, key, whole_number(metadata, "llama.attention.head_count"))
        if info.shape[0] % (2 * heads):
            raise StartError(f"tensor '{info.name}' has {info.shape[0]} rows, which {heads} heads do not divide")
        rows = np.arange(info.shape[0]).reshape(heads, -1, 2)
        permuted: np.ndarray = rows.swapaxes(1, 2).reshape(-1)
        return permuted


def _part_name(info: TensorInfo) -> str:
    return info.name.split(".")[-2] if "." in info.name else ""


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a tensor; llama.cpp's own where it has none there."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_ENDS[part]}.{kind}" if part in _ENDS else name
    found = {**_IN_LAYER, **_OTHERS.get(architecture, {})}.get(part)
    return name if found is None else f"model.layers.{int(layer)}.{found}.{kind}"
