"""Encoder checkpoints through transformers: a text's tokens in, one vector out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inflight.errors import StartError
from inflight.loading import read_object
from inflight.plan import ShardJob


class TextEncoder:
    """A model that reads in both directions, and how its vectors are pooled.

    Attributes:
        longest: tokens of the longest text.
        vocab_size: token ids are below it.
        size: values of a vector.
        dtype, weight_bytes: of the weights.
    """

    def __init__(self, job: ShardJob, device: torch.device) -> None:
        """Loads the model of a folder.

        Raises:
            StartError: it cannot be loaded.
        """
        if job.quantize != "none":
            raise StartError("encoders run as their checkpoint is; leave out --quantize")
        try:
            import transformers  # only encoders and bridged models need it

            self._model: Any = transformers.AutoModel.from_pretrained(
                job.model_dir,
                dtype=getattr(torch, job.dtype) if job.dtype != "auto" else "auto",
                use_safetensors=None if job.allow_pickle else True,
                trust_remote_code=job.trust_remote_code,
                local_files_only=True,
            )
        except Exception as error:  # transformers raises anything
            raise StartError(f"'{job.model_dir}' cannot be loaded: {error}") from error
        self._model = self._model.eval().to(device)
        self._device = device
        self._pooling = pooling_of(Path(job.model_dir))
        config = self._model.config
        self.longest = _longest(config)
        self.vocab_size = int(self._model.get_input_embeddings().weight.shape[0])
        self.size = int(config.hidden_size)
        self.dtype: torch.dtype = self._model.dtype
        self.weight_bytes = sum(parameter.nbytes for parameter in self._model.parameters())

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """One text's vector, float32 [size]. Args: tokens: int64 [T].

        One text at a time: padding to a neighbour's length would let the neighbour change the result.
        """
        with torch.inference_mode():
            ids = tokens.to(self._device)[None]
            hidden = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].float()
        if self._pooling == "cls":
            return hidden[0]
        if self._pooling == "last":
            return hidden[-1]
        return hidden.mean(dim=0)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that only reads: none of its architectures writes."""
    names = config.get("architectures")
    if isinstance(names, list) and any(
        str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names
    ):
        return False
    return config.get("model_type") in ENCODERS and not config.get("is_decoder", False)


ENCODERS = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "mpnet", "modernbert",
    "nomic_bert", "roberta", "xlm-roberta",
)  # fmt: skip


def pooling_of(folder: Path) -> str:
    """`cls`, `mean` or `last`, as sentence-transformers wrote it down; else the mean."""
    file = folder / "1_Pooling" / "config.json"
    if not file.exists():
        return "mean"
    found = read_object(file)
    for key, kind in (("cls_token", "cls"), ("lasttoken", "last"), ("mean_tokens", "mean")):
        if found.get(f"pooling_mode_{key}"):
            return kind
    raise StartError(f"'{folder}/1_Pooling/config.json' asks for a pooling other than cls, mean and last token")


def _longest(config: Any) -> int:
    """Tokens of the longest text. Models of RoBERTa's kind keep the first positions for themselves."""
    most = int(getattr(config, "max_position_embeddings", 0) or 512)
    taken = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return most - (2 if taken else 0)
