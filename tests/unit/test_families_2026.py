"""Ministral 3, OLMo 2 and 3, Hunyuan, Apertus and Cohere 2 on the CPU engine, and Qwen3-Next from GGUF: against
transformers, bit for bit against themselves, from a folder and from a GGUF file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inflight.checkpoint import open_model
from inflight.config import ModelConfig
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.kernels import native_reason
from inflight.models import load_model
from inflight.models.config import decoder_config
from inflight.models.decoder import Decoder
from inflight.models.load import choose
from inflight.models.native import NativeDecoder
from tests.gguf_files import write_gguf
from tests.lm import make_runner, run, save_tiny
from tests.recurrent import EXPERTS, forward, save_recurrent
from tests.unit.test_parallel import COUNT, PROMPTS, tokens_of

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GROWING = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.4, "llama_4_scaling_beta": 0.7}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
BY_TYPE = {
    "full_attention": {**YARN, "attention_factor": 1.3},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
WINDOWS = {"sliding_window": 20, "num_hidden_layers": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral3": ("Ministral3", {"head_dim": 24, "rope_parameters": GROWING}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {**WINDOWS, "rope_parameters": BY_TYPE}),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 24, "rope_parameters": ALPHA}),
    "apertus": ("Apertus", {"rope_parameters": LLAMA3}),
    "cohere2": ("Cohere2", {**WINDOWS, "logit_scale": 0.3, "hidden_size": 72}),
}
SWA = "attention.sliding_window"


def llama3_factors(dim: int) -> list[float]:
    """What llama.cpp's converter writes as `rope_freqs`."""
    waves = 2 * math.pi * 10000.0 ** (np.arange(0, dim, 2) / dim)
    smooth = ((64 / waves - 1) / 3).clip(0, 1)
    return [float(1 / ((1 - each) / 8 + each)) for each in smooth]


def metadata_of(name: str, folder: Path) -> tuple[str, dict[str, Any], dict[str, list[float]]]:
    """The architecture, the metadata that llama.cpp's converter adds, and factors of frequencies."""
    arch = {"olmo3": "olmo2", "hunyuan": "hunyuan-dense", "ministral3": "mistral3"}.get(name, name)
    scaled = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32}
    pattern = {SWA: 20, f"{SWA}_pattern": [True, True, True, False]}
    own: dict[str, dict[str, Any]] = {
        "ministral3": {
            **{f"rope.{key}": value for key, value in scaled.items()},
            "rope.scaling.yarn_log_multiplier": 0.4,
            "attention.temperature_scale": 0.7,
        },
        "olmo3": {
            **{f"rope.{key}": value for key, value in scaled.items()},
            "rope.scaling.yarn_attn_factor": 1.3,
            "rope.freq_base_swa": 10000.0,
            **pattern,
        },
        "hunyuan": {"rope.freq_base": 10000.0 * 50.0 ** (24 / 22), "rope.scaling.type": "none"},
        "cohere2": {SWA: 20, "logit_scale": 0.3, "rope.dimension_count": 18, "rope.scaling.type": "none"},
    }
    metadata = {f"{arch}.{key}": value for key, value in own.get(name, {}).items()}
    if name == "apertus":
        tensors = load_file(folder / "model.safetensors")
        for key in ("alpha_p", "alpha_n", "beta", "eps"):
            stored = [tensors[f"model.layers.{layer}.mlp.act_fn.{key}"].item() for layer in range(2)]
            metadata[f"xielu.{key}"] = stored
    return arch, metadata, {"rope_freqs.weight": llama3_factors(16)} if name == "apertus" else {}


def save(name: str, folder: Path) -> Path:
    family, settings = FAMILIES[name]
    save_tiny(family, folder, **settings)
    if name == "apertus":  # each layer's activation is another one
        file = folder / "model.safetensors"
        tensors = load_file(file)
        random = torch.Generator().manual_seed(3)
        for key, values in tensors.items():
            if ".alpha_" in key:
                tensors[key] = values + torch.randn(1, generator=random)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {name: save(name, base / name) for name in FAMILIES}


