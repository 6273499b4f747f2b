"""`text-generation-launcher`: what it reads, and from where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inflight.commands import benchmark, launcher, shard_server
from inflight.errors import ConfigError
from inflight.log import configure
from tests.lm import POCKET

READ_BY_TGI = {
    "MODEL_ID": "m",
    "PORT": "8123",
    "MAX_CONCURRENT_REQUESTS": "7",
    "TRUST_REMOTE_CODE": "true",
    "CORS_ALLOW_ORIGIN": "http://a,http://b",
}


def test_what_tgi_has_beside_and_what_to_use_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main() == 2
    assert "inflight bench" in capsys.readouterr().err
    assert shard_server.main(["quantize", "org/model", "out", "--bits", "4"]) == 2
    assert "--quantize int8 or int4" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_refusals_of_the_launcher_as_json(
    way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "stop_cleanly", lambda: None)
    monkeypatch.setenv("JSON_OUTPUT", "true" if way == "variable" else "")
    given = ["--json-output"] if way == "flag" else []
    try:
        assert launcher.main([*given, "--model-id", str(tmp_path / "nowhere")]) == 2
    finally:
        configure({})
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["level"] == "ERROR"


def test_variables_that_tgi_reads() -> None:
    values = launcher.read([], READ_BY_TGI)
    assert (values["model_id"], values["port"], values["max_concurrent_requests"]) == ("m", 8123, 7)
    assert values["trust_remote_code"] is True
    assert values["cors_allow_origin"] == ["http://a", "http://b"]
    assert launcher.read(["--port", "9"], READ_BY_TGI)["port"] == 9


def test_paths_and_sizes() -> None:
    given = ["--model-id", str(POCKET), "--mmproj", "a.gguf", "--prompt-cache", "kept", "--prompt-cache-size", "2g"]
    model = launcher.configs(launcher.read([*given, "--max-image-fetch-size", "9"], {}))[1].model
    assert (model.mmproj, model.prompt_cache) == (Path("a.gguf").absolute(), Path("kept").absolute())
    assert model.prompt_cache_size == 2 << 30
    with pytest.raises(ConfigError, match="--prompt-cache-size: 'much' is no amount"):
        launcher.read(["--prompt-cache-size", "much"], {})


@pytest.mark.parametrize("value", ["production", "true", "1", ""])
def test_env_is_a_flag_only(value: str) -> None:
    """ENV is what many deployments call themselves by; TGI does not read it."""
    assert not launcher.read([], {"ENV": value})["env"]
    assert launcher.read(["--env"], {"ENV": value})["env"] is True
    assert launcher.read(["-e"], {})["env"] is True


def test_hostname() -> None:
    def host(arguments: list[str], **environment: str) -> str:
        return str(launcher.read(arguments, environment)["hostname"])

    assert host([]) == "0.0.0.0"
    assert host([], HOSTNAME="10.1.2.3") == "10.1.2.3"
    assert host([], HOSTNAME="a4c5e6f7") == "0.0.0.0"  # a container's name, which nobody meant
    assert host(["--hostname", "localhost"], HOSTNAME="a4c5e6f7") == "127.0.0.1"
    assert host(["--hostname", "::1"]) == "[::1]"
    for mistyped in ("127.0.0.l", "256.1.1.1", "a b", "nosuchhost.invalid"):
        with pytest.raises(ConfigError, match=r"--hostname: .* is no address"):
            host(["--hostname", mistyped])
    with pytest.raises(ConfigError, match="no address"):
        launcher.read(["--hostname", "." * 300], {})
