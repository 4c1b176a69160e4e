"""Spans of requests, on their own trace and at vLLM's collector; and their times, as metrics."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from otlp_collector import Collector, Seen, grpc_collector, http_collector
from serving import SECONDS, Server, serving
from test_failing_policy import environment
from waiting import wait_for

from kvplug.hosts.vllm import tracing
from kvplug.hosts.vllm.flags import EXTENSION
from kvplug.hosts.vllm.tracing import SpanExporter
from kvplug_lab.engine.trial import TrialRequest, TrialResult, connector_flags
from kvplug_lab.models import tiny_llama

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

FLAGS: dict[str, Any] = {
    "block-size": 32,
    "max-model-len": 1024,
    "num-gpu-blocks-override": 96,
    "dtype": "float32",
    "enforce-eager": True,
    "worker-extension-cls": EXTENSION,
}
SECTION = {
    "reuse": {
        "use": ["structure", "position", "mask"],
        "approximate": True,
        "segments": {"by": "request", "min_tokens": 16},
        "recompute": {"boundary": 8, "gaps": 64},
    },
    "observe": {"baseline_requests": 2},
}
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4
"""Keys and values of a token: layers, K and V, heads, their size, bytes of a float32."""

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

choose = random.Random(11)


def text(n: int) -> list[int]:
    return [choose.randrange(10, 300) for _ in range(n)]


START, OTHER, DOCUMENT, QUESTION = text(40), text(20), text(200), text(20)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with grpc_collector() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("traced")
    # Deep enough for a token's KV to depend on the text before it.
    model = tiny_llama(folder / "model", layers=4, seed=2)
    flags = FLAGS | {
        "otlp-traces-endpoint": collector.endpoint,
        "kv-transfer-config": connector_flags(SECTION),
    }
    config = folder / "deployment.yaml"
    config.write_text(yaml.safe_dump(flags), encoding="utf-8")
    with serving(folder, str(config), "--model", str(model)) as found:
        yield found


def ask(
    server: Server, prompt: list[int], n: int, said: dict[str, Any], headers: dict[str, str]
) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": n,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "kv_transfer_params": {"kvplug": said},
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"} | headers,
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return dict(json.loads(answer.read()))


def children(collector: Collector, parent: Seen, name: str) -> list[Seen]:
    return [s for s in collector.named(name) if s.parent == parent.id and s.trace == parent.trace]


def test_a_request_has_its_spans_on_its_own_trace(server: Server, collector: Collector) -> None:
    asks = {"reuse": "approximate"}
    ask(server, START + DOCUMENT, 1, {"segments": [40, 200]}, {})
    traced = {"traceparent": f"00-{TRACE}-{SPAN}-01", "X-Request-Id": "asked"}
    prompt = START + OTHER + DOCUMENT + QUESTION
    answer = ask(server, prompt, 4, asks | {"segments": [40, 20, 200]}, traced)
    said = answer["kv_transfer_params"]["kvplug"]
    assert not said["exact"] and said["shifted"] and said["recomputed"], said

    wait_for(lambda: [s for s in collector.named("llm_request") if s.trace == TRACE], "vLLM's")
    wait_for(lambda: [s for s in collector.named("kvplug.request") if s.trace == TRACE], "ours")
    (vllm,) = [s for s in collector.named("llm_request") if s.trace == TRACE]
    (ours,) = [s for s in collector.named("kvplug.request") if s.trace == TRACE]
    assert ours.parent == vllm.parent == SPAN
    assert ours.process == "engine_core"
    assert ours.attributes["gen_ai.request.id"] == vllm.attributes["gen_ai.request.id"]
    assert ours.attributes["kvplug.exact"] is False
    assert ours.attributes["kvplug.reused"] == said["reused"]
    # The scheduler gets a request after the server has, and is done before it.
    assert vllm.begin <= ours.begin < ours.end <= vllm.end

    (lookup,) = children(collector, ours, "kvplug.lookup")
    assert lookup.attributes["kvplug.prefix_tokens"] == 32
    found = said["reused"] + said["recomputed"]
    assert lookup.attributes["kvplug.segment_tokens"] == found
    assert lookup.attributes["kvplug.tier_tokens"] == 0

    checks = children(collector, lookup, "kvplug.check")
    stages = [
        (s.attributes["kvplug.check.stage"], s.attributes["kvplug.check.verdict"])
        for s in sorted(checks, key=lambda s: s.begin)
    ]
    # The start stands where it stood; the document after another text, and elsewhere.
    assert stages == [
        *((stage, "exact") for stage in ("structure", "position", "mask")),
        *(("structure", "approximate"), ("position", "approximate"), ("mask", "exact")),
    ]
    assert all(s.attributes["kvplug.check.seconds"] == (s.end - s.begin) / 1e9 for s in checks)
    assert all(lookup.begin <= s.begin <= s.end <= lookup.end for s in checks)

    (load,) = children(collector, ours, "kvplug.load")
    assert load.attributes["kvplug.medium"] == "memory"
    assert load.attributes["kvplug.segments"] == said["segments"]
    assert load.attributes["kvplug.tokens"] == 8 + 200
    assert load.attributes["kvplug.bytes"] == TOKEN_BYTES * 208
    (adapt,) = children(collector, load, "kvplug.adapt")
    assert adapt.attributes["kvplug.shifted_tokens"] == said["shifted"]
    assert adapt.attributes["kvplug.recomputed_tokens"] == said["recomputed"]
    assert load.begin <= adapt.begin < adapt.end == load.end, "workers measured it"

    assert children(collector, ours, "kvplug.save"), "the part between was new"
    assert not any(s.failed for s in collector.spans if s.trace == TRACE)


def test_a_request_without_a_trace_gets_one_of_its_own(
    server: Server, collector: Collector
) -> None:
    answer = ask(server, text(60), 2, {}, {"X-Request-Id": "alone"})
    name = answer["id"]

    def mine(kind: str) -> list[Seen]:
        return [
            s
            for s in collector.named(kind)
            if str(s.attributes.get("gen_ai.request.id", "")).startswith(name)
        ]

    wait_for(lambda: mine("kvplug.request") and mine("llm_request"), "both spans")
    (ours,), (vllm,) = mine("kvplug.request"), mine("llm_request")
    assert ours.parent == vllm.parent == ""
    assert ours.trace != vllm.trace, "linked by the id alone"
    assert ours.attributes["gen_ai.request.id"] == vllm.attributes["gen_ai.request.id"]


def test_a_request_that_is_not_sampled_sends_nothing(server: Server, collector: Collector) -> None:
    other = "5" * 32
    ask(server, text(60), 2, {}, {"traceparent": f"00-{other}-{SPAN}-00"})
    last = ask(server, text(60), 2, {}, {"X-Request-Id": "after"})
    wait_for(
        lambda: [
            s
            for s in collector.named("kvplug.request")
            if last["id"] in str(s.attributes["gen_ai.request.id"])
        ],
        "the next one",
    )
    assert not [s for s in collector.spans if s.trace == other]


def test_times_of_requests_and_checks_are_metrics(server: Server) -> None:
    for _ in range(3):
        ask(server, text(60), 4, {}, {})

    def values(name: str, **labels: str) -> list[float]:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in server.get("/metrics").splitlines() if line.startswith(name)]
        return [float(x.rsplit(" ", 1)[1]) for x in lines if all(w in x for w in wanted)]

    short: dict[str, str] = {"prompt": "0-511"}
    wait_for(lambda: values("kvplug_latency_requests{", window="now", **short)[0] >= 3, "a count")
    assert values("kvplug_latency_requests{", window="baseline", **short) == [2.0]
    for name in ("kvplug_ttft_seconds{", "kvplug_tpot_seconds{"):
        for window in ("now", "baseline"):
            p50, p99 = (values(name, window=window, percentile=p, **short) for p in ("50", "99"))
            assert 0 < p50[0] <= p99[0] < SECONDS
        assert values(name, prompt="32768-") == [0.0] * 4, "there at 0"
    assert values("kvplug_check_seconds_count{", stage="structure")[0] > 0
    assert values("kvplug_energy_joules_total{") == [], "no GPU"


def test_what_ends_with_the_engine_is_sent(run: Callable[..., TrialResult], tmp_path: Path) -> None:
    """Offline, over HTTP: chunks that left the pool are loaded, and blocks are given back."""
    first, filler = text(200), text(330)
    work = [
        TrialRequest(first + QUESTION, 4, 0),
        TrialRequest(filler, 4, 1),
        TrialRequest(filler[::-1], 4, 2),
        TrialRequest(first + text(20), 4, 3),
    ]
    engine = {
        "max_model_len": 512,
        "num_gpu_blocks_override": 20,
        "block_size": 32,
        "dtype": "float32",
        "enforce_eager": True,
    }
    with http_collector() as collector:
        result = run(
            tiny_llama(tmp_path / "model"),
            work,
            {
                "tiers": [{"host": {"size": "64MiB"}}],
                "lifecycle": "loads",
                "sequence": {"use": "sink_window", "sink": 32, "window": 224},
            },
            env=environment() | {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            otlp_traces_endpoint=collector.endpoint,
            **engine,
        )
        assert (result.answers[3].kvplug or {})["loaded"] == 192
        requests = sorted(collector.named("kvplug.request"), key=lambda s: s.begin)
        assert len(requests) == 4
        (evict,) = children(collector, requests[1], "kvplug.evict")
        assert evict.attributes["kvplug.blocks"] == (result.answers[1].kvplug or {})["blocks_freed"]
        (lookup,) = children(collector, requests[3], "kvplug.lookup")
        assert lookup.attributes["kvplug.tier_tokens"] == 192
        (load,) = children(collector, requests[3], "kvplug.load")
        assert load.attributes["kvplug.medium"] == "host"
        assert load.attributes["kvplug.tokens"] == 192
        assert load.attributes["kvplug.exact"] is True and load.end > load.begin


# -- without an engine --------------------------------------------------------------------------


def config(endpoint: str | None) -> Any:
    return SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=endpoint))


def test_without_an_endpoint_there_is_no_exporter() -> None:
    assert SpanExporter.of(config(None)) is None


def test_a_provider_that_fails_and_too_many_requests_cost_only_their_spans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing, "MOST_WAITING", 8)
    monkeypatch.setattr(tracing, "INTERVAL", 60.0)
    made: list[str] = []

    class Tracer:
        def start_span(self, name: str, *_: Any, **__: Any) -> Any:
            made.append(name)
            raise OSError("no room")

    provider = SimpleNamespace(
        get_tracer=lambda *_: Tracer(), force_flush=lambda: made.append("flushed")
    )
    exporter = SpanExporter("nowhere", provider)
    for i in range(20):
        exporter.spans.began(str(i), None, 3)
        exporter.spans.ended(str(i), {})
    exporter.stop()
    assert made == ["kvplug.request"] * 8 + ["flushed"]
    assert exporter.dropped == 20
