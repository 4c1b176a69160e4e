"""The scheduler half as a loop over kinds: what a request asks, what is sent and what is answered;
no engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvplug.client_names import session_of
from kvplug.contract import EngineView, Kind, LayerView, PolicyReport
from kvplug.hosts.vllm.messages import (
    FormatReport,
    SequenceReport,
    StepDirectives,
    StepReport,
)
from kvplug.hosts.vllm.scheduler import half as half_module
from kvplug.hosts.vllm.scheduler.events import Events
from kvplug.hosts.vllm.scheduler.format import FormatScheduler
from kvplug.hosts.vllm.scheduler.half import KINDS, SchedulerHalf
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
from kvplug.hosts.vllm.scheduler.sequence import SequenceScheduler
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.hosts.vllm.scheduler.tiers import TiersScheduler
from kvplug.observe.catalogue import STEPS
from kvplug.observe.events import Event, EventType
from kvplug.observe.metric import Sample
from kvplug.parser import load_deployment
from kvplug.request_options import RequestOptions

BLOCK = 32
VIEW = EngineView(
    block_size=BLOCK,
    num_blocks=10,
    max_model_len=1024,
    layers=(LayerView(0, 1, num_kv_heads=2, num_heads=4, head_size=64, dtype="bfloat16"),),
)


@pytest.fixture(scope="module", autouse=True)
def _seeded() -> None:
    init_none_hash(sha256)


def request(name: str = "r", tokens: int = 100, **asked: Any) -> Request:
    extra = {"kv_transfer_params": {"kvplug": asked}} if asked else None
    return Request(
        name,
        list(range(tokens)),
        SamplingParams(max_tokens=4, extra_args=extra),
        None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def output(**spans: tuple[int, int]) -> Any:
    """A scheduler output of some requests, ``name=(start, tokens)``."""
    return SimpleNamespace(
        scheduled_new_reqs=[],
        preempted_req_ids=None,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(spans), num_computed_tokens=[a for a, _ in spans.values()]
        ),
        num_scheduled_tokens={name: n for name, (_, n) in spans.items()},
    )


class Seen(Events):
    """Events that a test looks at."""

    def __init__(self, section: dict[str, Any]):
        super().__init__(load_deployment(section))
        self._observers = {"test": lambda event: self.seen.append(event)}
        self.seen: list[Event] = []

    def named(self) -> list[tuple[str, str | None, str]]:
        self.emit()
        return [(str(e.type), e.kind, e.policy) for e in self.seen]


def context(section: dict[str, Any], **config: Any) -> SchedulerContext:
    deployment = load_deployment(section)
    own = SimpleNamespace(use_v2_model_runner=False, max_concurrent_batches=1, **config)
    return SchedulerContext(deployment, own, VIEW, Seen(section), Slots(), block_bytes=1000)


# -- the half --------------------------------------------------------------------------------------


class Noting(KindScheduler):
    """A kind that writes down its calls."""

    calls: list[tuple[Any, ...]]
    found: int | None = 0
    slots = False

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        self.marked = 0

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        self.calls.append(("new", self.kind, options))

    def matched(self, request: Any, num_local: int) -> int | None:
        self.calls.append(("matched", self.kind))
        return self.found

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        self.calls.append(("step", self.kind, step.number))
        if self.slots:
            self.calls.append(("slots", step.slots))

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        answer.fields[str(self.kind)] = blocks

    def reports(self) -> list[PolicyReport]:
        counters = {"marked": float(self.marked)}
        name = f"own_{self.kind}"
        return [PolicyReport(str(self.kind), name, True, self.marked, own=counters)]


SECTION = {"prefix_cache": "lru", "sequence": "sink_window", "format": "int8"}


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> SchedulerHalf:
    calls: list[tuple[Any, ...]] = []
    kinds = tuple(
        type(f"Noting{of.__name__}", (Noting,), {"kind": of.kind, "calls": calls}) for of in KINDS
    )
    monkeypatch.setattr(half_module, "KINDS", kinds)
    monkeypatch.setattr(half_module, "engine_view", lambda config, num_blocks: VIEW)
    monkeypatch.setattr(half_module, "require_planned", lambda *a: None)
    cache = SimpleNamespace(num_blocks=11, kv_cache_tensors=[SimpleNamespace(size=11 * 70)])
    made = SchedulerHalf(
        load_deployment(SECTION),
        SimpleNamespace(
            speculative_config=None,
            use_v2_model_runner=False,
            observability_config=SimpleNamespace(otlp_traces_endpoint=None),
            model_config=SimpleNamespace(model="m"),
            parallel_config=SimpleNamespace(data_parallel_index=0),
        ),
        cache,
    )
    assert made.kinds[0].context.block_bytes == 70
    return made


def calls(half: SchedulerHalf) -> list[tuple[Any, ...]]:
    one = half.kinds[0]
    assert isinstance(one, Noting)
    return one.calls


def test_only_kinds_with_a_policy_run_and_reuse_comes_first(half: SchedulerHalf) -> None:
    """Format makes a request's cache salt longer, which reuse and tiers take for the user's own;
    attention forgets an ended request, of which reuse must know what was approximated."""
    assert [kind.kind for kind in half.kinds] == ["format", "sequence", "prefix_cache"]
    assert KINDS[:2] == (ReuseScheduler, TiersScheduler)
    own = {kind.kind for kind in half.kinds}
    assert {of.kind for of in KINDS} == {Kind.REUSE, Kind.TIERS, Kind.ATTENTION, *own}


def test_every_kind_receives_the_parsed_options(half: SchedulerHalf) -> None:
    half.on_new_request(request(session_id="anna", sequence="off"))
    options = RequestOptions(session_id=session_of("", "anna"), sequence="off")
    assert calls(half) == [("new", kind.kind, options) for kind in half.kinds]
    assert half.refused == {}


def test_vllms_own_session_id_serves_where_the_options_name_none(half: SchedulerHalf) -> None:
    own = request()
    own.session_id = "engine"
    half.on_new_request(own)
    assert calls(half)[0][2].session_id == session_of("", "engine")
    calls(half).clear()
    named = request(session_id="anna")
    named.session_id = "engine"
    half.on_new_request(named)
    assert calls(half)[0][2].session_id == session_of("", "anna")


def test_whatever_is_refused_is_answered_counted_and_reported(half: SchedulerHalf) -> None:
    seen = Seen(SECTION)
    half._events = seen
    half.on_new_request(request("r", sequence="of", sequnce="off", session_id="anna"))
    assert calls(half)[0][2] == RequestOptions(session_id=session_of("", "anna")), (
        "valid options are kept"
    )
    assert half.refused == {"invalid value": 1, "unknown option": 1}
    unknown = "kvplug_request_options_refused_total\tunknown_option"
    assert half.measurements.increments(False)["counters"][unknown] == 1
    half.on_new_request(request("s", session="anna"))
    assert half.measurements.increments(False) == {"counters": {unknown: 1}}
    assert half.measurements.increments(False) == {}
    assert sorted(seen.named(), key=str) == [
        ("refused", "sequence", "sink_window"),
        ("refused", None, ""),
        ("refused", None, ""),
    ]
    answer = half.finished(request("r"), [])
    assert answer is not None
    refused = answer["kvplug"]["refused"]
    assert set(refused) == {"sequence", "sequnce"}
    assert "did you mean 'sequence'?" in refused["sequnce"]
    answer = half.finished(request("s"), [])
    assert answer is not None
    assert answer["kvplug"]["refused"] == {"session": "unknown option 'session'; use 'session_id'"}
    answer = half.finished(request("r"), [])
    assert answer is not None
    assert "refused" not in answer["kvplug"], "a request that ended is forgotten"


def test_the_first_kind_that_has_something_decides_what_is_matched(half: SchedulerHalf) -> None:
    assert half.matched(request(), 5) == 0
    assert len(calls(half)) == 3
    calls(half).clear()
    half.kinds[1].found = None  # type: ignore[attr-defined]
    assert half.matched(request(), 5) is None
    assert calls(half) == [("matched", "format"), ("matched", "sequence")]


def test_rows_are_sent_only_where_a_kind_names_slots(half: SchedulerHalf) -> None:
    block = SimpleNamespace(block_id=4, is_null=False)
    half._managers = [SimpleNamespace(block_size=BLOCK, req_to_blocks={"r": [block]})]
    assert half.step(output(r=(0, 7))).rows is None
    half.kinds[2].slots = True  # type: ignore[attr-defined]
    rows = half.step(output(r=(7, 1))).rows
    assert rows is not None
    assert rows.tolist() == [[4, 0]]
    assert [c[2] for c in calls(half) if c[0] == "step"] == [1, 1, 1, 2, 2, 2]
    half._managers[0].req_to_blocks["s"] = [block]
    step = output(s=(0, 7))
    step.preempted_req_ids = {"r"}
    rows = half.step(step).rows
    assert rows is not None
    assert rows.tolist() == [[4, 0]], "a preempted request gives its slot back"
    half.finished(request("s"), [])
    assert half._slots.request(0) is None, "a slot is released when its request ends"


def test_answers_of_kinds_are_joined(half: SchedulerHalf) -> None:
    assert half.finished(request(), [3]) == {
        "kvplug": {"exact": True, "format": [3], "sequence": [3], "prefix_cache": [3]}
    }
    assert Answer().as_params() is None
    assert Answer(exact=False).as_params() == {"kvplug": {"exact": False}}
    assert Answer(refused={"a": "b"}).as_params() == {
        "kvplug": {"exact": True, "refused": {"a": "b"}}
    }


def test_reports_follow_the_deployment_and_are_measured(half: SchedulerHalf) -> None:
    assert [r.kind for r in half.reports()] == ["prefix_cache", "sequence", "format"]
    assert half.increments() == {}
    one = half.kinds[1]
    assert isinstance(one, Noting)
    one.marked = 5
    assert half.increments() == {
        "counters": {"kvplug_policy_acts_total\tsequence\town_sequence": 5},
        "gauges": {"kvplug_policy_reported\tsequence\town_sequence\tmarked": 5},
    }
    one.marked = 3
    assert half.increments() == {
        "gauges": {"kvplug_policy_reported\tsequence\town_sequence\tmarked": 3}
    }


def test_measuring_waits_while_requests_are_under_way(half: SchedulerHalf) -> None:
    half.on_new_request(request("r"))
    half.increments()
    half.steps = 7
    half.measurements._due += 1000
    assert half.increments() == {}
    half.finished(request("r"), [])
    assert half.increments() == {"counters": {"kvplug_steps_total": 7}}


def test_what_cannot_be_measured_is_left_out(half: SchedulerHalf, log: list[str]) -> None:
    def samples() -> Iterator[Sample]:
        yield STEPS.of(1000)
        raise LookupError("no such block")

    half.measurements.measured.insert(0, SimpleNamespace(samples=samples))
    half.steps = 1
    assert half.increments() == {"counters": {"kvplug_steps_total": 1}}
    half.steps = 2
    assert half.increments() == {"counters": {"kvplug_steps_total": 1}}
    assert [line for line in log if "LookupError" in line] == [
        "kvplug: SimpleNamespace is not measured any more: LookupError('no such block')"
    ]


@pytest.fixture
def log() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    before = half_module.logger.level
    half_module.logger.addHandler(handler)
    half_module.logger.setLevel(logging.INFO)
    yield found
    half_module.logger.setLevel(before)
    half_module.logger.removeHandler(handler)


def test_the_summary_counts_refused_options_and_comes_once(
    half: SchedulerHalf, log: list[str]
) -> None:
    half.on_new_request(request(reuse="maybe", speed="high"))
    half.stop()
    half.stop()
    assert [line for line in log if "summary after" in line] == [
        "kvplug summary after 0 scheduler steps:"
    ]
    assert log[-1] == "  request options refused: invalid value 1, unknown option 1"


def test_what_fails_in_a_kind_is_contained_counted_and_told_once(log: list[str]) -> None:
    class Failing(Noting):
        kind = Kind.TIERS

    def fails(what: str) -> None:
        raise ValueError(what)

    kind = Failing(context({"prefix_cache": "lru"}))
    assert kind._guarded("matched", 7, lambda: 3) == 3
    assert kind.errors == 0
    assert [kind._guarded("matched", 7, fails, what) for what in ("no", "nor this")] == [7, 7]
    kind._fall_back("on a worker")
    assert kind.errors == 2
    assert log == ["tiers failed in matched: ValueError: no"]
    events = kind.context.events
    assert isinstance(events, Seen)
    events.emit()
    assert [(e.type, e.kind, e.detail) for e in events.seen] == [
        (EventType.FALLEN_BACK, "tiers", "matched: ValueError: no")
    ]


# -- sequence --------------------------------------------------------------------------------------


@pytest.fixture
def sequence(monkeypatch: pytest.MonkeyPatch) -> SequenceScheduler:
    policy = SimpleNamespace(name="sink_window", exact=False, counters=lambda: {"widened": 3})
    monkeypatch.setattr(
        "kvplug.hosts.vllm.scheduler.sequence.engine.sequence_policy", lambda *a: policy
    )
    made = SequenceScheduler(context({"sequence": "sink_window"}))
    made.managers = [SimpleNamespace(block_size=BLOCK)]  # type: ignore[list-item]
    return made


def test_a_request_that_asks_is_exempt_while_it_fits(sequence: SequenceScheduler) -> None:
    off = RequestOptions(sequence="off")
    sequence.on_new_request(request("small"), off)
    sequence.on_new_request(request("large", 320), off)
    sequence.on_new_request(request("other"), RequestOptions())
    events = sequence.context.events
    assert isinstance(events, Seen)
    assert events.named() == [("refused", "sequence", "sink_window")]
    step = SchedulerStep(output(other=(0, 1), small=(0, 1), large=(0, 1)), 1, Slots())
    into = StepDirectives()
    sequence.step(step, into)
    assert into.sequence is not None
    assert into.sequence.exempt is not None
    assert into.sequence.exempt.tolist() == [step.slots["small"]]
    answers = {}
    for name in ("small", "large", "other"):
        answers[name] = Answer()
        sequence.finished(request(name), [], answers[name])
    assert answers["small"] == Answer(fields={"blocks_freed": 0})
    sentence = "the request may need 11 blocks, but the pool has 10"
    assert answers["large"] == Answer(fields={"blocks_freed": 0}, refused={"sequence": sentence})
    assert answers["other"].as_params() is None
    into = StepDirectives()
    later = SchedulerStep(output(other=(1, 1)), 2, Slots())
    sequence.step(later, into)
    assert into.sequence is None
    assert not later.names_slots
    assert (sequence.counters.exempt, sequence.counters.exempt_refused) == (1, 1)


@pytest.mark.parametrize("second", [False, True])
def test_a_streamed_input_keeps_everything_where_it_moves_on(
    monkeypatch: pytest.MonkeyPatch, sequence: SequenceScheduler, second: bool
) -> None:
    """The second runner gives it another slot, where no query of it is remembered."""
    added: list[str] = []
    planner: Any = SimpleNamespace(add=lambda name, tokens: added.append(name))
    monkeypatch.setattr(sequence, "planner", planner)
    sequence.context.vllm_config.use_v2_model_runner = second
    streamed = request("streamed")
    streamed.resumable = True
    sequence.on_new_request(streamed, RequestOptions())
    sequence.on_new_request(request("other"), RequestOptions())
    assert added == (["other"] if second else ["streamed", "other"])
    assert sequence.counters.exempt == int(second)


@pytest.mark.parametrize("second", [False, True])
def test_the_second_runner_learns_before_the_forward_who_keeps_everything(
    sequence: SequenceScheduler, second: bool
) -> None:
    sequence.context.vllm_config.use_v2_model_runner = second
    sequence.on_new_request(request("small"), RequestOptions(sequence="off"))
    for scheduled, named in ((("other", "small"), True), (("other",), False)):
        step = SchedulerStep(output(**dict.fromkeys(scheduled, (0, 1))), 1, Slots())
        into = StepDirectives()
        sequence.step(step, into)
        assert into.names == ({"small": step.slots["small"]} if named else {})
        assert into.before_forward == (second and named)


def test_freed_blocks_are_counted_answered_and_an_event(sequence: SequenceScheduler) -> None:
    for count in (2, 3):
        sequence._on_freed(0, "r", count)
    answer = Answer()
    sequence.finished(request("r"), [], answer)
    assert answer == Answer(False, {"blocks_freed": 5})
    (report,) = sequence.reports()
    assert report.acted == 5
    assert report.counters["freed_bytes"] == 5000
    assert report.counters["requests"] == 1
    assert report.counters["widened"] == 3, "the policy's own counters"
    assert "evictions" not in report.counters, "it decides by position"
    events = sequence.context.events
    assert isinstance(events, Seen)
    events.emit()
    assert [(e.type, e.count) for e in events.seen] == [(EventType.FREED, 2), (EventType.FREED, 3)]


def test_what_workers_report_is_counted_and_a_failure_is_one_event(
    sequence: SequenceScheduler,
) -> None:
    for cause in ("score: no", "score: again"):
        sequence.on_report(StepReport(sequence=SequenceReport(rows=4, evictions=2, failed=cause)))
    sequence.on_report(StepReport())
    assert sequence.counters.rows == 8
    assert sequence.eviction_counters.evictions == 4
    assert sequence.reports()[0].errors == 1
    events = sequence.context.events
    assert isinstance(events, Seen)
    events.emit()
    assert [e.detail for e in events.seen] == ["score: no"]


# -- format ----------------------------------------------------------------------------------------


class Variants:
    """A format of three storage variants, assigned in turn."""

    name = "variants"
    exact = False

    def __init__(self) -> None:
        self.turn = iter([2, 1, 7, 0])
        self.observed: list[list[float]] = []

    def layout(self, layer: LayerView) -> Any:
        return SimpleNamespace(token_bytes=lambda layer: 64)

    def recent(self, layer: LayerView) -> int:
        return 0

    def assignments(self) -> list[str]:
        return ["zero", "one", "two"]

    def assign(self) -> int:
        return next(self.turn)

    def fingerprint(self) -> str:
        return "variants"

    def observe(self, signals: list[float]) -> str:
        self.observed.append(signals)
        return "now two" if len(self.observed) == 1 else ""

    def counters(self) -> dict[str, float]:
        return {"own": 2.0, "both": 1.0}


@pytest.fixture
def format_kind(monkeypatch: pytest.MonkeyPatch) -> FormatScheduler:
    policy = Variants()
    monkeypatch.setattr(
        "kvplug.hosts.vllm.scheduler.format.engine.format_policy", lambda *a: policy
    )
    return FormatScheduler(context({"format": "int8"}))


def test_each_request_is_stored_apart_by_its_assignment(format_kind: FormatScheduler) -> None:
    made = {name: request(name) for name in "abcd"}
    plain = request().block_hashes
    for one in made.values():
        format_kind.on_new_request(one, RequestOptions())
    assert [made[n].cache_salt for n in "abcd"] == [
        f"{len(salt)}:{salt}"
        for salt in (f"kvplug-format:{identity}" for identity in ("two", "one", "zero", "zero"))
    ]
    hashes = {n: tuple(made[n].block_hashes) for n in "abcd"}
    assert len({*hashes.values(), tuple(plain)}) == 4, "a failed assignment is the first one"
    into = StepDirectives()
    step = SchedulerStep(output(b=(0, 5), a=(0, 5)), 1, Slots())
    format_kind.step(step, into)
    assert into.format is not None
    assert into.format.assignments.dtype == np.int32
    assert into.format.assignments.tolist() == [[step.slots["b"], 1], [step.slots["a"], 2]]
    again = StepDirectives()
    format_kind.step(SchedulerStep(output(a=(5, 1)), 2, Slots()), again)
    assert again.format is not None
    assert again.format.assignments.tolist() == [[0, 2]], "kept while the request lives"
    answer = Answer()
    format_kind.finished(made["a"], [], answer)
    assert answer == Answer(False, {"format": "two"})
    assert format_kind.reports()[0].errors == 1
    nobody = StepDirectives()
    format_kind.step(SchedulerStep(output(), 3, Slots()), nobody)
    assert nobody.format is None


def test_what_a_format_could_not_store_leaves_the_prefix_cache(
    format_kind: FormatScheduler,
) -> None:
    evicted: list[set[int]] = []
    format_kind.bind(pages_of(evicted, {"a": [3, 4]}))
    report = FormatReport(tokens=1, errors=1, unwritten={3})
    report.merge(FormatReport(tokens=1, unwritten={5}))
    format_kind.on_report(StepReport(format=report))
    format_kind.on_report(StepReport(format=FormatReport(tokens=1)))
    assert evicted == [{3, 5}]
    answer = Answer()
    format_kind.finished(request("a"), [], answer)
    assert "blocks_not_stored" not in answer.fields, "vLLM has taken the step back"


def pages_of(evicted: list[set[int]], *groups: dict[str, list[int]]) -> SimpleNamespace:
    managers = [
        SimpleNamespace(
            req_to_blocks={
                name: [SimpleNamespace(block_id=block) for block in blocks]
                for name, blocks in group.items()
            }
        )
        for group in groups
    ]
    coordinator = SimpleNamespace(single_type_managers=managers)
    return SimpleNamespace(evict_blocks=evicted.append, coordinator=coordinator)


@pytest.mark.parametrize("ahead", [True, False])
def test_an_answer_computed_without_what_could_not_be_stored_says_so(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    policy = Variants()
    policy.exact = True
    monkeypatch.setattr(
        "kvplug.hosts.vllm.scheduler.format.engine.format_policy", lambda *a: policy
    )
    given = context({"format": "int8"})
    given.vllm_config.max_concurrent_batches = 2 if ahead else 1
    kind = FormatScheduler(given)
    groups = [{"a": [3, 4, 5], "b": [6]}]
    kind.bind(pages_of([], *(groups if ahead else [*groups, {"c": [7]}])))
    kind.on_report(StepReport(format=FormatReport(unwritten={3, 5, 7})))
    kind.on_report(StepReport(format=FormatReport(unwritten={4})))
    said = {}
    for name in "abc":
        answer = Answer()
        kind.finished(request(name), [], answer)
        said[name] = (answer.exact, answer.fields.get("blocks_not_stored"))
    assert said == {"a": (False, 3), "b": (True, None), "c": (ahead, None if ahead else 1)}


def test_a_formats_signals_and_counters_come_from_both_processes(
    format_kind: FormatScheduler,
) -> None:
    report = FormatReport(tokens=5, counters={"both": 4.0, "worker": 3.0}, signals=[1.0])
    format_kind.on_report(StepReport(format=report))
    format_kind.on_report(StepReport(format=FormatReport(tokens=1, errors=2, failed="attend: no")))
    format_kind.on_report(StepReport(format=FormatReport(failed="attend: again", signals=[2.0])))
    (found,) = format_kind.reports()
    assert (found.acted, found.errors) == (6, 2)
    assert found.counters == {
        "tokens": 6,
        "bytes_per_token": 64,
        "stock_bytes_per_token": 512,
        "own": 2.0,
        "both": 4.0,
        "worker": 3.0,
    }
    events = format_kind.context.events
    assert isinstance(events, Seen)
    events.emit()
    assert [(e.type, e.detail) for e in events.seen] == [
        (EventType.ADJUSTED, "now two"),
        (EventType.FALLEN_BACK, "attend: no"),
    ]


def test_counters_of_a_policy_that_fails_to_give_them_are_left_out(
    sequence: SequenceScheduler,
) -> None:
    asked = []

    def counters() -> dict[str, float]:
        asked.append(1)
        raise RuntimeError("no")

    sequence.policy.counters = counters  # type: ignore[method-assign]
    for _ in range(2):
        assert "widened" not in sequence.reports()[0].counters
    assert len(asked) == 1, "it is not asked again"
