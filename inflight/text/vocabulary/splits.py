"""Rules that cut text into words before byte-level merges, by the pre-tokenizer's name in GGUF (`tokenizer.ggml.pre`).

The names, and which of them are synonyms, are those of llama.cpp's `llama-vocab.cpp`. Where its patterns are only
approximate, because C++'s regular expressions lack classes of letters and marks, the patterns are those of the models'
own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True)
class Split:
    """One pre-tokenizer.

    Attributes:
        patterns: applied in order; each cuts out its matches, and the next one works within the pieces.
        whole_words: a word that is a token stays whole, without merges. Gemma 4 needs it for runs of line ends, which
            no merge makes.
        bos: default for files without `add_bos_token`: put the BOS token before the text.
        composed: text is normalized to NFC first.
        bytes: words are merged from bytes; else from characters, and spaces become SentencePiece's mark.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    composed: bool = False
    bytes: bool = True

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        if self.bytes:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.composed else None


def _any(*patterns: str) -> str:
    return "|".join(patterns)


# Parts of patterns in Oniguruma's syntax, as in every tokenizer.json.
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_LINES = r"\s*[\r\n]+"
_BLANKS = r"\s+(?!\S)|\s+"
_BY_THREE = r"\p{N}{1,3}"
_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"


def _cased(ending: str = "", letters: str = "") -> str:
    """A pattern of words that begin anew at capitals. Args: letters: a class that all letters must also be in."""
    upper, lower = f"[{_UPPER}{letters}]", f"[{_LOWER}{letters}]"
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{ending}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _any(_SHORT, _WORD, _BY_THREE, _SIGNS, _LINES, _BLANKS)
_QWEN2 = _any(_SHORT, _WORD, r"\p{N}", _SIGNS, _LINES, _BLANKS)
_QWEN35 = _any(_SHORT, _MARKED_WORD, r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LINES, _BLANKS)
_GPT4O = _any(_cased(f"{_SHORT}?"), _BY_THREE, _SIGNS_AND_SLASHES, _LINES, _BLANKS)
_TEKKEN = _any(_cased(), r"\p{N}", _SIGNS_AND_SLASHES, _LINES, _BLANKS)
_YOUTU = _any(_cased(f"{_SHORT}?"), r"\p{N}", _SIGNS_AND_SLASHES, _LINES, _BLANKS)
_KIMI_K2 = _any(
    r"\p{Han}+", _cased(f"{_SHORT}?", r"&&[^\p{Han}]"), _BY_THREE, _SIGNS, _LINES, _BLANKS
)  # fmt: skip
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK_V3 = _any(_DEEPSEEK_WORDS, r" ?[\p{P}\p{S}]+[\r\n]*", _LINES, _BLANKS)
_CHINESE_JAPANESE = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CHINESE_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_WITHOUT_SPACES = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
"""Scripts of Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese."""
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CHINESE_JAPANESE
)
_DEEPSEEK_LLM_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters with a case, in the version of Unicode that its authors used."""
_DEEPSEEK_LLM_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_JAIS2_BLANKS = _any(*(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)), r"\s{1,2}(?!\S)", r"\s")

_DIGITS_GPT2 = Split((r"\p{N}", _GPT2))
_DEEPSEEK = Split((_BY_THREE, _CHINESE_JAPANESE, _DEEPSEEK_V3))

_WAYS: tuple[tuple[str, Split], ...] = (
    (
        "default",
        Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    ),
    (
        "gpt-2 gpt2 phi-2 jina-es jina-de gigachat jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe a.x-4.0 "
        "mellum modern-bert exaone4 jais trillion granite-docling",
        Split((_GPT2,)),
    ),
    ("mpt olmo", Split((_GPT2,), composed=True)),
    ("starcoder refact smollm codeshell exaone minerva-7b mellum2", _DIGITS_GPT2),
    ("command-r", Split((r"\p{N}", _GPT2), composed=True)),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        Split((_LLAMA3,), whole_words=True, bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", Split((_LLAMA3,))),
    ("glm4 glm5", Split((_LLAMA3,), whole_words=True)),
    (
        "minicpm5",
        Split((_BY_THREE, _any(_SHORT, _WORD, r"\p{N}+", _SIGNS, _LINES, _BLANKS)), whole_words=True),
    ),
    ("jais-2", Split((_any(_SHORT, _WORD, _BY_THREE, _SIGNS, _LINES, _JAIS2_BLANKS),))),
    ("qwen2", Split((_QWEN2,), composed=True)),
    ("qwen35", Split((_QWEN35,), composed=True)),
    ("deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", Split((_QWEN2,))),
    ("ufakzeka", Split((_any(_WORD, r"\p{N}", _SIGNS, _LINES, _BLANKS),))),
    ("laguna", Split((r"[^\n]+|\n+", _QWEN2))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Split((_GPT4O,))),
    ("granite-embed-multi-97m", Split((_GPT4O,), whole_words=True)),
    ("tiny_aya cohere2moe", Split((_FROM_THE_RIGHT, _GPT4O))),
    ("tekken", Split((_TEKKEN,), whole_words=True, bos=True)),
    ("youtu", Split((_YOUTU_SCRIPTS, _YOUTU), whole_words=True)),
    ("kimi-k2", Split((_KIMI_K2,))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK),
    (
        "spark2_5",
        Split(
            (
                _BY_THREE,
                _CHINESE_JAPANESE,
                _any(_DEEPSEEK_WORDS, r" ?[\p{P}\p{S}]+", r"[\r\n]", _BLANKS),
                r"\p{N}",
            )
        ),
    ),
    ("afmoe", Split((_FROM_THE_RIGHT, _WITHOUT_SPACES, _DEEPSEEK_V3))),
    (
        "deepseek-llm",
        Split(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LLM_LETTERS}]+",
                rf"\s?[{_DEEPSEEK_LLM_SIGNS}]+",
                r"\s+$",
                _CHINESE_KOREAN,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}"))),
    ("falcon", Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("poro-chat bloom gpt3-finnish", Split((_BLOOM,))),
    ("viking", Split((_BLOOM, r"\p{N}"))),
    (
        "chameleon",
        Split(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            bos=True,
        ),
    ),
    ("superbpe", Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        Split(
            (
                _any(
                    r"'(?i:[sdmt]|ll|ve|re)",
                    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
                    r"\s*[\r\n]",
                    _BLANKS,
                ),
            )
        ),
    ),
    ("seed-coder", Split((_any(_SHORT, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _LINES, _BLANKS),))),
    (
        "exaone-moe",
        Split(
            (
                _any(
                    _SHORT,
                    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    r"\s*[\r\n]",
                    _BLANKS,
                ),
            )
        ),
    ),
    ("gemma4 granite-embed-multi-311m", Split((r"[^\n]+|\n+",), whole_words=True, bos=True, bytes=False)),
    ("sarvam-moe", Split((r"[^\n]+|\n+",), bytes=False)),
)

SPLITS: dict[str, Split] = {name: split for names, split in _WAYS for name in names.split()}
"""Pre-tokenizers by every supported name."""
