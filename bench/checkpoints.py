"""The same random checkpoints for every engine: made once, converted to each peer's format, kept in a folder.

    python -m bench.checkpoints FOLDER [--models 135m,0.5b] [--for llamacpp,openvino,vllm]

Weights are random, so speed is all that they can be asked about. Each checkpoint is written in Hugging Face layout
(bfloat16 safetensors, and a tokenizer in which every token is a word, so that lengths are exact), and from there to
GGUF, to OpenVINO's IR and to compressed-tensors by the peers' own tools, in their own environments
(`bench/setup_cpu_peers.sh`). What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "inflight-bench-checkpoints"
PRECISIONS = ("16bit", "int8", "int4")
LONGEST = 16_384
# The folder in which bench/setup_cpu_peers.sh builds llama.cpp: its libraries, llama-quantize, llama-server.
LLAMA_TOOLS = ROOT / ".venv-llamacpp" / "build" / "bin"


@dataclass(frozen=True)
class Shape:
    """The shape of a checkpoint's model.

    Attributes:
        kind: transformers' `model_type`; in GGUF the architecture has the same name.
        int4_group: weights that share a scale in OpenVINO's int4: 128, its default, if that divides `hidden`.
    """

    name: str
    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    int4_group: int

    @property
    def parameters(self) -> int:
        """Weights in the matrices that a token is multiplied with; a tied embedding counts once, as the head."""
        return self._of_layers + self.vocabulary * self.hidden

    @property
    def _of_layers(self) -> int:
        head = self.hidden // self.heads
        attention = self.hidden * head * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    def prefill_operations(self, tokens: int) -> int:
        """Operations of a prompt: layers for each token, the head for the last, scores and sums of attention."""
        seen = tokens * (tokens + 1) // 2
        return 2 * tokens * self._of_layers + 2 * self.vocabulary * self.hidden + 4 * self.layers * self.hidden * seen


MODELS = {
    "135m": Shape("135m", "llama", 576, 30, 9, 3, 1536, 49_152, 64),
    # Qwen2.5-0.5B, but with a smaller vocabulary than its 151,936.
    "0.5b": Shape("0.5b", "qwen2", 896, 24, 14, 2, 4864, 32_768, 128),
}


@dataclass(frozen=True)
class Files:
    """The paths of one model below the folder of all models, by engine and precision."""

    root: Path

    @property
    def huggingface(self) -> Path:
        return self.root / "huggingface"

    def gguf(self, precision: str) -> Path:
        return self.root / "gguf" / f"{precision}.gguf"

    def openvino(self, precision: str) -> Path:
        return self.root / "openvino" / precision

    def vllm(self, precision: str) -> Path:
        return self.huggingface if precision == "16bit" else self.root / "vllm" / precision


def python_of(environment: str) -> Path:
    return ROOT / environment / "bin" / "python"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to `path` when everything is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        yield written
        written.rename(path)


# Hugging Face layout, in the project's environment.


def make_huggingface(shape: Shape, folder: Path) -> None:
    """Random weights, and a tokenizer in which every token is a word, so that lengths are exact."""
    import torch
    import transformers

    torch.manual_seed(0)
    names = {"llama": "Llama", "qwen2": "Qwen2"}
    config = getattr(transformers, f"{names[shape.kind]}Config")(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = getattr(transformers, f"{names[shape.kind]}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # the constructor's zeros would hide a conversion that loses them
                parameter.normal_(std=0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(shape.vocabulary, folder)


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    import tokenizers

    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": "w2", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# GGUF, in llama.cpp's environment.

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of Llama or Qwen2."""
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"


def read_safetensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of a bfloat16 file, viewed as uint16; safetensors' own numpy reader has no bfloat16."""
    import numpy as np

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", (name, entry["dtype"])
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            yield name, np.frombuffer(file.read(end - begin), np.uint16).reshape(entry["shape"])


