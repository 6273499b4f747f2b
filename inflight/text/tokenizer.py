"""A model's tokenizer, with its special tokens, chat templates and sampling defaults."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from inflight.checkpoint import HfFolder, ModelFolder, open_model
from inflight.contract import AnswerForm, PieceOfText, SamplingDefaults, unknown_token
from inflight.errors import InvalidRequest, StartError, TemplateError
from inflight.startup import read_object
from inflight.text.answers import CALLS, find_form, own_names, sayable
from inflight.text.defaults import sampling_defaults
from inflight.text.detokenizer import Detokenizer
from inflight.text.encoder import Encoder, LibraryEncoder
from inflight.text.grammar import GrammarCompiler
from inflight.text.template import ChatTemplate, named_templates, pick_templates
from inflight.text.vocabulary import NativeEncoder, build, bytes_of, can_encode, end_ids, read_vocabulary, token_names

# The library's own threads and a fork elsewhere do not go together; batches are small, one thread is enough.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    Attributes:
        eos_ids: tokens that end a generation, most specific source first.
        bos_token, eos_token: as text; None if the model has none.
        vocab_size: tokens, added ones included.
        chat: the chat templates, or None.
        defaults: sampling settings of the model's generation_config.json.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | Encoder,
        eos_ids: Sequence[int],
        names: Mapping[str, str],
        chat: ChatTemplate | None,
        defaults: SamplingDefaults = SamplingDefaults(),
        parsers: tuple[str | None, str | None] = (None, None),
        response: str = "",
    ) -> None:
        self._encoder = LibraryEncoder(tokenizer) if isinstance(tokenizer, tokenizers.Tokenizer) else tokenizer
        self._special = self._encoder.special
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_token = names.get("bos_token")
        self.eos_token = names.get("eos_token")
        self.vocab_size = self._encoder.size
        self.chat = chat
        self.defaults = defaults
        self._parsers, self._response = parsers, response
        self._text_of = lru_cache(1 << 16)(self._decode_one)
        self._bytes_of = lru_cache(1 << 16)(self._bytes_of_one)

    def answer_form(self, vocab_size: int) -> AnswerForm:
        """How the model, with `vocab_size` logits, writes thoughts and calls."""
        source = self.chat.tool_source if self.chat is not None else None
        return sayable(find_form(source, self._added, *self._parsers, self._response), vocab_size)

    def _added(self, text: str) -> int | None:
        id = self._encoder.id_of(text)
        return id if id is not None and (id in self._special or self.encode(text, False) == [id]) else None

    def grammars(self, vocab_size: int) -> GrammarCompiler:
        """A compiler of grammars over this tokenizer's tokens, for a model with `vocab_size` logits."""
        library = self._encoder.library
        known = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        return GrammarCompiler(library.to_str(), vocab_size, self.eos_ids, known)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._encoder.encode(text, add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Several texts in one call."""
        return self._encoder.encode_batch(texts, add_special_tokens)

    def shorten(self, tokens: list[int], most: int, left: bool = False) -> list[int]:
        """Truncates an encoded text to at most `most` tokens; the special tokens at both ends stay, as in the library.

        Args:
            left: keep the end of the text, not its beginning.

        Raises:
            InvalidRequest: only special tokens would be left.
        """
        if len(tokens) <= most:
            return tokens
        head, tail = self._ends
        if tokens[: len(head)] != head or tokens[len(tokens) - len(tail) :] != tail:
            head, tail = [], []  # tokens that were not encoded here
        room = most - len(head) - len(tail)
        if room < 1:
            raise InvalidRequest(f"{most} tokens are taken by the special ones; truncate to more")
        text = tokens[len(head) : len(tokens) - len(tail)]
        return head + (text[-room:] if left else text[:room]) + tail

    def pair(self, first: str, second: str, most: int | None = None, left: bool = False) -> tuple[list[int], int]:
        """Encodes two texts in the tokenizer's own form of a pair.

        Args:
            most: tokens that the pair is cut to, always at the longer text, special ones included; None: all stay.
            left: keep the ends of the texts, not their beginnings.

        Returns:
            The tokens, and the index of the first one whose type is 1; 0: the form has only one type.

        Raises:
            InvalidRequest: only special tokens would be left.
        """
        library = self._encoder.library
        texts = [library.encode(text, add_special_tokens=False) for text in (first, second)]
        if most is not None:
            room = most - library.num_special_tokens_to_add(True)
            if room < 2:
                raise InvalidRequest(f"{most} tokens are too few for a pair with its special tokens; truncate to more")
            shorter, longer = sorted(texts, key=len)
            short = min(len(shorter), room // 2)
            shorter.truncate(short, direction="left" if left else "right")
            longer.truncate(room - short, direction="left" if left else "right")
        whole = library.post_process(texts[0], texts[1], True)
        return whole.ids, next((index for index, kind in enumerate(whole.type_ids) if kind), 0)

    def length_before(self, prompt: str) -> int:
        """Number of tokens of a prompt that is continued: encoded alone, without a special token at its end."""
        ids = self.encode(prompt)
        return len(ids) - (1 if ids and self.is_special(ids[-1]) else 0)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        return self._encoder.around

    def pieces(self, text: str, add_special_tokens: bool = True) -> list[PieceOfText]:
        """The tokens of a text and their positions in characters; added tokens have an empty range."""
        encoded = self._encoder.library.encode(text, add_special_tokens=add_special_tokens)
        return [PieceOfText(id, text[start:end], start, end) for id, (start, end) in zip(encoded.ids, encoded.offsets)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._encoder.decode(list(ids), skip_special)

    def token_text(self, id: int) -> str:
        """The text of one token alone."""
        return self._text_of(id)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token adds to a text, also where they are a part of a character."""
        return self._bytes_of(id)

    def check(self, tokens: Sequence[int], vocab_size: int) -> None:
        """Raises InvalidRequest for a token that a model's embedding of `vocab_size` rows does not have.

        Tokenizers may know more tokens than their model: that of Gemma 3 has one for images, the text models have none.
        """
        token = unknown_token(tokens, vocab_size)
        if token is None:
            return
        text = self._encoder.text_of(token) if 0 <= token < 1 << 32 else None
        named = f"token {token}" if text is None else f"token {token} ({text!r})"
        raise InvalidRequest(
            f"{named} does not exist in this model, whose tokens are 0 to {vocab_size - 1}; leave it out of the prompt"
        )

    def is_special(self, id: int) -> bool:
        return id in self._special

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for a generation after these tokens."""
        return Detokenizer(self._decode_all, self.is_special, self.token_text, prompt)

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self._encoder.decode(ids, False)

    def _decode_one(self, id: int) -> str:
        special = self._special.get(id)
        return special if special is not None else self._decode_all([id])

    def _bytes_of_one(self, id: int) -> bytes:
        text, piece, decoder = self.token_text(id), self._encoder.text_of(id), self._encoder.decoder
        if piece is None or decoder is None or id in self._special:
            return text.encode()
        if "\N{REPLACEMENT CHARACTER}" in text:
            return bytes_of(piece)
        # Decoders drop the space before a text's first token.
        after: str = decoder.decode(["a", piece])
        return after.removeprefix("a").encode()


def load_tokenizer(
    model: ModelFolder | Path | str,
    tokenizer_config: Path | None = None,
    calls: str | None = None,
    thoughts: str | None = None,
) -> Tokenizer:
    """Reads tokenizer.json and the files beside it, or the vocabulary of a GGUF file that has none beside it.

    Args:
        tokenizer_config: read instead of the model's own; its chat template takes precedence over chat_template.jinja.
        calls, thoughts: the names of `--tool-call-parser` and `--reasoning-parser`.

    Raises:
        StartError: there is no tokenizer, a file cannot be read, or a name is unknown.
    """
    parsers = own_names(calls, thoughts)
    if not isinstance(model, ModelFolder):
        model = open_model(model)
    config = model.tokenizer_config
    if tokenizer_config is not None:
        if not tokenizer_config.is_file():
            raise StartError(f"'{tokenizer_config}' does not exist; give the path of a tokenizer_config.json")
        special = model.beside / "special_tokens_map.json"
        config = {**(read_object(special) if special.exists() else {}), **read_object(tokenizer_config)}
    names, ends = _names(config), _ends(model)
    if model.tokenizer_file is None and model.metadata is not None:
        vocabulary = read_vocabulary(model.metadata)
        encoder: Encoder = NativeEncoder(vocabulary) if can_encode(vocabulary) else LibraryEncoder(build(vocabulary))
        ends = end_ids(vocabulary)
        names = {**token_names(vocabulary), **names}
    else:
        encoder = LibraryEncoder(_from_file(model))
    named = encoder.id_of(names["eos_token"]) if "eos_token" in names else None
    template = _template(model, config, names, tokenizer_config is not None)
    ends = ends + ([named] if named is not None else [])
    response = json.dumps(config["response_template"]) if isinstance(config.get("response_template"), dict) else ""
    ends += _ends_of_calls(encoder, template, parsers[0])
    return Tokenizer(encoder, ends, names, template, sampling_defaults(model.generation_config), parsers, response)


def _ends_of_calls(encoder: Encoder, template: ChatTemplate | None, calls: str | None) -> list[int]:
    """Special tokens with which the model ends an answer that is a call, where its configuration leaves them out."""
    if calls is None and template is not None:
        calls = find_form(template.tool_source, lambda text: None).calls
    ids = [encoder.id_of(text) for text in (CALLS[calls].ends if calls is not None else ())]
    return [id for id in ids if id is not None and id in encoder.special]


def _from_file(model: ModelFolder) -> tokenizers.Tokenizer:
    path = model.tokenizer_file
    if path is None:
        if not (model.path / "config.json").is_file():
            raise StartError(
                f"'{model.path}' has no config.json and no tokenizer.json; give a folder in Hugging Face layout, or a "
                "GGUF file"
            )
        raise StartError(
            f"'{model.path}' has no tokenizer.json; for an older model, load its tokenizer with transformers' "
            "AutoTokenizer and write it there with save_pretrained"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise StartError(f"'{path}' cannot be read: {error}; download it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.decoder is None and '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"]):
        tokenizer.decoder = tokenizers.decoders.ByteLevel()  # what the file leaves out
    if model.path.is_dir() and model.sentences is not None and model.sentences.lowercase:
        _lowercase(tokenizer)
    return tokenizer


def _lowercase(tokenizer: tokenizers.Tokenizer) -> None:
    """Makes the tokenizer lowercase texts before its other steps."""
    lower, other = tokenizers.normalizers.Lowercase(), tokenizer.normalizer
    tokenizer.normalizer = lower if other is None else tokenizers.normalizers.Sequence([lower, other])


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; a token may be given as text or as an object with its content."""
    found: dict[str, str] = {}
    for name in TOKEN_NAMES:
        token = config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _ends(model: ModelFolder) -> list[int]:
    """End tokens of generation_config.json and config.json, which may differ."""
    generation = _token_ids(model, "generation_config.json", model.generation_config)
    if model.metadata is not None or (isinstance(model, HfFolder) and not (model.inner / "config.json").is_file()):
        return generation  # a GGUF file has no config.json, nor does a folder with only a tokenizer
    nested = model.config.get("text_config") or {}
    if not isinstance(nested, Mapping):
        raise StartError(f"'{model.path}/config.json': text_config is {nested!r}; it must be an object")
    return generation + [id for each in (model.config, nested) for id in _token_ids(model, "config.json", each)]


def _token_ids(model: ModelFolder, name: str, source: Mapping[str, Any]) -> list[int]:
    """`eos_token_id` of a file: a number, several, or none."""
    given = source.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(isinstance(id, bool) or not isinstance(id, int) or id < 0 for id in ids):
        raise StartError(
            f"'{model.path / name}': eos_token_id is {given!r}; it must be a token's number or a list of them"
        )
    return ids


def _template(
    model: ModelFolder, config: Mapping[str, Any], names: Mapping[str, str], replaced: bool
) -> ChatTemplate | None:
    try:
        found = pick_templates(model.templates.own, config.get("chat_template"), replaced) or _oldest_form(model)
        return ChatTemplate(found, names) if found else None
    except TemplateError as error:
        raise StartError(f"'{model.path}': {error}") from error


def _oldest_form(model: ModelFolder) -> dict[str, str]:
    """Templates of the JSON files of processors, older than chat_template.jinja."""
    for path in (model.beside / "chat_template.json", model.beside / "processor_config.json"):
        if isinstance(model, HfFolder) and path.exists():
            found = named_templates(read_object(path).get("chat_template"))
            if found:
                return found
    return {}
