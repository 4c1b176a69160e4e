"""Recomputation inside a reused run: how spans are grouped, and which tokens deviate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from no_sync import Accelerator

from kvplug.hosts.vllm.worker.recompute import Recomputer, batches, with_deviating
from kvplug.hosts.vllm.worker.state import WorkerState


def test_a_long_span_is_split_and_short_ones_share_a_forward() -> None:
    assert batches([(0, 100), (120, 130)], 48, 8) == [
        [(0, 48)],
        [(48, 96)],
        [(96, 100), (120, 130)],
    ]
    assert batches([(0, 1), (2, 3), (4, 5)], 48, 2) == [[(0, 1), (2, 3)], [(4, 5)]]
    assert batches([], 48, 8) == []


@given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 50), st.integers(1, 4))
def test_every_token_is_in_one_forward_in_order(widths: list[int], most: int, rows: int) -> None:
    spans, at = [], 0
    for width in widths:
        spans.append((at, at + width))
        at += width + 1
    made = batches(spans, most, rows)
    assert all(sum(b - a for a, b in one) <= most and len(one) <= rows for one in made)
    flat = [i for one in made for a, b in one for i in range(a, b)]
    assert flat == [i for a, b in spans for i in range(a, b)]


def test_the_most_deviating_join_what_is_recomputed_anyway() -> None:
    deviation = torch.tensor([9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0])
    # Positions 10 to 19; 10 and 11 are recomputed anyway, 14 and 15 are exact.
    approximate, spans = [(10, 14), (16, 20)], [(2, 5), (10, 12), (25, 30)]
    assert with_deviating(deviation, 10, approximate, spans, 0.5) == [
        (2, 5),
        (10, 13),
        (16, 17),
        (25, 30),
    ]
    assert with_deviating(deviation, 10, approximate, spans, 0.0) == [(2, 5), (10, 12), (25, 30)]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 1.0])
def test_a_fraction_is_of_the_approximate_tokens(fraction: float) -> None:
    deviation = torch.rand(100, generator=torch.Generator().manual_seed(1))
    found = with_deviating(deviation, 0, [(0, 40), (60, 100)], [(0, 4)], fraction)
    assert sum(b - a for a, b in found) == max(4, round(80 * fraction))


def test_a_forward_within_the_step_waits_for_nothing_and_is_nobodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No rows of the runner's, and none of what a builder keeps for a CUDA graph."""
    accelerator = Accelerator()
    seen: dict[str, Any] = {}

    @contextmanager
    def forward_context(metadata: Any, config: Any, **kwargs: Any) -> Iterator[None]:
        seen.update(metadata=metadata, hidden=state.rows.hides, **kwargs)
        yield

    def build(prefix: int, common: Any, fast_build: bool = False) -> Any:
        seen.update(common=common, fast=fast_build)
        return "built"

    monkeypatch.setattr("vllm.forward_context.set_forward_context", forward_context)
    group = SimpleNamespace(
        get_metadata_builder=lambda: SimpleNamespace(build=build), layer_names=["layer"]
    )
    state = WorkerState()
    state.model_runner = SimpleNamespace(
        device=accelerator.device,
        attn_groups=[[group]],
        model=lambda **inputs: seen.update(inputs),
    )
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=8),
    )
    tokens = np.arange(100, 160, dtype=np.int32)
    with accelerator.no_sync():
        Recomputer(config, state).compute(tokens, torch.tensor([7, 3, 9, 5]), [(14, 18), (40, 41)])
    common = seen["common"]
    positions = [14, 15, 16, 17, 40]
    assert seen["positions"].tolist() == positions
    assert seen["input_ids"].tolist() == [100 + p for p in positions]
    slots = [7 * 16 + 14, 7 * 16 + 15, 3 * 16, 3 * 16 + 1, 9 * 16 + 8]
    assert seen["slot_mapping"]["layer"].tolist() == common.slot_mapping.tolist() == slots
    assert (common.seq_lens.tolist(), common.query_start_loc.tolist()) == ([18, 41], [0, 4, 5])
    assert common.block_table_tensor.tolist() == [[7, 3, 9, 5]] * 2
    assert seen["metadata"] == {"layer": "built"}
    assert seen["fast"] and seen["hidden"] and common.req_idx is None
    assert seen.get("cudagraph_runtime_mode") is None, "vLLM's default is no graph"
