"""Tokenizers out of GGUF metadata: the same tokens as llama.cpp's and as the models' own tokenizers."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from inflight.checkpoint import open_model
from inflight.errors import StartError
from inflight.text import GrammarCompiler, json_grammar
from inflight.text.encoder import LibraryEncoder
from inflight.text.vocabulary import (
    SPLITS,
    NativeEncoder,
    build,
    can_encode,
    end_ids,
    read_vocabulary,
    token_names,
    tokenizer_of,
)
from inflight.text.vocabulary.merges import merges_by_score, reachable
from tests import real
from tests.vocabularies import (
    CONTROL,
    DATA,
    NORMAL,
    TEXTS,
    USER_DEFINED,
    byte_level,
    of_characters,
    of_tokenizer_json,
    of_wordpiece_json,
    phi3,
    sentencepiece,
    unigram,
    wordpiece,
)

RECORDED: dict[str, Any] = json.loads((DATA / "llamacpp.json").read_text())

WITHOUT_MARKS = {"gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken", "kimi-k2"}
"""Where llama.cpp's patterns leave out marks that are part of a word in the models' own: vowel signs of Hindi and Thai,
accents that are characters of their own."""


def of_llamacpp(name: str) -> list[list[int]]:
    """What llama.cpp made of each of the texts (tests/record_llamacpp.py)."""
    return [answers[which] for answers, which in zip(RECORDED["answers"], RECORDED["which"][name])]


def marked(text: str) -> bool:
    return any(unicodedata.category(letter).startswith("M") for letter in text)


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def compare(tokenizer: Tokenizer, texts: dict[str, list[int]]) -> None:
    different = {
        text: (tokenizer.encode(text).tokens, [tokenizer.id_to_token(id) for id in ids])
        for text, ids in texts.items()
        if tokenizer.encode(text).ids != ids
    }
    assert not different


@pytest.mark.parametrize("pre", [name.partition(":")[2] for name in RECORDED["which"] if name.startswith("gpt2:")])
def test_each_pre_tokenizer_cuts_as_llamacpp_does(pre: str) -> None:
    expected = dict(zip(TEXTS, of_llamacpp(f"gpt2:{pre}")))
    if pre in WITHOUT_MARKS:
        expected = {text: ids for text, ids in expected.items() if not marked(text)}
    if SPLITS[pre].composed:  # llama.cpp leaves out the normal form that these models' tokenizers bring texts into
        expected = {text: ids for text, ids in expected.items() if composed(text) == text}
    if pre in ("afmoe", "tiny_aya", "cohere2moe"):  # llama.cpp joins digits with the blanks before them
        del expected["1 2 3  4   5\n6\n\n7 8,9"]
    assert len(expected) > 80
    compare(tokenizer_of(byte_level(pre) if SPLITS[pre].bytes else of_characters("gpt2", pre)), expected)


def test_every_name_is_compared() -> None:
    recorded = {name.partition(":")[2] for name in RECORDED["which"] if name.startswith("gpt2:")}
    assert set(SPLITS) - recorded == {"gpt2"}  # which llama.cpp does not know: a slip of other converters
    assert SPLITS["gpt2"] == SPLITS["gpt-2"]


def test_models_that_compose_texts_do() -> None:
    tokenizer = tokenizer_of(byte_level("qwen2"))
    texts = [text for text in TEXTS if composed(text) != text]
    assert len(texts) > 2
    for text in texts:
        assert tokenizer.encode(text).ids == tokenizer.encode(composed(text)).ids


def test_patterns_are_those_of_transformers() -> None:
    """Also where llama.cpp's are not the models' own."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    names = [name for name in mapping.GGUF_PRE_TOKENIZER_SPLITS if name in SPLITS]
    assert len(names) > 20
    for pattern in dict.fromkeys(mapping.GGUF_PRE_TOKENIZER_SPLITS[name] for name in names):
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs = pre_tokenizers.Sequence([split, last])
        for ours in {SPLITS[name] for name in names if mapping.GGUF_PRE_TOKENIZER_SPLITS[name] == pattern}:
            for text in TEXTS:
                assert ours.pre_tokenizer().pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("llama", sentencepiece()),
        ("llama:no prefix", sentencepiece(add_space_prefix=False, add_bos_token=False)),
        ("llama:ends", sentencepiece(add_bos_token=True, add_eos_token=True)),
        ("llama:phi-3", phi3()),
        ("gemma4", of_characters("gemma4")),
    ],
)
def test_characters_are_merged_as_llamacpp_does(name: str, metadata: dict[str, Any]) -> None:
    compare(tokenizer_of(metadata), dict(zip(TEXTS, of_llamacpp(name))))


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("t5", unigram(add_space_prefix=True)),
        ("t5:trimmed", unigram(remove_extra_whitespaces=True, add_space_prefix=True, add_eos_token=False)),
        ("bert", wordpiece()),
    ],
)
def test_pieces_are_chosen_as_llamacpp_does(name: str, metadata: dict[str, Any]) -> None:
    expected = dict(zip(TEXTS, of_llamacpp(name)))
    # llama.cpp puts no mark before a part that is blank; in BERT's words it takes U+0085 for a blank, leaves out
    # enclosing marks, and reads SentencePiece's mark in a text as the beginning of a word.
    others = {"t5": ("<s>begin",), "bert": ("no-break\u00a0space", "\U0001f468\u200d", "\u2581already")}
    kept = {text: ids for text, ids in expected.items() if not text.startswith(others.get(name, ()))}
    if name == "t5":
        del kept[" "]
    assert len(kept) >= len(TEXTS) - 3
    compare(tokenizer_of(metadata), kept)


