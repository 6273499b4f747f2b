"""Models that read whole texts: vectors, the states of tokens, scores of labels. On the CPU engine, or transformers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.checkpoint import (
    ModelFolder,
    SentenceModel,
    Splade,
    is_classifier,
    is_masked,
    open_model,
    pooled_as,
)
from inflight.config import ModelConfig
from inflight.contract import Array, Pooled
from inflight.device import Device
from inflight.errors import StartError
from inflight.kernels import native_reason
from inflight.models.encoder_forms import ENCODER_FORMS
from inflight.models.native_encoder import ROWS, NativeEncoder, NotNative
from inflight.models.sparse_head import MASKED_HEADS, MaskedHead, Pool
from inflight.models.text_head import ClassifierHead, has_head, labels_of, reads_forward
from inflight.models.vectors import Vector, VectorHead, pool
from inflight.startup import require

log = logging.getLogger("inflight")

_TWO_PARTS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Encoder-decoder models, and the class of transformers that has only the encoder."""


@dataclass(frozen=True)
class Text:
    """What is computed of one text.

    Attributes:
        tokens: int64 [T].
        first: tokens before this one are read, but not pooled.
        second: the first token of a pair's second text; 0: it is one text.
        wanted: what is computed of it, one of the encoder's `tasks`.
    """

    tokens: Array
    first: int = 0
    second: int = 0
    wanted: Pooled = "embed"


class TextEncoder(ABC):
    """A model that reads whole texts, with the pooling of its vectors or its head.

    Attributes:
        longest: tokens of the longest text.
        vocab_size: token ids are below it.
        size: values of a vector; of a classifier, its labels.
        dtype, weight_bytes: of the weights.
        tasks: what it computes.
    """

    longest: int
    vocab_size: int
    size: int
    dtype: str
    weight_bytes: int
    tasks: tuple[Pooled, ...]

    @abstractmethod
    def encode(self, texts: Sequence[Text]) -> list[Vector]:
        """Of each text what it wants, in the form that `Pooled` says; sparse vectors as one array of float32. A text's
        bits are its own."""


def load_encoder(settings: ModelConfig, device: Device, folder: ModelFolder | None = None) -> TextEncoder:
    """Loads the model of a folder: on the CPU engine if it has the family, else through transformers; logs the reason.

    Args:
        folder: the opened model, if it is open already.

    Raises:
        StartError: it cannot be loaded.
    """
    folder = folder or open_model(settings.model_dir)
    reason = _reason(settings, device, folder)
    if reason is None:
        try:
            encoder = EngineEncoder(settings, folder)
            log.info("model '%s' (%s): on the CPU engine%s", folder.name, folder.config.get("model_type"), encoder.form)
            return encoder
        except NotNative as error:
            reason = str(error)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise StartError(
                f"config.json of '{folder.name}' makes no sense: {error!r}; download the model again"
            ) from error
    if settings.quantize != "none":
        raise StartError(f"--quantize is for the CPU engine, which does not compute this encoder: {reason}")
    kind = folder.config.get("model_type")
    log.info("model '%s' (%s): through transformers; the CPU engine is not used: %s", folder.name, kind, reason)
    return BridgedEncoder(settings, device, folder)


def _reason(settings: ModelConfig, device: Device, folder: ModelFolder) -> str | None:
    """The reason why no encoder runs on the CPU engine with these settings; None if those that it has can."""
    if device.type != "cpu":
        return f"the model runs on {device.type}"
    if settings.cpu_engine == "torch":
        return "the setting cpu_engine is torch"
    if settings.dtype == "float16":
        return "float16 is computed by torch"
    if settings.quantize not in ("none", "int8"):
        return f"{settings.quantize} is not for encoders; int8 is"
    return native_reason()


class EngineEncoder(TextEncoder):
    """An encoder on the CPU engine.

    Attributes:
        form: what the log says of its arithmetic.

    Raises:
        NotNative: the engine does not have it.
        StartError: a weight is missing or of another shape.
    """

    def __init__(self, settings: ModelConfig, folder: ModelFolder) -> None:
        sentences, config = pooled_as(folder.sentences, settings.pooling), folder.config
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        wanted = settings.dtype if settings.dtype != "auto" else stored
        self.dtype = "float32" if wanted == "float32" else "bfloat16"
        int8 = settings.quantize == "int8"
        kind, self._splade = str(config.get("model_type")), sparse_of(sentences, config)
        if kind in ENCODER_FORMS and is_classifier(config) and not has_head(config):
            raise NotNative(f"the head of labels of '{kind}' is not in it")
        if kind in ENCODER_FORMS and self._splade is not None and kind not in MASKED_HEADS:
            raise NotNative(f"the head that fills masks of '{kind}' is not in it")
        with folder.weights(allow_pickle=settings.allow_pickle) as weights:
            self._encoder = encoder = NativeEncoder(
                config, weights, self.dtype, int8, settings.threads, settings.cpu_isa
            )
            self._classify: ClassifierHead | None = None
            if is_classifier(config):
                self._classify = ClassifierHead(config, weights, encoder.prefix, encoder.width)
            if self._splade is not None:
                self._masked = MaskedHead(
                    config, weights, encoder.words, (encoder.vocab_size, encoder.width), encoder.eps, self.dtype, int8,
                    settings.threads, settings.cpu_isa,
                )  # fmt: skip
        self.form = ", float32 from bfloat16 parts" if encoder.splits else ""
        self._poolings = sentences.poolings
        self.longest = min(encoder.positions, sentences.longest or encoder.positions)
        self.vocab_size, self.weight_bytes = encoder.vocab_size, encoder.weight_bytes
        if self._classify is not None:
            self.size, self.tasks = len(self._classify.labels), ("scores",)
            return
        if self._splade is not None:
            self.weight_bytes += self._masked.weight_bytes
            self.size, self.tasks = encoder.vocab_size, ("sparse",)
            return
        self._head = VectorHead(sentences.layers, encoder.width * len(self._poolings), settings.allow_pickle)
        self.size, self.tasks = self._head.size, ("embed", "tokens")

    def encode(self, texts: Sequence[Text]) -> list[Vector]:
        found: list[Vector] = []
        for some in batches(texts):
            states = self._encoder.states([each.tokens for each in some], [each.second for each in some])
            if self._splade is not None:
                found.extend(self._masked(states, self._splade))
            else:
                found.extend(self._of(text, rows) for text, rows in zip(some, states))
        return found

    def _of(self, text: Text, states: Vector) -> Vector:
        if self._classify is not None:
            return self._classify(states)
        return np.array(states) if text.wanted == "tokens" else self._head(pool(states, self._poolings, text.first))


