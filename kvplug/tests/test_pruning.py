"""When tokens are evicted and which survive, against a request that is walked block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvplug.contract import EngineView, LayerView, ResidentView, ScoringPolicy
from kvplug.hosts.pruning import Eviction, EvictionPlan, Layout, Limits, choose, keep_best, layout

INF, NAN = math.inf, math.nan
LOWEST = torch.finfo(torch.float32).min

quick = settings(deadline=None, max_examples=150)


@st.composite
def some_limits(draw: st.DrawFn, whole: bool = False) -> Limits:
    """Limits as a policy may set them; `whole` for budgets in tokens only."""
    size = draw(st.sampled_from([1, 16, 32]))
    interval = draw(st.integers(1, 5))
    parts = st.floats(0.01, 1.0)
    tokens = st.integers(1, 12 * size)
    return Limits(
        block_size=size,
        budget=draw(tokens if whole else st.one_of(tokens, parts)),
        share=draw(st.sampled_from([0.05, 0.5, 1.0, 1.5, 3.0])),
        always=draw(st.integers(0, 2 * size)),
        interval=interval,
        protected=draw(st.integers(interval, interval + 6)),
        prefill_limit=draw(st.one_of(st.just(0), st.integers(1, 40))),
    )


texts = st.tuples(st.integers(1, 1200), st.integers(0, 1200))
"""Tokens of a prompt, and generated after it."""


def walk(plan: EvictionPlan, total: int) -> tuple[list[tuple[Eviction, Layout, set[int]]], int]:
    """Every eviction with its layout and the blocks before it, tracked by hand; and the most blocks
    that a text of ``total`` tokens ever had."""
    plan.until(total)
    shared, size = plan.limits.protected, plan.limits.block_size
    found = []
    held: set[int] = set()
    written, most = 0, 0
    last: Eviction | None = None
    for cut in plan.evictions:
        filled = -(-cut.at // size)
        held |= set(range(written, filled))
        most = max(most, len(held))
        lay = layout(last, cut, shared, size)
        found.append((cut, lay, set(held)))
        held -= set(lay.blocks[lay.survivors : lay.candidates])
        written, last = filled, cut
    held |= set(range(written, -(-total // size)))
    return found, max(most, len(held))


# -- evictions -------------------------------------------------------------------------------------


def cuts(limits: Limits, prompt: int, total: int) -> list[tuple[int, ...]]:
    plan = EvictionPlan(limits, prompt)
    plan.until(total)
    return [(c.at, c.end, c.kept, c.grown) for c in plan.evictions]


@pytest.mark.parametrize(
    ("prompt", "total", "expected"),
    [
        pytest.param(
            1000,
            1300,
            [(1000, 31, 8, 0), (1120, 35, 8, 0), (1248, 39, 8, 0)],
            id="at its end and every interval",
        ),
        pytest.param(992, 1120, [(992, 31, 8, 0), (1120, 35, 8, 0)], id="whole blocks"),
        pytest.param(384, 384, [(384, 12, 8, 0)], id="as soon as survivors have room"),
        pytest.param(383, 512, [(384, 12, 8, 0), (512, 16, 8, 0)], id="one token too few"),
        pytest.param(1, 383, [], id="a short text"),
    ],
)
def test_where_a_request_is_cut(prompt: int, total: int, expected: list[tuple[int, ...]]) -> None:
    """Eight blocks of 32, of which four are protected; four between two evictions."""
    assert cuts(Limits(32, 256, 1, 36, 4, 4), prompt, total) == expected


def test_where_a_long_prompt_is_cut() -> None:
    """At its limit of 40 blocks it is pruned to what leaves room for a quarter of them beside the
    protected ones; at its end it is pruned to its budget."""
    assert cuts(Limits(32, 256, 1, 36, 4, 4, prefill_limit=40), 3000, 3104) == [
        (1280, 40, 26, 0),
        (1728, 54, 26, 0),
        (2176, 68, 26, 0),
        (2624, 82, 26, 0),
        (3000, 93, 8, 0),
        (3104, 97, 8, 0),
    ]


def test_a_part_of_the_prompt_is_kept() -> None:
    assert cuts(Limits(16, 0.25, 1, 20, 2, 2), 640, 690) == [(640, 40, 10, 0), (672, 42, 10, 0)]
    assert cuts(Limits(16, 0.25, 0.5, 20, 2, 2), 640, 650) == [(640, 40, 5, 0)]
    assert cuts(Limits(16, 0.01, 1, 20, 2, 2), 640, 650) == [(640, 40, 2, 0)], "what always stays"


@given(some_limits(), texts)
@quick
def test_cuts_ascend(limits: Limits, text: tuple[int, int]) -> None:
    prompt, more = text
    plan = EvictionPlan(limits, prompt)
    first = plan.first
    plan.until(prompt + more)
    ats = [c.at for c in plan.evictions]
    assert ats == sorted(set(ats))
    size = limits.block_size
    assert all(c.end == c.at // size > 0 for c in plan.evictions)
    assert [c.end for c in plan.evictions] == sorted(c.end for c in plan.evictions)
    assert plan.first == first == (ats[0] if ats else first)
    assert not ats or ats[-1] <= prompt + more
    after = [c.end for c in plan.evictions if c.at >= prompt]
    assert all(b - a == limits.interval for a, b in pairwise(after))


@given(some_limits(), texts)
@quick
def test_held_before_a_cut_is_what_the_last_one_left_and_what_came_since(
    limits: Limits, text: tuple[int, int]
) -> None:
    prompt, more = text
    for cut, lay, held in walk(EvictionPlan(limits, prompt), prompt + more)[0]:
        check_layout(cut, lay, held, limits)
        assert cut.grown == 0


def check_layout(cut: Eviction, lay: Layout, held: set[int], limits: Limits) -> None:
    size = limits.block_size
    assert len(set(lay.blocks)) == len(lay.blocks)
    assert set(lay.blocks) == held
    assert set(lay.blocks[: lay.candidates]) == {b for b in held if b < cut.end}
    survivors = lay.blocks[: lay.survivors]
    assert lay.survivors == cut.blocks == len(survivors) <= lay.candidates
    assert survivors == (
        *range(limits.protected, limits.protected + cut.kept),
        *range(cut.end - cut.grown, cut.end),
    )
    assert min(survivors) >= limits.protected, "a survivor in a block that others read"
    others = lay.blocks[lay.survivors : lay.candidates]
    assert list(others) == sorted(others)
    partly = cut.at % size
    assert lay.tokens == len(held) * size - (size - partly if partly else 0)


@given(some_limits(), texts)
@quick
def test_what_is_held_stays_within_what_admission_counts_on(
    limits: Limits, text: tuple[int, int]
) -> None:
    prompt, more = text
    plan = EvictionPlan(limits, prompt)
    most = walk(plan, prompt + more)[1]
    if limits.prefill_limit:
        assert most <= plan.prefill_limit + 1
        assert most <= max(limits.prefill_limit + 1, limits.most(prompt + more))
    elif prompt < plan.first:
        assert most <= limits.most(prompt + more)


@given(some_limits(), texts)
@quick
def test_every_cut_frees_or_has_freed(limits: Limits, text: tuple[int, int]) -> None:
    """No decision is made for nothing."""
    prompt, more = text
    for cut, lay, _ in walk(EvictionPlan(limits, prompt), prompt + more)[0]:
        assert lay.candidates > cut.blocks


@given(some_limits(whole=True), st.data())
@quick
def test_a_text_within_the_budget_is_never_cut_whatever_the_share(
    limits: Limits, data: st.DataObject
) -> None:
    assert isinstance(limits.budget, int)
    prompt = data.draw(st.integers(1, limits.budget))
    plan = EvictionPlan(limits, prompt)
    plan.until(limits.budget)
    assert plan.evictions == []
    assert plan.first > limits.budget


@given(some_limits(), texts)
@quick
def test_a_cut_keeps_its_budget(limits: Limits, text: tuple[int, int]) -> None:
    """Blocks of the share of the budget, never fewer than what always stays; inside a prompt as
    many or more."""
    prompt, more = text
    plan = EvictionPlan(limits, prompt)
    plan.until(prompt + more)
    whole = limits.budget if isinstance(limits.budget, int) else limits.budget * prompt
    for cut in plan.evictions:
        assert cut.kept * limits.block_size >= limits.always
        assert cut.kept * limits.block_size >= whole * limits.share
        if cut.at >= prompt:
            tokens = max(math.ceil(whole * limits.share), limits.always, 1)
            assert (cut.kept - 1) * limits.block_size < tokens


# -- budgets that change ---------------------------------------------------------------------------


def sizes(*blocks: int) -> tuple[Callable[[int], int], list[int]]:
    """A resize that returns these, and the arguments of its calls."""
    answers = iter(blocks)
    asked: list[int] = []

    def resize(before: int) -> int:
        asked.append(before)
        return next(answers, before)

    return resize, asked


def test_a_budget_grows_at_the_end_and_shrinks_at_both() -> None:
    resize, asked = sizes(10, 5, 7, 100, 0)
    plan = EvictionPlan(Limits(32, 256, 1, 36, 4, 4), 1000, resize)
    plan.until(1632)
    assert [(c.at, c.end, c.kept, c.grown) for c in plan.evictions] == [
        (1000, 31, 8, 0),
        (1120, 35, 8, 2),
        (1248, 39, 5, 0),
        (1376, 43, 5, 2),
        (1504, 47, 5, 6),
        (1632, 51, 2, 0),
    ], "what was given back cannot be had again, and what always stays does"
    assert asked == [8, 10, 5, 7, 11]


def test_a_prompts_own_cuts_are_not_resized() -> None:
    resize, asked = sizes(9)
    plan = EvictionPlan(Limits(32, 256, 1, 36, 4, 4, prefill_limit=40), 3000, resize)
    plan.until(3000)
    assert asked == []
    assert plan.evictions[-1].kept == 8
    plan.until(3104)
    assert asked == [8]


def test_the_first_cut_of_a_short_prompt_is_resized_within_what_is_held() -> None:
    for blocks, kept in ((3, 3), (50, 8), (0, 2)):
        plan = EvictionPlan(Limits(32, 256, 1, 36, 4, 4), 100, sizes(blocks)[0])
        plan.until(384)
        assert plan.evictions == [Eviction(384, 12, kept)]


@given(some_limits(), texts, st.lists(st.integers(-4, 40), max_size=30))
@quick
def test_resizing_never_names_a_block_that_was_given_back(
    limits: Limits, text: tuple[int, int], wishes: list[int]
) -> None:
    prompt, more = text
    resize, asked = sizes(*wishes)
    plan = EvictionPlan(limits, prompt, resize)
    found, most = walk(plan, prompt + more)
    for cut, lay, held in found:
        check_layout(cut, lay, held, limits)
        assert cut.blocks * limits.block_size >= limits.always
    if limits.prefill_limit:
        assert most <= plan.prefill_limit + 1, "whatever the policy asks for"
    assert len(asked) == sum(cut.at > prompt for cut in plan.evictions)
    before = [plan.kept, *(cut.blocks for cut in plan.evictions)]
    assert asked == [b for b, cut in zip(before, plan.evictions, strict=False) if cut.at > prompt]


# -- asking a plan ---------------------------------------------------------------------------------


def seeds(first: int) -> Callable[[int], int]:
    """A resize that answers by how often it was asked, as a host's would."""
    state = [first]

    def resize(before: int) -> int:
        state[0] = (state[0] * 1103515245 + 12345) % (1 << 31)
        return before + state[0] % 7 - 3

    return resize


