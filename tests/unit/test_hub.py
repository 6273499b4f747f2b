"""How models of the hub are written, and which files of a repository are needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inflight.commands.options import UsageError, resolve
from inflight.commands.serve import COMMAND, build_plan
from inflight.errors import ConfigError, StartError
from inflight.hub import HubModel, hint, locate, parse
from inflight.hub.choose import Choice, Wanted, choose

QWEN = HubModel("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Qwen/Qwen3-0.6B", QWEN),
        ("hf.co/Qwen/Qwen3-0.6B", QWEN),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/", QWEN),
        ("hf://Qwen/Qwen3-0.6B", QWEN),
        ("Qwen/Qwen3-0.6B-GGUF:Q4_K_M", HubModel("Qwen/Qwen3-0.6B-GGUF", "Q4_K_M")),
        ("hf.co/Qwen/Qwen3-0.6B-GGUF:Q8_0@v1.0", HubModel("Qwen/Qwen3-0.6B-GGUF", "Q8_0", "v1.0")),
        ("org/name:some/file.gguf", HubModel("org/name", "some/file.gguf")),
        ("org/name@refs/pr/3", HubModel("org/name", "", "refs/pr/3")),
        ("https://huggingface.co/org/name/tree/dev", HubModel("org/name", "", "dev")),
        ("https://huggingface.co/org/name/blob/main/a-Q4_0.gguf", HubModel("org/name", "a-Q4_0.gguf", "main")),
        ("hf.co/gpt2", HubModel("gpt2")),
        ("gpt2", None),
        ("./org/name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org/name:", None),
        ("org/--name", None),
        ("org/a--b", None),
        ("org/a..b", None),
        ("org/name.git", None),
        (f"org/{'x' * 100}", None),
        ("org/näme", None),
        ("", None),
    ],
)
def test_what_people_write(text: str, found: HubModel | None) -> None:
    assert parse(text) == found
    if found is not None:
        assert parse(str(found)) == found


def test_an_address_that_is_none() -> None:
    for text in ("hf.co/", "hf.co/a/b/c", "https://huggingface.co/datasets/org/name", "hf.co/org/name:"):
        with pytest.raises(ConfigError, match=r"hf\.co/org/name"):
            parse(text)


def test_a_path_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "pocket").mkdir(parents=True)
    assert locate("models/pocket") == Path("models/pocket")
    assert locate("other/pocket") == HubModel("other/pocket")
    assert locate("other/pocket", revision="v1", cache="c") == HubModel("other/pocket", "", "v1", "c")
    # Where the folder exists, the rest is mistyped; the hub is asked when it is named.
    assert locate("models/pockett") == Path("models/pockett")
    assert hint("models/pockett") == "for the model of the hub write hf.co/models/pockett"
    assert locate("hf.co/models/pocket") == HubModel("models/pocket")
    assert locate(Path("other/pocket")) == Path("other/pocket")
    for path in ("pocket", "./other/pocket", "other/model.onnx", "other/a.gguf", "/other/pocket", "a/b/c"):
        assert locate(path) == Path(path)
    assert locate("gpt2", bare=True) == HubModel("gpt2")
    assert locate("other/pocket", tmp_path / "models") == HubModel("other/pocket")
    assert locate("pocket", tmp_path / "models") == tmp_path / "models" / "pocket"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            "pockett",
            "does not exist; give a model file, a servable, a directory of servables or a language model; a model",
        ),
        ("./toy/none", "does not exist; "),
        ("models/pockett", "for the model of the hub write hf.co/models/pockett"),
        ("hf.co/a/b/c", "'hf.co/a/b/c' is no model of the hub"),
    ],
)
def test_a_path_that_is_not_there(given: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(text)):
        build_plan(resolve(COMMAND, {"paths": [given]}, {}))


def test_the_options_of_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"paths": ["org/name:Q8_0", "org/other@v2"], "revision": "v1", "lora_adapters": "a/b@v3,red=a/c"}
    first, second = build_plan(resolve(COMMAND, given, {})).generators
    assert (first.name, first.model_id, first.hub) == ("name", "org/name:Q8_0", HubModel("org/name", "Q8_0", "v1"))
    assert second.hub == HubModel("org/other", "", "v2")
    assert [(one.name, one.hub) for one in first.model.adapters] == [
        ("a/b", HubModel("a/b", "", "v3")),
        ("red", HubModel("a/c")),
    ]


SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
REST = [
    *("README.md", ".gitattributes", "LICENSE", "LICENSE.txt", "USE_POLICY.md", "trainer_state.json", "code.py"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.onnx", "onnx/model.onnx", "onnx/config.json"),
    *("original/consolidated.00.pth", "original/params.json", "consolidated.safetensors", "tf_model.h5", "a.png"),
    *("adapter_model.safetensors", "runs/events.out", "openvino/openvino_model.xml", "rust_model.ot"),
]


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        (["model.safetensors"], []),
        ([f"model-0000{part}-of-00002.safetensors" for part in (1, 2)], ["model.safetensors.index.json"]),
        (["weights.safetensors"], []),
        (["model.safetensors"], ["modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "vocab.txt"]),
        (["model.safetensors"], ["additional_chat_templates/tool_use.jinja", "tokenizer.model", "merges.txt"]),
    ],
)
def test_files_of_a_folder(weights: list[str], more: list[str]) -> None:
    found = choose("org/name", [*REST, *SMALL, *more, *weights], Wanted())
    assert sorted(found.files) == sorted([*SMALL, *more, *weights])
    assert found.gguf == "" == found.said


def test_all_weights_in_the_folders_of_modules() -> None:
    names = ["modules.json", "0_Transformer/config.json", "0_Transformer/model.safetensors", "1_Pooling/config.json"]
    assert sorted(choose("o/n", [*names, "onnx/model.onnx"], Wanted()).files) == sorted(names)


def test_code_and_pickle_are_asked_for() -> None:
    names = ["config.json", "model.safetensors", "modeling_x.py", "pytorch_model.bin"]
    assert "modeling_x.py" in choose("o/n", names, Wanted(code=True)).files
    pickled = ["config.json", "pytorch_model.bin"]
    assert choose("o/n", pickled, Wanted(pickle=True)) == Choice(("config.json", "pytorch_model.bin"))
    with pytest.raises(StartError, match="--allow-pickle"):
        choose("o/n", pickled, Wanted())


def test_an_adapter() -> None:
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "adapter_model.bin"]
    assert choose("o/n", names, Wanted(adapter=True)).files == ("adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(StartError, match="--lora-adapters o/n"):
        choose("o/n", names, Wanted())
    with pytest.raises(StartError, match=r"holds no adapter_config\.json"):
        choose("o/n", ["config.json"], Wanted(adapter=True))
    with pytest.raises(StartError, match=r"adapter_model\.safetensors"):
        choose("o/n", ["adapter_config.json", "adapter_model.bin"], Wanted(adapter=True))


def files(*kinds: str) -> list[str]:
    return [f"model-{kind}.gguf" for kind in kinds]


@pytest.mark.parametrize(
    ("kinds", "taken"),
    [
        (("Q2_K", "Q4_K_M", "Q8_0", "F16"), "Q4_K_M"),
        (("q3_k_m", "q5_k_m", "q8_0", "q4_0"), "q4_0"),
        (("Q2_K", "Q3_K_L", "Q5_K_M", "Q8_0"), "Q5_K_M"),
        (("UD-IQ1_S", "UD-Q4_K_XL", "Q4_K_S"), "UD-Q4_K_XL"),
        (("UD-Q4_K_M", "Q4_K_M"), "Q4_K_M"),
        (("Q3_K_M", "BF16"), "Q3_K_M"),
        (("IQ2_XXS", "F16"), "F16"),
        (("BF16", "something"), "BF16"),
    ],
)
def test_the_quantisation_that_nobody_named(kinds: tuple[str, ...], taken: str) -> None:
    found = choose("o/n", [*files(*kinds), "README.md", "mmproj-model-F16.gguf", "imatrix_unsloth.gguf"], Wanted())
    assert found.files == (f"model-{taken}.gguf", "mmproj-model-F16.gguf")
    assert found.gguf == found.files[0]
    assert found.said.startswith(f"o/n: taking {taken.upper()} of ")
    assert all(kind.upper() in found.said for kind in kinds if kind != "something")


def test_the_only_file_is_taken_without_a_word() -> None:
    assert choose("o/n", ["model.gguf", "imatrix.gguf"], Wanted()) == Choice(("model.gguf",), "model.gguf")


@pytest.mark.parametrize(
    ("model", "others", "taken"),
    [
        ("m-Q4_K_M.gguf", ["mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"], "mmproj-BF16.gguf"),
        ("m-Q4_K_M.gguf", ["mmproj-m-Q8_0.gguf", "mmproj-m-f16.gguf"], "mmproj-m-Q8_0.gguf"),
        ("m-F16.gguf", ["mmproj-m-Q8_0.gguf", "mmproj-m-f16.gguf"], "mmproj-m-f16.gguf"),
        ("Q8_0/m-Q8_0.gguf", ["mmproj-F16.gguf"], "mmproj-F16.gguf"),
        (
            "Q8_0/m-Q8_0.gguf",
            ["mmproj-Q8_0.gguf", "Q8_0/mmproj-F16.gguf", "F16/mmproj-Q8_0.gguf"],
            "Q8_0/mmproj-F16.gguf",
        ),
        ("m-Q8_0.gguf", ["m.mmproj-F16.gguf"], "m.mmproj-F16.gguf"),
        ("m-Q8_0.gguf", ["F16/mmproj-F16.gguf", "README.md"], None),
    ],
)
def test_the_vision_part_beside_a_gguf_file(model: str, others: list[str], taken: str | None) -> None:
    """That which llama.cpp takes."""
    found = choose("o/n", [model, *others], Wanted())
    assert found == Choice((model,) if taken is None else (model, taken), model)


def test_a_quantisation_by_name() -> None:
    names = ["config.json", *files("Q4_K_M", "Q8_0", "UD-Q2_K_XL", "fp16")]
    for wanted, file in (("q8_0", "Q8_0"), ("Q2_K_XL", "UD-Q2_K_XL"), ("F16", "fp16"), ("model-Q4_K_M.gguf", "Q4_K_M")):
        assert choose("o/n", names, Wanted(wanted)) == Choice((f"model-{file}.gguf",), f"model-{file}.gguf")
    with pytest.raises(StartError, match="'o/n' has no Q5_K_M; it has Q4_K_M, Q8_0, F16, UD-Q2_K_XL"):
        choose("o/n", names, Wanted("Q5_K_M"))
    with pytest.raises(StartError, match=r"no file 'x\.gguf'; it has model-"):
        choose("o/n", names, Wanted("x.gguf"))
    with pytest.raises(StartError, match="no GGUF files"):
        choose("o/n", ["config.json", "model.safetensors"], Wanted("Q4_K_M"))


def test_all_parts_of_a_split_file() -> None:
    parts = [f"Q4_K_M/model-Q4_K_M-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    others = ["Q8_0/model-Q8_0-00001-of-00002.gguf", "Q8_0/model-Q8_0-00002-of-00002.gguf", "model-Q2_K.gguf"]
    assert choose("o/n", [*others, *reversed(parts)], Wanted("Q4_K_M")) == Choice(tuple(parts), parts[0])
    assert choose("o/n", [*others, *parts], Wanted("model-Q4_K_M-00001-of-00003.gguf")).files == tuple(parts)
    assert choose("o/n", [*others, *parts], Wanted()).files == tuple(parts)
    with pytest.raises(StartError, match="3 parts belong together and 2 are there"):
        choose("o/n", [*others, *parts[1:]], Wanted("Q4_K_M"))


def test_several_models_in_one_repository() -> None:
    names = ["small-Q4_K_M.gguf", "large-Q4_K_M.gguf"]
    with pytest.raises(StartError, match=r"several files of Q4_K_M: large-Q4_K_M\.gguf, small-Q4_K_M\.gguf"):
        choose("o/n", names, Wanted())
    assert choose("o/n", names, Wanted("small-Q4_K_M.gguf")).gguf == "small-Q4_K_M.gguf"


def test_nothing_to_serve() -> None:
    with pytest.raises(StartError, match=r"no safetensors and no GGUF file; it has README\.md, data\.csv"):
        choose("o/n", ["data.csv", "README.md"], Wanted())
    with pytest.raises(StartError, match="it has nothing"):
        choose("o/n", [], Wanted())
