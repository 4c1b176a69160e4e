"""The catalogue of metrics: names as Prometheus' users expect them, labels with closed values."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvplug.contract import Kind
from kvplug.observe import catalogue
from kvplug.observe.catalogue import metric
from kvplug.observe.causes import word
from kvplug.observe.metric import (
    RESENT,
    Distribution,
    Increments,
    Metric,
    Named,
    Only,
    Type,
    Values,
    add_increments,
)
from kvplug.parser import load_deployment
from kvplug.plain_text import label

METRICS = list(catalogue.catalogue().values())
UNITS = ("seconds", "bytes", "ratio", "joules", "info", "total")

DEPLOYMENT = load_deployment(
    {
        "prefix_cache": "lru",
        "sequence": "sink_window",
        "tiers": [{"host": {"size": "1MiB"}}, {"device": {"size": "1MiB"}}],
    }
)


@pytest.mark.parametrize("one", METRICS, ids=[m.name for m in METRICS])
def test_a_metric_follows_the_rules_of_names(one: Metric) -> None:
    assert re.fullmatch(r"kvplug(_[a-z0-9]+)+", one.name)
    assert one.name.endswith("_total") == (one.type is Type.COUNTER)
    assert not re.search(r"_(milli|micro|us|ms|kb|mb|mib|percent|count)(_|$)", one.name)
    assert (one.type is Type.HISTOGRAM) == bool(one.buckets)
    assert list(one.buckets) == sorted(set(one.buckets))
    assert one.help.endswith(".") and one.group
    for name, values in one.labels.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert name not in {"le", "engine", "model_name", "quantile", "job", "instance"}
        if isinstance(values, tuple):
            assert values and len(set(values)) == len(values)
            assert all(value and label(value) == value for value in values)


def test_a_name_is_taken_once() -> None:
    one = METRICS[0]
    with pytest.raises(ValueError, match=f"there is a metric {one.name} already"):
        metric(one.name, Type.GAUGE, "Again.", group="x")


def test_a_phrase_becomes_a_word() -> None:
    assert word("Approximate not  allowed: by 3%") == "approximate_not_allowed_by_3"


def made(labels: dict[str, Any], **more: Any) -> Metric:
    return Metric("kvplug_x_total", Type.COUNTER, "X.", labels, **more)


def test_series_are_those_of_the_deployment() -> None:
    named = Named.of(DEPLOYMENT)
    assert named.tiers == ("host", "device")
    assert named.policies == (
        ("prefix_cache", "lru"),
        ("sequence", "sink_window"),
        ("transfer", "raw"),
        ("lifecycle", "watermarks"),
        ("tiers", "host"),
        ("tiers", "device"),
    )
    pairs = made({"kind": Values.KIND, "policy": Values.POLICY, "way": ("in", "out")})
    assert list(pairs.series(named))[:3] == [
        ("prefix_cache", "lru", "in"),
        ("prefix_cache", "lru", "out"),
        ("sequence", "sink_window", "in"),
    ]
    of_tiers = made({"kind": Values.KIND, "policy": Values.POLICY}, kinds=(Kind.TIERS,))
    assert list(of_tiers.series(named)) == [("tiers", "host"), ("tiers", "device")]
    assert list(made({"policy": Values.POLICY}, kinds=(Kind.SEQUENCE,)).series(named)) == [
        ("sink_window",)
    ]
    assert list(made({"tier": Values.TIER}).series(named)) == [("host",), ("device",)]
    assert list(made({"kind": Values.KIND}, kinds=(Kind.TIERS,)).series(named)) == [("tiers",)]
    assert list(made({}).series(named)) == [()]
    assert list(made({"a": ("x", "y"), "name": Values.OPEN}).series(named)) == []


def test_a_metric_is_there_where_its_kind_and_its_condition_are() -> None:
    assert made({}).is_in(DEPLOYMENT)
    assert made({}, kinds=(Kind.FORMAT, Kind.TIERS)).is_in(DEPLOYMENT)
    assert not made({}, kinds=(Kind.FORMAT,)).is_in(DEPLOYMENT)
    guarded = Only("with `guard`", lambda deployment: deployment.guard is not None)
    assert not made({}, only=guarded).is_in(DEPLOYMENT)


# -- increments ------------------------------------------------------------------------------------

COUNTER = made({"cause": ("a", "b")})
GAUGE = Metric("kvplug_y", Type.GAUGE, "Y.")
HISTOGRAM = Metric("kvplug_z_seconds", Type.HISTOGRAM, "Z.", buckets=(1.0, 2.0))


def test_a_counter_travels_as_what_it_grew_by() -> None:
    new = Increments()
    assert new.of([COUNTER.of(0, "a")]) == {}
    assert new.of([COUNTER.of(5, "a"), COUNTER.of(1, "b")]) == {
        "counters": {"kvplug_x_total\ta": 5, "kvplug_x_total\tb": 1}
    }
    assert new.of([COUNTER.of(3, "a")]) == {}, "a Prometheus counter cannot go down"
    assert new.of([COUNTER.of(6, "a")]) == {"counters": {"kvplug_x_total\ta": 1}}
    assert new.of([COUNTER.of(float("nan"), "a"), COUNTER.of(float("inf"), "a")]) == {}


def test_a_gauge_travels_as_its_value_and_falls() -> None:
    new = Increments()
    assert new.of([GAUGE.of(4)]) == {"gauges": {"kvplug_y": 4}}
    assert new.of([GAUGE.of(4)]) == {}
    assert new.of([GAUGE.of(0)]) == {"gauges": {"kvplug_y": 0}}


def test_a_gauge_travels_again_now_and_then() -> None:
    new = Increments()
    found = [new.of([GAUGE.of(4)]) for _ in range(2 * RESENT)]
    again = [i for i, one in enumerate(found, 1) if one == {"gauges": {"kvplug_y": 4}}]
    assert again == [1, RESENT, 2 * RESENT]


def test_a_histogram_travels_as_new_values_of_each_bucket() -> None:
    new, seen = Increments(), HISTOGRAM.distribution()
    for value in (0.5, 1.0, 1.5, 7.0):
        seen.add(value)
    assert (seen.count, seen.sum) == (4, 10.0)
    assert new.of([HISTOGRAM.of(seen)]) == {
        "histograms": {"kvplug_z_seconds": [[0, 2, 1.5], [1, 1, 1.5], [2, 1, 7.0]]}
    }
    assert new.of([HISTOGRAM.of(seen)]) == {}
    seen.add(9.0)
    assert new.of([HISTOGRAM.of(seen)]) == {"histograms": {"kvplug_z_seconds": [[2, 1, 9.0]]}}


def test_later_increments_are_added_to_earlier_ones() -> None:
    into: dict[str, Any] = {"counters": {"a": 1, "b": 2}, "histograms": {"h": [[0, 1, 0.5]]}}
    add_increments(
        into,
        {"counters": {"b": 3, "c": 4}, "gauges": {"g": 5}, "histograms": {"h": [[1, 1, 1.5]]}},
    )
    add_increments(into, {"gauges": {"g": 2}})
    assert into == {
        "counters": {"a": 1, "b": 5, "c": 4},
        "gauges": {"g": 2},
        "histograms": {"h": [[0, 1, 0.5], [1, 1, 1.5]]},
    }


def test_a_distribution_counts_a_bound_in_its_bucket() -> None:
    seen = Distribution((1.0, 2.0))
    for value in (1.0, 2.0, 2.0000001):
        seen.add(value)
    assert seen.counts == [1, 1, 1]