@given(some_limits(), texts, st.lists(st.integers(0, 2400), max_size=8), st.integers(0, 99))
@quick
def test_until_is_monotone_and_idempotent(
    limits: Limits, text: tuple[int, int], stops: list[int], seed: int
) -> None:
    prompt = text[0]
    plan = EvictionPlan(limits, prompt, seeds(seed) if seed % 2 else None)
    whole = EvictionPlan(limits, prompt, seeds(seed) if seed % 2 else None)
    whole.until(2400)
    furthest = 0
    for stop in stops:
        before = list(plan.evictions)
        plan.until(stop)
        furthest = max(furthest, stop)
        assert plan.evictions[: len(before)] == before
        assert plan.evictions == [c for c in whole.evictions if c.at <= furthest]
        again = list(plan.evictions)
        plan.until(stop)
        assert plan.evictions == again


@given(some_limits(), texts, st.lists(st.integers(1, 300), min_size=1, max_size=12))
@quick
def test_between_says_what_is_in_force_and_what_comes(
    limits: Limits, text: tuple[int, int], steps: list[int]
) -> None:
    prompt = text[0]
    plan, whole = EvictionPlan(limits, prompt), EvictionPlan(limits, prompt)
    whole.until(sum(steps))
    start = 0
    seen = []
    for step in steps:
        end = start + step
        state, made = plan.between(start, end)
        earlier = [c for c in whole.evictions if c.at <= start]
        assert state == (earlier[-1] if earlier else None)
        assert list(made) == [c for c in whole.evictions if start < c.at <= end]
        seen += made
        start = end
    assert seen == whole.evictions, "chunks of any size make the same evictions"


