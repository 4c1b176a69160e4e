"""The guard's shadow in the scheduler, with requests that a test makes up; no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from kvplug.contract import EngineView
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.messages import ShadowReport
from kvplug.hosts.vllm.scheduler import shadow as module
from kvplug.hosts.vllm.scheduler.kind import Answer, SchedulerContext
from kvplug.hosts.vllm.scheduler.shadow import LATE, ShadowWatch
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.hosts.vllm.shadow_orders import ASK, NUMBER, STOP
from kvplug.parser import load_deployment
from kvplug.request_options import RequestOptions
from kvplug.shadow.states import ShadowResult, ShadowState

ENGINE = "shadow-test"
LEFT = ((1, 2), (-0.01, -4.7))
"""Likeliest tokens of a distribution, and of one far from it."""
RIGHT = ((3, 4), (-0.01, -4.7))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A scheduler's shadow, its requests and what their workers would report."""

    def __init__(self, sections: Any = None, **settings: Any):
        self.clock = Clock()
        shadow = {"one_in": 1, "max_divergence": 0.05, "tokens": 4} | settings
        section = (sections or {"sequence": "sink_window"}) | {"guard": {"shadow": shadow}}
        deployment = load_deployment(section)
        assert deployment.guard is not None and deployment.guard.shadow is not None
        config = SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id=ENGINE))
        events: Any = SimpleNamespace(add=lambda *a, **k: self.events.append(k["detail"]))
        context = SchedulerContext(
            deployment, config, EngineView(block_size=32, max_model_len=100), events, Slots()
        )
        self.events: list[str] = []
        self.watch = ShadowWatch(deployment.guard.shadow, context, self.clock)
        self.options: dict[str, RequestOptions] = {}

    def add(self, name: str, params: Any = None, options: Any = None, **more: Any) -> Any:
        params = params or SamplingParams(max_tokens=10)
        request = SimpleNamespace(
            request_id=name,
            sampling_params=params,
            kv_transfer_params=(params.extra_args or {}).get("kv_transfer_params"),
            cache_salt="mine",
            lora_request=None,
            mm_features=[],
            prompt_embeds=None,
            num_prompt_tokens=8,
            all_token_ids=list(range(100, 108)),
            num_computed_tokens=0,
        )
        vars(request).update(more)
        self.options[name] = self.watch.on_new_request(request, options or RequestOptions())
        return request

    def end(self, request: Any, answer: list[int], exact: bool) -> Answer:
        request.all_token_ids = [*request.all_token_ids, *answer]
        request.num_computed_tokens = len(request.all_token_ids) - 1
        said = Answer(exact=exact)
        self.watch.finished(request, said)
        return said

    def report(self, request: Any, kind: Any, count: int) -> None:
        self.watch.on_report(ShadowReport([(request.request_id, *kind)] * count))

    def serve(self, name: str, *, exact: bool = False, answer: Any = (1, 2, 3, 4, 5)) -> Answer:
        """A user's request from its beginning to its end."""
        request = self.add(name)
        self.report(request, LEFT, len(answer) - 1)
        return self.end(request, list(answer), exact)

    def send(self, order: Any, name: str = "shadow") -> Any:
        """What the server sends for an order."""
        params = SamplingParams(
            max_tokens=order["tokens"],
            extra_args={"kv_transfer_params": {NUMBER: order[ASK]}},
        )
        return self.add(name, params)

    def shadow(self, kind: Any, exact: bool = True, answer: Any = None) -> None:
        """The shadow that is asked for now, from its beginning to its end."""
        order = self.watch.orders()
        assert order is not None
        request = self.send(order)
        given = compat.shadow_answers(request.sampling_params, ENGINE)
        assert given is not None and len(given) == order["tokens"]
        self.report(request, kind, len(given) - 1)
        self.end(request, list(given if answer is None else answer), exact)


def test_an_approximate_answer_is_answered_again_exactly_and_compared() -> None:
    scene = Scene()
    scene.serve("a")
    order = scene.watch.orders()
    assert order is not None
    assert np.frombuffer(order["prompt"], dtype=np.int32).tolist() == list(range(100, 108))
    assert (order["tokens"], order["salt"]) == (4 + LATE, "mine")
    assert scene.watch.orders() is None, "one at a time"
    request = scene.send(order)
    assert scene.watch.is_of("shadow") and not scene.watch.is_of("a")
    assert scene.options["shadow"].model_dump(exclude={"segments", "session_id"}) == {
        "sequence": "off",
        "reuse": "off",
        "attention": "exact",
        "store": False,
        "missed": False,
    }
    given = compat.shadow_answers(request.sampling_params, ENGINE)
    assert given == (1, 2, 3, 4, 4, 4)
    scene.report(request, LEFT, 2)
    scene.report(request, RIGHT, 2)
    scene.end(request, [*given], True)
    assert scene.watch.results == {ShadowResult.COMPARED: 1}
    found = scene.watch.divergences
    assert (found.count, found.sum) == (1, pytest.approx(0.5, abs=0.01))
    assert scene.watch.orders() is None


