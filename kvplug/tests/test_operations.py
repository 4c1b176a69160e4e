"""The operations page and its recipes: each name on them exists, and what must agree does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvplug.cli.check import read_checked
from kvplug.contract import Kind
from kvplug.hosts.vllm import compat
from kvplug.observe.catalogue import catalogue
from kvplug.observe.metric import Values
from kvplug.request_options import RequestOptions
from kvplug.tiers.queued import CLOSING

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
RULES = ROOT / "configs" / "prometheus" / "kvplug.rules.yaml"
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text(encoding="utf-8")
MANIFEST = ROOT / "deploy" / "kubernetes" / "kvplug.yaml"
RUNBOOK = "https://github.com/kvplug/kvplug/blob/main/docs/operations.md"
CODE = "\n".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
    for root in ("kvplug/kvplug", "policies/kvplug_policies")
    for path in sorted((ROOT / root).rglob("*.py"))
)
"""The product's source, strings that go over several lines joined."""


def anchor(title: str) -> str:
    """A heading's anchor, the same on the site and on GitHub."""
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def symptoms() -> dict[str, str]:
    """Text of each entry of the runbook, by anchor."""
    runbook = PAGE.split("\n## Runbook\n")[1].split("\n## ")[0]
    parts = re.split(r"^### (.+)\n", runbook, flags=re.MULTILINE)[1:]
    return {anchor(title): text for title, text in zip(parts[::2], parts[1::2], strict=True)}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


# -- the runbook -----------------------------------------------------------------------------------


def test_each_entry_says_what_is_seen_what_it_means_and_what_to_do() -> None:
    assert len(symptoms()) >= 18
    for name, entry in symptoms().items():
        assert re.findall(r"^\* \*\*(\w+):\*\*", entry, re.M) == ["See", "Means", "Do"], name


def test_each_alert_leads_to_the_entry_that_names_it() -> None:
    named = {alert for entry in symptoms().values() for alert in re.findall(r"`(Kv\w+)`", entry)}
    assert named == set(alerts())
    for name, rule in alerts().items():
        page, _, fragment = rule["annotations"]["runbook_url"].partition("#")
        assert page == RUNBOOK and f"`{name}`" in symptoms()[fragment], name


def test_metrics_of_the_runbook_exist_with_the_values_it_names() -> None:
    named = set(re.findall(r"\b(kvplug_[a-z_]+[a-z])\b", PAGE)) - {"kvplug_lab"}
    assert len(named) > 25
    assert named <= set(catalogue())
    known = {
        value
        for name in named
        for values in catalogue()[name].labels.values()
        if not isinstance(values, Values)
        for value in values
    }
    for label, value in re.findall(r'`(\w+)="([\w-]+)"`', PAGE):
        assert value in known, (label, value)
        assert any(label in catalogue()[name].labels for name in named), label
    # Causes that stand without their label, in the sentence that explains them.
    causes = {
        word
        for entry in symptoms().values()
        for word in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", entry)
        if not word.startswith("kvplug_")
    }
    options = {*RequestOptions.model_fields, *(str(kind) for kind in Kind), "cache_salt"}
    for cause in causes - known - options:
        assert re.search(rf"\b{cause}\b", CODE), cause


def test_vllms_metrics_on_the_page_are_vllms() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(spec.origin).parent / "v1" / "metrics"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    named = set(re.findall(r"`(vllm:\w+)`", PAGE))
    assert len(named) >= 3
    for name in named:
        assert f'"{name}"' in source, name


def test_lines_of_the_log_are_the_codes() -> None:
    said = [
        line
        for found in re.findall(r"\blog (`[^`]+`(?:, `[^`]+`)*)", PAGE)
        for line in re.findall(r"`([^`]+)`", found)
    ]
    assert len(said) >= 7
    for line in said:
        assert line in CODE, line
    for word in ("FAILED", "NEVER ACTED"):
        assert f"`{word}`" in PAGE and word in CODE


# -- the image -------------------------------------------------------------------------------------


def test_the_image_is_of_a_vllm_that_was_tested() -> None:
    (tag,) = re.findall(r"^FROM vllm/vllm-openai:v([\d.]+)$", DOCKERFILE, re.MULTILINE)
    assert compat.is_tested(tag)