def test_bytes_come_back() -> None:
    for metadata in (byte_level("llama-bpe"), sentencepiece(), of_characters("gemma4")):
        tokenizer = tokenizer_of(metadata)
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            # SentencePiece has a blank put after each of these.
            if not any(token in text for token in ("<unk>", "<s>", "</s>", "<table>", "<think>", "</think>")):
                marks = text.replace("\u2581", " ") if metadata["tokenizer.ggml.model"] != "gpt2" else text
                assert tokenizer.decode(ids, skip_special_tokens=False) == marks


def test_tokens_stand_where_their_texts_are() -> None:
    text = "d\u00e9j\u00e0 <table> vu\n\u732b"
    for metadata in (byte_level("smollm"), sentencepiece(add_bos_token=False)):
        encoded = tokenizer_of(metadata).encode(text)
        covered = {at for start, end in encoded.offsets for at in range(start, end)}
        assert covered == set(range(len(text)))


def test_special_tokens_in_a_text() -> None:
    metadata = byte_level("qwen2")
    tokenizer = tokenizer_of(metadata)
    ids = tokenizer.encode("<|im_start|>a<|im_end|><think>").ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "a<think>"  # which is defined by users, not special
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added["<|im_end|>"]
    assert not added["<think>"]


def test_what_is_put_beside_a_text() -> None:
    metadata = byte_level("qwen2")
    alone = tokenizer_of(metadata).encode("a").ids
    del metadata["tokenizer.ggml.add_bos_token"]
    assert tokenizer_of(metadata).encode("a").ids == alone
    assert tokenizer_of({**metadata, "tokenizer.ggml.pre": "llama-bpe"}).encode("a").ids == [0, *alone]
    both = {**metadata, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert tokenizer_of(both).encode("a").ids == [0, *alone, 2]
    assert tokenizer_of(both).encode("a", add_special_tokens=False).ids == alone
    del both["tokenizer.ggml.bos_token_id"]
    with pytest.raises(StartError, match="'bos' is to be put beside each text"):
        tokenizer_of(both)


def test_tokens_that_end_an_answer() -> None:
    texts = ["<s>", "</s>", "<|eot_id|>", "<|im_end|>", "<eos>", "a", "<|end|>", "x"]
    kinds = [CONTROL, CONTROL, CONTROL, USER_DEFINED, NORMAL, NORMAL, CONTROL, CONTROL]
    metadata = {
        **byte_level("default"),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.eom_token_id": 99,
    }
    # The file's own first; what is called so without being a control token, where no ordinary text is; 99 is none.
    assert end_ids(read_vocabulary(metadata)) == [7, 2, 1, 3, 6]
    assert tokenizer_of(metadata).decode([3]) == ""
    metadata["tokenizer.ggml.tokens"] = ["<|return|>", "<|call|>", *texts[2:]]
    assert 6 not in end_ids(read_vocabulary(metadata))  # ends a part of the answer there


def test_names_for_templates() -> None:
    names = token_names(read_vocabulary(sentencepiece()))
    assert names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pre": "of-tomorrow"}, "its pre-tokenizer 'of-tomorrow' is not known"),
        ({"pre": 7}, "its pre-tokenizer '7' is not known"),
        ({"model": "rwkv"}, "its model is 'rwkv'; read are gpt2"),
        ({"model": None}, "its model is 'None'"),
        ({"model": ["gpt2"]}, "its model is"),
        ({"tokens": None}, "it has no list of tokens"),
        ({"tokens": []}, "it has no list of tokens"),
        ({"tokens": ["a", 7]}, "a token is no text"),
        ({"tokens": ["a", "b", "a"]}, "two of its tokens are 'a'"),
        ({"merges": None}, "it has no list of merges"),
        ({"merges": ["ab"]}, "the merge 'ab' is no pair"),
        ({"merges": ["nothing ofthis"]}, "out of vocabulary"),
        ({"token_type": [1, 2]}, "does not have a number for each of"),
        ({"token_type": "abc"}, "holds more than numbers"),
        ({"token_type": [[1]] * 4000}, "does not have a number for each of"),
        ({"model": "llama"}, "it has no scores"),
        ({"model": "llama", "scores": [float("nan")] * 4000}, "a score of a token is no number"),
        ({"model": "t5", "scores": [0.0] * 4000, "precompiled_charsmap": ["x"]}, "holds more than bytes"),
        ({"model": "t5", "scores": [0.0] * 4000, "precompiled_charsmap": [1, 2, 3]}, "cannot be read"),
    ],
)
def test_a_broken_vocabulary_is_told(changes: dict[str, Any], problem: str) -> None:
    metadata = byte_level("qwen2")
    for name, value in changes.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    with pytest.raises(StartError, match=r"tokenizer\.json and tokenizer_config\.json beside the file") as raised:
        tokenizer_of(metadata)
    assert problem in str(raised.value)


