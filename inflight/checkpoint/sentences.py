"""Reads the description of a sentence-transformers folder: its modules, the length of texts, prompts.

Supports the layouts up to version 6 of sentence-transformers, whose file formats and defaults are the specification
(Reimers and Gurevych, 2019): `modules.json`, the modules' own `config.json`, `sentence_bert_config.json`,
`config_sentence_transformers.json`. A module's kind is the last part of its type's name, because the package path
before it has changed with nearly every version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from inflight.checkpoint.classifier import is_classifier
from inflight.errors import StartError
from inflight.startup import read_items, read_object

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Poolings of tokens' states to one vector; also the order of several of them in the older form."""

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "Sigmoid", "GELU", "SiLU")

_OLD_POOLINGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_PROMPTS = ("query", "document")
"""Prompts that every such model has; empty unless its folder has texts for them."""


@dataclass(frozen=True)
class Dense:
    """A linear layer: `activation(x @ weight.T + bias)`, plus `x` if it is residual.

    Attributes:
        folder: of its weights: `linear.weight` [outputs, inputs], `linear.bias`, `residual.weight`.
        activation: one of `ACTIVATIONS`.
    """

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class LayerNorm:
    """A layer norm. Attributes: folder: of `norm.weight` and `norm.bias`, both [size]."""

    folder: Path
    size: int


@dataclass(frozen=True)
class Normalize:
    """Divides a vector by its length."""


@dataclass(frozen=True)
class LogitScore:
    """The score of a pair that a language model reads: its logit of one token, minus that of another.

    Attributes:
        true, false: the tokens; false None: the logit of the first is the score.
    """

    true: int
    false: int | None = None


@dataclass(frozen=True)
class Splade:
    """How the logits of a head that fills masks become a sparse vector of a text (SPLADE): log(1 + relu(logit)) of each
    token, over all tokens of the text the largest, or the sum.

    Attributes:
        sums: the sum. twice: log(1 + x) is applied twice.
    """

    sums: bool = False
    twice: bool = False


Layer = Dense | LayerNorm | Normalize


@dataclass(frozen=True)
class SentenceModel:
    """The steps before and after the transformer.

    Attributes:
        poolings: of `POOLINGS`; several vectors are concatenated.
        include_prompt: the prompt's tokens count in the pooling.
        layers: applied to the pooled vector, in order.
        cuts: texts that are too long are cut, not refused.
        longest: tokens that a text is cut to, special ones included; None: the model's own limit.
        cut_left: a text that is too long keeps its end.
        lowercase: texts are lowercased, whatever the tokenizer does.
        prompts: prefixes of texts, by name.
        default_prompt: the name of the prompt for requests that name none.
        score: the model reads pairs and scores them in this way; it has no vectors.
        splade: its vectors are sparse and made in this way; `poolings` is `splade`.
    """

    poolings: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    layers: tuple[Layer, ...] = (Normalize(),)
    cuts: bool = False
    longest: int | None = None
    cut_left: bool = False
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    score: LogitScore | None = None
    splade: Splade | None = None

    @property
    def of_states(self) -> bool:
        """Whether pooling needs only one state or a sum of all, so that a decoder can compute a text in chunks."""
        return self.poolings == ("lasttoken",) or (self.poolings == ("mean",) and self.include_prompt)

    @property
    def unit(self) -> bool:
        """Whether its vectors have length 1."""
        return bool(self.layers) and isinstance(self.layers[-1], Normalize)


def pooled_as(found: SentenceModel | None, pooling: str | None) -> SentenceModel:
    """How an encoder's vectors are made.

    Args:
        found: what its folder says.
        pooling: `cls`, `mean`, `last` or `splade` in place of the folder's own; None: as the folder says.
    """
    model = found or SentenceModel()
    if pooling is None:
        return model
    if pooling == "splade":
        return replace(model, poolings=("splade",), layers=(), splade=model.splade or Splade())
    layers = model.layers if model.splade is None else (Normalize(),)
    return replace(model, poolings=("lasttoken" if pooling == "last" else pooling,), layers=layers, splade=None)


