"""Builds a tokenizer of the `tokenizers` library from a vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from inflight.text.vocabulary.base import (
    BYTE,
    CONTROL,
    NORMAL,
    SENTENCEPIECE,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORDPIECE,
    Vocabulary,
    pairs,
    unreadable,
)
from inflight.text.vocabulary.merges import Merges, merges_by_score, reachable

_SPACE = "\u2581"  # SentencePiece's
_NEVER_SWALLOW = ("<unk>", "<s>", "<|endoftext|>")


class Steps(NamedTuple):
    """Normalization and pre-tokenization of a text, and the decoding of tokens."""

    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer | None
    decoder: decoders.Decoder


def build(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, with added tokens and the tokens that are put around a text.

    Raises:
        StartError: the library refuses the vocabulary; the text gives its reason.
    """
    try:
        if vocabulary.model in (UNIGRAM, WORDPIECE):
            tokenizer = _unigram(vocabulary) if vocabulary.model == UNIGRAM else _wordpiece(vocabulary)
        else:
            tokenizer = Tokenizer(_merging(vocabulary))
            normalizer, pre_tokenizer, tokenizer.decoder = steps(vocabulary)
            if normalizer is not None:
                tokenizer.normalizer = normalizer
            if pre_tokenizer is not None:
                tokenizer.pre_tokenizer = pre_tokenizer
        _add_tokens(tokenizer, vocabulary)
        _surround(tokenizer, vocabulary)
    except Exception as error:  # the library raises plain Exceptions
        raise unreadable(str(error)) from error
    return tokenizer


def steps(vocabulary: Vocabulary) -> Steps:
    """The steps of a vocabulary with merges.

    For SentencePiece vocabularies a space is put before each part between special tokens, even if the part begins with
    one, as SentencePiece and llama.cpp do. Gemma 4 also writes spaces as SentencePiece's mark but puts none before.
    """
    split = vocabulary.split
    if split is not None and split.bytes:
        return Steps(split.normalizer(), split.pre_tokenizer(), decoders.ByteLevel())
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    marked = normalizers.Replace(" ", _SPACE)
    if split is not None:
        return Steps(marked, split.pre_tokenizer(), decoders.Sequence(decoding))
    if not vocabulary.flags.get("add_space_prefix", True):
        return Steps(normalizers.Sequence([marked]), None, decoders.Sequence(decoding))
    decoding.append(decoders.Strip(" ", 1, 0))
    return Steps(normalizers.Sequence([normalizers.Prepend(_SPACE), marked]), None, decoders.Sequence(decoding))


def _merging(vocabulary: Vocabulary) -> models.BPE:
    """A BPE model over bytes, or over characters with bytes for characters without a token."""
    split = vocabulary.split
    tokens = list(vocabulary.tokens)
    merges = _merges(tokens, vocabulary).texts(tokens) if split is None else pairs(vocabulary.merges)
    bytes = split is not None and split.bytes
    return models.BPE(
        vocab=dict(zip(tokens, range(len(tokens)))),
        merges=merges,
        unk_token=None if bytes else vocabulary.token("unknown"),
        fuse_unk=not bytes,
        byte_fallback=not bytes,
        ignore_merges=split is not None and split.whole_words,
    )


def _merges(tokens: list[str], vocabulary: Vocabulary) -> Merges:
    """The merges that can happen. Loading the others into the library would take longer than finding them."""
    types = vocabulary.types
    result = np.isin(types, (NORMAL, UNUSED))  # others are matched before merging, or are bytes
    merges = merges_by_score(tokens, vocabulary.scores, result)
    # `reachable` assumes that texts begin as characters; byte and unknown tokens do not.
    odd = np.isin(types, (BYTE, UNKNOWN))
    return merges.some(reachable(tokens, merges) | odd[merges.left] | odd[merges.right])


def _unigram(vocabulary: Vocabulary) -> Tokenizer:
    unknown = vocabulary.ids.get("unknown")
    scored = list(zip(vocabulary.tokens, vocabulary.scores.astype(float).tolist()))
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=bool(vocabulary.of_type(BYTE))))
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.flags.get("remove_extra_whitespaces", False):
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = vocabulary.flags.get("add_space_prefix", False)
    if prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always" if prefix else "never")
    return tokenizer


def _wordpiece(vocabulary: Vocabulary) -> Tokenizer:
    """BERT's tokenizer. The file marks tokens that begin a word; BERT's vocabulary marks those that continue one."""
    vocab: dict[str, int] = {}
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types.tolist())):
        begins = token.startswith(_SPACE) and len(token) > 1
        vocab[token if kind in (CONTROL, UNKNOWN) else token[1:] if begins else f"##{token}"] = id
    if len(vocab) != len(vocabulary.tokens):
        raise unreadable("words and their parts have the same texts")
    unknown = vocabulary.token("unknown") or "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=unknown, max_input_chars_per_word=100))
    lowercase = vocabulary.flags.get("normalizer.lowercase", True)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=vocabulary.flags.get("normalizer.strip_accents", lowercase)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Adds the tokens that are matched in a text before all else. User-defined ones are shown as text, not special."""

    def added(token: str, special: bool) -> AddedToken:
        swallows = vocabulary.swallows and token not in _NEVER_SWALLOW
        return AddedToken(token, rstrip=swallows, normalized=False, special=special)

    special = [*vocabulary.of_type(CONTROL), *vocabulary.of_type(UNKNOWN)]
    tokenizer.add_special_tokens([added(token, True) for token in special])
    tokenizer.add_tokens([added(token, False) for token in vocabulary.of_type(USER_DEFINED)])


def around(vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
    """Names of the tokens put before and after a text, as the file says, else by default for its kind of vocabulary.

    Raises:
        StartError: the file does not name such a token.
    """
    before = ["bos"] if _puts_bos(vocabulary) else []
    after = ["eos"] if vocabulary.flags.get("add_eos_token", vocabulary.model == UNIGRAM) else []
    if vocabulary.model == WORDPIECE:
        before, after = ["bos"], ["seperator"]
    for name in before + after:
        if name not in vocabulary.ids:
            raise unreadable(f"the token '{name}' is to be put beside each text, and the file does not name it")
    return before, after


def _surround(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    before, after = around(vocabulary)
    if not before and not after:
        return
    numbers = {name: vocabulary.ids[name] for name in before + after}
    first, last = ([vocabulary.tokens[numbers[name]] for name in names] for names in (before, after))
    again = [] if vocabulary.model == WORDPIECE else first
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *again, "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(vocabulary.tokens[id], id) for id in numbers.values()],
    )


def _puts_bos(vocabulary: Vocabulary) -> bool:
    if vocabulary.model == SENTENCEPIECE:
        usual = True
    else:
        usual = vocabulary.split is not None and vocabulary.split.bos
    # Files of Gemma 4 wrongly say no: its models fail without that token.
    return vocabulary.flags.get("add_bos_token", usual) or (
        usual and vocabulary.split is not None and not vocabulary.split.bytes
    )
