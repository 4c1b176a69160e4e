"""Laws of sequence policies, and resident tokens to check them with."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvplug.contract import (
    EngineView,
    LayerView,
    ResidentView,
    ScoringPolicy,
    SequencePolicy,
    Window,
)
from kvplug.registry import plugins
from kvplug.testing.laws import LAYERS, PolicyLaws, law

ENGINE = EngineView(block_size=16, num_blocks=64, host="test")


def scoring_policies() -> list[type[ScoringPolicy]]:
    """Every registered scoring policy, third parties' included."""
    return [p for p in plugins().registry if issubclass(p, ScoringPolicy)]


def build(policy: type[ScoringPolicy], **options: object) -> ScoringPolicy:
    """Make a policy for an engine whose layers are not known."""
    return policy(policy.Options.model_validate(options), ENGINE)


def residents(
    keys: Tensor,
    values: Tensor | None = None,
    *,
    page: int = 16,
    positions: Tensor | None = None,
    queries: Tensor | None = None,
    query_positions: Tensor | None = None,
    num_tokens: Tensor | None = None,
    num_prompt_tokens: Tensor | None = None,
    totals: Tensor | None = None,
    layer: LayerView | None = None,
    scale: float | None = None,
) -> ResidentView:
    """A host's view for keys in slot order, ``[rows, kv_heads, held, head_size]``.

    Pages lie in shuffled order between others that are NaN, as is the rest of the last page.
    Positions are 0, 1, ... and queries the latest ones unless given.
    """
    rows, kv_heads, held, head_size = keys.shape
    values = torch.ones_like(keys) if values is None else values
    width = -(-held // page)
    table = torch.randperm(rows * width + 3, generator=torch.Generator().manual_seed(5))
    table = table[: rows * width].reshape(rows, width)

    def pages(content: Tensor) -> Tensor:
        full = content.new_full((rows, kv_heads, width * page, head_size), float("nan"))
        full[:, :, :held] = content
        stored = content.new_full((rows * width + 3, kv_heads, page, head_size), float("nan"))
        stored[table] = full.reshape(rows, kv_heads, width, page, head_size).transpose(1, 2)
        return stored

    if positions is None:
        positions = torch.arange(held).expand(rows, kv_heads, held).contiguous()
    if num_tokens is None:
        num_tokens = positions.amax((1, 2)) + 1
    if queries is not None and query_positions is None:
        count = queries.shape[1]
        query_positions = num_tokens[:, None] - count + torch.arange(count)
        query_positions = query_positions.clamp(min=-1)
    heads = kv_heads if queries is None else queries.shape[2]
    return ResidentView(
        layer=layer or LayerView(0, 4, kv_heads, heads, head_size),
        scale=head_size**-0.5 if scale is None else scale,
        softcap=0.0,
        num_tokens=num_tokens.int(),
        num_prompt_tokens=(num_tokens if num_prompt_tokens is None else num_prompt_tokens).int(),
        count=held,
        positions=positions.int(),
        key_pages=pages(keys),
        value_pages=pages(values),
        block_table=table.int(),
        queries=queries,
        query_positions=None if query_positions is None else query_positions.int(),
        cumulative_attention=totals,
    )


def random_residents(
    policy: ScoringPolicy,
    *,
    rows: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    held: int = 75,
    text: int = 140,
    head_size: int = 8,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    same_tokens: bool = False,
    seed: int = 0,
) -> ResidentView:
    """A request in the middle of its life: each KV head holds its own tokens of the text, in no
    order, the latest 20 of the text among them; the rows' texts end at different positions."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    lengths = text - torch.arange(rows) * 7
    positions = torch.empty(rows, kv_heads, held, dtype=torch.int64)
    for r in range(rows):
        old = int(lengths[r]) - 20
        shared = torch.randperm(old, generator=random)
        for h in range(kv_heads):
            chosen = shared if same_tokens else torch.randperm(old, generator=random)
            kept = torch.cat([chosen[: held - 20], torch.arange(old, old + 20)])
            positions[r, h] = kept[torch.randperm(held, generator=random)]
    case = residents(
        (normal(rows, kv_heads, held, head_size) * 1.5).to(dtype),
        normal(rows, kv_heads, held, head_size).to(dtype),
        page=page,
        positions=positions,
        num_tokens=lengths,
        num_prompt_tokens=lengths - 30 * torch.arange(rows),
        queries=(
            (normal(rows, policy.observation, kv_heads * group, head_size) * 1.5).to(dtype)
            if policy.observation
            else None
        ),
        totals=(normal(rows, kv_heads, held).abs() if policy.wants_cumulative_attention else None),
    )
    return case


def row(held: ResidentView, index: int) -> ResidentView:
    """One row alone."""
    part: dict[str, Any] = {
        f.name: value[index : index + 1]
        for f in fields(held)
        if f.name not in ("key_pages", "value_pages")
        and isinstance(value := getattr(held, f.name), Tensor)
    }
    return replace(held, **part)


def permuted(held: ResidentView, order: Tensor, page: int) -> ResidentView:
    """The same tokens in other slots; ``order[r, h, t]`` is the old held index of slot ``t``."""
    totals = held.cumulative_attention
    wide = order[..., None].expand(-1, -1, -1, held.keys.shape[-1])
    moved = residents(
        held.keys.gather(2, wide),
        held.values.gather(2, wide),
        page=page,
        positions=held.positions.gather(2, order),
        num_tokens=held.num_tokens,
        num_prompt_tokens=held.num_prompt_tokens,
        queries=held.queries,
        query_positions=held.query_positions,
        totals=totals if totals is None else totals.gather(2, order),
        layer=held.layer,
    )
    return moved


def closely(got: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless two tensors of scores are equal but for rounding."""
    torch.testing.assert_close(
        got, expected, rtol=2e-4, atol=1e-5, msg=lambda said: f"{what}: {said}"
    )


class WindowLaws(PolicyLaws):
    """Laws of every sequence policy with a positional rule."""

    policy: ClassVar[type[SequencePolicy]]

    @law("SequencePolicy.window", "Return the positional rule of a layer")
    def test_a_layers_rule_is_a_window(self) -> None:
        policy = self.build()
        for layer in LAYERS:
            rule = policy.window(layer)
            assert isinstance(rule, Window), f"layer {layer.index}: {rule!r}"

    @law("Window", "both\n    sides of the engine evaluate this, so nothing is sent")
    def test_two_objects_of_one_deployment_have_one_rule(self) -> None:
        one, other = self.build(), self.build()
        for layer in LAYERS:
            rules = [one.window(layer), other.window(layer), one.window(layer)]
            assert rules[0] == rules[1] == rules[2], f"layer {layer.index}: {rules}"


class ScoringLaws(PolicyLaws):
    """Laws of every scoring policy.

    Attributes:
        least: Fewest resident tokens that it is held against.
    """

    policy: ClassVar[type[ScoringPolicy]]
    least: int = 1

    def build(self, engine: EngineView = ENGINE, **more: Any) -> Any:
        """Make the policy, by default for an engine whose layers are not known."""
        return super().build(engine, **more)

    @law("ScoringPolicy.score", "Score each resident token, ``[rows, kv_heads, count]`` float")
    def test_scores_are_finite_float32_of_the_held_shape(self) -> None:
        made = self.build()
        for held, (kv_heads, group), dtype in itertools.product(
            (21, 64, 131), ((1, 4), (3, 1), (2, 3)), (torch.float32, torch.bfloat16)
        ):
            case = random_residents(
                made, kv_heads=kv_heads, group=group, held=held, text=held + 60, dtype=dtype
            )
            scores = made.score(case)
            what = f"{held} {dtype} tokens, {kv_heads} KV heads of {group} query heads: scores "
            assert scores.shape == (2, kv_heads, held), f"{what}{list(scores.shape)}"
            assert scores.dtype == torch.float32, f"{what}{scores.dtype}"
            assert bool(scores.isfinite().all()), f"{what}not finite"

    @law("ScoringPolicy.score", "higher scores are kept")
    def test_scores_tell_tokens_apart(self) -> None:
        made = self.build(budget=64)
        scores = made.score(random_residents(made, held=120, text=200, seed=3))
        apart = scores.amax(-1) > scores.amin(-1)
        assert bool(apart.all()), "a KV head of 120 tokens has one score for all of them (seed 3)"

    @law("ScoringPolicy.score", "a request's scores must not depend on its neighbours")
    def test_a_row_scores_alone_as_it_does_beside_others(self) -> None:
        made = self.build()
        for held in (21, 75):
            case = random_residents(made, rows=3, held=held, seed=1)
            together = made.score(case)
            for index in range(3):
                alone = made.score(row(case, index))
                closely(alone, together[index : index + 1], f"{held} tokens, row {index} of 3")

    @law("ResidentView", "each KV head may hold different tokens of the text there")
    def test_slots_do_not_matter(self) -> None:
        made = self.build()
        random = torch.Generator().manual_seed(2)
        for held, page in ((21, 16), (75, 16), (75, 32), (75, 128)):
            case = random_residents(made, held=held, same_tokens=True, seed=2)
            order = torch.stack([torch.randperm(case.count, generator=random) for _ in range(4)])
            order = order.reshape(2, 2, -1)
            moved = made.score(permuted(case, order, page))
            what = f"{held} tokens in pages of {page}, the same ones in other slots"
            closely(moved, made.score(case).gather(2, order), what)

    @law("ScoringPolicy.score", "Deterministic, and row by row")
    def test_scores_are_the_same_twice(self) -> None:
        made = self.build()
        case = random_residents(made, dtype=torch.bfloat16, seed=4)
        assert torch.equal(made.score(case), made.score(case)), "75 tokens, twice (seed 4)"
        assert torch.equal(made.score(case), self.build().score(case)), "by another object (seed 4)"

    @law("ResidentView", "read them, never write them")
    def test_inputs_stay(self) -> None:
        made = self.build()
        case = random_residents(made, dtype=torch.bfloat16, seed=4)
        before = {
            f.name: value.clone()
            for f in fields(ResidentView)
            if isinstance(value := getattr(case, f.name), Tensor)
        }
        made.score(case)
        for name, value in before.items():
            torch.testing.assert_close(
                getattr(case, name),
                value,
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=f"score wrote to {name}",
            )

    @law("ScoringPolicy.score", "Score each resident token")
    def test_few_tokens_are_scored(self) -> None:
        made = self.build()
        case = random_residents(made, held=21, text=30)
        few = permuted(case, case.positions.argsort(-1)[..., -self.least :], 16)
        scores = made.score(few)
        assert scores.shape == (2, 2, self.least), f"{self.least} tokens: {list(scores.shape)}"
        assert bool(scores.isfinite().all()), f"{self.least} tokens: scores are not finite"

    @law("ScoringPolicy.measure", "Measure a decision for the scheduler, ``[rows, n]`` float")
    def test_measurements_are_rows_of_finite_numbers(self) -> None:
        made = self.build()
        case = random_residents(made, rows=3, seed=6)
        scores = made.score(case)
        measured = made.measure(case, scores)
        assert (measured is not None) == made.resizes, f"`measure` gave {measured!r}"
        if measured is None:
            return
        assert measured.ndim == 2, f"`measure` gave {list(measured.shape)}"
        assert bool(measured.isfinite().all()), "a measurement is not finite"
        for index in range(3):
            alone = row(case, index)
            again = made.measure(alone, made.score(alone))
            closely(again, measured[index : index + 1], f"row {index} of 3")
            asked = made.resize(measured[index].tolist(), 64, 1000)
            assert isinstance(asked, int) and asked >= 1, f"`resize` gave {asked!r}"

    @law("ScoringPolicy.share", "Return the layer's share of the budget")
    def test_shares_are_positive(self) -> None:
        made = self.build()
        for layer in LAYERS:
            share = made.share(layer)
            assert 0 < share <= 16, f"layer {layer.index} has a share of {share}"

    @law("ScoringOptions", "including sinks and recent tokens")
    def test_a_budget_below_what_is_always_kept_is_refused(self) -> None:
        try:
            self.build(budget=10, sink=8, recent=8)
        except ValueError as error:
            assert "smaller than" in str(error), f"the refusal says {error}"
            return
        raise AssertionError("budget 10 with sink 8 and recent 8 was accepted")
