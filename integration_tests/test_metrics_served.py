"""What Prometheus scrapes of an engine with two API servers and a policy that fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from serving import SECONDS, VLLM_SERVE, Server, free_port, serving
from waiting import wait_for

from kvplug import __version__
from kvplug.observe.catalogue import BUILD_INFO, POLICY_INFO, TOKEN_BYTES, catalogue
from kvplug.observe.metric import Named, Type
from kvplug.parser import load_deployment
from kvplug_lab.engine.trial import connector_flags

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
BLOCK = 32
BLOCKS = 25
"""Of the pool, the null block included."""
PROMPT = 9 * BLOCK + 5
TURNS = [0, 1, 2, 1, 3, 4, 0, 1, 5, 6, 2, 3, 4, 3, 5, 1]
"""Prompts asked for, in a pool that holds two of them."""
SECTION: dict[str, Any] = {
    "prefix_cache": "fails_later",
    "tiers": [{"host": {"size": "64MiB"}}],
    "lifecycle": "everything",
}
FLAGS: dict[str, Any] = {
    "block-size": BLOCK,
    "max-model-len": 512,
    "max-num-batched-tokens": 512,
    "num-gpu-blocks-override": BLOCKS,
    "max-num-seqs": 2,
    "dtype": "float32",
    "enforce-eager": True,
    "api-server-count": 2,
}


def program(name: str) -> str:
    """Path of a program of Debian's package ``prometheus``."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed: see requirements/servers.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return str(found)


def ask(server: Server, prompt: list[int]) -> None:
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        assert answer.status == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("metrics")
    file = folder / "deployment.yaml"
    data = FLAGS | {"kv-transfer-config": connector_flags(SECTION)}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(HERE / "plugins"), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        with serving(folder, str(tiny), "--config", str(file), program=VLLM_SERVE) as found:
            yield found


@pytest.fixture(scope="module")
def at_start(server: Server) -> str:
    """The exposition before the first request."""
    return server.get("/metrics")


@pytest.fixture(scope="module")
def loaded(server: Server, at_start: str) -> Server:
    """The server after requests that evicted, stored, loaded, and made a policy fail."""
    choose = random.Random(1)
    prompts = [[choose.randrange(10, 300) for _ in range(PROMPT)] for _ in range(7)]
    for turn in TURNS:
        ask(server, prompts[turn])
    return server


def ours(exposition: str) -> str:
    """The part of an exposition that is kvplug's."""
    lines = [
        line
        for line in exposition.splitlines()
        if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith("kvplug_")
    ]
    return "\n".join(lines) + "\n"


def test_every_series_of_the_deployment_is_there_at_zero(at_start: str) -> None:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    families = {one.name: one for one in text_string_to_metric_families(ours(at_start))}
    policies = (("prefix_cache", "fails_later"), ("lifecycle", "everything"))
    named = Named((*policies, ("transfer", "raw"), ("tiers", "host")), ("host",))
    deployment = load_deployment(SECTION | {"prefix_cache": "lru"})
    for metric in catalogue().values():
        name = metric.name.removesuffix("_total")
        if not metric.is_in(deployment):
            assert name not in families
            continue
        family = families.get(name)
        if family is None:
            # Several servers show a metric once it has a series.
            assert metric.is_open or not metric.seeded, metric.name
            continue
        assert (family.type, family.documentation) == (str(metric.type), metric.help)
        sample = f"{metric.name}_count" if metric.type is Type.HISTOGRAM else metric.name
        found[metric.name] = {
            tuple(one.labels[label] for label in metric.labels): one.value
            for one in family.samples
            if one.name == sample
        }
        if metric in (BUILD_INFO, POLICY_INFO) or not metric.seeded or metric.is_open:
            continue
        assert found[metric.name] == dict.fromkeys(metric.series(named), 0.0), metric.name
    assert TOKEN_BYTES.name not in found, "a metric of formats, and no format runs"
    assert [key[0] for key in found[BUILD_INFO.name]] == [__version__]
    assert {key: value for key, value in found[POLICY_INFO.name].items() if value} == {
        (kind, name, "true"): 1.0 for kind, name in named.policies
    }


