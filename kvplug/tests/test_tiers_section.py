"""The tiers of a deployment: names, codecs and orders, and what is refused by key."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.contract import Kind
from kvplug.errors import DeploymentError
from kvplug.parser import load_deployment

NO_TIERS = (
    "kvplug.tiers: must be a list of tiers, fastest first. Fix: write "
    "`tiers: [{host: {size: 8GiB}}, ...]`, or remove it."
)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"tiers": "host"}, NO_TIERS),
        ({"tiers": {"host": {"size": "8GiB"}}}, NO_TIERS),
        ({"tiers": []}, NO_TIERS),
        ({"tiers": [7]}, "kvplug.tiers[0]: is not a tier. Fix: write `NAME: {option: value}`."),
        ({"tiers": [{"host": 7}]}, "kvplug.tiers[0].host: has no options. Fix: write `host: "),
        ({"tiers": ["host"]}, "kvplug.tiers[0].size: is missing."),
        (
            {"tiers": [{"host": {"size": "8 parsecs"}}]},
            "kvplug.tiers[0].host.size: must be a size such as 8GiB",
        ),
        (
            {"tiers": [{"host": {"size": "8GiB", "transfer": "rav"}}]},
            "kvplug.tiers[0].host.transfer: unknown transfer policy 'rav'. Fix: did you mean raw",
        ),
        (
            {"tiers": [{"host": {"size": "8GiB", "order": {"uze": "arc"}}}]},
            "kvplug.tiers[0].host.order: does not name a policy. Fix: write `order: {use: NAME}`.",
        ),
        (
            {"transfer": "raw"},
            "kvplug.transfer: has no effect without tiers. Fix: add e.g. "
            "`tiers: [{host: {size: 8GiB}}]`, or remove transfer.",
        ),
        ({"lifecycle": "watermarks"}, "kvplug.lifecycle: has no effect without tiers."),
        (
            {
                "tiers": [{"host": {"size": "8MiB"}}],
                "lifecycle": {"use": "watermarks", "checkpoint": 5},
            },
            "kvplug.lifecycle.checkpoint: saves KV for the engine's next start, but no tier "
            "outlives the engine. Fix: add e.g. `disk: ",
        ),
        (
            {
                "tiers": [
                    {"disk": {"path": "/nowhere/a", "size": "8MiB"}},
                    {"disk": {"path": ["/nowhere/b", "/nowhere/c/../a"], "size": "8MiB"}},
                ]
            },
            "kvplug.tiers[1].disk: stores in the same place as kvplug.tiers[0].disk. Fix: give",
        ),
        (
            {"tiers": [{"disk": {"path": "/nowhere", "size": "8MiB", "fsync_seconds": 3}}]},
            "kvplug.tiers[0].disk: disk: fsync_seconds needs fsync: interval. Fix: change fsync",
        ),
    ],
)
def test_tiers_are_refused_by_key(section: dict[str, Any], told: str) -> None:
    with pytest.raises(DeploymentError) as caught:
        load_deployment(section)
    assert f"inline: {told}" in str(caught.value)


def test_tiers_have_names_codecs_and_orders() -> None:
    host = {"size": "8GiB"}
    section = {
        "tiers": [
            {"host": host},
            {"host": host | {"transfer": {"use": "raw"}, "order": "arc"}},
        ],
    }
    deployment = load_deployment(section)
    assert [t.name for t in deployment.tiers] == ["host", "host_2"]
    assert [t.codec.policy.name for t in deployment.tiers] == ["raw", "raw"]
    assert [t.order.policy.name for t in deployment.tiers] == ["lru", "arc"]
    assert [str(c.policy.kind) for c in deployment.all()] == [
        "tiers",
        "tiers",
        "transfer",
        "lifecycle",
    ]
    assert deployment.choices[Kind.LIFECYCLE][0].policy.name == "watermarks"
    assert load_deployment({}).tiers == ()


@pytest.mark.parametrize(
    "tier",
    [
        {"redis": {"url": ["redis://:hunter2@127.0.0.1"]}},
        {"redis": {"url": 7, "prefix": ["redis://:hunter2@127.0.0.1"]}},
        {"redis": {"url": {"password": "hunter2"}}},
        {"s3": {"bucket": "b", "region": ["https://me:hunter2@127.0.0.1"]}},
        "redis://:hunter2@127.0.0.1",
        {"redis://:hunter2@127.0.0.1": {}},
    ],
)
def test_a_password_in_a_wrong_place_is_not_printed(tier: Any) -> None:
    with pytest.raises(DeploymentError) as caught:
        load_deployment({"tiers": [tier]})
    assert "hunter2" not in str(caught.value)


def test_tiers_of_different_codecs_may_share_a_place() -> None:
    disk = {"path": "/nowhere", "size": "8MiB"}
    load_deployment({"tiers": [{"disk": disk}, {"disk": disk | {"transfer": "int8"}}]})
