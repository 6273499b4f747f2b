"""Writes down what tokens llama.cpp makes of the texts, with the vocabularies of tests/vocabularies.py and real files.

    LLAMA_CPP_LIB_PATH=.venv-llamacpp/build/bin .venv-llamacpp/bin/python -m tests.record_llamacpp [NAME=FILE.gguf ...]

in the environment that bench/setup_cpu_peers.sh makes. The tests read tests/data/tokens/llamacpp.json; it is made anew
where the texts, the vocabularies or the names of pre-tokenizers change.
"""

from __future__ import annotations

import ast
import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

from tests.vocabularies import DATA, TEXTS, byte_level, of_characters, phi3, sentencepiece, unigram, wordpiece

PREFIX = "tokenizer.ggml."


def names() -> list[str]:
    """Of the pre-tokenizers; read as text, because inflight is not installed here."""
    source = Path(__file__).parents[1] / "inflight" / "text" / "vocabulary" / "splits.py"
    ways = next(
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "_WAYS"
    )
    return [name for way in ways.elts for name in ast.literal_eval(way.elts[0]).split()]


def write(path: Path, metadata: dict[str, Any]) -> None:
    """A file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encode(path: Path, texts: list[str]) -> list[list[int]] | None:
    """Tokens of each text with special tokens read and added; None where llama.cpp refuses the file."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        return None
    vocab = llama_cpp.llama_model_get_vocab(model)
    found = []
    for text in texts:
        data = text.encode()
        most = 4 * len(data) + 16
        ids = (llama_cpp.llama_token * most)()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, most, True, True)
        assert count >= 0
        found.append(list(ids[:count]))
    llama_cpp.llama_model_free(model)
    return found


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    made = {f"gpt2:{name}": byte_level(name) for name in names() if byte_level_name(name)}
    for name in names():
        if not byte_level_name(name):
            made[f"gpt2:{name}"] = of_characters("gpt2", name)
    made["gemma4"] = of_characters("gemma4")
    made["llama"] = sentencepiece()
    made["llama:no prefix"] = sentencepiece(add_space_prefix=False, add_bos_token=False)
    made["llama:ends"] = sentencepiece(add_bos_token=True, add_eos_token=True)
    made["llama:phi-3"] = phi3()
    made["t5"] = unigram(add_space_prefix=True)
    made["t5:trimmed"] = unigram(remove_extra_whitespaces=True, add_space_prefix=True, add_eos_token=False)
    made["bert"] = wordpiece()
    recorded: dict[str, list[list[int]] | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, metadata in made.items():
            path = Path(folder) / "vocabulary.gguf"
            write(path, metadata)
            recorded[name] = encode(path, TEXTS)
    for argument in sys.argv[1:]:
        name, _, file = argument.partition("=")
        recorded[f"real:{name}"] = encode(Path(file), TEXTS)
    refused = [name for name, ids in recorded.items() if ids is None]
    print("refused:", refused)
    save({name: ids for name, ids in recorded.items() if ids is not None})


def byte_level_name(name: str) -> bool:
    return name not in ("gemma4", "granite-embed-multi-311m", "sarvam-moe")


def save(recorded: dict[str, list[list[int]]]) -> None:
    """For each text the different answers once, and for each vocabulary which of them it gave."""
    answers: list[list[list[int]]] = [[] for _ in TEXTS]
    which: dict[str, list[int]] = {}
    for name, found in recorded.items():
        which[name] = []
        for at, ids in enumerate(found):
            if ids not in answers[at]:
                answers[at].append(ids)
            which[name].append(answers[at].index(ids))
    lines = ",\n".join(json.dumps(of_text, separators=(",", ":")) for of_text in answers)
    rows = ",\n".join(f"{json.dumps(name)}:{json.dumps(row, separators=(',', ':'))}" for name, row in which.items())
    version = llama_cpp.__version__
    (DATA / "llamacpp.json").write_text(
        f'{{"llama_cpp_python":{json.dumps(version)},\n"answers":[\n{lines}\n],\n"which":{{\n{rows}\n}}}}\n'
    )


if __name__ == "__main__":
    main()