def test_tokens_without_a_text_and_numbers_in_arrays() -> None:
    metadata = byte_level("qwen2")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "", ""]
    kinds = np.array([*metadata["tokenizer.ggml.token_type"], 5, 5], np.int32)
    metadata["tokenizer.ggml.token_type"] = kinds
    tokenizer = tokenizer_of(metadata)
    assert tokenizer.get_vocab_size() == len(kinds)
    assert tokenizer.id_to_token(len(kinds) - 1) == f"[EMPTY_{len(kinds) - 1}]"


def test_a_tokenizer_of_deepseek() -> None:
    path = real.need("tokenizer-deepseek")
    theirs = Tokenizer.from_file(str(path))
    ours = tokenizer_of(of_tokenizer_json(path, "deepseek-v3"))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text


def test_a_tokenizer_of_bert() -> None:
    path = real.need("minilm") / "tokenizer.json"
    theirs = Tokenizer.from_file(str(path))
    theirs.no_padding()
    theirs.no_truncation()
    ours = tokenizer_of(of_wordpiece_json(path))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        assert ours.encode("a", text).type_ids == theirs.encode("a", text).type_ids


@pytest.mark.parametrize(
    "metadata",
    [byte_level("qwen2"), byte_level("llama-bpe"), sentencepiece(add_space_prefix=False), of_characters("gemma4")],
)
def test_grammars_know_the_tokens(metadata: dict[str, Any]) -> None:
    """Each token of a text that a grammar allows is allowed in its turn, bytes of rare characters among them."""
    tokenizer = tokenizer_of(metadata)
    size = tokenizer.get_vocab_size()
    compiler = GrammarCompiler(tokenizer.to_str(), size, end_ids(read_vocabulary(metadata)), size)
    text = '{"name": "\u732b harbour", "n": 12}'
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["\u732b harbour", "lamp"]}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    matcher = compiler.compile(json_grammar(schema))
    for id in tokenizer.encode(text, add_special_tokens=False).ids:
        assert matcher.mask()[id // 8] >> id % 8 & 1, tokenizer.id_to_token(id)
        matcher.advance(id)
    assert matcher.complete


# Merges of vocabularies with scores


def scored(seed: int, size: int) -> tuple[list[str], NDArray[np.float32]]:
    """Texts of a few letters, so that nearly each can be merged in several ways, and scores of which some are equal."""
    random = np.random.default_rng(seed)
    texts = dict.fromkeys("abc")
    while len(texts) < size:
        texts["".join(random.choice(list("abc"), random.integers(2, 7)))] = None
    return list(texts), random.integers(-size, 0, size).astype(np.float32)


def merged(text: str, tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[int]:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    ids: list[int] = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges))).encode(text).ids
    return ids