def load(path: Path, **changes: Any) -> NativeDecoder:
    settings = ModelConfig(path, device_type="cpu", **{"threads": 2, "dtype": "float32", **changes})
    model = load_model(settings, Alone(), open_device("cpu", 0))
    assert isinstance(model, NativeDecoder)
    model.make_cache(64, 16)
    if model.state_bytes:
        model.make_states(2)
    return model


def tokens(count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(3, 96, count)]


def reference(folder: Path, prompt: list[int], kind: str = "AutoModelForCausalLM") -> np.ndarray:
    """All logits of a prompt in transformers."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: np.ndarray = model(torch.tensor([prompt])).logits[0].numpy()
        return found


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_parity(folders: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture) -> None:
    prompt = tokens(150)
    wanted = reference(folders[name], prompt)
    model = load(folders[name])
    prefill = forward(model, prompt[:120], 0, 0)
    decoded = [forward(model, [token], 120 + index, 0) for index, token in enumerate(prompt[120:])]
    assert apart(np.concatenate([prefill, *decoded]), wanted) < 1e-4
    assert not [record for record in caplog.records if record.name == "inflight"]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_cut_gives_the_same_bits(folders: dict[str, Path], name: str) -> None:
    prompt = tokens(70)
    model = load(folders[name], dtype="bfloat16")
    whole = forward(model, prompt, 0, 0)
    for cut in (1, 7):
        parts = [forward(model, prompt[at : at + cut], at, 0) for at in range(0, len(prompt), cut)]
        assert np.array_equal(np.concatenate(parts), whole), cut
    assert np.array_equal(forward(load(folders[name], dtype="bfloat16", threads=1), prompt, 0, 0), whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_is_the_same_model(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    arch, metadata, factors = metadata_of(name, folders[name])
    write_gguf(folders[name], tmp_path / "tiny.gguf", arch, metadata=metadata, factors=factors)
    prompt = tokens(150)
    wanted = forward(load(folders[name]), prompt, 0, 0)
    assert apart(forward(load(tmp_path / "tiny.gguf"), prompt, 0, 0), wanted) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_in_integers(folders: dict[str, Path], name: str) -> None:
    prompt = tokens(60)
    wanted = forward(load(folders[name]), prompt, 0, 0)
    found = forward(load(folders[name], quantize="int8"), prompt, 0, 0)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("name", FAMILIES)
def test_on_torchs_operators(folders: dict[str, Path], name: str) -> None:
    """They have all parts: other devices and several ranks compute these families."""
    settings = ModelConfig(folders[name], device_type="cpu", dtype="float32", cpu_engine="torch")
    model = load_model(settings, Alone(), open_device("cpu", 0))
    assert isinstance(model, Decoder)
    model.make_cache(16, 16)
    prompt = tokens(90)
    assert apart(forward(model, prompt, 0, 0), forward(load(folders[name]), prompt, 0, 0)) < 1e-4


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("olmo3", 2), ("olmo3", 4), ("cohere2", 2), ("apertus", 2))
    ],
)
def test_ranks(folders: dict[str, Path], name: str, size: int) -> None:
    """Norms over all heads need all ranks; of four ranks two have the same key head. `test_parallel` has Olmo 3 on
    two, in short."""
    alone = run(make_runner(folders[name], cpu_engine="torch"), PROMPTS, COUNT)
    assert tokens_of({name: folders[name]}, size) == [alone]


def test_ministral_3_within_a_model_that_reads_images(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    text = {**json.loads((save("ministral3", tmp_path / "text") / "config.json").read_text())}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "image_size": 32, "patch_size": 8, "head_dim": 16}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=95)
    model = transformers.Mistral3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "whole")
    prompt = [token % 90 for token in tokens(100)]
    wanted = reference(tmp_path / "whole", prompt, "AutoModelForImageTextToText")
    assert apart(forward(load(tmp_path / "whole"), prompt, 0, 0), wanted) < 1e-4


REFUSED = {
    "experts": ("hunyuan", {"num_experts": 8}, "num_experts"),
    "keys of others": ("hunyuan", {"use_cla": True}, "use_cla"),
    "norms elsewhere": ("apertus", {"post_norm": True}, "post_norm"),
    "no parallel block": ("cohere2", {"use_parallel_block": False}, "use_parallel_block"),
    "a turned part": ("cohere2", {"rotary_pct": 0.5}, "rotary_pct"),
    "no original length": (
        "ministral3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
        "original_max_position_embeddings",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_told(folders: dict[str, Path], case: str) -> None:
    name, changes, told = REFUSED[case]
    config = json.loads((folders[name] / "config.json").read_text())
    assert decoder_config(config) is not None
    with pytest.raises(StartError, match=told):
        decoder_config({**config, **changes})


def test_other_scalings_and_activations(folders: dict[str, Path]) -> None:
    """An unknown scaling is refused; an activation that the engine lacks runs through transformers."""
    config = json.loads((folders["hunyuan"] / "config.json").read_text())
    odd = decoder_config({**config, "rope_parameters": {"rope_type": "xdrope", "rope_theta": 1e4}})
    assert odd is not None
    folder = folders["hunyuan"].parent / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "xdrope"}}))
    (folder / "model.safetensors").write_bytes((folders["hunyuan"] / "model.safetensors").read_bytes())
    with pytest.raises(StartError, match="rope type 'xdrope' is unknown"):
        load(folder)
    for name, act in (("cohere2", "xielu"), ("apertus", "mish")):
        model = open_model(folders[name])
        described = decoder_config({**model.config, "hidden_act": act})
        assert choose(model, described, ModelConfig(folders[name]), 1, "cpu").way == "bridge"


NEXT = {
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
}


def write_next(folder: Path, path: Path, legacy: bool) -> None:
    """What llama.cpp's converter makes of a Qwen3-Next checkpoint. Args: legacy: as its first versions."""
    config = json.loads((folder / "config.json").read_text())
    layers, keys, values = (
        config[f"{key}"] for key in ("num_hidden_layers", "linear_num_key_heads", "linear_num_value_heads")
    )
    dims = config["linear_key_head_dim"], config["linear_value_head_dim"]
    writer = gguf.GGUFWriter(path, "qwen3next")
    sizes = {
        "block_count": layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "rope.dimension_count": int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]),
        "full_attention_interval": 2,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": dims[0],
        "ssm.group_count": keys,
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * dims[1],
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }
    for key, value in sizes.items():
        writer.add_uint32(f"qwen3next.{key}", value)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3NEXT, layers)
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items(), key=lambda item: _order(item[0])):
        data = tensor.numpy()
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            data = data + np.float32(1)
        if name.endswith("A_log"):
            data = -np.exp(data)
        if "conv1d" in name:
            data = data[:, 0]
        if name.endswith("shared_expert_gate.weight"):
            data = data[0]
        if ".experts." in name:
            stem, _, rest = name.partition(".experts.")
            experts.setdefault(f"{stem}.experts.{rest.partition('.')[2]}", []).append(data)
            continue
        if name.endswith("in_proj_qkvz.weight") and not legacy:
            shared = values // keys
            heads = data.reshape(keys, -1, data.shape[1])
            parts = np.split(heads, np.cumsum([dims[0], dims[0], shared * dims[1]]), axis=1)
            flat = [part.reshape(-1, data.shape[1]) for part in parts]
            layer = name.split(".")[2]
            writer.add_tensor(f"blk.{layer}.attn_qkv.weight", np.concatenate(flat[:3]))
            writer.add_tensor(f"blk.{layer}.attn_gate.weight", flat[3])
            continue
        stem, _, kind = name.replace(".dt_bias", ".dt_proj.bias").rpartition(".")
        found = names.get_name(name if name.endswith("A_log") else stem)
        assert found is not None, name
        writer.add_tensor(found if name.endswith("A_log") else f"{found}.{kind}", np.ascontiguousarray(data))
    for name, all_ in experts.items():
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", np.stack(all_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _order(name: str) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in name.split(".")]


@pytest.mark.parametrize("legacy", [False, True])
def test_qwen3_next_from_gguf(tmp_path: Path, legacy: bool) -> None:
    save_recurrent("Qwen3Next", tmp_path, **EXPERTS)
    write_next(tmp_path, tmp_path / "tiny.gguf", legacy)
    prompt = tokens(100)
    wanted = forward(load(tmp_path), prompt, 0, 0)
    assert apart(forward(load(tmp_path / "tiny.gguf"), prompt, 0, 0), wanted) < 1e-5