def interleaved(weight: Any, heads: int) -> Any:
    """llama.cpp's order of the rows of q and k of a Llama: pairs that are rotated together lie side by side."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def make_gguf(shape: Shape, folder: Path, path: Path) -> None:
    """Writes matrices in bfloat16 and vectors in float32, as llama.cpp's own converter does."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, shape.kind)
    config = json.loads((folder / "config.json").read_text())
    write_gguf_head(writer, shape, config["rms_norm_eps"], config["rope_parameters"]["rope_theta"])
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}
    for name, tensor in read_safetensors(folder / "model.safetensors"):
        rows = heads.get(name.split(".")[-2]) if shape.kind == "llama" else None
        ordered = interleaved(tensor, rows) if rows else tensor
        if ordered.ndim == 1:
            writer.add_tensor(gguf_name(name), (ordered.astype(np.uint32) << 16).view(np.float32))
        else:
            data = np.ascontiguousarray(ordered).view(np.uint8)
            writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Sizes(Protocol):
    """The sizes of a model in a file's header."""

    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def mlp(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


def write_gguf_head(writer: Any, shape: Sizes, eps: float, rope_theta: float) -> None:
    """Writes the sizes and a vocabulary."""
    writer.add_context_length(LONGEST)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_freq_base(rope_theta)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    write_vocabulary(writer, shape.vocabulary)


def write_vocabulary(writer: Any, tokens: int) -> None:
    """Writes a vocabulary in which every token is a word."""
    writer.add_vocab_size(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"▁w{number}" for number in range(tokens)])
    writer.add_token_scores([-float(number) for number in range(tokens)])
    unknown, control, normal = 2, 3, 1  # gguf.TokenType
    writer.add_token_types([unknown, control, control] + [normal] * (tokens - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def make_all_gguf(shape: Shape, files: Files) -> None:
    """llama-quantize makes Q8_0 and Q4_0, with its own choice for the tied head (Q8_0 in both at these widths)."""
    if not files.gguf("16bit").exists():
        with whole(files.gguf("16bit")) as path:
            make_gguf(shape, files.huggingface, path)
    quantize = LLAMA_TOOLS / "llama-quantize"
    for precision, kind in (("int8", "Q8_0"), ("int4", "Q4_0")):
        if not files.gguf(precision).exists():
            with whole(files.gguf(precision)) as path:
                command = [str(part) for part in (quantize, files.gguf("16bit"), path, kind, "1")]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# OpenVINO's IR, in its environment.


def make_all_openvino(shape: Shape, files: Files) -> None:
    """16 bits stay bfloat16; int8 is asymmetric per channel,
    int4 symmetric in groups with embedding and head in int8: optimum-intel's defaults."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    settings = {
        "16bit": None,
        "int8": OVWeightQuantizationConfig(bits=8),
        "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=shape.int4_group, ratio=1.0),
    }
    for precision, config in settings.items():
        if not files.openvino(precision).exists():
            with whole(files.openvino(precision)) as path:
                given = {"quantization_config": config} if config else {"load_in_8bit": False}
                model = OVModelForCausalLM.from_pretrained(
                    str(files.huggingface), export=True, compile=False, local_files_only=True, **given
                )
                model.save_pretrained(path)


# compressed-tensors for vLLM, in the project's environment.


def make_all_vllm(shape: Shape, files: Files) -> None:
    """int8: weights per channel, activations per token (W8A8, the int8 form of vLLM's CPU backend)."""
    if not files.vllm("int8").exists():
        with whole(files.vllm("int8")) as path:
            path.mkdir()
            make_w8a8(files.huggingface, path)


def make_w8a8(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    whole_numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**whole_numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**whole_numbers, "strategy": "token", "dynamic": True},
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config))


CONVERSIONS: dict[str, tuple[str, Callable[[Shape, Files], None]]] = {
    "llamacpp": (".venv-llamacpp", make_all_gguf),
    "openvino": (".venv-openvino", make_all_openvino),
    "vllm": (".venv", make_all_vllm),
}


def ensure(folder: Path, model: str, peers: Sequence[str]) -> Files:
    """Makes the missing files of one model, each conversion in its peer's environment.

    Raises:
        subprocess.CalledProcessError: a conversion failed; it has printed the reason on standard error.
    """
    files = Files(folder / model)
    if not files.huggingface.exists():
        with whole(files.huggingface) as path:
            make_huggingface(MODELS[model], path)
    for peer in peers:
        if peer in CONVERSIONS:
            environment, _ = CONVERSIONS[peer]
            command = [str(python_of(environment)), "-m", "bench.checkpoints", str(folder), "--convert", peer, model]
            subprocess.run(command, cwd=ROOT, check=True)
    return files


def describe(files: Files) -> str:
    """Every file of weights and its size."""
    found = sorted(path for path in files.root.rglob("*") if path.suffix in (".safetensors", ".gguf", ".bin"))
    return "\n".join(
        f"{path.relative_to(files.root.parent)}: {math.ceil(path.stat().st_size / 1e6):,} MB" for path in found
    )


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: known names, separated by commas."""
    allowed = list(known)

    def parse(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        unknown = [name for name in found if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(allowed)}")
        return found

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    parser.add_argument("--models", type=names(MODELS), default=",".join(MODELS))
    parser.add_argument("--for", dest="peers", type=names(CONVERSIONS), default=",".join(CONVERSIONS))
    parser.add_argument("--convert", nargs=2, metavar=("PEER", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        peer, model = options.convert
        CONVERSIONS[peer][1](MODELS[model], Files(options.folder / model))
        return
    for model in options.models:
        print(describe(ensure(options.folder, model, options.peers)))


if __name__ == "__main__":
    main()
