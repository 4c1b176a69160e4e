"""Wishes that a deployment has nothing for."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.hosts.vllm.scheduler.unmet_options import unmet_options
from kvplug.parser import load_deployment
from kvplug.request_options import Cause, RequestOptions

REUSE = {"reuse": ["structure", "position", "mask"]}


def told(section: dict[str, Any], **asked: Any) -> dict[str, str]:
    refused = unmet_options(RequestOptions(**asked), load_deployment(section))
    assert {one.cause for one in refused.values()} <= {Cause.NOT_MET}
    return {key: one.sentence for key, one in refused.items()}


@pytest.mark.parametrize(
    "asked", [{}, {"reuse": "exact"}, {"reuse": "off"}, {"sequence": "off"}, {"session_id": "a"}]
)
def test_what_any_deployment_meets(asked: dict[str, Any]) -> None:
    assert told({"prefix_cache": "lru"}, **asked) == {}


def test_approximate_reuse_needs_a_deployment_that_allows_it() -> None:
    nothing = {"reuse": "reuse is 'approximate', but the deployment reuses nothing"}
    assert told({"sequence": "sink_window"}, reuse="approximate") == nothing
    section = {"reuse": {"use": REUSE["reuse"]}}
    forbidden = {"reuse": "reuse is 'approximate', which the deployment does not allow"}
    assert told(section, reuse="approximate") == forbidden
    section["reuse"]["approximate"] = True  # type: ignore[call-overload]
    assert told(section, reuse="approximate", segments=(3,)) == {}


def test_other_options_need_their_policy() -> None:
    assert told({}, attention="approximate", segments=(3,)) == {
        "attention": "attention is 'approximate', but the deployment has no such policy",
        "segments": "segments are given, but the deployment reuses nothing",
    }