# -- limits ----------------------------------------------------------------------------------------


class Given(ScoringPolicy):
    """Scores that a test gives."""

    name = "given"
    scores: Any = None

    def score(self, held: ResidentView) -> Tensor:
        found: Tensor = self.scores
        return found


def build(**options: Any) -> Given:
    return Given(Given.Options.model_validate(options), EngineView(block_size=16, host="test"))


def limits_of(hold: int = 0, layer: int = 0, **options: Any) -> Limits:
    return Limits.of(build(**options), LayerView(layer, 4), 16, hold)


def test_limits_count_in_whole_blocks() -> None:
    given = limits_of(budget=100, sink=4, recent=30, interval=33, shared=0)
    assert given == Limits(16, 100, 1.0, 34, interval=3, protected=3, prefill_limit=0)
    assert given.kept(1) == given.kept(10_000) == 7
    assert limits_of(budget=100, interval=16, shared=50).protected == 4
    assert limits_of(budget=100, interval=100, shared=50).protected == 7
    assert limits_of(budget=0.5).kept(1000) == 32
    assert limits_of(budget=0.5).kept(0) == 3, "sink and recent"
    assert limits_of(budget=64, layers={"1-2": 2.5}, layer=1).kept(0) == 10
    assert limits_of(budget=1, sink=0, recent=0).kept(0) == 1