def read_sentence_model(folder: Path) -> SentenceModel | None:
    """The folder's description; None: it is not a sentence-transformers folder.

    Raises:
        StartError: a file is broken, or a module is not supported.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return _bare_pooling(folder)
    kinds = [_module(file, entry) for entry in read_items(file)]
    if not kinds or kinds[0][0] not in ("Transformer", "MLMTransformer") or kinds[0][1]:
        found = ", ".join(f"{kind} in '{path}'" if path else kind for kind, path in kinds) or "none"
        raise StartError(f"'{file}' must begin with a Transformer whose path is empty; its modules are: {found}")
    score = _scored(folder, kinds[1:])
    poolings: tuple[str, ...] | None = ("lasttoken",) if score is not None or _classifies(folder, kinds) else None
    splade = _splade(folder, kinds[1:])
    poolings = ("splade",) if splade is not None else poolings
    include, layers = True, list[Layer]()
    for kind, path in kinds[1:] if poolings is None else ():
        place = folder / path
        if kind == "Pooling" and poolings is None and not layers:
            poolings, include = _pooling(place / "config.json")
        elif kind == "Dropout":
            continue
        elif kind in _LAYERS and poolings is not None:
            layers.append(_LAYERS[kind](place))
        else:
            raise StartError(
                f"'{file}' has a module '{kind}' that is not computed here; after a Transformer and a Pooling there "
                "may be Dense, LayerNorm, Normalize and Dropout"
            )
    if poolings is None:
        raise StartError(f"'{file}' has no Pooling module, so it gives no vector of a text")
    longest, lowercase = _lengths(folder)
    settings = _object(folder / "tokenizer_config.json")
    prompts, default = _prompts(folder / "config_sentence_transformers.json")
    left = settings.get("truncation_side") == "left"
    return SentenceModel(
        poolings, include, tuple(layers), True, longest, left, lowercase, prompts, default, score, splade
    )


def _scored(folder: Path, modules: list[tuple[str, str]]) -> LogitScore | None:
    """The module behind the transformer of a language model that scores pairs, if it has one.

    Raises:
        StartError: its tokens are missing.
    """
    if not modules or modules[0][0] != "LogitScore":
        return None
    file = folder / modules[0][1] / "config.json"
    found = read_object(file)
    true, false = found.get("true_token_id"), found.get("false_token_id")
    if len(modules) == 1 and _is_id(true) and (false is None or _is_id(false)):
        return LogitScore(int(true), None if false is None else int(false))
    raise StartError(f"'{file}' must have a token's number in true_token_id, and nothing may follow the module")


def _splade(folder: Path, modules: list[tuple[str, str]]) -> Splade | None:
    """How the model's vectors are sparse, if they are.

    Raises:
        StartError: in a way that is not computed here.
    """
    if not modules or modules[0][0] != "SpladePooling":
        return None
    file = folder / modules[0][1] / "config.json"
    found = read_object(file)
    strategy, activation = found.get("pooling_strategy", "max"), found.get("activation_function", "relu")
    if len(modules) > 1 or strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise StartError(
            f"'{file}' has the strategy {strategy!r} and the activation {activation!r}; known are max and sum, relu "
            "and log1p_relu, and nothing may follow the module"
        )
    return Splade(strategy == "sum", activation == "log1p_relu")


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _classifies(folder: Path, kinds: list[tuple[str, str]]) -> bool:
    """Whether it is a cross-encoder's folder: a lone transformer with a head of its own."""
    return len(kinds) == 1 and is_classifier(_object(folder / "config.json"))


