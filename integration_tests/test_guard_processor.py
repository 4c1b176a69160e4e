"""The guard's logits processor, driven by vLLM's own batch updates."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    BatchUpdateBuilder,
    LogitsProcessors,
    MoveDirectionality,
)

from kvplug.hosts.vllm import compat, guard
from kvplug.hosts.vllm.compat import GUARD_MARK
from kvplug.hosts.vllm.guard import GuardProcessor, entropy_and_logprob
from kvplug.hosts.vllm.worker.state import drop_worker_state, worker_state

VOCAB = 50
CONFIG = SimpleNamespace(kv_transfer_config=SimpleNamespace(engine_id="guard-test"))


@pytest.fixture
def state() -> Any:
    drop_worker_state(CONFIG)
    yield worker_state(CONFIG)
    drop_worker_state(CONFIG)


def processor() -> GuardProcessor:
    return GuardProcessor(CONFIG, torch.device("cpu"), False)


def params(name: Any = None, **more: Any) -> SamplingParams:
    made = SamplingParams(**more)
    if name is not None:
        compat.mark_request(SimpleNamespace(request_id=name, sampling_params=made), "guard-test")
    return made


def statistics(logits: Tensor) -> list[tuple[float, float]]:
    """The two numbers of each row, in float64."""
    found = []
    for row in logits.double():
        p = torch.softmax(row, -1)
        p = p[p > 0]
        found.append((float(-(p * p.log()).sum()), float(p.max().log())))
    return found


class Batch:
    """A runner's batch, which calls processors as vLLM's own would."""

    def __init__(self, on: GuardProcessor, seed: int = 0):
        self.on, self.builder = on, BatchUpdateBuilder()
        self.rows: list[tuple[str | None, list[int]] | None] = []
        self.random = random.Random(seed)
        self.expected: list[tuple[str, float, float]] = []
        self.made = 0

    def remove(self, index: int) -> None:
        self.builder.removed_append(index)
        self.rows[index] = None

    def add(self, name: str | None, output: list[int] | None = None) -> None:
        output = [] if output is None else output
        index = self.builder.pop_removed()
        if index is None:
            index = len(self.rows)
            self.rows.append(None)
        self.builder.added.append((index, params(name), [1, 2, 3], output))
        self.rows[index] = (name, output)

    def swap(self, one: int, two: int) -> None:
        self.builder.moved.append((one, two, MoveDirectionality.SWAP))
        self.rows[one], self.rows[two] = self.rows[two], self.rows[one]

    def condense(self) -> None:
        while (empty := self.builder.peek_removed()) is not None:
            last = len(self.rows) - 1
            while last >= 0 and self.rows[last] is None:
                last -= 1
            if last <= empty:
                break
            self.builder.pop_removed()
            self.builder.moved.append((last, empty, MoveDirectionality.UNIDIRECTIONAL))
            self.rows[empty], self.rows[last] = self.rows[last], None
        while self.rows and self.rows[-1] is None:
            self.rows.pop()

    def step(self, unfinished_prompts: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """One forward; prompts named are still being read, so nobody samples from their rows."""
        self.on.update_state(self.builder.get_and_reset(len(self.rows)))
        self.made += 1
        generator = torch.Generator().manual_seed(self.made)
        logits = torch.randn(len(self.rows), VOCAB, generator=generator) * 3
        before = logits.clone()
        assert self.on.apply(logits) is logits
        assert torch.equal(logits, before)
        for row, numbers in zip(self.rows, statistics(logits), strict=True):
            assert row is not None
            name, output = row
            if name in unfinished_prompts:
                continue
            output.append(-1)  # as with async scheduling: only the length is known
            if name is not None:
                self.expected.append((name, *numbers))


def same(found: list[tuple[str, float, float]], expected: list[tuple[str, float, float]]) -> None:
    assert [f[0] for f in found] == [e[0] for e in expected]
    np.testing.assert_allclose(
        [f[1:] for f in found], [e[1:] for e in expected], rtol=1e-4, atol=1e-5
    )


def test_entropy_and_log_probability_are_those_of_the_softmax() -> None:
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(1)) * 5
    logits[2] = 0.0
    logits[3, 1:] = -torch.inf
    logits[4, ::2] = -torch.inf
    found = entropy_and_logprob(logits).T.tolist()
    np.testing.assert_allclose(found, statistics(logits), rtol=1e-4, atol=1e-5)
    assert found[2] == pytest.approx([np.log(VOCAB), -np.log(VOCAB)], rel=1e-5)
    assert found[3] == [0.0, 0.0]


def test_vllm_runs_it_for_greedy_answers_too() -> None:
    made = LogitsProcessors([processor()])
    assert len(made.non_argmax_invariant) == 1 and not made.argmax_invariant


def test_only_marked_requests_are_reported(state: Any) -> None:
    batch = Batch(processor())
    for name in ("a", None, "b"):
        batch.add(name)
    for _ in range(3):
        batch.step()
    batch.on.update_state(None)
    same(state.guard_reports, batch.expected)
    assert {h[0] for h in state.guard_reports} == {"a", "b"} and len(state.guard_reports) == 6


def test_a_step_is_reported_at_the_next(state: Any) -> None:
    batch = Batch(processor())
    batch.add("a")
    batch.step()
    assert state.guard_reports == []
    batch.remove(0)
    batch.condense()
    batch.on.update_state(batch.builder.get_and_reset(0))
    same(state.guard_reports, batch.expected)
    assert len(state.guard_reports) == 1


def test_chunks_of_a_prompt_report_nothing(state: Any) -> None:
    batch = Batch(processor())
    batch.add("long")
    batch.add("short")
    batch.step({"long"})
    batch.step({"long"})
    batch.step()
    batch.on.update_state(None)
    same(state.guard_reports, batch.expected)
    assert [h[0] for h in state.guard_reports] == ["short", "short", "long", "short"]


def test_a_preempted_request_goes_on_where_it_was(state: Any) -> None:
    batch = Batch(processor())
    output: list[int] = []
    batch.add("a", output)
    batch.step()
    batch.remove(0)
    batch.condense()
    batch.on.update_state(batch.builder.get_and_reset(0))
    batch.add("a", output)
    batch.step({"a"})
    batch.step()
    batch.on.update_state(None)
    same(state.guard_reports, batch.expected)
    assert len(state.guard_reports) == 2


@pytest.mark.parametrize("seed", range(20))
def test_requests_are_followed_through_any_batch(seed: int, state: Any) -> None:
    batch, draw = Batch(processor()), random.Random(seed)
    for made in range(60):
        for index in draw.sample(range(len(batch.rows)), draw.randint(0, len(batch.rows) // 2)):
            batch.remove(index)
        for i in range(draw.randint(0, 3)):
            batch.add(draw.choice([None, f"r{made}.{i}"]))
        batch.condense()
        if len(batch.rows) > 1 and draw.random() < 0.5:
            batch.swap(*draw.sample(range(len(batch.rows)), 2))
        batch.step({f"r{made}.0"} if draw.random() < 0.3 else set())
        if draw.random() < 0.2:
            state.guard_reports = list(state.guard_reports)
    batch.on.update_state(None)
    assert len(batch.expected) > 20
    same(state.guard_reports, batch.expected)


def test_a_row_taken_by_an_unmarked_request_is_forgotten(state: Any) -> None:
    on = processor()
    on.update_state(BatchUpdate(1, [], [(0, params("a"), None, [])], []))
    on.update_state(BatchUpdate(1, [], [(0, params(), None, [])], []))
    on.apply(torch.zeros(1, VOCAB))
    on.update_state(None)
    assert state.guard_reports == []


FOREIGN = [3, "", None, ["a"], "victim", b"", b"victim", bytes(16) + b"victim"]


@pytest.mark.parametrize("mark", FOREIGN)
def test_a_mark_that_kvplug_did_not_make_is_ignored(mark: Any, state: Any) -> None:
    """A request could speak in the guard under another request's name."""
    on = processor()
    odd = SamplingParams(extra_args={GUARD_MARK: mark})
    GuardProcessor.validate_params(odd)
    on.update_state(BatchUpdate(1, [], [(0, odd, None, [])], []))
    on.apply(torch.zeros(1, VOCAB))
    on.update_state(None)
    assert state.guard_reports == []
    assert not on.add_request(0, odd)