def test_harm_makes_new_requests_exact_and_says_so() -> None:
    scene = Scene()
    served = 0
    while scene.watch.control.state is ShadowState.FULL and served < 20:
        assert scene.serve(f"r{served}").fields == {}
        scene.shadow(RIGHT)
        served += 1
    assert served < 8
    assert scene.events == [
        f"exact: new requests are exact, for 600 s ({served} answers again, mean divergence "
        f"{scene.watch.divergences.sum / served:.3f}, bound 0.05)"
    ]
    said = scene.serve("next", exact=True)
    assert scene.options["next"].sequence == "off"
    assert said.as_params() == {"kvplug": {"exact": True, "guard": "exact"}}
    assert scene.watch.orders() is None
    scene.clock.now = 600
    for i in range(100):
        scene.serve(f"later{i}", exact=True)
    assert scene.watch.control.state is ShadowState.CAUTIOUS
    kept = [scene.options[f"later{i}"].sequence for i in range(100)]
    assert 2 < kept.count("on") < 30


def test_without_harm_nothing_changes() -> None:
    scene = Scene()
    for i in range(300):
        scene.serve(f"r{i}")
        scene.shadow(LEFT)
    assert scene.watch.control.state is ShadowState.FULL
    assert (scene.events, scene.watch.made_exact) == ([], 0)
    assert (scene.watch.divergences.count, scene.watch.divergences.sum) == (300, 0.0)


def test_only_what_could_be_approximate_is_made_exact() -> None:
    both = {
        "sequence": "sink_window",
        "reuse": {"use": ["structure", "position"], "approximate": True},
    }
    scene = Scene(both)
    while scene.watch.control.state is ShadowState.FULL:
        scene.serve("a")
        scene.shadow(RIGHT)
    asked = RequestOptions(reuse="approximate", sequence="off")
    scene.add("b", options=asked)
    assert scene.options["b"] == RequestOptions(reuse="exact", sequence="off")
    exact = RequestOptions(reuse="off", sequence="off")
    scene.add("c", options=exact)
    assert scene.options["c"] is exact
    assert scene.watch.made_exact == 1


def test_it_waits_for_idle_and_yields_to_traffic() -> None:
    scene = Scene()
    other = scene.add("other")
    scene.serve("a")
    assert scene.watch.orders() is None, "another request runs"
    scene.end(other, [1, 2, 3], True)
    order = scene.watch.orders()
    assert order is not None
    shadow = scene.send(order)
    scene.add("comes")
    assert scene.watch.orders() == {STOP: order[ASK]}
    assert scene.watch.orders() is None
    scene.end(shadow, [1], True)
    assert ShadowResult.COMPARED not in scene.watch.results
    assert scene.watch.orders() is None, "it runs still"


def test_one_that_is_stopped_again_and_again_is_given_up() -> None:
    scene = Scene()
    scene.serve("a")
    for i in range(module.MAX_STOPS):
        order = scene.watch.orders()
        assert order is not None
        shadow = scene.send(order, f"s{i}")
        comes = scene.add(f"comes{i}", options=RequestOptions(sequence="off"))
        assert scene.watch.orders() == {STOP: order[ASK]}
        scene.end(shadow, [], True)
        scene.end(comes, [1, 2, 3], True)
    assert scene.watch.orders() is None
    assert scene.watch.results == {ShadowResult.STOPPED: 1}


def test_one_that_was_stopped_before_it_was_sent_is_asked_for_again() -> None:
    scene = Scene()
    scene.serve("a")
    first = scene.watch.orders()
    assert first is not None
    comes = scene.add("comes", options=RequestOptions(sequence="off"))
    assert scene.watch.orders() == {STOP: first[ASK]}
    scene.end(comes, [1, 2, 3], True)
    assert scene.watch.orders() is None
    scene.clock.now += module.STOP_SECONDS + 1
    scene.watch.orders()
    again = scene.watch.orders()
    assert again is not None and again[ASK] != first[ASK]


