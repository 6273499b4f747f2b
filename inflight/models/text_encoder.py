"""Encoders through transformers: a text's tokens in, one vector out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inflight.checkpoint import ModelFolder, SentenceModel, open_model
from inflight.config import ModelConfig
from inflight.contract import Array
from inflight.device import Device
from inflight.errors import StartError
from inflight.models.vectors import Vector, VectorHead, pool
from inflight.startup import require

_TWO_PARTS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Encoder-decoder models, and the class of transformers that has only the encoder."""


class TextEncoder:
    """An encoder with the pooling of its vectors. It computes a text at once.

    Attributes:
        longest: tokens of the longest text.
        vocab_size: token ids are below it.
        size: values of a vector.
        dtype, weight_bytes: of the weights.
    """

    def __init__(self, settings: ModelConfig, device: Device, folder: ModelFolder | None = None) -> None:
        """Loads the model of a folder.

        Args:
            folder: the opened model, if it is open already.

        Raises:
            StartError: it cannot be loaded.
        """
        if settings.quantize != "none":
            raise StartError("encoders run as their checkpoint is; leave out --quantize")
        sentences = (folder or open_model(settings.model_dir)).sentences or SentenceModel()
        self._model = model = _load(settings).eval().to(device.torch)
        self._device = device.torch
        self._poolings = sentences.poolings
        positions = _longest(model.config)
        self.longest = min(positions, sentences.longest or positions)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        width = int(model.config.get_text_config().hidden_size)
        self._head = VectorHead(sentences.layers, width * len(self._poolings), settings.allow_pickle)
        self.size = self._head.size
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())

    def encode(self, tokens: Array, first: int = 0) -> Vector:
        """One text's vector, float32 [size].

        Texts are computed one at a time, because padding to a neighbour's length would change the result.

        Args:
            tokens: int64 [T].
            first: tokens before this one are read, but not pooled.
        """
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(tokens).to(self._device)[None]
            states = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        return self._head(pool(states.float().cpu().numpy(), self._poolings, first))


def _load(settings: ModelConfig) -> Any:
    """Loads transformers' model."""
    require("an encoder", "torch", "transformers")
    import torch

    arguments = {
        "dtype": getattr(torch, settings.dtype) if settings.dtype != "auto" else "auto",
        "use_safetensors": None if settings.allow_pickle else True,
        "trust_remote_code": settings.trust_remote_code,
        "local_files_only": True,
    }
    try:
        import transformers  # only encoders and bridged models need it

        config = transformers.AutoConfig.from_pretrained(
            settings.model_dir, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
        kind: Any = getattr(transformers, _TWO_PARTS.get(config.model_type, "AutoModel"))
        return kind.from_pretrained(settings.model_dir, **arguments)
    except Exception as error:  # transformers raises anything
        raise StartError(f"'{settings.model_dir}' cannot be loaded: {error}") from error


def is_encoder(config: Mapping[str, Any], sentences: SentenceModel | None = None) -> bool:
    """Whether a config.json is an encoder's, or that of a decoder whose vectors need whole texts.

    Args:
        sentences: the folder's description of vectors, if it has one.
    """
    names = config.get("architectures")
    names = [str(name) for name in names] if isinstance(names, list) else []
    if sentences is not None and config.get("model_type") in _TWO_PARTS:
        return True
    if config.get("use_bidirectional_attention") is True:
        return True
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return sentences is not None and not sentences.of_states
    if config.get("model_type") in ENCODERS:
        return not config.get("is_decoder", False)
    return sentences is not None and bool(names)


ENCODERS = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "mpnet", "modernbert",
    "nomic_bert", "roberta", "xlm-roberta",
)  # fmt: skip


def _longest(config: Any) -> int:
    """Tokens of the longest text. Models like RoBERTa reserve the first positions."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 512)
    taken = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return positions - (2 if taken else 0)
