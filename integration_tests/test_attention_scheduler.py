"""Requests that an attention policy may serve, as the scheduler names them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.messages import AttentionReport, StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.attention import AttentionScheduler
from kvplug.hosts.vllm.scheduler.kind import Answer
from kvplug.request_options import RequestOptions

SLOTS = {"a": 3, "b": 1}


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> AttentionScheduler:
    policy = SimpleNamespace(name="memo", exact=False)
    monkeypatch.setattr(engine, "attention_policy", lambda deployment, config: policy)
    events: list[str] = []
    context: Any = SimpleNamespace(
        deployment=None,
        vllm_config=SimpleNamespace(use_v2_model_runner=True),
        events=SimpleNamespace(add=lambda what, kind, **more: events.append(more["detail"])),
        noted=events,
    )
    return AttentionScheduler(context)


def request(name: str, prompt: int = 10, pooling: Any = None) -> Any:
    return SimpleNamespace(request_id=name, num_prompt_tokens=prompt, pooling_params=pooling)


def step(kind: AttentionScheduler, **starts: int) -> list[list[int]]:
    into = StepDirectives()
    kind.step(SimpleNamespace(starts=starts, slots=SLOTS), into)  # type: ignore[arg-type]
    return into.attention.requests.tolist() if into.attention is not None else []


def test_only_requests_that_ask_are_served_and_only_past_their_prompt(
    kind: AttentionScheduler,
) -> None:
    kind.on_new_request(request("a"), RequestOptions(attention="approximate"))
    kind.on_new_request(request("b"), RequestOptions())
    kind.on_new_request(request("c", pooling=object()), RequestOptions(attention="approximate"))
    assert step(kind, a=0, b=0) == []
    assert step(kind, a=9, b=10) == [], "a prompt's last token may be a row of one"
    assert step(kind, a=10, b=11) == [[3, 0]]


def test_a_request_that_starts_over_has_another_owner(kind: AttentionScheduler) -> None:
    kind.on_new_request(request("a"), RequestOptions(attention="approximate"))
    assert step(kind, a=12) == [[3, 0]] == step(kind, a=13)
    assert step(kind, a=0) == []
    assert step(kind, a=12) == [[3, 1]]


def test_an_answer_names_the_policy_and_is_not_exact(kind: AttentionScheduler) -> None:
    kind.on_new_request(request("a"), RequestOptions(attention="approximate"))
    served, other = Answer(), Answer()
    kind.finished(request("a"), [], served)
    kind.finished(request("b"), [], other)
    assert served.as_params() == {"kvplug": {"exact": False, "attention": "memo"}}
    assert other.as_params() is None
    assert step(kind, a=12) == [], "forgotten"


def test_reports_count_and_a_failure_is_said_once(kind: AttentionScheduler) -> None:
    for failed in (None, "attend: ValueError: x", "attend: ValueError: x"):
        kind.on_report(StepReport(attention=AttentionReport(5, failed, {"reused_rows": 2})))
    (report,) = kind.reports()
    assert (report.acted, report.errors) == (15, 1)
    assert report.counters == {"requests": 0, "rows": 15, "reused_rows": 2}
    assert kind.context.noted == ["attend: ValueError: x"]  # type: ignore[attr-defined]
