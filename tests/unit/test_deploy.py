"""The files for containers and Kubernetes agree with the server: its options, variables, routes and version."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from inflight.commands.serve import OPTIONS
from inflight.version import __version__

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "inflight"
KSERVE = sorted((ROOT / "deploy" / "kserve").glob("*.yaml"))
IMAGE = (ROOT / "Dockerfile").read_text()
TEMPLATES = {file.name: file.read_text() for file in sorted((CHART / "templates").iterdir())}
KNOWN = {option.name.replace("-", "_") for option in OPTIONS}


def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return found


def options_of(text: str) -> list[str]:
    """Names of the options of `inflight serve` that stand in a manifest as `--name=...`."""
    return [name.replace("-", "_") for name in re.findall(r"^\s*- --([a-z-]+)=", text, re.MULTILINE)]


def test_options_and_variables_exist() -> None:
    texts = [TEMPLATES["deployment.yaml"].replace("--port=8080", ""), *(file.read_text() for file in KSERVE)]
    found = [name for text in texts for name in options_of(text)]
    assert {"stop_timeout", "api_keys", "name"} <= set(found) <= KNOWN
    variables = re.findall(r"INFLIGHT_([A-Z_]+)", IMAGE + "".join(texts))
    assert {name.lower() for name in variables} <= KNOWN
    assert {"http", "grpc", "packed_cache"} <= {name.lower() for name in variables}


def test_versions_are_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    images = [each["image"] for file in KSERVE for each in yaml.safe_load(file.read_text())["spec"]["containers"]]
    assert {chart["appVersion"], *(image.partition(":")[2] for image in images)} == {__version__}


def test_the_chart_uses_its_values_and_no_others() -> None:
    """A mistyped value is an empty string in a template, and nobody is told."""

    def names(tree: dict[str, Any], before: str = "") -> list[str]:
        found = []
        for name, value in tree.items():
            found += [before + name, *(names(value, f"{before}{name}.") if isinstance(value, dict) else [])]
        return found

    known = names(values())
    used = {name for text in TEMPLATES.values() for name in re.findall(r"\.Values\.([A-Za-z.]+)", text)}
    assert sorted(used - set(known)) == []
    whole = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    given_on = ("resources.", "image.")  # as a whole
    unused = [name for name in whole if name not in used and not name.startswith(given_on)]
    assert unused == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"modles": []}, "modles"), ({"replicas": "2"}, "replicas"), ({"image": {"pullPolicy": "always"}}, "pullPolicy")],
)
def test_a_mistyped_value_is_refused(wrong: dict[str, Any], text: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.validate(values(), schema)
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.validate({**values(), **wrong}, schema)
    assert text in str(caught.value)


def test_probes_and_the_end_of_a_pod() -> None:
    """`/health` tells readiness; the pod has longer to end than the server takes."""
    deployment = TEMPLATES["deployment.yaml"]
    assert deployment.count("path: /health\n") == 2
    assert "--stop-timeout={{ .Values.drainSeconds }}" in deployment
    assert "add .Values.notifySeconds .Values.drainSeconds 10" in deployment  # five more than the server needs
    for file in KSERVE:
        (container,) = yaml.safe_load(file.read_text())["spec"]["containers"]
        assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
        assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


def test_the_image_is_made_of_what_the_package_needs() -> None:
    """`.dockerignore` lets through what building the package reads, and nothing else."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert kept == {
        *("inflight", "mindspore_serving", "licenses"),
        *("pyproject.toml", "constraints.txt", "CMakeLists.txt", "README.md", "LICENSE"),
    }
    assert all((ROOT / name).exists() for name in kept)
    assert re.search(r"^USER 10001:10001$", IMAGE, re.MULTILINE)