@pytest.mark.parametrize("seed", range(6))
def test_merges_that_never_happen_are_left_out(seed: int) -> None:
    tokens, scores = scored(seed, 150)
    merges = merges_by_score(tokens, scores, np.ones(len(tokens), np.bool_))
    few = merges.some(reachable(tokens, merges))
    assert len(few.made) == len(set(few.made.tolist())) < len(merges.made) / 2
    random = np.random.default_rng(seed)
    for _ in range(100):
        text = "".join(random.choice(list("abc"), 40))
        assert merged(text, tokens, few.texts(tokens)) == merged(text, tokens, merges.texts(tokens))


# Our own module beside the library

VOCABULARIES: dict[str, dict[str, Any]] = {
    **{f"gpt2:{pre}": byte_level(pre) for pre in ("qwen2", "llama-bpe", "smollm", "deepseek-llm", "tekken")},
    "llama": sentencepiece(),
    "llama:no prefix": sentencepiece(add_space_prefix=False, add_bos_token=False),
    "llama:ends": sentencepiece(add_bos_token=True, add_eos_token=True),
    "gemma4": of_characters("gemma4"),
    "characters": of_characters("gpt2", "sarvam-moe"),
}


def both(metadata: dict[str, Any]) -> tuple[NativeEncoder, LibraryEncoder]:
    vocabulary = read_vocabulary(metadata)
    if not can_encode(vocabulary):
        pytest.skip("the package was built without a compiler")
    return NativeEncoder(vocabulary), LibraryEncoder(build(vocabulary))


def random_texts(seed: int, tokens: Sequence[str], count: int) -> list[str]:
    """Of tokens and their beginnings, of marks that the vocabularies know and of characters that they do not."""
    random = np.random.default_rng(seed)
    others = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "<s>",
        "<",
        "<0x41>",
        "\u2581",
        "\u732b",
        "e\u0301",
        "\U0001f468\u200d",
        "\x00",
        "7",
    ]
    texts = []
    for _ in range(count):
        parts = [
            str(random.choice(others)) if random.random() < 0.3 else tokens[random.integers(len(tokens))]
            for _ in range(random.integers(1, 12))
        ]
        texts.append("".join(part if random.random() < 0.7 else part[:2] for part in parts))
    return texts


