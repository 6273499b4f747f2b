"""Checkpoints: slices, files that are broken, and what is refused unless asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inflight.checkpoint import Slice, open_model
from inflight.errors import StartError
from tests.lm import make_runner, run, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("Llama", tmp_path_factory.mktemp("tiny"))


def copied(source: Path, folder: Path) -> Path:
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def sharded(source: Path, folder: Path) -> Path:
    """The same weights in three files with an index."""
    copied(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    index = {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


PROMPTS = [[5, 9, 11], [40] * 17]


def test_one_file_and_several_are_the_same(tiny: Path, tmp_path: Path) -> None:
    assert run(make_runner(sharded(tiny, tmp_path)), PROMPTS, 20) == run(make_runner(tiny), PROMPTS, 20)


def test_slices(tiny: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    seen: list[float] = []
    with open_model(tiny).weights(seen.append) as checkpoint:
        whole = checkpoint.read(name, (64, 96))
        assert np.array_equal(checkpoint.read(name, (64, 96), Slice(1, 32, 64)), whole[:, 32:64])
        assert np.array_equal(checkpoint.read(name, (64, 96), Slice(0, 10, 20)), whole[10:20])
        checkpoint.release()
        assert np.array_equal(whole, load_file(tiny / "model.safetensors")[name].numpy())
        assert name not in checkpoint.unused()
        assert "model.norm.weight" in checkpoint.unused()
    assert seen == sorted(seen)


LOAD = """
import sys
from pathlib import Path
import torch
from inflight.device import Alone, open_device
from inflight.models import load_model
from tests.lm import job

def anonymous():  # bytes of this process that are no file's: what loading really allocates
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10

folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ranks = Alone()  # loading needs no other rank
ranks.rank, ranks.size = rank, size
torch.ones(9) @ torch.ones(9)
seen = [anonymous()]
what = job(folder, rank=rank, world_size=size)
model = load_model(what.model, ranks, open_device("cpu", 0), lambda _: seen.append(anonymous()))
print(model.weight_bytes, max(seen) - seen[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from /proc")
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_memory_while_loading(rank: int, size: int, tmp_path: Path) -> None:
    """Never more than the rank's share and one tensor, the whole checkpoint being several times that."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    save_tiny("Llama", tmp_path, num_key_value_heads=8, head_dim=64, **wide)
    total = (tmp_path / "model.safetensors").stat().st_size
    largest = 2048 * 512 * 4
    root = Path(__file__).resolve().parents[2]
    # A process of its own: this one's allocator still has memory of earlier tests to give.
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), str(rank), str(size)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    assert total / size * 0.9 < weights < total / size * 1.1
    assert weights * 0.9 < peak < weights + largest + (8 << 20)


def test_a_missing_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    copied(tiny, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(StartError, match=r"tensor 'model\.layers\.1\.self_attn\.k_proj\.weight' is missing"):
        make_runner(tmp_path)


def test_a_tensor_of_another_shape_is_named(tiny: Path, tmp_path: Path) -> None:
    copied(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(StartError, match=r"mlp\..*shape \[.*\], the config wants \["):
        make_runner(tmp_path)


def test_a_file_that_was_cut(tiny: Path, tmp_path: Path) -> None:
    copied(tiny, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(StartError, match=r"model\.safetensors' cannot be read"):
        make_runner(tmp_path)


def test_an_index_that_names_no_file(tiny: Path, tmp_path: Path) -> None:
    sharded(tiny, tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(StartError, match=r"names the file 'model-1\.safetensors', which is not there"):
        make_runner(tmp_path)


def test_pickles_are_refused_unless_asked_for(tiny: Path, tmp_path: Path) -> None:
    copied(tiny, tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StartError, match="pass --allow-pickle"):
        make_runner(tmp_path)
    assert run(make_runner(tmp_path, allow_pickle=True), PROMPTS, 5) == run(make_runner(tiny), PROMPTS, 5)


def test_code_of_the_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    copied(tiny, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}))
    with pytest.raises(StartError, match="--trust-remote-code"):
        make_runner(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"no config\.json"),
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"model_type": "llama"}', "has no"),
    ],
)
def test_configs_that_cannot_be_used(content: str | None, text: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(StartError, match=text):
        make_runner(tmp_path)


def test_no_weights_at_all(tiny: Path, tmp_path: Path) -> None:
    copied(tiny, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StartError, match=r"no model\.safetensors"):
        make_runner(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(tiny: Path, dtype: str) -> None:
    runner = make_runner(tiny, dtype=dtype)
    assert runner.offer.model.dtype == dtype
    assert len(run(runner, PROMPTS, 8)[1]) == 8
    with pytest.raises(StartError, match="dtype 'int4' is not supported"):
        make_runner(tiny, dtype="int4")


def test_a_cache_that_is_too_small_or_too_large(tiny: Path) -> None:
    with pytest.raises(StartError, match="raise --kv-cache-memory"):
        make_runner(tiny, kv_cache_bytes=100)
    with pytest.raises(StartError, match="lower it"):
        make_runner(tiny, kv_cache_bytes=1 << 50, max_rows=1 << 40)
