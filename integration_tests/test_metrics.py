"""Series in the API server, whose output handler must not see an exception; and observers."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from kvplug.contract import EngineView, Kind, PolicyReport
from kvplug.deployment import Deployment
from kvplug.hosts.vllm import metrics
from kvplug.hosts.vllm.metrics import Exposition, PolicyPromMetrics
from kvplug.hosts.vllm.scheduler.events import Events, call_each
from kvplug.observe.events import Event, EventType
from kvplug.observe.metric import Increments, Metric, Type, Values
from kvplug.parser import load_deployment

DEPLOYMENT = load_deployment({"prefix_cache": "lru", "sequence": "sink_window"})
OPEN = Metric("kvplug_own", Type.GAUGE, "Own.", {"policy": Values.POLICY, "name": Values.OPEN})
CAUSES = Metric(
    "kvplug_refused_total", Type.COUNTER, "R.", {"cause": ("far", "other"), "kind": Values.KIND}
)
TIMES = Metric("kvplug_times_seconds", Type.HISTOGRAM, "T.", buckets=(0.001, 0.1, 1.0))
NOT_HERE = Metric("kvplug_format", Type.GAUGE, "F.", kinds=(Kind.FORMAT,))


class Exported:
    """Metrics in a registry of their own."""

    def __init__(self, *metrics: Metric, engines: int = 1):
        self.registry = CollectorRegistry()
        types = {of: partial(of, registry=self.registry) for of in (Counter, Gauge, Histogram)}
        values = {i: ["m", str(i)] for i in range(engines)}
        self.series = Exposition(metrics, DEPLOYMENT, types, ["model_name", "engine"], values)

    def values(self) -> dict[tuple[str, ...], float]:
        """Values by name and labels, those of engine 0 without model and engine."""
        return {
            (s.name, *list(s.labels.values())[2:]): s.value
            for m in self.registry.collect()
            for s in m.samples
            if s.labels["engine"] == "0" and not s.name.endswith("_created")
        }


def test_all_series_of_the_deployment_are_there_at_zero() -> None:
    found = Exported(CAUSES, TIMES, NOT_HERE, OPEN).values()
    assert {key: n for key, n in found.items() if key[0] == CAUSES.name} == {
        (CAUSES.name, cause, kind): 0.0
        for cause in ("far", "other")
        for kind in ("prefix_cache", "sequence")
    }
    assert found["kvplug_times_seconds_count",] == 0
    assert not any(key[0] in (NOT_HERE.name, OPEN.name) for key in found)


def test_increments_are_added_up_and_gauges_fall() -> None:
    exported = Exported(CAUSES, OPEN, engines=2)
    add = exported.series.add
    add({"counters": {"kvplug_refused_total\tfar\tsequence": 2.0}})
    add({"counters": {"kvplug_refused_total\tfar\tsequence": 3.0}})
    add({"counters": {"kvplug_refused_total\tfar\tsequence": 30.0}}, 1)
    add({"gauges": {"kvplug_own\tlru\tlevel": 7.0}})
    add({"gauges": {"kvplug_own\tlru\tlevel": 4.0}})
    found = exported.values()
    assert found[CAUSES.name, "far", "sequence"] == 5.0
    assert found[OPEN.name, "lru", "level"] == 4.0


def test_a_cause_outside_the_set_is_another_one() -> None:
    exported = Exported(CAUSES)
    exported.series.add({"counters": {"kvplug_refused_total\ttoo near: 12\tsequence": 2.0}})
    assert exported.values()[CAUSES.name, "other", "sequence"] == 2.0


def test_a_histogram_counts_in_the_buckets_and_sums_what_was_measured() -> None:
    exported = Exported(TIMES)
    measured = [0.0001, 0.0009, 0.001, 0.02, 0.1, 0.1, 0.1, 0.5, 20.0, 30.0]
    new, seen = Increments(), TIMES.distribution()
    for value in measured:
        seen.add(value)
        exported.series.add(new.of([TIMES.of(seen)]))
    found = exported.values()
    buckets = {key[1]: n for key, n in found.items() if key[0].endswith("_bucket")}
    assert buckets == {"0.001": 3.0, "0.1": 7.0, "1.0": 8.0, "+Inf": 10.0}
    assert found["kvplug_times_seconds_count",] == 10
    assert found["kvplug_times_seconds_sum",] == pytest.approx(sum(measured))


@pytest.mark.parametrize("values", [[0.1] * 7, [math.nextafter(0.001, 1)] * 3, [1.0] * 49])
def test_a_mean_stays_in_its_bucket_whatever_it_is_rounded_to(values: list[float]) -> None:
    exported, seen = Exported(TIMES), TIMES.distribution()
    for value in values:
        seen.add(value)
    exported.series.add(Increments().of([TIMES.of(seen)]))
    buckets = [n for key, n in exported.values().items() if key[0].endswith("_bucket")]
    counts = [int(n - before) for before, n in pairwise([0.0, *buckets])]
    assert counts == seen.counts


@pytest.mark.parametrize(
    "key", ["", "kvplug_x", "kvplug_refused_total", "kvplug_refused_total\tfar\tformat", "\t"]
)
def test_what_is_no_series_is_left_out(key: str) -> None:
    exported = Exported(CAUSES)
    before = exported.values()
    for part in ("counters", "gauges"):
        exported.series.add({part: {key: 1.0}})
    exported.series.add({"histograms": {key: [[0, 1, 1.0]]}})
    assert exported.values() == before


@pytest.mark.parametrize("amount", [float("nan"), float("inf"), -1.0, 0])
def test_an_amount_that_is_no_increment_is_left_out(amount: Any) -> None:
    exported = Exported(CAUSES)
    exported.series.add({"counters": {"kvplug_refused_total\tfar\tsequence": amount}})
    assert exported.values()[CAUSES.name, "far", "sequence"] == 0.0


def test_what_a_policy_names_is_plain_and_of_a_bounded_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "MAX_OPEN", 10)
    exported = Exported(OPEN)
    names = {f"kvplug_own\tlru\t{i}\n\ud800" + "x" * 1000: 1.0 for i in range(1000)}
    exported.series.add({"gauges": names})
    found = [key[2] for key in exported.values()]
    assert len(found) == 10 and all(len(name) <= 64 and name.isprintable() for name in found)


def test_nothing_is_raised_in_the_servers_output_handler() -> None:
    made, exported = object.__new__(PolicyPromMetrics), Exported(CAUSES)
    made.exposition = exported.series
    for amount in ("1", None, 1.0):
        made.observe({"counters": {"kvplug_refused_total\tfar\tsequence": amount}})
    assert exported.values()[CAUSES.name, "far", "sequence"] == 1.0
    assert made._failed


SEVERAL = """
import os, sys
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from test_metrics import CAUSES, DEPLOYMENT, TIMES
from kvplug.hosts.vllm.metrics import Exposition
from kvplug.observe.metric import Metric, Type

