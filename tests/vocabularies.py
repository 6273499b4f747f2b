"""Small vocabularies as GGUF files hold them, made of the texts that tokenizers are compared on, the same everywhere.

Merges cross the borders of words: a tokenizer that cuts a text elsewhere gives other tokens.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "tokens"
TEXTS: list[str] = json.loads((DATA / "texts.json").read_text())

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_DEFINED = ["<table>", "<think>", "</think>"]
_WHOLE = [" quoted", " harbour", "lamp", "1234567", "name", "\u6211\u60f3", "\u0434\u043e\u0436\u0434\u044c", " still"]
"""Tokens that no merge makes."""


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, GPT-2's."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


_ALPHABET = byte_alphabet()


def _as_bytes(text: str) -> str:
    return "".join(_ALPHABET[byte] for byte in text.encode())


def byte_level(pre: str) -> dict[str, Any]:
    """A byte-level vocabulary that is cut as `pre` says."""
    merges = _byte_merges()
    words = list(map(_as_bytes, _WHOLE))
    made = dict.fromkeys([*_ALPHABET, *("".join(pair) for pair in merges), *words])
    tokens = [*_CONTROL, *_DEFINED, *made]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(tokens),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def of_characters(model: str, pre: str = "") -> dict[str, Any]:
    """Merges of characters, with tokens for bytes: Gemma 4's kind, with a list of merges and one run of line ends."""
    pieces, merges = _character_merges("")
    tokens = list(dict.fromkeys([*pieces, *("".join(pair) for pair in merges), "\n\n"]))
    return {
        "tokenizer.ggml.model": model,
        **({"tokenizer.ggml.pre": pre} if pre else {}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(tokens),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece(**flags: bool) -> dict[str, Any]:
    """Pieces with scores; merges come out of them. Args: flags: add_bos_token, add_space_prefix and so on."""
    pieces, merges = _character_merges("\u2581")
    tokens = list(dict.fromkeys([*pieces, *("".join(pair) for pair in merges)]))
    scores = [float(min(0, len(pieces) - id)) for id in range(len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(tokens),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in flags.items()},
    }


def phi3() -> dict[str, Any]:
    """Pieces with scores under a name that says that special tokens swallow the blanks after them."""
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"] += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    metadata["tokenizer.ggml.token_type"] += [CONTROL] * 3
    metadata["tokenizer.ggml.scores"] += [0.0] * 3
    return {"general.name": "Phi-3 Mini", **metadata}


def unigram(**flags: bool) -> dict[str, Any]:
    """Pieces with the logarithms of their frequencies."""
    words = [word for text in TEXTS for word in text.replace(" ", " \u2581").split(" ")]
    counted = Counter(part for word in words for size in (1, 2, 3, 5) for part in _parts(word, size))
    kept = [part for part, count in sorted(counted.items()) if count > 1 and "\n" not in part]
    kept = [part for part in kept if "\u2581" not in part[1:]]
    total = sum(counted[part] for part in kept)
    special = ["<pad>", "</s>", "<unk>"]
    tokens = [*special, *_DEFINED, *kept]
    # A little of the rank, so that no two ways of cutting a text are equally likely.
    scores = [math.log(counted[part] / total) - 1e-3 * rank / len(kept) for rank, part in enumerate(kept)]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            CONTROL,
            CONTROL,
            UNKNOWN,
            *[USER_DEFINED] * len(_DEFINED),
            *[NORMAL] * len(kept),
        ],
        "tokenizer.ggml.scores": [0.0] * (3 + len(_DEFINED)) + scores,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in flags.items()},
    }


