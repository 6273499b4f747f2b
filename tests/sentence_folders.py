"""Small folders of sentence-transformers in its old and its new layout, and the vectors that it gives with them.

`python -m tests.sentence_folders` records the vectors anew (in an environment with sentence-transformers; the file was
made with 6.2.0) into tests/data/sentence_vectors.json. Weights come from numpy's generator, so that they are the same
wherever a folder is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

RECORDED = Path(__file__).parent / "data" / "sentence_vectors.json"
WIDTH, POSITIONS, LONGEST = 16, 64, 24
TEXTS = [
    "The quick Fox",
    "a",
    "jumps OVER the lazy dog " * 9,
    "one two three four five six seven eight nine ten eleven twelve. " * 2,
    "(dog) [SEP] dog",
]
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
PROMPTS = {"query": "search for: ", "passage": "a text about "}
_WORDS = (
    "the quick brown fox jumps over lazy dog one two three four five six seven eight nine ten eleven twelve search for"
)
_NEW = "sentence_transformers.base.modules"
_TYPES = {
    "Transformer": f"{_NEW}.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": f"{_NEW}.dense.Dense",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "Normalize": f"{_NEW}.normalize.Normalize",
}

Layer = tuple[str, dict[str, Any]]


def dense(inputs: int, outputs: int, activation: str, **settings: Any) -> Layer:
    name = f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
    given = {"in_features": inputs, "out_features": outputs, "bias": True, "activation_function": name, **settings}
    return "Dense", given


NORMALIZE: Layer = ("Normalize", {})
VARIANTS: dict[str, dict[str, Any]] = {
    "old": {"poolings": ["mean"], "layers": [NORMALIZE], "old": True},
    "old, lowercased": {"poolings": ["cls", "mean"], "layers": [NORMALIZE], "old": True, "lowercase": True},
    "layers": {
        "poolings": ["mean", "max"],
        "layers": [
            dense(2 * WIDTH, 20, "Tanh", module_input_name="sentence_embedding"),
            ("LayerNorm", {"dimension": 20}),
            dense(20, 20, "GELU", use_residual=True),
            dense(20, 12, "SiLU", use_residual=True),
            dense(12, 12, "Sigmoid"),
            dense(12, 10, "ReLU"),
            dense(10, 8, "Identity", bias=False),
        ],
    },
    "prompts": {"poolings": ["mean"], "layers": [NORMALIZE], "prompts": PROMPTS, "default": "query"},
    "left": {"poolings": ["mean"], "layers": [NORMALIZE], "left": True},
    "without the prompt": {
        "poolings": list(POOLINGS), "layers": [], "prompts": PROMPTS, "default": "query", "include_prompt": False,
    },
    **{pooling: {"poolings": [pooling], "layers": []} for pooling in POOLINGS},
}  # fmt: skip


def make(folder: Path, variant: str) -> Path:
    """Writes the folder of a variant."""
    given = VARIANTS[variant]
    draw = np.random.default_rng(7)
    _transformer(folder, draw, lowercase=variant != "old, lowercased", left=given.get("left", False))
    old = given.get("old", False)
    modules: list[Layer] = [("Transformer", {}), ("Pooling", _pooling(given, old)), *given["layers"]]
    listed = []
    for index, (kind, settings) in enumerate(modules):
        path = f"{index}_{kind}" if index else ""
        name = f"sentence_transformers.models.{kind}" if old else _TYPES[kind]
        listed.append({"idx": index, "name": str(index), "path": path, "type": name})
        if not settings:
            continue
        (folder / path).mkdir()
        _write(folder / path / "config.json", settings)
        tensors = _tensors(kind, settings, draw)
        if tensors:
            save_file(tensors, folder / path / "model.safetensors")
    _write(folder / "modules.json", listed)
    if old:
        settings = {"max_seq_length": LONGEST, "do_lower_case": given.get("lowercase", False)}
        _write(folder / "sentence_bert_config.json", settings)
    named = {"prompts": given.get("prompts", {}), "default_prompt_name": given.get("default")}
    _write(folder / "config_sentence_transformers.json", named)
    return folder


def _pooling(given: dict[str, Any], old: bool) -> dict[str, Any]:
    if not old:
        include = given.get("include_prompt", True)
        return {"embedding_dimension": WIDTH, "pooling_mode": given["poolings"], "include_prompt": include}
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    return {"word_embedding_dimension": WIDTH} | {
        f"pooling_mode_{name}": pooling in given["poolings"] for pooling, name in names.items()
    }


def _tensors(kind: str, settings: dict[str, Any], draw: np.random.Generator) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "Dense":
        shape = settings["out_features"], settings["in_features"]
        shapes["linear.weight"] = shape
        if settings["bias"]:
            shapes["linear.bias"] = shape[:1]
        if settings.get("use_residual") and shape[0] != shape[1]:
            shapes["residual.weight"] = shape
    elif kind == "LayerNorm":
        shapes = {"norm.weight": (settings["dimension"],), "norm.bias": (settings["dimension"],)}
    return {name: (draw.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in shapes.items()}


def _transformer(folder: Path, draw: np.random.Generator, lowercase: bool, left: bool) -> None:
    """A BERT of two layers and its WordPiece tokenizer."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*marks, *_WORDS.split(), *letters, *(f"##{each}" for each in letters)]))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)
    model = transformers.BertModel(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if value.is_floating_point()}
    save_file(
        {name: (draw.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in sorted(shapes.items())},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tokenizer = transformers.BertTokenizer(
        vocab={word: index for index, word in enumerate(vocabulary)},
        do_lower_case=lowercase,
        strip_accents=False,
        model_max_length=LONGEST,
        truncation_side="left" if left else "right",
    )
    tokenizer.save_pretrained(folder)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2))


def record() -> None:
    import tempfile

    import sentence_transformers

    found: dict[str, Any] = {}
    for variant, given in VARIANTS.items():
        with tempfile.TemporaryDirectory() as place:
            model = sentence_transformers.SentenceTransformer(str(make(Path(place) / "m", variant)))
            names = [None, *given.get("prompts", {})]
            vectors = {name or "": model.encode(TEXTS, prompt_name=name) for name in names}
        found[variant] = {name: [[round(float(x), 6) for x in row] for row in rows] for name, rows in vectors.items()}
    rows = [f"{json.dumps(variant)}: {json.dumps(vectors)}" for variant, vectors in found.items()]
    RECORDED.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    record()