LEVEL = Metric("kvplug_level", Type.GAUGE, "L.")
STILL = Metric("kvplug_still", Type.GAUGE, "S.")
STEPS = [
    {"counters": {"kvplug_refused_total\\tfar\\tsequence": 2.0}, "gauges": {"kvplug_level": 9.0}},
    {"counters": {"kvplug_refused_total\\tfar\\tsequence": 3.0}, "gauges": {"kvplug_level": 4.0},
     "histograms": {"kvplug_times_seconds": [[1, 2, 0.1]]}},
]
for increments in STEPS:
    if os.fork() == 0:
        types = {one: one for one in (Counter, Gauge, Histogram)}
        labels = ["model_name", "engine"]
        made = Exposition((CAUSES, TIMES, LEVEL, STILL), DEPLOYMENT, types, labels, {0: ["m", "0"]})
        made.add(increments)
        os._exit(0)
    os.wait()
registry = CollectorRegistry()
MultiProcessCollector(registry)
sys.stdout.write(generate_latest(registry).decode())
"""


def test_several_api_servers_add_up_counters_and_show_the_latest_level(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], env=environment, capture_output=True, text=True, check=True
    )
    found = {
        (
            one.name,
            *[v for k, v in sorted(one.labels.items()) if k not in ("engine", "model_name")],
        ): one.value
        for family in text_string_to_metric_families(done.stdout)
        for one in family.samples
    }
    assert found["kvplug_refused_total", "far", "sequence"] == 5.0
    assert found["kvplug_refused_total", "other", "prefix_cache"] == 0.0
    assert found["kvplug_level",] == 4.0
    assert found["kvplug_still",] == 0.0, "a gauge that nobody has set is there"
    assert found["kvplug_times_seconds_count",] == 2
    assert found["kvplug_times_seconds_sum",] == pytest.approx(0.1)


def leave() -> None:
    sys.exit(1)


def cancel() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("fail", [leave, cancel])
def test_an_observer_that_fails_hears_no_more_and_the_others_do(fail: Any) -> None:
    events = Events(Deployment("inline", {}))
    heard: list[Event] = []
    asked: list[Event] = []

    def broken(event: Event) -> None:
        asked.append(event)
        fail()

    events._observers = {"broken": broken, "good": lambda event: heard.append(event)}
    for _ in range(3):
        events.add(EventType.EVICTED, Kind.PREFIX_CACHE)
        events.emit()
    assert (len(asked), len(heard)) == (1, 3)


def test_each_plugin_gets_reports_of_its_own_when_the_engine_stops() -> None:
    reports = [PolicyReport("prefix_cache", "lru", True, counters={"a": 1.0})]
    seen: list[int] = []

    def emptying(reports: list[PolicyReport]) -> None:
        seen.append(len(reports))
        reports[0].counters.clear()
        reports.clear()
        leave()

    hook = "kvplug_engine_stopping"
    failed = call_each({"one": emptying, "two": emptying}, hook, reports=reports)
    assert (failed, seen) == (["one", "two"], [1, 1])
    assert reports[0].counters == {"a": 1.0}
    assert call_each({}, hook, engine=EngineView(block_size=16)) == []