def test_a_prompt_is_held_as_the_options_say_else_as_the_host_says() -> None:
    assert limits_of(hold=70).prefill_limit == 70
    assert limits_of(hold=70, prefill=100).prefill_limit == 7
    assert limits_of(hold=70).with_prefill_limit(3) == limits_of(hold=3)


def test_a_share_below_what_always_stays_is_refused() -> None:
    options: dict[str, Any] = {"budget": 200, "sink": 4, "recent": 32, "layers": {"2": 0.15}}
    assert limits_of(layer=1, **options).kept(0) == 13
    with pytest.raises(ValueError, match=r"layer 2 keeps 32 tokens .* sink \+ recent = 36"):
        limits_of(layer=2, **options)
    assert limits_of(layer=2, **options | {"budget": 0.3}).kept(0) == 3


def test_most_is_reached_one_token_before_a_cut() -> None:
    limits = Limits(32, 256, 1, 36, 4, 4)
    assert [limits.most(n) for n in (1, 32, 33, 383, 384)] == [1, 1, 2, 12, 12]
    assert limits.most(100_000) == 12 + 4 + 1


# -- what survives ---------------------------------------------------------------------------------


def held_view(positions: list[list[list[int]]], num_tokens: list[int]) -> ResidentView:
    """Tokens by position, ``[rows, kv_heads, held]``."""
    where = torch.tensor(positions, dtype=torch.int32)
    rows, heads, held = where.shape
    pages = torch.zeros(rows, heads, held, 2)
    return ResidentView(
        layer=LayerView(0, 1, heads, heads, 2),
        scale=1.0,
        softcap=0.0,
        num_tokens=torch.tensor(num_tokens, dtype=torch.int32),
        num_prompt_tokens=torch.tensor(num_tokens, dtype=torch.int32),
        count=held,
        positions=where,
        key_pages=pages,
        value_pages=pages,
        block_table=torch.arange(rows, dtype=torch.int32)[:, None],
    )


def chosen(
    scores: Any,
    positions: list[list[list[int]]],
    num_tokens: list[int],
    candidates: int,
    count: int,
    *,
    sink: int = 0,
    recent: int = 0,
    unwanted: Tensor | None = None,
) -> tuple[Any, Tensor]:
    policy = build(budget=64, sink=sink, recent=recent)
    policy.scores = scores if isinstance(scores, Tensor) else torch.tensor(scores)
    view = held_view(positions, num_tokens)
    keep, used = choose(policy, view, candidates, count, unwanted)
    assert keep.dtype == torch.int32
    assert used.dtype == torch.float32
    assert used.shape == view.positions.shape
    return keep.tolist(), used