@pytest.mark.parametrize("name", VOCABULARIES)
def test_our_module_gives_the_librarys_tokens(name: str) -> None:
    ours, theirs = both(VOCABULARIES[name])
    texts = ["", *TEXTS, "".join(TEXTS), *random_texts(1, list(read_vocabulary(VOCABULARIES[name]).tokens), 300)]
    for text in texts:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, special), text
    assert ours.encode_batch(texts, True) == theirs.encode_batch(texts, True)
    random = np.random.default_rng(2)
    for _ in range(300):
        ids = random.integers(0, ours.size + 3, random.integers(0, 9)).tolist()
        assert [ours.decode(ids, hide) for hide in (True, False)] == [
            theirs.decode(ids, hide) for hide in (True, False)
        ]
    assert (ours.size, ours.special, ours.around) == (theirs.size, theirs.special, theirs.around)
    for id in (0, 7, ours.size - 1, ours.size):
        token = ours.text_of(id)
        assert token == theirs.text_of(id)
        assert ours.id_of(token or "nothing") == theirs.id_of(token or "nothing")
    for encoder in (ours, theirs):
        with pytest.raises(TypeError):
            encoder.encode("half \ud83d", True)


@pytest.mark.parametrize("missing", [range(0), range(256), range(0x80, 0xC0)])
def test_characters_without_a_token(missing: range) -> None:
    """Bytes take their place where all of them have tokens; unknown ones stand behind those, as the library has it."""
    metadata = sentencepiece(add_space_prefix=False)
    left_out = {f"<0x{byte:02X}>" for byte in missing}
    kept = [id for id, token in enumerate(metadata["tokenizer.ggml.tokens"]) if token not in left_out]
    for key in ("tokens", "scores", "token_type"):
        metadata[f"tokenizer.ggml.{key}"] = [metadata[f"tokenizer.ggml.{key}"][id] for id in kept]
    ours, theirs = both(metadata)
    for text in (*random_texts(3, metadata["tokenizer.ggml.tokens"], 100), "\u732b\x01\u732b a\x01\x02\u0444", "\x01"):
        assert ours.encode(text, True) == theirs.encode(text, True), text


@pytest.mark.parametrize("seed", range(4))
def test_merges_of_letters_that_go_many_ways(seed: int) -> None:
    """Vocabularies in which nearly each text can be merged in several ways, some of equal scores."""
    tokens, scores = scored(seed, 150)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.random.default_rng(seed).choice([1, 1, 1, 5, 6], len(tokens)),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    ours, theirs = both(metadata)
    listed = merges_by_score(tokens, scores, np.ones(len(tokens), np.bool_)).texts(tokens)
    merges = [" ".join(pair) for pair in [*listed, *listed[:20]]]  # the last one of a pair counts
    vocabulary = {"model": "gpt2", "pre": "default", "tokens": tokens, "merges": merges}
    by_list, their_list = both({f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()})
    random = np.random.default_rng(seed)
    for _ in range(200):
        text = "".join(random.choice(list("abc"), random.integers(1, 60)))
        assert ours.encode(text, True) == theirs.encode(text, True)
        assert by_list.encode(text, True) == their_list.encode(text, True)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_files_have_the_librarys_tokens(name: str) -> None:
    metadata = open_model(real.need(name)).metadata
    assert metadata is not None
    ours, theirs = both(metadata)
    for text in [*TEXTS, *random_texts(4, list(read_vocabulary(metadata).tokens), 300)]:
        ids = theirs.encode(text, True)
        assert ours.encode(text, True) == ids
        assert ours.decode(ids, True) == theirs.decode(ids, True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"merges": None}, "it has no list of merges"),
        ({"merges": ["ab"]}, "the merge 'ab' is no pair"),
        ({"merges": ["nothing ofthis"]}, "Token `nothing` out of vocabulary"),
        ({"merges": [7]}, "it has no list of merges"),
        ({"tokens": ["a", "\ud800"]}, "a token is no text"),
    ],
)
def test_our_module_tells_of_a_broken_vocabulary(changes: dict[str, Any], problem: str) -> None:
    metadata = {**byte_level("qwen2"), **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
    with pytest.raises(StartError, match=r"beside the file") as raised:
        both(metadata)
    assert problem in str(raised.value)