def wordpiece() -> dict[str, Any]:
    """Words and parts of words, marked as llama.cpp's converter marks them."""
    words = Counter(word for text in TEXTS for word in text.lower().split())
    letters = sorted({letter for word in words for letter in word if words[word] > 1 or letter.isascii()})
    parts = Counter(part for word in words for size in (2, 3) for part in _parts(word, size))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*letters, *(part for part, count in sorted(parts.items()) if count > 1)]
    tokens = [*special, *(f"\u2581{piece}" for piece in pieces), *pieces]
    tokens = list(dict.fromkeys(token for token in tokens if token.strip()))
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 5 + [NORMAL] * (len(tokens) - 5),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }


@cache
def _byte_merges() -> list[tuple[str, str]]:
    return _learn(map(_as_bytes, TEXTS))


@cache
def _character_merges(before: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Special tokens, bytes and the characters that are not rare; and merges of these characters.

    Line ends and rare characters have no token, they are written in bytes.
    """
    marked = [before + text.replace(" ", "\u2581") for text in TEXTS]
    letters = Counter(letter for text in marked for letter in text)
    kept = [letter for letter, count in sorted(letters.items()) if count > 1 and letter != "\n"]
    merges = [pair for pair in _learn(marked) if set("".join(pair)) <= set(kept)]
    return ["<unk>", "<s>", "</s>", *_DEFINED, *(f"<0x{byte:02X}>" for byte in range(256)), *kept], merges


def _types(tokens: list[str]) -> list[int]:
    named = {**dict.fromkeys(_CONTROL, CONTROL), **dict.fromkeys(_DEFINED, USER_DEFINED)}
    named.update({"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL})
    named.update({f"<0x{byte:02X}>": BYTE for byte in range(256)})
    return [named.get(token, NORMAL) for token in tokens]


def _learn(texts: Iterable[str], rounds: int = 3) -> list[tuple[str, str]]:
    """Merges of neighbours, the frequent ones first, then merges of what came out of those."""
    sequences = [list(text) for text in texts]
    merges: dict[tuple[str, str], int] = {}
    made: set[str] = set()
    for _ in range(rounds):
        pairs = Counter(pair for sequence in sequences for pair in pairwise(sequence))
        for pair, count in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
            joined = "".join(pair)
            if count > 1 and joined not in made and len(joined) > 1:
                made.add(joined)
                merges[pair] = len(merges)
        sequences = [_merged(sequence, merges) for sequence in sequences]
    return list(merges)


def _merged(sequence: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    while True:
        ranked = [(merges[pair], at) for at, pair in enumerate(pairwise(sequence)) if pair in merges]
        if not ranked:
            return sequence
        at = min(ranked)[1]
        sequence = [*sequence[:at], sequence[at] + sequence[at + 1], *sequence[at + 2 :]]


def _parts(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(len(text) - size + 1)]


def of_tokenizer_json(path: Path, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer.json."""
    whole = json.loads(path.read_text())
    numbered: dict[str, int] = whole["model"]["vocab"]
    added = {token["id"]: token for token in whole["added_tokens"]}
    texts = {id: text for text, id in numbered.items()} | {id: token["content"] for id, token in added.items()}
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(max(texts) + 1)]
    kinds = [NORMAL if id in texts else UNUSED for id in range(len(tokens))]
    for id, token in added.items():
        kinds[id] = CONTROL if token["special"] else USER_DEFINED
    merges = whole["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


def of_wordpiece_json(path: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes of BERT's tokenizer.json."""
    whole = json.loads(path.read_text())
    numbered: dict[str, int] = whole["model"]["vocab"]
    special = {token["content"] for token in whole["added_tokens"]}
    texts = sorted(numbered, key=numbered.__getitem__)
    tokens = [_phantom(text) if text not in special else text for text in texts]
    keys = {"bos": "[CLS]", "seperator": "[SEP]", "unknown": "[UNK]", "padding": "[PAD]", "mask": "[MASK]"}
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "jina-v2-en",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if text in special else NORMAL for text in texts],
        **{f"tokenizer.ggml.{key}_token_id": numbered[text] for key, text in keys.items()},
    }


def _phantom(text: str) -> str:
    return text.removeprefix("##") if text.startswith("##") else f"\u2581{text}"