def _bare_pooling(folder: Path) -> SentenceModel | None:
    """The description of a folder that has only its pooling; its vectors are normalised to length 1."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    poolings, include = _pooling(file)
    return SentenceModel(poolings, include)


def _module(file: Path, entry: Any) -> tuple[str, str]:
    """Kind and path of a module."""
    kind, path = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(path, str):
        raise StartError(f"'{file}' has a module {entry!r}; each is an object with the texts 'type' and 'path'")
    parts = Path(path).parts
    if ".." in parts or Path(path).is_absolute():
        raise StartError(f"'{file}' has a module in '{path}', which is outside its folder")
    return kind.rpartition(".")[2], "" if path == "." else path


def _pooling(file: Path) -> tuple[tuple[str, ...], bool]:
    """Modes, and whether the prompt counts."""
    settings = read_object(file)
    given = settings.get("pooling_mode")
    if given is None:
        given = [mode for mode, old in zip(POOLINGS, _OLD_POOLINGS) if settings.get(f"pooling_mode_{old}")] or "mean"
    modes = [given] if isinstance(given, str) else given
    if not isinstance(modes, list) or not modes or any(mode not in POOLINGS for mode in modes):
        raise StartError(f"'{file}' has the pooling {given!r}; known are {', '.join(POOLINGS)}")
    return tuple(modes), settings.get("include_prompt", True) is not False


def _of_the_vector(file: Path, found: Mapping[str, Any]) -> None:
    """Raises StartError for a module that does not work on the text's vector."""
    for key in ("module_input_name", "module_output_name"):
        if found.get(key) not in (None, "sentence_embedding"):
            raise StartError(f"'{file}' has {key} {found[key]!r}; only sentence_embedding is computed here")


def _dense(folder: Path) -> Dense:
    file = folder / "config.json"
    found = read_object(file)
    _of_the_vector(file, found)
    name = str(found.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, activation = name.rpartition(".")
    if activation not in ACTIVATIONS or not package.startswith("torch.nn"):
        raise StartError(f"'{file}' has the activation '{name}'; known are torch's {', '.join(ACTIVATIONS)}")
    inputs, outputs = _size(file, found, "in_features"), _size(file, found, "out_features")
    residual = found.get("use_residual") is True
    return Dense(folder, inputs, outputs, found.get("bias", True) is not False, activation, residual)


def _layer_norm(folder: Path) -> LayerNorm:
    file = folder / "config.json"
    return LayerNorm(folder, _size(file, read_object(file), "dimension"))


def _normalize(folder: Path) -> Normalize:
    file = folder / "config.json"
    _of_the_vector(file, _object(file))
    return Normalize()


_LAYERS: dict[str, Callable[[Path], Layer]] = {"Dense": _dense, "LayerNorm": _layer_norm, "Normalize": _normalize}


def _size(file: Path, settings: Mapping[str, Any], key: str) -> int:
    size = settings.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise StartError(f"'{file}': {key} is {size!r}; it must be a whole number of at least 1")
    return size


def _object(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def _lengths(folder: Path) -> tuple[int | None, bool]:
    """Tokens that a text is cut to, and whether it is lowercased first.

    Version 6 writes the length into the tokenizer's configuration, where an enormous number means no limit.
    """
    file = next((folder / name for name in _SETTINGS if (folder / name).is_file()), folder / _SETTINGS[0])
    found, key = _object(file), "max_seq_length"
    longest, lowercase = found.get(key), found.get("do_lower_case") is True
    if longest is None:
        file, key = folder / "tokenizer_config.json", "model_max_length"
        longest = _object(file).get(key)
    if longest is None:
        return None, lowercase
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
        raise StartError(f"'{file}': {key} is {longest!r}; it must be a number of tokens")
    return (int(longest) if longest < 1 << 31 else None), lowercase


def _prompts(file: Path) -> tuple[dict[str, str], str | None]:
    found = _object(file)
    given, default = found.get("prompts") or {}, found.get("default_prompt_name")
    if not isinstance(given, dict) or any(not isinstance(text, (str, type(None))) for text in given.values()):
        raise StartError(f"'{file}': prompts are {given!r}; they must be texts by name")
    prompts = dict.fromkeys(_PROMPTS, "") | {name: text or "" for name, text in given.items()}
    if default is not None and default not in prompts:
        raise StartError(f"'{file}': default_prompt_name is {default!r}; prompts are named {', '.join(prompts)}")
    return prompts, default