LINE = [[[0, 1, 2, 3, 4, 5]]]


def test_the_best_survive_in_order() -> None:
    assert chosen([[[1.0, 5, 3, 2, 4, 9]]], LINE, [6], 6, 3)[0] == [[[1, 4, 5]]]
    assert chosen([[[1.0, 5, 3, 2, 4, 9]]], LINE, [6], 5, 3)[0] == [[[1, 2, 4]]]
    assert chosen([[[1, 5, 3, 2, 4, 9]]], LINE, [6], 5, 3)[0] == [[[1, 2, 4]]], "integers"


def test_sinks_and_recent_ones_survive_whatever_their_score() -> None:
    low = [[[-INF, 9.0, 9, 9, NAN, -1e38]]]
    assert chosen(low, LINE, [6], 6, 4, sink=1, recent=2)[0] == [[[0, 1, 4, 5]]]
    assert chosen(low, LINE, [6], 5, 3, sink=1, recent=2)[0] == [[[0, 1, 4]]]
    scattered = [[[7, 0, 90, 3, 99, 98]]]
    assert chosen(low, scattered, [100], 6, 4, sink=1, recent=2)[0] == [[[1, 2, 4, 5]]]
    assert chosen([[[INF] * 4 + [-1.0, -2.0]]], LINE, [6], 6, 2, recent=2)[0] == [[[4, 5]]]


def test_heads_and_rows_keep_tokens_of_their_own() -> None:
    scores = [[[3.0, 2, 1], [1, 2, 3]], [[2, 3, 1], [2, 1, 3]]]
    where = [[[0, 1, 2], [2, 1, 0]], [[5, 6, 7], [7, 5, 6]]]
    assert chosen(scores, where, [3, 8], 3, 1)[0] == [[[0], [2]], [[1], [2]]]
    assert chosen(scores, where, [3, 8], 3, 1, recent=1)[0] == [[[2], [0]], [[2], [0]]]


def test_nan_and_minus_infinity_are_lowest_and_infinity_is_a_score() -> None:
    keep, used = chosen([[[NAN, -INF, -5.0, INF, 1e30, -3.0]]], LINE, [6], 6, 4)
    assert keep == [[[2, 3, 4, 5]]]
    expected = torch.tensor([[[LOWEST, LOWEST, -5.0, -LOWEST, 1e30, -3.0]]])
    assert torch.equal(used, expected)
    assert chosen([[[NAN] * 6]], LINE, [6], 6, 2)[0] == [[[0, 1]]]
    double = torch.tensor([[[1e300, -1e300, 0, 0, 0, 0]]], dtype=torch.float64)
    assert chosen(double, LINE, [6], 6, 1)[0] == [[[0]]]
    half = torch.tensor([[[NAN, 1, -INF, 2, 0, 0]]], dtype=torch.bfloat16)
    assert chosen(half, LINE, [6], 6, 2)[0] == [[[1, 3]]]


def test_the_unwanted_do_not_survive() -> None:
    """Not even where they are sinks or have the best scores, nor before those without a score."""
    unwanted = torch.tensor([[True, False, True, False, False, True]])
    scores = [[[9.0, NAN, 8, -INF, 1, 7]]]
    assert chosen(scores, LINE, [6], 6, 3, unwanted=unwanted)[0] == [[[1, 3, 4]]]
    assert chosen(scores, LINE, [6], 6, 3, sink=1, unwanted=unwanted)[0] == [[[1, 3, 4]]]
    per_head = torch.tensor([[True, False, False], [False, False, True]])
    two = [[[3.0, 2, 1], [1, 2, 3]]]
    places = [[[0, 1, 2], [0, 1, 2]]]
    assert chosen(two, places, [3], 3, 1, unwanted=per_head)[0] == [[[1], [1]]]


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 6), (1, 1, 7), (2, 1, 6), ()])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"given returned scores of shape .* \(1, 1, 6\)"):
        chosen(torch.zeros(shape), LINE, [6], 6, 3)