def test_beside_others_where_idle_is_off() -> None:
    scene = Scene(idle=False)
    scene.add("other")
    scene.serve("a")
    order = scene.watch.orders()
    assert order is not None
    scene.send(order)
    scene.add("comes")
    assert scene.watch.orders() is None, "it goes on"


@pytest.mark.parametrize("number", ["", "0" * 32, 7, None, ["x"]])
def test_a_client_cannot_send_a_shadow(number: Any) -> None:
    scene = Scene()
    scene.serve("a")
    order = scene.watch.orders()
    assert order is not None
    params = SamplingParams(extra_args={"kv_transfer_params": {NUMBER: number}})
    forged = scene.add("forged", params)
    assert scene.options["forged"].sequence == "on"
    assert compat.shadow_answers(forged.sampling_params, ENGINE) == ()
    used = scene.send(order)
    scene.end(used, [1, 2, 3, 4, 4, 4], True)
    replayed = scene.send(order, "replayed")
    assert compat.shadow_answers(replayed.sampling_params, ENGINE) in ((), None)


@pytest.mark.parametrize(
    ("exact", "shadow_exact", "answer", "said", "result"),
    [
        (True, None, (1, 2, 3), None, ShadowResult.EXACT),
        (False, None, (1,), None, ShadowResult.SHORT),
        (False, False, (1, 2, 3), None, ShadowResult.INEXACT),
        (False, True, (1, 2, 3), [1, 9, 3], ShadowResult.FAILED),
    ],
)
def test_what_cannot_be_compared_is_counted_and_changes_nothing(
    exact: bool, shadow_exact: Any, answer: Any, said: Any, result: ShadowResult
) -> None:
    scene = Scene()
    scene.serve("a", exact=exact, answer=answer)
    if shadow_exact is not None:
        scene.shadow(RIGHT, shadow_exact, said)
    assert scene.watch.results == {result: 1}
    assert scene.watch.control.evidence == 0


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"min_tokens": 2, "max_tokens": 5},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.2},
    ],
)
def test_answers_of_other_distributions_are_not_watched(params: dict[str, Any]) -> None:
    scene = Scene()
    request = scene.add("a", SamplingParams(**params))
    assert compat.shadow_answers(request.sampling_params, ENGINE) is None
    scene.end(request, [1, 2, 3], False)
    assert not scene.watch.results


def test_where_nobody_answers_again_it_stops_asking(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    for i in range(10):
        scene.serve(f"r{i}")
        scene.watch.orders()
        scene.clock.now += module.LOST_SECONDS + 1
        scene.watch.orders()
    assert scene.watch.off
    assert scene.watch.results[ShadowResult.LOST] >= module.MAX_LOST
    scene.serve("later")
    assert scene.watch.orders() is None


def test_what_it_keeps_is_bounded() -> None:
    scene = Scene()
    requests = [scene.add(f"r{i}") for i in range(500)]
    for request in requests:
        scene.report(request, LEFT, 1000)
        scene.end(request, list(range(1000)), False)
    watch = scene.watch
    assert len(watch._waiting) == module.MAX_WATCHED
    assert len(watch._reported) <= 2 * module.MAX_WATCHED
    assert all(len(found) <= 4 for found in watch._reported.values())
    assert not watch._live and not watch._hits and not watch._watched


def test_other_weights_start_over() -> None:
    scene = Scene()
    scene.serve("a")
    order = scene.watch.orders()
    assert order is not None
    shadow = scene.send(order)
    scene.serve("b")
    scene.watch.clear()
    scene.report(shadow, RIGHT, 5)
    scene.end(shadow, [1, 2, 3, 4, 4, 4], True)
    scene.watch.orders()
    assert scene.watch.orders() is None
    assert scene.watch.divergences.count == 0


def test_a_failure_of_its_own_ends_it_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene()
    monkeypatch.setattr(scene.watch.control, "chooses", lambda: 1 / 0)
    options = RequestOptions(reuse="off")
    scene.add("a", options=options)
    assert scene.options["a"] is options
    assert (scene.watch.errors, scene.watch.off) == (1, True)


def test_tokens_of_shadows_and_of_others_are_counted_apart() -> None:
    scene = Scene()
    request = scene.add("a")
    scene.watch.looked_up("a", 5)
    scene.report(request, LEFT, 4)
    scene.end(request, [1, 2, 3, 4, 5], False)
    scene.shadow(LEFT)
    assert (scene.watch.served, scene.watch.computed) == (8 + 4 - 5, 8 + 5)
