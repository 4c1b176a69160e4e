"""Calibrations, steps and laws for the tests of formats that have one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import AttendBatch, EngineView, FormatPolicy, LayerView, WriteBatch
from kvplug.hosts.dense import attend, attend_dense
from kvplug_lab.calibrate.statistics import Collector, Source, calibration

MODEL = "0123456789abcdef" * 2


def view(
    layers: int = 2,
    kv_heads: int = 2,
    readers: int = 3,
    width: int = 16,
    dtype: str = "float32",
    block_size: int = 16,
) -> EngineView:
    """An engine of a small model."""
    return EngineView(
        block_size,
        layers=tuple(
            LayerView(i, layers, kv_heads, kv_heads * readers, width, dtype) for i in range(layers)
        ),
        model=MODEL,
    )


def activations(
    layer: LayerView, n: int = 640, rank: int = 0, noise: float = 0.05, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[heads, n, d]`` with means, near a subspace of a rank."""
    random = torch.Generator().manual_seed(seed * 31 + layer.index)
    heads, width = layer.num_kv_heads, layer.head_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    found = []
    for _ in range(2):
        inner = rank or width
        basis = draw(heads, inner, width) / inner**0.5
        found.append(draw(heads, n, inner) @ basis + 2 * draw(heads, 1, width))
        found[-1] += noise * draw(heads, n, width)
    query = draw(layer.num_heads, n, width) * (0.3 + draw(layer.num_heads, 1, width).abs())
    return query, found[0], found[1]


def write_calibration(
    path: Path, engine: EngineView, seen: dict[int, tuple[Tensor, Tensor, Tensor]]
) -> str:
    """Write the calibration of some activations; returns its path."""
    collector = Collector()
    for index, (query, key, value) in seen.items():
        collector.see(index, query, key, value, None)  # type: ignore[arg-type]
    made = calibration(collector, Source(engine.model, "tiny", "0" * 64))
    made.save(path)
    return str(path)


def build(policy: type[FormatPolicy], engine: EngineView, **options: Any) -> Any:
    return policy(policy.Options.model_validate(options), engine)


def pages(policy: FormatPolicy, layer: LayerView, blocks: int, size: int) -> Tensor:
    layout = policy.layout(layer)
    heads = layout.heads if layout.heads is not None else layer.num_kv_heads
    return torch.zeros((blocks, heads, size, layout.bytes_per_token_head), dtype=torch.uint8)


def through(policy: FormatPolicy, layer: LayerView, key: Tensor, value: Tensor) -> list[Tensor]:
    """K and V ``[heads, n, d]`` as the format gives them back."""
    n, size = key.shape[1], 16
    blocks = -(-n // size)
    cache = pages(policy, layer, blocks, size)
    dtype = getattr(torch, layer.dtype)
    tokens = [x.transpose(0, 1).to(dtype) for x in (key, value)]
    policy.write(layer, WriteBatch(tokens[0], tokens[1], torch.arange(n)), cache)
    found = policy.read(layer, cache, torch.arange(blocks))
    return [p.transpose(0, 1).flatten(1, 2)[:, :n].float() for p in found]


def attends_as_it_reads(
    policy: FormatPolicy,
    layer: LayerView,
    seen: tuple[Tensor, Tensor, Tensor],
    tolerance: float = 2e-5,
    softcap: float = 0.0,
) -> None:
    """Attention in the format's own space is that over what it reads back.

    Three requests: one that decodes, a chunk with history, a fresh prompt; with the step's own
    tokens exact, and read back.
    """
    size = 16
    lens, news = [37, 50, 11], [1, 13, 11]
    table = torch.tensor([[3, 5, 1, 0], [2, 7, 4, 6], [8, 0, 0, 0]], dtype=torch.int32)
    cache = pages(policy, layer, 9, size)
    query, key, value = (x.transpose(0, 1) for x in seen)
    at, queries, keys, values = 0, [], [], []
    for row, (n, new) in enumerate(zip(lens, news, strict=True)):
        slots = torch.tensor([int(table[row, t // size]) * size + t % size for t in range(n)])
        tokens = WriteBatch(key[at : at + n], value[at : at + n], slots)
        policy.write(layer, tokens, cache)
        queries.append(query[at + n - new : at + n])
        keys.append(key[at + n - new : at + n])
        values.append(value[at + n - new : at + n])
        at += n
    batch = AttendBatch(
        torch.cat(queries),
        torch.tensor([0, 1, 14, 25], dtype=torch.int32),
        table,
        torch.tensor(lens, dtype=torch.int32),
        layer.head_size**-0.5,
        max(news),
        max(lens),
        torch.cat(keys),
        torch.cat(values),
        softcap=softcap,
    )
    for step in (batch, replace(batch, key=None, value=None)):
        found, wanted = (torch.zeros_like(batch.query) for _ in range(2))
        attend(policy, layer, step, cache, found)
        attend_dense(policy, layer, step, cache, wanted)
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention ``[heads, n, d]``, in plain torch."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def output_error(
    policy: FormatPolicy, layer: LayerView, seen: tuple[Tensor, Tensor, Tensor]
) -> float:
    """Relative error of attention outputs over what a format gives back."""
    query, key, value = seen
    exact = attention(query, key, value)
    coded = attention(query, *through(policy, layer, key, value))
    return float((coded - exact).norm() / exact.norm())