def test_a_mark_of_another_engine_is_ignored(state: Any) -> None:
    on, made = processor(), SamplingParams()
    compat.mark_request(SimpleNamespace(request_id="a", sampling_params=made), "another-engine")
    assert not on.add_request(0, made)
    assert on.add_request(0, params("a"))


def test_a_failure_ends_the_guard_and_not_the_step(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on, calls = processor(), []

    def broken(logits: Tensor) -> Tensor:
        calls.append(logits)
        raise RuntimeError("no")

    monkeypatch.setattr(guard, "entropy_and_logprob", broken)
    on.update_state(BatchUpdate(1, [], [(0, params("a"), None, [])], []))
    logits = torch.zeros(1, VOCAB)
    for _ in range(3):
        assert on.apply(logits) is logits
        on.update_state(None)
        on.apply_staged_writes()
    assert len(calls) == 1 and state.guard_reports == []
    on.update_state(BatchUpdate(1, ["x"], [], [(0,)]))  # type: ignore[list-item]
    assert not on.add_request(0, params("a"))


def test_a_batch_update_it_cannot_read_ends_it_too(state: Any) -> None:
    on = processor()
    on.update_state(BatchUpdate(1, [], [], [(0,)]))  # type: ignore[list-item]
    on.update_state(BatchUpdate(1, [], [(0, params("a"), None, [])], []))
    on.apply(torch.zeros(1, VOCAB))
    on.update_state(None)
    assert state.guard_reports == []


def test_what_nobody_takes_is_bounded(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_REPORTS", 5)
    batch = Batch(processor())
    batch.add("a")
    batch.add("b")
    for _ in range(6):
        batch.step()
    assert len(state.guard_reports) == 5
    same(state.guard_reports, batch.expected[:5])


def test_numbers_on_their_way_from_a_device_are_not_waited_for(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Any] = []

    class Late(guard._Statistics):
        arrived = False

        def __init__(self, values: Tensor):
            super().__init__(values)
            late.append(self)

        @property
        def ready(self) -> bool:
            return self.arrived

    monkeypatch.setattr(guard, "_Statistics", Late)
    batch = Batch(processor())
    batch.add("a")
    for _ in range(guard.MAX_PENDING + 1):
        batch.step()
    assert state.guard_reports == []
    batch.step()
    assert len(state.guard_reports) == 1, "the oldest is waited for in the end"
    late[3].arrived = True
    batch.on.update_state(None)
    assert len(state.guard_reports) == 2, "and what is behind it stays in order"
    for found in late:
        found.arrived = True
    batch.on.update_state(None)
    same(state.guard_reports, batch.expected)


def test_without_a_connector_it_does_nothing() -> None:
    on = GuardProcessor(SimpleNamespace(kv_transfer_config=None), torch.device("cpu"), False)
    on.update_state(BatchUpdate(1, [], [(0, params("a"), None, [])], []))
    logits = torch.zeros(1, VOCAB)
    assert on.apply(logits) is logits and not on.add_request(0, params("a"))


def test_the_second_runner_is_followed_by_its_slots(state: Any) -> None:
    prefill = np.array([4, 10, 6, 0])
    states = SimpleNamespace(prefill_len=SimpleNamespace(np=prefill))
    on = GuardProcessor(CONFIG, states)
    assert on.add_request(2, params("a"))
    assert on.add_request(1, params("b"))
    assert not on.add_request(0, params())
    expected = []
    lengths = {2: 6, 0: 4, 1: 8}
    for step in range(4):
        order = [[2, 0, 1], [1, 2, 0], [0, 1, 2], [2, 1, 0]][step]
        ctx = SimpleNamespace(
            idx_mapping_np=np.array(order),
            seq_lens_upper_bound_np=np.array([lengths[slot] for slot in order]),
        )
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(step))
        before = logits.clone()
        on.apply_staged_writes()
        assert on.apply(logits, ctx) is logits and torch.equal(logits, before)
        for slot, numbers in zip(order, statistics(logits), strict=True):
            if slot in (1, 2) and lengths[slot] >= prefill[slot]:
                expected.append(({1: "b", 2: "a"}[slot], *numbers))
            lengths[slot] += 1
    on.apply_staged_writes()
    same(state.guard_reports, expected)
    assert [n for n, *_ in expected].count("b") == 2
    # A slot given to a request that nobody watches is not reported any more.
    assert not on.add_request(2, params())
    ctx = SimpleNamespace(idx_mapping_np=np.array([2]), seq_lens_upper_bound_np=np.array([99]))
    on.apply(torch.zeros(1, VOCAB), ctx)
    on.apply_staged_writes()
    assert len(state.guard_reports) == len(expected)


def test_rows_of_drafted_tokens_are_left_alone(state: Any) -> None:
    on = GuardProcessor(CONFIG, SimpleNamespace())
    on.add_request(0, params("a"))
    ctx = SimpleNamespace(idx_mapping_np=np.array([0]), seq_lens_upper_bound_np=np.array([9]))
    on.apply(torch.zeros(3, VOCAB), ctx)
    on.apply_staged_writes()
    assert state.guard_reports == []


def test_both_runners_load_it_by_its_name() -> None:
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    name = "kvplug.hosts.vllm.guard:GuardProcessor"
    assert _load_logitsprocs_by_fqcns([name]) == [GuardProcessor]
    assert loader._load_v2_logitsprocs_by_fqcns([name]) == [GuardProcessor]


def test_in_vllms_own_batch_and_sampler(state: Any) -> None:
    """Greedy requests come, wait, come back and go, in the first runner's batch and sampler."""
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

    batch = InputBatch(
        max_num_reqs=8,
        max_model_len=64,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=VOCAB,
        block_sizes=[16],
        max_num_blocks_per_req=[4],
        logitsprocs=LogitsProcessors([processor()]),
    )
    sampler, draw = Sampler(), random.Random(5)
    waiting: dict[str, CachedRequestState] = {}
    running: dict[str, CachedRequestState] = {}
    expected: list[tuple[str, float, float]] = []
    for step in range(40):
        if step % 2 == 0:
            name = f"r{step}"
            marked = params(name if draw.random() < 0.7 else None, temperature=0.0)
            waiting[name] = CachedRequestState(name, [1, 2], None, marked, None, ([0],), 2, [])
        for name in draw.sample(sorted(running), min(len(running), draw.randint(0, 2))):
            batch.remove_request(name)
            request = running.pop(name)
            if len(request.output_token_ids) < 5:
                waiting[name] = request  # not scheduled in this step
        for name in sorted(waiting)[: 8 - len(running)]:
            running[name] = waiting.pop(name)
            batch.add_request(running[name])
        batch.condense()
        if len(batch.req_ids) > 1 and draw.random() < 0.5:
            batch.swap_states(*draw.sample(range(len(batch.req_ids)), 2))
        batch.refresh_metadata()
        generator = torch.Generator().manual_seed(step)
        logits = torch.randn(len(batch.req_ids), VOCAB, generator=generator) * 3
        numbers = statistics(logits)
        tokens = sampler(logits.clone(), batch.sampling_metadata).sampled_token_ids
        assert torch.equal(tokens[:, 0].long(), logits.argmax(-1))
        for row, name in enumerate(batch.req_ids):
            request = running[name]
            assert request.sampling_params is not None
            request.output_token_ids.append(int(tokens[row, 0]))
            if request.sampling_params.extra_args:
                expected.append((name, *numbers[row]))
    batch.refresh_metadata()
    assert len(expected) > 60
    same(state.guard_reports, expected)


# -- shadows ---------------------------------------------------------------------------------------


def shadow(name: str, answers: tuple[int, ...] = ()) -> SamplingParams:
    made = SamplingParams(temperature=0)
    owner = SimpleNamespace(request_id=name, sampling_params=made)
    compat.mark_shadow(owner, "guard-test", answers)
    return made


def the_likeliest(row: Tensor) -> tuple[tuple[int, ...], list[float]]:
    values, ids = torch.log_softmax(row.double(), -1).topk(guard.LIKELIEST)
    return tuple(ids.tolist()), values.tolist()


def compared(found: list[Any], expected: list[Any]) -> None:
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    for (*_, logprobs), (*_, wanted) in zip(found, expected, strict=True):
        np.testing.assert_allclose(logprobs, wanted, rtol=1e-4, atol=1e-5)


def test_a_shadow_answers_what_it_is_given_and_is_read_before(state: Any) -> None:
    on, outputs = processor(), [[], [], []]  # type: ignore[var-annotated]
    added = [
        (0, shadow("s", (7, 9)), None, outputs[0]),
        (1, shadow("w"), None, outputs[1]),
        (2, params("plain"), None, outputs[2]),
    ]
    expected, answered = [], []
    for step in range(3):
        on.update_state(BatchUpdate(3, [], added, []) if step == 0 else None)  # type: ignore[arg-type]
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(step))
        before = logits.clone()
        assert on.apply(logits) is logits
        assert torch.equal(logits[1:], before[1:]), "only a shadow is changed"
        expected += [("s", *the_likeliest(before[0])), ("w", *the_likeliest(before[1]))]
        answered.append(int(logits[0].argmax()))
        if step < 2:
            assert torch.isfinite(logits[0]).sum() == 1
        else:
            assert torch.equal(logits[0], before[0]), "after the tokens it was given"
        for output in outputs:
            output.append(-1)
    on.update_state(None)
    assert answered[:2] == [7, 9]
    compared(state.likeliest, expected)
    assert len(state.guard_reports) == 9