def test_promtool_finds_nothing_to_complain_of(loaded: Server) -> None:
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=ours(loaded.get("/metrics")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_policy_that_failed_is_retired(loaded: Server) -> None:
    assert loaded.metric("kvplug_policy_retired") == 1
    assert loaded.metric("kvplug_policy_retired", policy="fails_later") == 1
    assert loaded.metric("kvplug_policy_fallbacks_total", kind="prefix_cache") == 1


def test_counts_agree_with_what_was_asked(loaded: Server) -> None:
    assert loaded.metric("kvplug_lookup_tokens_total") == len(TURNS) * PROMPT
    tier = loaded.metric("kvplug_hit_tokens_total", source="tier")
    assert tier > 0 == loaded.metric("kvplug_hit_tokens_total", source="segment")
    assert loaded.metric("kvplug_tier_loaded_chunks_total", tier="host") == tier / BLOCK
    assert loaded.metric("kvplug_hit_tokens_total", source="prefix") == loaded.metric(
        "vllm:prefix_cache_hits_total"
    )
    for hook, count in (("new_request", len(TURNS)), ("finished", len(TURNS))):
        assert loaded.metric("kvplug_hook_seconds_count", hook=hook) == count
    steps = loaded.metric("kvplug_steps_total")
    assert loaded.metric("kvplug_hook_seconds_count", hook="step") == steps
    assert loaded.metric("kvplug_saved_flops_total", source="tier") > 0


def test_levels_are_those_of_now(loaded: Server) -> None:
    blocks = {own["state"]: n for own, n in loaded.series("kvplug_pool_blocks")}
    assert blocks["held"] == 0, "no request runs"
    assert sum(blocks.values()) == BLOCKS - 1
    # The last two prompts, and the blocks that their last requests filled.
    assert blocks["cached"] >= 2 * (PROMPT // BLOCK)
    (ratio,) = (
        n for own, n in loaded.series("kvplug_pool_fragmentation_ratio") if own["of"] == "free"
    )
    assert ratio == pytest.approx(blocks["cached"] / (BLOCKS - 1))
    assert loaded.metric("kvplug_loading_requests") == 0
    stored = loaded.metric("kvplug_tier_stored_chunks_total")
    gone = loaded.metric("kvplug_tier_gone_chunks_total")
    assert loaded.metric("kvplug_tier_chunks") == stored - gone
    assert loaded.metric("kvplug_tier_capacity_bytes") == 64 << 20
    # Raw, with a header of its own.
    assert 0.9 < loaded.metric("kvplug_compression_ratio", kind="transfer") < 1


# -- Prometheus itself -----------------------------------------------------------------------------


@pytest.fixture
def prometheus(loaded: Server, tmp_path: Path) -> Iterator[str]:
    """URL of a Prometheus that scrapes the server each second under the alert rules."""
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(CONFIGS / "prometheus" / "kvplug.rules.yaml")],
        "scrape_configs": [
            {
                "job_name": "vllm",
                "static_configs": [{"targets": [f"127.0.0.1:{loaded.port}"]}],
            }
        ],
    }
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={file}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        process.kill()
        process.wait()


def of(url: str) -> Any:
    """What Prometheus answers, or None while it does not."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = json.load(answer)
    except OSError:
        return None
    assert found["status"] == "success"
    return found["data"]


def test_the_alert_of_a_retired_policy_fires_and_no_other(prometheus: str) -> None:
    def firing() -> list[dict[str, Any]]:
        found = of(f"{prometheus}/alerts") or {"alerts": []}
        return [alert["labels"] for alert in found["alerts"] if alert["state"] == "firing"]

    wait_for(lambda: bool(firing()), "an alert that fires", SECONDS)
    assert [(one["alertname"], one["policy"]) for one in firing()] == [
        ("KvplugPolicyRetired", "fails_later")
    ]
    up = of(f"{prometheus}/query?query=up")["result"]
    assert [one["value"][1] for one in up] == ["1"]
    dashboard = json.loads((CONFIGS / "grafana" / "kvplug.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "5m")
            query = query.replace("$engine", ".*").replace("$model", ".*")
            assert of(f"{prometheus}/query?{urllib.parse.urlencode({'query': query})}")