def batches(texts: Sequence[Text], rows: int = ROWS) -> list[list[Text]]:
    """Neighbours that are computed together: as many as have at most so many tokens, and at least one."""
    found: list[list[Text]] = []
    tokens = rows
    for text in texts:
        tokens += len(text.tokens)
        if tokens > rows:
            found.append([])
            tokens = len(text.tokens)
        found[-1].append(text)
    return found


class BridgedEncoder(TextEncoder):
    """An encoder through transformers, which computes one text at a time: padding to a neighbour's length would change
    the result.

    Raises:
        StartError: it cannot be loaded.
    """

    def __init__(self, settings: ModelConfig, device: Device, folder: ModelFolder) -> None:
        sentences = pooled_as(folder.sentences, settings.pooling)
        self._classifier, self._splade = is_classifier(folder.config), sparse_of(sentences, folder.config)
        head = "SequenceClassification" if self._classifier else "MaskedLM" if self._splade is not None else ""
        self._model = model = _load(settings, head).eval().to(device.torch)
        self._device = device.torch
        self._poolings = sentences.poolings
        positions = _longest(model.config)
        self.longest = min(positions, sentences.longest or positions)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._typed = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
        width = int(model.config.get_text_config().hidden_size)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if self._classifier:
            self.size, self.tasks = len(labels_of(folder.config)), ("scores",)
            return
        if self._splade is not None:
            self.size, self.tasks = self.vocab_size, ("sparse",)
            return
        self._head = VectorHead(sentences.layers, width * len(self._poolings), settings.allow_pickle)
        self.size, self.tasks = self._head.size, ("embed", "tokens")

    def encode(self, texts: Sequence[Text]) -> list[Vector]:
        return [self._one(text) for text in texts]

    def _one(self, text: Text) -> Vector:
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(text.tokens).to(self._device)[None]
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if self._typed and text.second:
                given["token_type_ids"] = (torch.arange(ids.shape[1], device=self._device) >= text.second).long()[None]
            found = self._model(**given)
            headed = self._classifier or self._splade is not None
            states = (found.logits if headed else found.last_hidden_state)[0].float().cpu().numpy()
        if self._splade is not None:
            pooled = Pool(self._splade)
            pooled.add(states)
            return pooled.packed()
        if self._classifier or text.wanted == "tokens":
            return np.asarray(states, np.float32)
        return self._head(pool(states, self._poolings, text.first))


def sparse_of(sentences: SentenceModel, config: Mapping[str, Any]) -> Splade | None:
    """How the model's vectors are sparse; None: they are not.

    Raises:
        StartError: it has no head for them.
    """
    if sentences.splade is None or is_classifier(config):
        return None
    if not is_masked(config):
        raise StartError("sparse vectors (SPLADE) need a model with a head that fills masks, a *ForMaskedLM")
    return sentences.splade


def _load(settings: ModelConfig, head: str) -> Any:
    """Loads transformers' model with a head, or without one."""
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
        name = f"AutoModelFor{head}" if head else _TWO_PARTS.get(config.model_type, "AutoModel")
        kind: Any = getattr(transformers, name)
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
    if reads_forward(config) or (sentences is not None and sentences.score is not None):
        return False
    if config.get("use_bidirectional_attention") is True or is_classifier(config):
        return True
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return sentences is not None and not sentences.of_states
    if config.get("model_type") in ENCODERS:
        return not config.get("is_decoder", False)
    return sentences is not None and bool(names)


ENCODERS = (
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "gte", "modernbert",
    "mpnet", "new", "nomic_bert", "roberta", "xlm-roberta",
)  # fmt: skip


def _longest(config: Any) -> int:
    """Tokens of the longest text. Models like RoBERTa reserve the first positions."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 512)
    taken = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return positions - (2 if taken else 0)
