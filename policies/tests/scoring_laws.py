"""Laws of every scoring policy, and resident tokens to check them with."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from kvplug.contract import EngineView, LayerView, ResidentView, ScoringPolicy
from kvplug.registry import plugins

ENGINE = EngineView(block_size=16, num_blocks=64, host="test")


def scoring_policies() -> list[type[ScoringPolicy]]:
    """Every registered scoring policy, third parties' included."""
    return [p for p in plugins().registry if issubclass(p, ScoringPolicy)]


def build(policy: type[ScoringPolicy], **options: object) -> ScoringPolicy:
    return policy(policy.Options.model_validate(options), ENGINE)


def view(
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


def random_case(
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
    case = view(
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
    part = {
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
    moved = view(
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