class Answering(ScoringPolicy):
    """Answers what a test gives it."""

    name, changes = "answering", ""
    answer: Any = None

    def score(self, resident: ResidentView) -> Any:
        return self.answer(resident)


def answering(answer: Callable[[ResidentView], Any]) -> tuple[Answering, ResidentView]:
    policy = Answering(
        Answering.Options(budget=32, sink=4, recent=8), EngineView(block_size=16, num_blocks=9)
    )
    policy.answer = answer
    return policy, held_view([[[*range(64)]] * 2], [64])


SHAPE = (1, 2, 64)
NO_SCORES: dict[str, Callable[[ResidentView], Any]] = {
    "nothing": lambda held: None,
    "numpy": lambda held: torch.ones(SHAPE).numpy(),
    "a subclass": lambda held: torch.nn.Parameter(torch.ones(SHAPE)),
    "complex": lambda held: torch.ones(SHAPE, dtype=torch.complex64),
    "sparse": lambda held: torch.ones(SHAPE).to_sparse(),
    "elsewhere": lambda held: torch.ones(SHAPE, device="meta"),
}


@pytest.mark.parametrize("what", NO_SCORES)
def test_what_is_no_dense_tensor_of_reals_is_refused(what: str) -> None:
    policy, held = answering(NO_SCORES[what])
    with pytest.raises((TypeError, ValueError)):
        choose(policy, held, 64, 32)


ODD_SCORES: dict[str, Callable[[ResidentView], Any]] = {
    "integers": lambda held: torch.arange(64).expand(SHAPE),
    "flags": lambda held: (torch.arange(64) % 3 == 0).expand(SHAPE),
    "too large": lambda held: torch.full(SHAPE, 1e300, dtype=torch.float64),
    "with a gradient": lambda held: torch.ones(SHAPE, requires_grad=True) * 2,
    "its positions": lambda held: held.positions,
    "moved positions": lambda held: (held.positions.neg_(), torch.zeros(SHAPE))[1],
    "moved lengths": lambda held: (held.num_tokens.add_(100), torch.zeros(SHAPE))[1],
    "moved prompts": lambda held: (held.num_prompt_tokens.add_(100), torch.zeros(SHAPE))[1],
}


@pytest.mark.parametrize("what", ODD_SCORES)
def test_sinks_and_recent_tokens_survive_whatever_a_policy_does_to_what_it_is_shown(
    what: str,
) -> None:
    policy, held = answering(ODD_SCORES[what])
    before = held.positions.clone(), held.num_tokens.clone(), held.num_prompt_tokens.clone()
    keep, scores = choose(policy, held, 64, 32)
    for head in keep[0].tolist():
        assert {*range(4), *range(56, 64)} <= set(head) and len(set(head)) == 32
    assert scores.dtype == torch.float32 and not scores.requires_grad
    after = held.positions, held.num_tokens, held.num_prompt_tokens
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@given(st.data())
@quick
def test_survivors_are_those_of_a_plain_sort(data: st.DataObject) -> None:
    draw = data.draw
    rows, heads, held = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    candidates = draw(st.integers(1, held))
    count = draw(st.integers(1, candidates))
    sink, recent = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    value = st.sampled_from([0.0, 1.0, -1.0, 2.5, INF, -INF, NAN])
    row = st.lists(value, min_size=held, max_size=held)
    spots = st.permutations(range(held + 6))
    scores = [[draw(row) for _ in range(heads)] for _ in range(rows)]
    positions = [[draw(spots)[:held] for _ in range(heads)] for _ in range(rows)]
    tokens = [draw(st.integers(held + 6, held + 9)) for _ in range(rows)]
    policy = build(budget=64, sink=sink, recent=recent)
    view = held_view(positions, tokens)
    clean = torch.nan_to_num(torch.tensor(scores), nan=LOWEST, posinf=-LOWEST, neginf=LOWEST)
    keep = keep_best(policy, view, clean, candidates, count).tolist()
    for r in range(rows):
        for h in range(heads):

            def rank(t: int, r: int = r, h: int = h) -> tuple[bool, float, int]:
                always = positions[r][h][t] < sink or positions[r][h][t] >= tokens[r] - recent
                return not always, 0.0 if always else -float(clean[r, h, t]), t

            best = sorted(range(candidates), key=rank)[:count]
            assert keep[r][h] == sorted(best)