def test_a_shadow_on_the_second_runner(state: Any) -> None:
    prefill = np.array([4, 6])
    on = GuardProcessor(CONFIG, SimpleNamespace(prefill_len=SimpleNamespace(np=prefill)))
    assert on.add_request(1, shadow("s", (3, 5)))
    assert on.add_request(0, shadow("w"))
    expected, answered = [], []
    for step, length in enumerate([4, 6, 7]):
        ctx = SimpleNamespace(
            idx_mapping_np=np.array([0, 1]), seq_lens_upper_bound_np=np.array([4 + step, length])
        )
        logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(step))
        before = logits.clone()
        on.apply_staged_writes()
        on.apply(logits, ctx)
        assert torch.equal(logits[0], before[0])
        expected.append(("w", *the_likeliest(before[0])))
        if length >= 6:
            expected.append(("s", *the_likeliest(before[1])))
        answered.append(int(logits[1].argmax()))
    on.apply_staged_writes()
    assert answered[1:] == [3, 5]
    compared(state.likeliest, expected)


def test_other_ranks_make_a_shadow_answer_and_report_nothing(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_first_rank", lambda: False)
    on = processor()
    added = [(0, shadow("s", (7,)), None, []), (1, shadow("w"), None, [])]
    on.update_state(BatchUpdate(2, [], added, []))  # type: ignore[arg-type]
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    on.apply(logits)
    assert int(logits[0].argmax()) == 7
    assert torch.equal(logits[1], before[1])
    on.update_state(None)
    assert (state.likeliest, state.guard_reports) == ([], [])


@pytest.mark.parametrize("mark", [b"", bytes(16) + b"\7\0\0\0", "x", None])
def test_a_shadow_that_kvplug_did_not_make_answers_for_itself(mark: Any) -> None:
    made = params("a")
    assert made.extra_args is not None
    made.extra_args[compat.SHADOW_MARK] = mark
    assert compat.shadow_answers(made, "guard-test") is None
    assert compat.shadow_answers(shadow("a", (7,)), "another-engine") is None
    assert compat.shadow_answers(shadow("a", (7, 8)), "guard-test") == (7, 8)
    stolen = params("b")
    stolen.extra_args = {**(stolen.extra_args or {})}
    stolen.extra_args[compat.SHADOW_MARK] = (shadow("a", (7,)).extra_args or {})["kvplug_shadow"]
    assert compat.shadow_answers(stolen, "guard-test") is None


def test_a_clients_marks_are_taken_out() -> None:
    made = shadow("a", (7,))
    made.extra_args = {**(made.extra_args or {}), "mine": 1}
    compat.unmark_request(SimpleNamespace(sampling_params=made))
    assert made.extra_args == {"mine": 1}