def test_the_image_is_made_of_what_there_is() -> None:
    copied = [
        path
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for path in line.split()
    ]
    assert {"pyproject.toml", "configs", "kvplug", "policies", "kernels"} <= set(copied)
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in copied:
        assert (ROOT / path).exists() and f"!{path}" in ignore, path
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r'"kvplug\[([\w,]+)\] @', DOCKERFILE)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_the_image_runs_without_root_and_says_how_it_is() -> None:
    last = DOCKERFILE.split("\nFROM ")[-1]
    (user,) = re.findall(r"^USER (\d+)$", last, re.MULTILINE)
    assert int(user) > 0 and f"--uid {user} " in last
    assert "HEALTHCHECK" in last and "/health" in last
    assert 'ENTRYPOINT ["kvplug", "serve"]' in last


# -- the manifest ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    found = list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))
    by_kind = {one["kind"]: one for one in found}
    assert len(by_kind) == len(found)
    return by_kind


def gibibytes(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([GMT])iB?", text).groups()  # type: ignore[union-attr]
    return int(number) * {"M": 1 / 1024, "G": 1, "T": 1024}[unit]


def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = objects["StatefulSet"]["spec"]["template"]["spec"]
    return found


def test_labels_ports_and_names_agree(objects: dict[str, dict[str, Any]]) -> None:
    state, service, monitor = (objects[k] for k in ("StatefulSet", "Service", "PodMonitor"))
    labels = state["spec"]["template"]["metadata"]["labels"].items()
    assert state["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels
    assert state["spec"]["serviceName"] == service["metadata"]["name"]
    (container,) = pod(objects)["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": 8000}
    assert all(one["targetPort"] in ports for one in service["spec"]["ports"])
    assert {(one["port"], one["path"]) for one in monitor["spec"]["podMetricsEndpoints"]} == {
        ("http", "/metrics")
    }
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_every_mount_has_its_volume(objects: dict[str, dict[str, Any]]) -> None:
    (container,) = pod(objects)["containers"]
    volumes = {one["name"]: one for one in pod(objects)["volumes"]}
    claims = {
        one["metadata"]["name"] for one in objects["StatefulSet"]["spec"]["volumeClaimTemplates"]
    }
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert set(mounts) == set(volumes) | claims
    config = objects["ConfigMap"]
    assert volumes["deployment"]["configMap"]["name"] == config["metadata"]["name"]
    (file,) = config["data"]
    assert container["args"][0] == f"{mounts['deployment']}/{file}"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory" and mounts["shm"] == "/dev/shm"


def test_the_pod_has_no_more_rights_than_it_needs(objects: dict[str, dict[str, Any]]) -> None:
    rights = pod(objects)["securityContext"]
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert rights["runAsNonRoot"] and rights["runAsUser"] == int(user) == rights["fsGroup"]
    (container,) = pod(objects)["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod(objects)["automountServiceAccountToken"]


def test_times_and_sizes_leave_room(objects: dict[str, dict[str, Any]]) -> None:
    (text,) = objects["ConfigMap"]["data"].values()
    flags = yaml.safe_load(text)
    assert flags["shutdown-timeout"] + CLOSING < pod(objects)["terminationGracePeriodSeconds"]
    section = flags["kv-transfer-config"]["kv_connector_extra_config"]["kvplug"]
    tiers = {name: options for one in section["tiers"] for name, options in one.items()}
    (container,) = pod(objects)["containers"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert Path(mounts["tier"]) in Path(tiers["disk"]["path"]).parents
    claims = {
        one["metadata"]["name"]: one["spec"]["resources"]["requests"]["storage"]
        for one in objects["StatefulSet"]["spec"]["volumeClaimTemplates"]
    }
    assert gibibytes(tiers["disk"]["size"]) <= 0.95 * gibibytes(claims["tier"])
    (shared,) = (
        one["emptyDir"]["sizeLimit"] for one in pod(objects)["volumes"] if "emptyDir" in one
    )
    limit = gibibytes(container["resources"]["limits"]["memory"])
    assert gibibytes(tiers["host"]["size"]) + gibibytes(shared) <= limit / 2


def test_the_deployment_of_the_manifest_is_checked(
    objects: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    ((name, text),) = objects["ConfigMap"]["data"].items()
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    kinds = {choice.policy.kind for choice in read_checked(file).deployment.all()}
    assert {Kind.PREFIX_CACHE, Kind.TIERS, Kind.LIFECYCLE} <= kinds
