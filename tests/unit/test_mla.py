"""Multi-head latent attention on the CPU engine: against transformers, bit for bit against itself, from folders and
from GGUF files of both ages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inflight.checkpoint import open_model
from inflight.config import ModelConfig
from inflight.contract import Sampling
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.kernels import native_reason
from inflight.models import load_model
from inflight.models.config import decoder_config
from inflight.models.load import choose
from inflight.models.native import NativeDecoder
from tests.engine_checks import check_cuts, check_parity
from tests.engine_checks import tokens as random_tokens
from tests.gguf_files import float32, matrices, write_gguf
from tests.lm import SIZE, Driver, make_runner, on_sets, reference, run, save_tiny
from tests.recurrent import forward

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

LOGGED = Sampling(logprobs=True)
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 24,
    "num_hidden_layers": 3,
}
MIXTURE: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.2],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # As DeepSeek-V2-Lite
    "deepseek_v2": (
        "DeepseekV2",
        {**MIXTURE, "q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1, "rope_parameters": YARN},
    ),
    "deepseek_v2, groups": (
        "DeepseekV2",
        {
            **MIXTURE,
            **GROUPS,
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 28,
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
            "attention_bias": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **MIXTURE,
            **GROUPS,
            "q_lora_rank": 28,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "glm4_moe_lite": ("Glm4MoeLite", {**MIXTURE, "q_lora_rank": 28, "n_shared_experts": 1}),
    "minicpm3": (
        "MiniCPM3",
        {
            "q_lora_rank": 28,
            "v_head_dim": 16,  # the only one that its GGUF files can have
            "rope_parameters": LONGROPE,
            "dim_model_base": 256,
            "tie_word_embeddings": True,
        },
    ),
}
ROUTED = [name for name in FAMILIES if name != "minicpm3"]
ARCHITECTURES = {**dict.fromkeys(ROUTED, "deepseek2"), "minicpm3": "minicpm3"}
CORRECTION = "model.layers.{}.mlp.gate.e_score_correction_bias"


def save(name: str, folder: Path, **changes: Any) -> Path:
    family, settings = FAMILIES[name]
    save_tiny(family, folder, **{**LATENT, **settings, **changes})
    if name in ("deepseek_v3", "glm4_moe_lite"):  # which experts are chosen is not what their scores say
        tensors = load_file(folder / "model.safetensors")
        random = torch.Generator().manual_seed(3)
        for layer in range(1, LATENT["num_hidden_layers"]):
            tensors[CORRECTION.format(layer)] = 0.2 * torch.randn(8, generator=random)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("latent")
    return {name: save(name, base / name.replace(", ", "-")) for name in FAMILIES}


def tokens(count: int, seed: int = 0) -> list[int]:
    return random_tokens(count, seed, vocabulary=96)


def load(path: Path, blocks: int = 64, block_size: int = 16, **changes: Any) -> NativeDecoder:
    settings = ModelConfig(path, device_type="cpu", **{"threads": 2, "dtype": "float32", **changes})
    model = load_model(settings, Alone(), open_device("cpu", 0))
    assert isinstance(model, NativeDecoder)
    model.make_cache(blocks, block_size)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_parity(folders: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture) -> None:
    check_parity(folders[name], reference(folders[name]), tokens(150), decoded=30)
    assert not [record for record in caplog.records if record.name == "inflight"]


PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "rope_scaling": {"type": "yarn", "mscale": 0.707, "mscale_all_dim": 0.707, "factor": 40},
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "num_attention_heads": 128,
        "num_hidden_layers": 61,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 40},
    },
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite",
        "num_attention_heads": 20,
        "num_hidden_layers": 47,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rope_scaling": None,
    },
}
"""What matters here of published config.json files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    import transformers

    rope = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    settings = {**SIZE, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "max_position_embeddings": 163840, **MIXTURE}
    settings |= PUBLISHED[name] | {"hidden_size": 2560, "num_key_value_heads": PUBLISHED[name]["num_attention_heads"]}
    if settings["rope_scaling"]:
        settings["rope_scaling"] = settings["rope_scaling"] | rope
    described = decoder_config(settings)
    assert described is not None
    assert described.latent is not None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**(settings | {"num_hidden_layers": 1}))
        )
    assert abs(model.model.layers[0].self_attn.scaling / described.scale - 1) < 1e-7
    assert described.latent.rank + described.latent.rotary == 576


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "float32"}, {"kv_cache_dtype": "int8"}])
def test_any_cut_gives_the_same_bits(folders: dict[str, Path], changes: dict[str, Any], isa: str) -> None:
    check_cuts(folders["deepseek_v2"], tokens(90), cpu_isa=isa, **changes)


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_long_contexts(folders: dict[str, Path], quantize: str, isa: str) -> None:
    """Beyond 512 keys a decoding row's chunks are computed apart."""
    prompt = tokens(700)
    model = load(folders["minicpm3"], cpu_isa=isa, dtype="bfloat16", quantize=quantize)
    whole = forward(model, prompt, 0, 0)
    assert np.array_equal(forward(model, prompt[-1:], 699, 0), whole[-1:])
    assert np.array_equal(forward(model, prompt[650:], 650, 0), whole[650:])


