"""From a vocabulary to a tokenizer of the `tokenizers` library."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from inflight.text.vocabulary.base import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    GEMMA4,
    NORMAL,
    SENTENCEPIECE,
    UNIGRAM,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORDPIECE,
    Vocabulary,
    unreadable,
)
from inflight.text.vocabulary.kept import kept_merges
from inflight.text.vocabulary.merges import Merges, merges_by_score, reachable

_SPACE = "\u2581"  # SentencePiece's
_NEVER_SWALLOW = ("<unk>", "<s>", "<|endoftext|>")


def build(vocabulary: Vocabulary, kept: Path | None = None) -> Tokenizer:
    """The tokenizer, with added tokens and what is put before and after a text.

    Args:
        kept: a file in which the merges of a vocabulary with scores are kept from one time to the next.

    Raises:
        StartError: the library refuses the vocabulary; the text has its reason.
    """
    try:
        if vocabulary.model == SENTENCEPIECE:
            tokenizer = _sentencepiece(vocabulary, kept)
        else:
            tokenizer = _BUILDERS[vocabulary.model](vocabulary)
        _add_tokens(tokenizer, vocabulary)
        _surround(tokenizer, vocabulary)
    except Exception as error:  # the library raises plain Exceptions
        raise unreadable(str(error)) from error
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    split = vocabulary.split
    assert split is not None
    if not split.bytes:
        return _merged_characters(vocabulary)
    model = models.BPE(vocab=_numbered(vocabulary), merges=list(vocabulary.merges), ignore_merges=split.whole_words)
    tokenizer = Tokenizer(model)
    normalizer = split.normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merged_characters(vocabulary: Vocabulary) -> Tokenizer:
    """Merges of characters, SentencePiece's mark for spaces, bytes for what has no token: Gemma 4."""
    assert vocabulary.split is not None
    tokenizer = _with_bytes(vocabulary, list(vocabulary.merges), vocabulary.split.whole_words)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = vocabulary.split.pre_tokenizer()
    tokenizer.decoder = decoders.Sequence(_from_marks())
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary, kept: Path | None) -> Tokenizer:
    """Byte-pair merges by score over the whole text.

    The space before a text is put before each part between special tokens, also where there is one already: so do
    SentencePiece and llama.cpp.
    """
    merges = _merges(vocabulary) if kept is None else kept_merges(kept, vocabulary, partial(_merges, vocabulary))
    tokenizer = _with_bytes(vocabulary, merges.texts(vocabulary.tokens))
    marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    decoding = _from_marks()
    if vocabulary.flags.get("add_space_prefix", True):
        marks.insert(0, normalizers.Prepend(_SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges(vocabulary: Vocabulary) -> Merges:
    """Without those that never happen: they would cost more to build than to find."""
    types, tokens = vocabulary.types, vocabulary.tokens
    result = np.isin(types, (NORMAL, UNUSED))  # the others are found in a text before, or are bytes
    merges = merges_by_score(tokens, vocabulary.scores, result)
    # Bytes and unknown ones stand in a text where no character is.
    odd = np.isin(types, (BYTE, UNKNOWN))
    return merges.some(reachable(tokens, merges) | odd[merges.left] | odd[merges.right])


def _with_bytes(vocabulary: Vocabulary, merges: list[tuple[str, str]], whole_words: bool = False) -> Tokenizer:
    model = models.BPE(
        vocab=_numbered(vocabulary),
        merges=merges,
        unk_token=vocabulary.token("unknown"),
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=whole_words,
    )
    return Tokenizer(model)


def _from_marks() -> list[decoders.Decoder]:
    return [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


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
    """Words as BERT cuts them. The file marks the beginning of a word, BERT's own vocabulary what goes on in one."""
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


_BUILDERS = {
    BYTE_LEVEL: _byte_level,
    GEMMA4: _merged_characters,
    UNIGRAM: _unigram,
    WORDPIECE: _wordpiece,
}


def _numbered(vocabulary: Vocabulary) -> dict[str, int]:
    return dict(zip(vocabulary.tokens, range(len(vocabulary.tokens))))


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Tokens that are found in a text as they are, before anything else. Those that a user defined are text."""

    def added(token: str, special: bool) -> AddedToken:
        swallows = vocabulary.swallows and token not in _NEVER_SWALLOW
        return AddedToken(token, rstrip=swallows, normalized=False, special=special)

    special = [*vocabulary.of_type(CONTROL), *vocabulary.of_type(UNKNOWN)]
    tokenizer.add_special_tokens([added(token, True) for token in special])
    tokenizer.add_tokens([added(token, False) for token in vocabulary.of_type(USER_DEFINED)])


def _surround(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """The tokens before and after a text, where the file has them put, or says nothing and its kind has them."""
    before = "bos" if _puts_bos(vocabulary) else None
    after = "eos" if vocabulary.flags.get("add_eos_token", vocabulary.model == UNIGRAM) else None
    if vocabulary.model == WORDPIECE:
        before, after = "bos", "seperator"
    names = [name for name in (before, after) if name is not None]
    for name in names:
        if name not in vocabulary.ids:
            raise unreadable(f"the token '{name}' is to be put beside each text, and the file does not name it")
    if not names:
        return
    first = [vocabulary.tokens[vocabulary.ids[name]] for name in (before,) if name is not None]
    last = [vocabulary.tokens[vocabulary.ids[name]] for name in (after,) if name is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[
            *first,
            "$A",
            *last,
            *(() if vocabulary.model == WORDPIECE else first),
            "$B:1",
            *(f"{t}:1" for t in last),
        ],
        special_tokens=[
            (vocabulary.tokens[vocabulary.ids[name]], vocabulary.ids[name]) for name in dict.fromkeys(names)
        ],
    )


def _puts_bos(vocabulary: Vocabulary) -> bool:
    if vocabulary.model == SENTENCEPIECE:
        usual = True
    else:
        usual = vocabulary.split is not None and vocabulary.split.bos
    # Files of Gemma 4 say no and mean yes: its models know nothing without that token.
    return vocabulary.flags.get("add_bos_token", usual) or (
        usual and vocabulary.split is not None and not vocabulary.split.bytes
    )
