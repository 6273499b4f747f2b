"""A model folder in Hugging Face layout, made of a GGUF file; the weights stay where they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from inflight.checkpoint import GgufModel
from inflight.errors import StartError

GGUF_NAME = "model.gguf"

_SPLITS_DIGITS = ("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b")
"""Pre-tokenizers that are GPT-2's after each digit was cut off (llama.cpp's llama-vocab.cpp)."""
_GPT2 = ("gpt-2", "gpt2", "default", "phi-2", "mpt", "olmo", "jais")


def make_folder(path: Path, folder: Path) -> None:
    """Writes config.json, generation_config.json, tokenizer.json and tokenizer_config.json, and links the file.

    A tokenizer.json beside the file is taken as it is; else it is converted by transformers.

    Raises:
        StartError: a broken file, or one whose architecture or tokenizer is not known.
    """
    file = GgufModel(path)
    (folder / "config.json").write_text(json.dumps(file.config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(file.generation_config))
    (folder / GGUF_NAME).symlink_to(path)
    beside = path.parent / "tokenizer.json"
    if beside.is_file():
        for found in (beside, path.parent / "tokenizer_config.json", path.parent / "chat_template.jinja"):
            if found.is_file():
                shutil.copyfile(found, folder / found.name)
    else:
        _convert(file, folder)


def _convert(file: GgufModel, folder: Path) -> None:
    import transformers  # slow to import, and not needed for the others

    _check_kind(file)
    transformers.logging.set_verbosity_error()
    try:
        made = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file=GGUF_NAME)
        made.save_pretrained(str(folder))
    except Exception as error:  # the library raises anything for vocabularies that it does not expect
        raise _unknown(file, f"transformers says: {error}") from error
    if file.metadata.get("tokenizer.ggml.pre") in _SPLITS_DIGITS:
        _split_digits(folder / "tokenizer.json")


def _check_kind(file: GgufModel) -> None:
    """Refuses a byte-level vocabulary whose way of splitting text would silently be GPT-2's."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind = file.metadata.get("tokenizer.ggml.pre", "default")
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_SPLITS_DIGITS, *_GPT2}
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and kind not in known:
        raise _unknown(file, f"its pre-tokenizer {kind!r} is not known")


def _unknown(file: GgufModel, problem: str) -> StartError:
    return StartError(
        f"the tokenizer of '{file.path}' cannot be converted: {problem}. Put the original model's tokenizer.json and "
        "tokenizer_config.json beside the file"
    )


def _split_digits(path: Path) -> None:
    found: dict[str, Any] = json.loads(path.read_text())
    found["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(found, ensure_ascii=False))