def test_fp8(folders: dict[str, Path], tmp_path: Path) -> None:
    """Scales of blocks, in which heads begin and end, as DeepSeek publishes V3: the bits of the floats meant."""
    size = 16
    kinds: dict[str, dict[str, torch.Tensor]] = {"floats": {}, "fp8": {}}
    for name, weight in load_file(folders["deepseek_v3"] / "model.safetensors").items():
        kinds["floats"][name] = kinds["fp8"][name] = weight
        if not name.endswith(("_proj.weight", "_mqa.weight")):
            continue
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -columns % size, 0, -rows % size))
        scales = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).abs().amax((1, 3)) / 448
        each = scales.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
        kinds["fp8"][name] = (weight / each).to(torch.float8_e4m3fn)
        kinds["fp8"][f"{name}_scale_inv"] = scales
        kinds["floats"][name] = kinds["fp8"][name].float() * each
    config = json.loads((folders["deepseek_v3"] / "config.json").read_text())
    given = {"fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [size, size]}}}
    for kind, tensors in kinds.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps(config | given.get(kind, {})))
        save_file(tensors, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
    found, wanted = (forward(load(tmp_path / kind), tokens(40), 0, 0) for kind in ("fp8", "floats"))
    assert np.array_equal(found, wanted)


def test_published_widths(tmp_path: Path) -> None:
    """Keys of 576 numbers, and more heads than a tile has queries, so that tiles begin within a token."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 20, "num_key_value_heads": 20}
    sizes |= {"hidden_size": 60, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    folder, prompt = save("minicpm3", tmp_path / "wide", **sizes, v_head_dim=24, rope_parameters=YARN), tokens(530)
    check_parity(folder, reference(folder), prompt, decoded=5)
    for cache in ("auto", "int8"):
        check_cuts(folder, prompt, cuts=(37,), kv_cache_dtype=cache)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["deepseek_v2", pytest.param("minicpm3", marks=pytest.mark.slow)])
def test_quantised(folders: dict[str, Path], name: str, quantize: str) -> None:
    prompt = tokens(60)
    model = load(folders[name], dtype="bfloat16", quantize=quantize)
    whole = forward(model, prompt, 0, 0)
    parts = [forward(model, prompt[at : at + 9], at, 1) for at in range(0, 60, 9)]
    assert np.array_equal(np.concatenate(parts), whole)
    floats = forward(load(folders[name]), prompt, 0, 0)
    assert np.corrcoef(whole.ravel(), floats.ravel())[0, 1] > (0.95 if quantize == "int8" else 0.5)


def test_the_cache_has_one_copy(folders: dict[str, Path]) -> None:
    """Of a token and a layer: the latent and one rotated key, rounded up to 16 numbers."""
    wide = -(-(LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]) // 16) * 16
    for changes, size in (({"dtype": "float32"}, 4 * wide), ({"dtype": "bfloat16"}, 2 * wide)):
        model = load(folders["deepseek_v2"], **changes)
        assert model.block_bytes(16) == LATENT["num_hidden_layers"] * 16 * size
        assert model.kept().block_bytes == model.block_bytes(16)
    model = load(folders["deepseek_v2"], kv_cache_dtype="int8")
    assert model.block_bytes(16) == LATENT["num_hidden_layers"] * 16 * (wide + 4)


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_blocks_of_any_size(folders: dict[str, Path], cache: str) -> None:
    prompt = tokens(70)
    settings = {"dtype": "bfloat16", "kv_cache_dtype": cache}
    wanted = forward(load(folders["glm4_moe_lite"], **settings), prompt, 0, 0)
    driver_of = {size: load(folders["glm4_moe_lite"], 512 // size, size, **settings) for size in (5, 32)}
    for size, model in driver_of.items():
        assert np.array_equal(forward(model, prompt, 0, 0, block=size), wanted), size


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_blocks_are_copied(folders: dict[str, Path], cache: str) -> None:
    """As the prompt cache does it, into the cache of another process."""
    prompt = tokens(70)
    first, second = (load(folders["deepseek_v3"], dtype="bfloat16", kv_cache_dtype=cache) for _ in range(2))
    whole = forward(first, prompt, 0, 0)
    page = np.empty(first.kept().block_bytes, np.uint8)
    for block in range(4):
        first.kept().read_block(block, page)
        second.kept().write_block(block, page)
    assert np.array_equal(forward(second, prompt[64:], 64, 0), whole[64:])


def with_parts(folder: Path, to: Path) -> Path:
    """The folder with what llama.cpp's converter makes of kv_b_proj: of keys transposed, of values, both by head."""
    shutil.copytree(folder, to)
    config = json.loads((folder / "config.json").read_text())
    heads, plain = config["num_attention_heads"], config["qk_nope_head_dim"]
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".kv_b_proj." not in name:
            parts[name] = tensor
            continue
        keys, values = tensor.reshape(heads, -1, tensor.shape[1]).split([plain, config["v_head_dim"]], 1)
        parts[name.replace("kv_b", "k_b")] = keys.transpose(1, 2).contiguous()
        parts[name.replace("kv_b", "v_b")] = values.contiguous()
    save_file(parts, to / "model.safetensors")
    return to


def metadata_of(folder: Path, architecture: str, *, absorbed: bool) -> dict[str, Any]:
    """What the converter writes. Args: absorbed: sizes of heads are those of the cache."""
    config = json.loads((folder / "config.json").read_text())
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    own = config["qk_nope_head_dim"] + rotary, config["v_head_dim"]
    keys = gguf.Keys
    found: dict[str, Any] = {
        keys.Attention.KV_LORA_RANK: rank,
        keys.Attention.KEY_LENGTH: rank + rotary if absorbed else own[0],
        keys.Rope.DIMENSION_COUNT: rotary,
    }
    if architecture != "minicpm3":
        found[keys.Attention.VALUE_LENGTH] = rank if absorbed else own[1]
    if absorbed:
        found[keys.Attention.HEAD_COUNT_KV] = 1
        found |= {keys.Attention.KEY_LENGTH_MLA: own[0], keys.Attention.VALUE_LENGTH_MLA: own[1]}
    if config["q_lora_rank"]:
        found[keys.Attention.Q_LORA_RANK] = config["q_lora_rank"]
    if architecture == "deepseek2":
        sigmoid = config["model_type"] in ("deepseek_v3", "glm4_moe_lite")
        dense = config.get("first_k_dense_replace", 1)
        found |= {
            keys.LLM.EXPERT_COUNT: config["n_routed_experts"],
            keys.LLM.EXPERT_USED_COUNT: config["num_experts_per_tok"],
            keys.LLM.EXPERT_FEED_FORWARD_LENGTH: config["moe_intermediate_size"],
            keys.LLM.EXPERT_SHARED_COUNT: config["n_shared_experts"],
            keys.LLM.EXPERT_WEIGHTS_SCALE: config["routed_scaling_factor"],
            keys.LLM.LEADING_DENSE_BLOCK_COUNT: dense,
            keys.LLM.EXPERT_WEIGHTS_NORM: sigmoid,
            keys.LLM.EXPERT_GATING_FUNC: 2 if sigmoid else 1,
        }
        if (config.get("n_group") or 1) > 1:
            found[keys.LLM.EXPERT_GROUP_COUNT] = config["n_group"]
            found[keys.LLM.EXPERT_GROUP_USED_COUNT] = config["topk_group"]
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        found[keys.Rope.SCALING_TYPE] = "yarn"
        found[keys.Rope.SCALING_FACTOR] = rope["factor"]
        found[keys.Rope.SCALING_ORIG_CTX_LEN] = rope["original_max_position_embeddings"]
        found[keys.Rope.SCALING_YARN_LOG_MUL] = 0.1 * rope["mscale_all_dim"]
    if rope["rope_type"] == "longrope":
        found[keys.Rope.SCALING_ORIG_CTX_LEN] = rope["original_max_position_embeddings"]
    return {key.format(arch=architecture): value for key, value in found.items()}


def write(name: str, folder: Path, path: Path, *, absorbed: bool, type_of: Any = float32) -> Path:
    source = with_parts(folder, path.with_suffix("")) if absorbed else folder
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    factors = {
        f"rope_factors_{kind}.weight": rope[f"{kind}_factor"] for kind in ("long", "short") if "long_factor" in rope
    }
    architecture = ARCHITECTURES[name]
    metadata = metadata_of(folder, architecture, absorbed=absorbed)
    write_gguf(source, path, architecture, type_of, metadata, factors=factors)
    return path


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_is_the_same_model(
    folders: dict[str, Path], name: str, absorbed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if absorbed and name == "minicpm3":
        pytest.skip("its converter does not split them")
    path = write(name, folders[name], tmp_path / "tiny.gguf", absorbed=absorbed)
    prompt = tokens(60)
    wanted = forward(load(folders[name]), prompt, 0, 0)
    found = forward(load(path), prompt, 0, 0)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert not [record for record in caplog.records if record.name == "inflight"]


def test_a_gguf_files_router_that_is_not_computed(folders: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp divides probabilities of V2's experts by their sum where a file says so; transformers never does."""
    path = tmp_path / "tiny.gguf"
    metadata = metadata_of(folders["deepseek_v2"], "deepseek2", absorbed=False)
    metadata["deepseek2.expert_weights_norm"] = True
    write_gguf(folders["deepseek_v2"], path, "deepseek2", float32, metadata)
    with pytest.raises(StartError, match="expert_weights_norm beside a softmax"):
        load(path)


@pytest.mark.parametrize("absorbed", [True, False])
def test_blocks_of_a_gguf_file(tmp_path: Path, absorbed: bool) -> None:
    """Products of heads are computed at the file's own number of bits where their rows are whole blocks."""
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    folder = save("glm4_moe_lite", tmp_path / "floats", **sizes, q_lora_rank=32)
    type_of = matrices(gguf.GGMLQuantizationType.Q8_0)
    path = write("glm4_moe_lite", folder, tmp_path / "blocks.gguf", absorbed=absorbed, type_of=type_of)
    prompt = tokens(60)
    wanted, model = forward(load(folder), prompt, 0, 0), load(path, dtype="auto")
    found = forward(model, prompt, 0, 0)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99
    parts = [forward(model, prompt[at : at + 9], at, 1) for at in range(0, 60, 9)]
    assert np.array_equal(np.concatenate(parts), found)


def test_packed_weights_are_found_again(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, prompt = folders["deepseek_v3"], tokens(40)
    first = forward(load(folder, quantize="int8", packed_cache=tmp_path), prompt, 0, 0)
    assert np.array_equal(forward(load(folder, quantize="int8", packed_cache=tmp_path), prompt, 0, 0), first)


def test_alone_and_in_a_crowd(folders: dict[str, Path]) -> None:
    """Also where prompts share a prefix that is cached, and where blocks are so few that rows are preempted."""

    def answers(prompts: list[list[int]], **settings: Any) -> list[tuple[list[int], list[float]]]:
        runner = make_runner(folders["glm4_moe_lite"], dtype="bfloat16", block_size=16, **settings)
        driver = Driver(runner)
        ids = [driver.add(prompt, 12, LOGGED) for prompt in prompts]
        driver.drain()
        return [(driver.out[id], driver.logprobs[id]) for id in ids]

    shared = tokens(40, 7)
    prompts = [tokens(count, count) for count in (5, 70, 33)] + [shared + tokens(9, 8), shared + tokens(20, 9)]
    alone = [answers([prompt], kv_cache_bytes=1 << 20)[0] for prompt in prompts]
    assert answers(prompts, kv_cache_bytes=1 << 20) == alone
    block = 3 * 16 * 64 * 2
    assert answers(prompts, kv_cache_bytes=9 * block) == alone


def test_elsewhere_they_run_through_transformers(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        model = open_model(folder)
        assert choose(model, decoder_config(model.config), ModelConfig(folder), 1, "cuda").way == "bridge", name


def test_transformers_tokens_are_the_same(folders: dict[str, Path]) -> None:
    prompts = [[5, 9, 11], [40] * 17]
    folder = folders["minicpm3"]
    assert run(make_runner(folder, cpu_engine="torch"), prompts, 12) == run(make_runner(folder), prompts, 12)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "known are greedy and group_limited_greedy"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v2", {"mlp_bias": True}, "'mlp_bias' beside experts"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "known is sigmoid"),
        ("deepseek_v3", {"kv_lora_rank": "x"}, "'kv_lora_rank' in config.json is 'x'"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("glm4_moe_lite", {"qk_rope_head_dim": 7}, "rotated in pairs"),
        ("minicpm3", {"kv_lora_rank": 1 << 20}, "shape"),
    ],
)
def test_what_is_not_computed_is_refused(
    folders: dict[str, Path], name: str, change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    shutil.copytree(folders[name], tmp_path / "other")
    config = json.loads((folders[name] / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(StartError, match=text):
        load(tmp_path / "other")
