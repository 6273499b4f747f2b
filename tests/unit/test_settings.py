"""A setting is written once: command lines, scripts and messages have it from its field."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import inflight
from inflight.commands import launcher, resolve, serve, shard_server
from inflight.config import (
    SERVABLE_SETTINGS,
    SERVER_SETTINGS,
    SETTINGS,
    AdapterConfig,
    GeneratorConfig,
    Limits,
    ListenConfig,
    ModelConfig,
    Policy,
    RestConfig,
    ServableConfig,
    ServerConfig,
    TlsConfig,
    check,
)
from inflight.contract import (
    CacheSize,
    GenerationLimits,
    GeneratorInfo,
    ModelFacts,
    Sampling,
    ShardJob,
    ShardOffer,
    TensorSpec,
    Watermark,
)
from inflight.errors import ConfigError, RegistrationError
from inflight.frontends.tgi.response import compute_type
from inflight.hub import HubModel
from inflight.link import GeneratorOffer, GraphOffer, Load, LoadShard, ModelOffer, Offer, Packer, Ready, WorkerJob
from inflight.link.codec import PREFIX, decode
from inflight.llm import LLM
from inflight.sched import Capacity
from inflight.servable import declare_generator
from inflight.servable.checks import check_settings
from inflight.server import Server
from inflight.shard.native_sampler import NativeSampler
from inflight.shard.sampler import RowState, Sampler
from inflight.shard.torch_sampler import TorchSampler
from tests.lm import POCKET

OTHER: dict[Any, Any] = {int: 7, int | None: 8, str: "other", str | None: "another", bool: True, float: 0.75}


def strange(folder: Path = Path("/models/one")) -> GeneratorConfig:
    """A configuration in which no field has its default."""
    fields: dict[str, Any] = {}
    for each in SETTINGS:
        kind = each.kind
        fields[each.name] = not each.value if kind is bool else OTHER.get(kind)
    fields.update(packed_cache=Path("/cache"), prompt_cache=Path("/prompts"))
    fields.update(adapters=(AdapterConfig("a", Path("/a"), HubModel("org/a", "", "v1")),))
    fields.update(device_type="gpu", device_ids=(3, 4), tensor_parallel=2, max_batch_size=9, plans_in_flight=3)
    fields.update(resources=(("CPU", 2.0),), min_replicas=2, max_replicas=7)
    fields.update(media_domains=("images.example",), media_path=Path("/pictures"))
    fields.update(max_batch_prefill_tokens=100, tokenizer_config=Path("/t.json"), commit="abc", model_id="m")
    return GeneratorConfig.of(folder, "one", **fields)


def over_the_wire(message: Any) -> Any:
    frame = Packer().frame(message)
    _, header = PREFIX.unpack_from(frame)
    return decode(frame, header, PREFIX.size, None)[0]


def test_messages_carry_the_records_as_they_are() -> None:
    config = strange()
    job = ShardJob.of(config, 1, "127.0.0.1:9", 77)
    assert over_the_wire(LoadShard(job)) == LoadShard(job)
    model = ModelOffer("m", [GraphOffer([TensorSpec("x", "float32", (-1, 2))], [])], 4, False, True, [1])
    offer = Offer(2, [], [model], True, "cpu", [GeneratorOffer("one", config)])
    assert over_the_wire(Ready(offer)) == Ready(offer)
    work = WorkerJob("/d", "n", 0, None, None, 1, None, True, 2, b"\x00key", "AES-GCM", [model], None)
    assert over_the_wire(Load(work)) == Load(work)


def test_a_rank_is_told_the_model_whole() -> None:
    config = strange()
    job = ShardJob.of(config, 1, "there", 77)
    assert job.model.device_type == "cuda"
    assert (job.rank, job.world_size, job.device_id, job.num_blocks) == (1, 2, 4, 77)
    assert (job.max_rows, job.max_step_tokens, job.max_model_len) == (9, 109, 8)
    for name in set(ModelConfig.__struct_fields__) - {"device_type"}:
        assert getattr(job.model, name) == getattr(config.model, name), name
    assert job.on(5).model.threads == config.model.threads
    plain = ShardJob.of(GeneratorConfig.of(Path("/m")))
    assert (plain.on(5).model.threads, plain.max_step_tokens) == (5, 4096 + 128)


def test_a_field_that_is_none() -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        GeneratorConfig.of(Path("/m"), max_tokens=3)


def test_what_shards_leave_of_a_policy() -> None:
    offer = ShardOffer(ModelFacts("llama", "float32", 96, 0, 40, 60), CacheSize(50, 4), 8, 100, "cpu")
    policy = Policy().resolved("cpu", offer.max_rows)
    assert (policy.max_batch_size, policy.max_batch_prefill_tokens, policy.max_batch_mixed_tokens) == (8, 512, 32)
    assert Capacity.of(offer, policy, 40) == Capacity(40, 4, 8, 520, 512, 32, 40, 60)
    assert Policy(max_batch_size=3).resolved("cuda", 8).max_batch_size == 3
    assert Policy().resolved("cuda", 8).max_batch_mixed_tokens is None


def test_every_field_is_in_one_record() -> None:
    names = [name for record in (GeneratorConfig, ModelConfig, Limits, Policy) for name in record.__struct_fields__]
    assert len(names) == len(set(names))
    keys = [each.key for each in (*SETTINGS, *SERVER_SETTINGS, *SERVABLE_SETTINGS)]
    assert len(keys) == len(set(keys))


def test_serve_has_every_setting() -> None:
    options = {option.key: option for option in serve.OPTIONS}
    for each in (*SETTINGS, *SERVER_SETTINGS, *SERVABLE_SETTINGS):
        option = options[each.key]
        assert option.help == each.help
        assert (option.metavar is None) == (each.kind is bool)
        assert option.of_model == (each not in SERVER_SETTINGS or each.name == "execution_timeout")
        if each.name != "execution_timeout":  # also NAME=SECONDS, for one servable
            assert (option.default, option.parse, option.many) == (each.default, each.setting.parse, each.setting.many)
    by_hand = {option.key for option in serve.OPTIONS} - {each.key for each in SETTINGS}
    by_hand -= {each.key for each in (*SERVER_SETTINGS, *SERVABLE_SETTINGS)}
    assert by_hand == {"paths", "log_level", "revision"}  # of the command line itself


def test_what_a_file_says_of_a_server_and_a_servable(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    (tmp_path / "server.pem").touch()
    table: dict[str, Any] = {
        "max_enqueued": 5,
        "start_timeout": 0,
        "stop_timeout": 3,
        "cors_allow_origin": ["http://a", "http://b"],
        "grpc": "off",
        "max_message_mb": 7,
        "tls_cert": str(tmp_path / "server.pem"),
        "tls_key": str(tmp_path / "server.pem"),
        "status_codes": True,
        "models": [{"path": str(tmp_path / "net.onnx"), "workers": 2, "device_type": "CPU", "execution_timeout": 4}],
    }
    (tmp_path / "a.json").write_text(json.dumps(table))
    plan = serve.build_plan(resolve(serve.COMMAND, {"config": str(tmp_path / "a.json")}, {}))
    assert plan.server == ServerConfig(
        max_enqueued_requests=5,
        start_timeout=None,
        stop_timeout=3.0,
        cors_origins=("http://a", "http://b"),
        rest=RestConfig(status_codes=True),
    )
    tls = TlsConfig(table["tls_cert"], table["tls_key"])
    assert (plan.http, plan.grpc) == (ListenConfig("127.0.0.1:8080", 7, tls), None)
    assert plan.servables == (
        ServableConfig(
            tmp_path,
            "net",
            device_type="cpu",
            num_parallel_workers=2,
            model_file=tmp_path / "net.onnx",
            execution_timeout=4.0,
        ),
    )


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            ServerConfig(grpc_engine="zttp"),
            "ServerConfig.grpc_engine: 'zttp' is not known; write one of: auto, nghttp2",
        ),
        (ServerConfig(stop_timeout=-1.0), "ServerConfig.stop_timeout: '-1.0' is no number of seconds; write for"),
        (GeneratorConfig.of(Path("/m"), grammars="no"), "Limits.grammars: Expected `bool`, got `str`"),
        (ListenConfig("127.0.0.1:0", 513), "ListenConfig.max_message_mb: 513 is out of range; write 1 to 512"),
        (ServableConfig(Path("/d"), "n", device_type="tpu"), "ServableConfig.device_type: 'tpu' is not known"),
        (GeneratorConfig.of(Path("/m"), dtype="int7"), "ModelConfig.dtype: 'int7' is not known; write one of: auto"),
    ],
)
def test_a_script_is_told_of_a_wrong_setting(record: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        check(record)


def test_what_a_script_sets_is_checked_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"ServerConfig\.max_enqueued_requests: 0 is out of range; write at least 1"):
        Server(ServerConfig(max_enqueued_requests=0))
    check(ServerConfig(start_timeout=None, log_dir=Path("/logs"), api_key="0"))


def test_the_launcher_has_the_settings_that_tgi_names() -> None:
    flags = {flag.name: flag for flag in launcher.FLAGS}
    for each in (*SETTINGS, *SERVER_SETTINGS):
        if not each.setting.tgi:
            continue
        flag = flags[each.setting.tgi]
        assert flag.many == each.setting.many
        own = ("num-shard", "dtype", "quantize", "lora-adapters", "graceful-termination-timeout")
        if each.setting.tgi not in own:  # these have rules of TGI's
            assert (flag.default, flag.help) == (each.default, each.setting.help)


def test_the_shard_server_guesses_nothing_unless_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shard_server.parser().parse_args(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "checked in one step; results stay the same. 0: none. Default 0." in text


def test_the_shard_server_has_settings_of_ranks(tmp_path: Path) -> None:
    given = shard_server.parser().parse_args(
        ["serve", "m", "--dtype", "float32", "--kv-cache-memory", "1m", "--trust-remote-code", "--block-size", "8"]
    )
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MAX_TOTAL_TOKENS": "99"}
    job = shard_server._job(shard_server._config(given, tmp_path, variables, []), variables)
    assert (job.model.dtype, job.model.kv_cache_bytes, job.model.block_size) == ("float32", 1 << 20, 8)
    assert (job.model.trust_remote_code, job.model.allow_pickle, job.model.quantize) == (True, False, "none")
    assert (job.rank, job.world_size, job.device_id, job.rendezvous) == (1, 2, 1, "localhost:29500")
    assert (job.max_rows, job.max_model_len) == (128, 99)


@pytest.mark.parametrize("written", [LLM.__init__, declare_generator])
def test_a_signature_says_what_the_fields_say(written: Callable[..., Any]) -> None:
    """Written out, because people and editors read it; so it is compared."""
    given = inspect.signature(written, eval_str=True).parameters
    settings = {each.key: each for each in SETTINGS}
    found = [name for name in given if name in settings]
    assert {"dtype", "kv_cache_memory", "threads", "quantize", "kv_cache_dtype", "max_total_tokens"} <= set(found)
    for name in found:
        parameter, field = given[name], settings[name]
        if name in (
            "lora_adapters",
            "packed_cache",
            "prompt_cache",
            "mmproj",
            "draft_model",
            "cluster_resources",
        ):  # a mapping of them; also a text
            assert parameter.default is None
        else:
            assert (parameter.annotation, parameter.default) == (field.kind, field.value), name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"threads": -1}, "threads.*-1 is out of range; write at least 0"),
        ({"dtype": 3}, "'dtype' should be str"),
        ({"quantize": "int3"}, "'quantize': 'int3' is not known; write one of: none, int8"),
        ({"max_total_tokens": "9"}, "'max_total_tokens' should be int"),
        ({"queue_time": "1"}, "'queue_time' should be int or float"),
        ({"max_replicas": 65}, "'max_replicas': 65 is out of range"),
    ],
)
def test_a_servable_is_told_of_a_wrong_setting(given: dict[str, object], told: str) -> None:
    with pytest.raises(RegistrationError, match=told):
        check_settings(given)


READERS = {
    # Entries: commands, processes, and what a script calls first. They pass on what they read.
    "cli.py": "flags, variables and files",
    "commands/agents.py": "INFLIGHT_RUNTIMES",
    "commands/options.py": "the log's variables",
    "commands/serve.py": "paths that a platform names",
    "commands/launcher.py": "TGI's variables",
    "commands/shard_server.py": "TGI's variables of a rank",
    "distributed/__main__.py": "the log's variables, in an agent",
    "dropin/distributed.py": "INFLIGHT_RUNTIMES and INFLIGHT_AGENTS_*, for a script",
    "dropin/log.py": "the log's variables, for a script",
    "server.py": "INFLIGHT_RUNTIMES, for a script",
    "llm/llm.py": "INFLIGHT_CPU_*, for a script",
    "worker/process.py": "the log's variables, in a worker",
    "worker/shard.py": "the log's variables and INFLIGHT_CPU_*, in a rank",
    "vision/worker.py": "the log's variables, in a vision worker",
    "hub/__main__.py": "the hub's token, in the process that fetches",
}


def reads_the_environment(file: Path) -> bool:
    """Whether a module looks at variables.

    To set a library's own switch before the library is imported (`setdefault`, an assignment, `pop` whose value is
    dropped) and to hand all of them on to a process (`{**os.environ}`) is not to look at them.
    """
    tree = ast.parse(file.read_text())
    allowed: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value.func
            if isinstance(call, ast.Attribute) and call.attr in ("setdefault", "pop"):
                allowed.append(call.value)
        elif isinstance(node, ast.Assign):
            allowed += [each.value for each in node.targets if isinstance(each, ast.Subscript)]
        elif isinstance(node, ast.Dict):
            allowed += [value for key, value in zip(node.keys, node.values) if key is None]
    names = ("environ", "environb", "getenv", "getenvb")
    return any(
        (isinstance(node, ast.Attribute) and node.attr in names and node not in allowed)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {each.name for each in node.names} & {*names})
        for node in ast.walk(tree)
    )


def test_nothing_but_entries_reads_the_environment() -> None:
    package = Path(inflight.__file__).parent
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if reads_the_environment(file)}
    assert found == set(READERS)


def test_switches_of_the_cpu_engine_come_as_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").touch()
    variables = {"INFLIGHT_CPU_ENGINE": "torch", "INFLIGHT_CPU_ISA": "avx2"}

    def told(given: dict[str, Any]) -> tuple[str | None, str | None]:
        (config,) = serve.build_plan(resolve(serve.COMMAND, {"paths": [str(tmp_path)], **given}, variables)).generators
        model = over_the_wire(LoadShard(ShardJob.of(config))).job.completed(variables).model  # as a rank has it
        return model.cpu_engine, model.cpu_isa

    assert told({}) == ("torch", "avx2")
    assert told({"cpu_engine": "auto", "cpu_isa": "scalar"}) == ("auto", "scalar")  # a flag goes first
    given = shard_server.parser().parse_args(["serve", "m"])
    config = shard_server._config(given, tmp_path, variables, [])
    assert shard_server._job(config, variables).model.cpu_engine == "torch"
    assert GeneratorConfig.of(tmp_path).completed(variables).model.cpu_isa == "avx2"
    assert GeneratorConfig.of(tmp_path).completed({"INFLIGHT_THREADS": "3"}).model.threads == 0
    with pytest.raises(ConfigError, match="INFLIGHT_CPU_ENGINE: 'fast' is not known; write one of: auto, torch"):
        GeneratorConfig.of(tmp_path).completed({"INFLIGHT_CPU_ENGINE": "fast"})


def test_what_the_environment_says_to_a_launcher(tmp_path: Path) -> None:
    variables = {"COMPUTE_TYPE": "2-mine", "WATERMARK_GAMMA": "0.25", "WATERMARK_DELTA": "4", "AIP_HEALTH_ROUTE": "/up"}
    values = launcher.read(["--model-id", str(POCKET), "--hostname", "127.0.0.1"], variables)
    server, config, _ = launcher.configs(values)
    assert (config.compute_type, config.model.watermark_gamma, config.model.watermark_delta) == ("2-mine", 0.25, 4.0)
    assert (server.rest.health_routes, server.rest.predict_routes) == (("/up",), ())
    given = shard_server.parser().parse_args(["serve", "m"])
    model = shard_server._config(given, tmp_path, {"WATERMARK_GAMMA": "0.75"}, []).model
    assert (model.watermark_gamma, model.watermark_delta) == (0.75, 2.0)
    with pytest.raises(ConfigError, match="WATERMARK_GAMMA: '2' is no share; write a number from 0 to 1"):
        shard_server._config(given, tmp_path, {"WATERMARK_GAMMA": "2"}, [])
    other = GeneratorInfo("m", "m", GenerationLimits(), device_type="cuda", world_size=2)
    assert compute_type(other) == (b"x-compute-type", b"2-cuda")
    assert compute_type(replace(other, compute_type="mine")) == (b"x-compute-type", b"mine")


@pytest.mark.parametrize("make", [TorchSampler, lambda mark: NativeSampler(1, mark)])
def test_a_watermark_is_as_strong_as_it_is_told(make: Callable[[Watermark], Sampler]) -> None:
    def favoured(mark: Watermark) -> set[int]:
        rows = np.zeros((1, 40), np.float32)
        logits = rows if mark and make is not TorchSampler else torch.from_numpy(rows)
        asked = [Sampling(watermark=True, top_n_tokens=40)]
        found = make(mark).sample(logits, asked, lambda _: RowState(np.array([5], np.int32), 1))
        best = found.top[0][0][1]
        return {token for token, value in found.top[0] if value > best - 0.1}

    assert len(favoured(Watermark(0.25, 4.0))) == 10
    assert favoured(Watermark(0.25, 4.0)) < favoured(Watermark(0.5, 4.0))
    assert len(favoured(Watermark(0.25, 0.0))) == 40
