"""MindIR files as MindSpore 2.10 and 2.0 exported them, with the outputs that MindSpore itself gave."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from inflight.errors import StartError
from inflight.proto import mind_ir_reader_pb2 as pb
from inflight.runtime import LoadedModel, LoadRequest, mindir
from inflight.runtime.mindir import MindIRRuntime
from tests.unit.mindir_builder import Builder

DATA = Path(__file__).parents[1] / "data" / "mindir"
KEY = b"0123456789ABCDEF"
MODES = {"gcm": "AES-GCM", "cbc": "AES-CBC", "sm4": "SM4-CBC"}
PLAIN = sorted(
    str(path.relative_to(DATA).with_suffix(""))
    for path in DATA.rglob("*.mindir")
    if "_enc_" not in path.name and path.stem not in ("lstm", "control_flow", "tp_rank0", "tp_rank1")
)
ENCRYPTED = {
    "matmul_enc_aes_gcm": "AES-GCM",
    "matmul_enc_aes_cbc": "AES-CBC",
    "matmul_enc_sm4_cbc": "SM4-CBC",
    "ms200/matmul_enc_aes_gcm": "AES-GCM",
}


def load(*files: Path, key: bytes | None = None, mode: str = "AES-GCM") -> LoadedModel:
    return MindIRRuntime.load(LoadRequest(files=files, device_type="cpu", dec_key=key, dec_mode=mode))


def recorded(name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    with np.load(DATA / f"{name}.npz") as stored:
        values = dict(stored)
    inputs = [values[f"in{index}"] for index in range(sum(key.startswith("in") for key in values))]
    outputs = [values[f"out{index}"] for index in range(sum(key.startswith("out") for key in values))]
    return inputs, outputs


def check_recorded(model: LoadedModel, name: str, subgraph: int = 0) -> None:
    inputs, expected = recorded(name)
    outputs = model.run(inputs, subgraph)
    assert len(outputs) == len(expected) == len(model.graphs[subgraph].outputs)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype == wanted.dtype
        np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-5)


def test_there_are_files() -> None:
    assert len(PLAIN) >= 16
    assert any(name.startswith("ms200/") for name in PLAIN)


@pytest.mark.parametrize("name", PLAIN)
def test_outputs_equal_those_of_mindspore(name: str) -> None:
    check_recorded(load(DATA / f"{name}.mindir"), name)


@pytest.mark.parametrize("name", ENCRYPTED)
def test_encrypted_files(name: str) -> None:
    check_recorded(load(DATA / f"{name}.mindir", key=KEY, mode=ENCRYPTED[name]), name)


def test_a_fixed_batch_stays_fixed_and_an_open_one_open() -> None:
    fixed = load(DATA / "lenet_b32.mindir").graphs[0]
    assert fixed.inputs[0].shape == (32, 1, 32, 32)
    assert fixed.outputs[0].shape == (32, 10)
    model = load(DATA / "lenet_dyn.mindir")
    assert model.graphs[0].inputs[0].shape == (-1, 1, 32, 32)
    assert model.graphs[0].outputs[0].shape == (-1, 10)
    images = recorded("lenet_b32")[0][0]
    whole = model.run([images])[0]
    np.testing.assert_allclose(whole[:5], model.run([images[:5]])[0], rtol=1e-4, atol=1e-6)


def test_names_are_short_and_distinct(tmp_path: Path) -> None:
    graph = load(DATA / "bert_tiny.mindir").graphs[0]
    assert [spec.name for spec in graph.inputs] == ["ids", "mask", "tt"]
    assert [spec.dtype for spec in graph.inputs] == ["int32"] * 3
    assert [spec.name for spec in graph.outputs] == ["output_0", "output_1"]
    builder = Builder()
    x, y = (builder.input("float32", (2,), name=f"{prefix}:x") for prefix in ("a", "b"))
    z = builder.input("float32", (2,), name="output_0")
    builder.output(builder.call("Add", builder.call("Sub", x, y), z))
    model = load(builder.write(tmp_path / "same.mindir"))
    assert [spec.name for spec in model.graphs[0].inputs] == ["x", "x_1", "output_0"]
    inputs = [np.array(values, np.float32) for values in ([5, 6], [1, 1], [0, 10])]
    np.testing.assert_array_equal(model.run(inputs)[0], [4, 15])


def test_several_files_are_subgraphs() -> None:
    model = load(DATA / "lenet_b1.mindir", DATA / "matmul_b4.mindir")
    assert len(model.graphs) == 2
    check_recorded(model, "lenet_b1", 0)
    check_recorded(model, "matmul_b4", 1)


def test_an_input_or_a_weight_may_be_an_output(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.input("float32", (2,))
    weight = builder.parameter(np.array([1, 2], np.float32))
    builder.output(builder.call("MakeTuple", x, weight, x))
    model = load(builder.write(tmp_path / "m.mindir"))
    data = np.array([3, 4], np.float32)
    assert [output.tolist() for output in model.run([data])] == [[3, 4], [1, 2], [3, 4]]


def with_external_weights(folder: Path, location: str = "m_variables/data_0") -> Path:
    """The fixed LeNet, its weights moved to a second file, as large exports have it."""
    model = pb.Model.FromString((DATA / "lenet_b1.mindir").read_bytes())
    blob = bytearray(64)
    for parameter in model.graph.parameter:
        raw = parameter.raw_data
        parameter.ClearField("raw_data")
        parameter.external_data.location = location
        parameter.external_data.offset, parameter.external_data.length = len(blob), len(raw)
        blob += raw
    target = folder / location
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(bytes(blob))
    file = folder / "m_graph.mindir"
    file.write_bytes(model.SerializeToString())
    return file


def test_external_weights(tmp_path: Path) -> None:
    check_recorded(load(with_external_weights(tmp_path)), "lenet_b1")


def test_external_weights_must_lie_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    with pytest.raises(StartError, match="outside of its own folder"):
        load(with_external_weights(tmp_path / "inside", "../data_0"))
    with pytest.raises(StartError, match="outside of its own folder"):
        load(with_external_weights(tmp_path / "inside", str(tmp_path / "data_0")))


def test_external_weights_that_are_gone_or_short(tmp_path: Path) -> None:
    file = with_external_weights(tmp_path)
    weights = tmp_path / "m_variables" / "data_0"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4])
    with pytest.raises(StartError, match="too short"):
        load(file)
    weights.unlink()
    with pytest.raises(StartError, match="cannot be read"):
        load(file)


def test_external_weights_may_be_encrypted_too(tmp_path: Path) -> None:
    file = with_external_weights(tmp_path)
    for path in (file, tmp_path / "m_variables" / "data_0"):
        path.write_bytes(encrypt(path.read_bytes(), KEY, "AES-GCM"))
    check_recorded(load(file, key=KEY), "lenet_b1")


def test_a_model_too_large_for_one_protobuf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such a model passes through files; none of them is left."""
    monkeypatch.setattr(mindir, "_INLINE_LIMIT", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load(DATA / "bert_tiny.mindir", DATA / "lenet_b1.mindir")
    assert not list(tmp_path.iterdir())
    check_recorded(model, "bert_tiny", 0)
    check_recorded(model, "lenet_b1", 1)


def encrypt(data: bytes, key: bytes, mode: str, block: int = 64 << 20) -> bytes:
    """As MindSpore writes it, with blocks of any size."""
    magic = {"AES-GCM": 0x7F3A5ED8, "AES-CBC": 0x7F3A5ED9, "SM4-CBC": 0x7F3A5EDA}[mode]
    iv = bytes(range(16))
    parts = []
    for start in range(0, len(data), block):
        plain = data[start : start + block]
        tag = b""
        if mode == "AES-GCM":
            context = Cipher(algorithms.AES(key), modes.GCM(iv[:12])).encryptor()
            cipher = context.update(plain) + context.finalize()
            tag = context.tag
        else:
            algorithm = algorithms.AES(key) if mode == "AES-CBC" else algorithms.SM4(key)
            padder = PKCS7(128).padder()
            chained = Cipher(algorithm, modes.CBC(iv)).encryptor()
            cipher = chained.update(padder.update(plain) + padder.finalize()) + chained.finalize()
        body = struct.pack("<I", 16) + iv + struct.pack("<I", len(cipher)) + cipher
        parts.append(struct.pack("<I", magic) + tag + struct.pack("<I", len(body)) + body)
    return b"".join(parts)


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
@pytest.mark.parametrize("length", [16, 24, 32])
def test_files_of_many_blocks(tmp_path: Path, mode: str, length: int) -> None:
    key = bytes(range(100, 100 + length))
    file = tmp_path / "m.mindir"
    file.write_bytes(
        encrypt((DATA / "add.mindir").read_bytes(), key[:16] if mode == "SM4-CBC" else key, mode, block=100)
    )
    if mode == "SM4-CBC" and length != 16:
        with pytest.raises(StartError, match="SM4-CBC takes 16"):
            load(file, key=key, mode=mode)
        return
    check_recorded(load(file, key=key, mode=mode.lower()), "add")


ENC = DATA / "matmul_enc_aes_gcm.mindir"


@pytest.mark.parametrize(
    ("file", "key", "mode", "text"),
    [
        (ENC, None, "AES-GCM", r"encrypted with AES-GCM: give its key as dec_key"),
        (ENC, KEY, "AES-CBC", r"use dec_mode='AES-GCM'"),
        (ENC, KEY[::-1], "AES-GCM", r"not the key it was exported with"),
        (ENC, b"short", "AES-GCM", r"dec_key has 5 bytes: AES-GCM takes 16 or 24 or 32"),
        (DATA / "matmul_enc_aes_cbc.mindir", KEY[::-1], "AES-CBC", r"not the key it was exported with"),
        (DATA / "matmul_enc_sm4_cbc.mindir", KEY[::-1], "SM4-CBC", r"not the key it was exported with"),
        (DATA / "matmul_b4.mindir", KEY, "AES-GCM", r"is not encrypted: start the servable without dec_key"),
    ],
)
def test_wrong_keys_and_modes(file: Path, key: bytes | None, mode: str, text: str) -> None:
    with pytest.raises(StartError, match=text):
        load(file, key=key, mode=mode)


@pytest.mark.parametrize("name", ["lenet_b1", "matmul_enc_aes_gcm", "matmul_enc_aes_cbc"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.97, 0.9999])
def test_truncated_files(tmp_path: Path, name: str, share: float) -> None:
    data = (DATA / f"{name}.mindir").read_bytes()
    file = tmp_path / "cut.mindir"
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(StartError, match=r"Load model failed"):
        load(file, key=KEY if "enc" in name else None, mode=MODES[name[-3:]] if "enc" in name else "AES-GCM")


def test_a_block_that_claims_more_than_there_is(tmp_path: Path) -> None:
    data = bytearray(ENC.read_bytes())
    data[20:24] = b"\xff\xff\xff\xff"
    file = tmp_path / "huge.mindir"
    file.write_bytes(bytes(data))
    with pytest.raises(StartError, match="cut short or damaged"):
        load(file, key=KEY)


def test_a_weight_that_claims_more_than_there_is(tmp_path: Path) -> None:
    model = pb.Model.FromString((DATA / "lenet_b1.mindir").read_bytes())
    model.graph.parameter[0].dims[:] = [1 << 40, 1 << 20]
    file = tmp_path / "huge.mindir"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(StartError, match=r"is damaged: tensor"):
        load(file)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    file = tmp_path / "m.mindir"
    for data in (b"", b"hello, this is text", b"\x00" * 64, pb.Model().SerializeToString()):
        file.write_bytes(data)
        with pytest.raises(StartError, match="Load model failed"):
            load(file)
    with pytest.raises(StartError, match="there is no model file"):
        load(tmp_path / "missing.mindir")
    with pytest.raises(StartError, match="Load model failed"):
        load(tmp_path)


def test_damaged_bytes_never_crash(tmp_path: Path) -> None:
    """Any single damaged byte outside of the weights: loaded all the same, or a StartError."""
    data = (DATA / "ms200" / "lenet_b1.mindir").read_bytes()
    file = tmp_path / "m.mindir"
    generator = np.random.default_rng(3)
    errors = 0
    for place in generator.integers(0, 12_000, 60):
        damaged = bytearray(data)
        damaged[place] ^= int(generator.integers(1, 256))
        file.write_bytes(bytes(damaged))
        try:
            load(file)
        except StartError:
            errors += 1
    assert errors > 5


def test_a_node_that_refers_to_nothing_or_to_itself(tmp_path: Path) -> None:
    builder = Builder()
    x = builder.input("float32", (2,))
    builder.output(builder.call("Add", x, "nowhere"))
    with pytest.raises(StartError, match="refers to 'nowhere'"):
        load(builder.write(tmp_path / "a.mindir"))
    builder = Builder()
    x = builder.input("float32", (2,))
    first = builder.call("Add", x, "later")
    second = builder.call("Add", x, first)
    builder.model.graph.node[0].input[1] = second
    builder.output(second)
    with pytest.raises(StartError, match="runs in a circle"):
        load(builder.write(tmp_path / "b.mindir"))
