"""Recomputes some tokens inside a run that is otherwise loaded.

A connector may say that a run of tokens is there, not that some of it is missing. What is missing
is computed by a forward of its own before the engine's: each contiguous span is one row over the
request's block table, as long as the text up to its end, so vLLM's own kernels see it as the last
tokens of a chunked prefill. All spans go through the model together, and each layer writes all
their K and V before any of them attends. These rows belong to no slot, no CUDA graph runs or is
captured, and nothing is written that the step's own forward, or a graph it replays, reads.

Needs the model: ``--worker-extension-cls kvplug.hosts.vllm.extension.WorkerExtension``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.state import WorkerState
from kvplug.reuse.deviation import most_deviating
from kvplug.reuse.deviation import spans as runs
from kvplug.reuse.plan import deviating

Span = tuple[int, int]


class StopForward(Exception):
    """Ends a forward once a layer has compared stored K and V with recomputed ones."""


class Recomputer:
    """Runs the model on spans of a request.

    Args:
        vllm_config: The engine's config.
        state: The worker's; it holds the model runner.
    """

    def __init__(self, vllm_config: Any, state: WorkerState):
        self._config = vllm_config
        self._state = state
        self.block_size = int(vllm_config.cache_config.block_size)
        scheduler = vllm_config.scheduler_config
        self._max_tokens = int(scheduler.max_num_batched_tokens)
        self._max_rows = int(scheduler.max_num_seqs)

    @property
    def ready(self) -> bool:
        """True if the worker has its model runner."""
        return self._state.model_runner is not None

    def compute(self, tokens: npt.NDArray[np.int32], blocks: Tensor, spans: Sequence[Span]) -> None:
        """Recompute K and V of some spans and write them into the request's pages.

        Args:
            tokens: Token ids of the request, at least up to the last span's end.
            blocks: Ids of its blocks, ``[n]`` int64.
            spans: What to recompute, ascending and disjoint. Everything else before the last span's
                end lies in the pages already.
        """
        for batch in self.batches(spans):
            self.forward(tokens, blocks, batch)

    def batches(self, spans: Sequence[Span]) -> list[list[Span]]:
        """Group spans into forwards."""
        return batches(spans, self._max_tokens, self._max_rows)

    def forward(self, tokens: npt.NDArray[np.int32], blocks: Tensor, spans: Sequence[Span]) -> None:
        """Run one forward over spans that `batches` put together; see `compute`."""
        from vllm.forward_context import set_forward_context

        runner = self._state.model_runner
        assert runner is not None, "recomputation needs --worker-extension-cls"
        device = runner.device
        positions = torch.cat([torch.arange(a, b) for a, b in spans])
        slots = metadata.to_device(
            blocks[positions // self.block_size] * self.block_size + positions % self.block_size,
            device,
        )
        common = metadata.of_spans(spans, blocks, slots)
        by_layer, mappings = {}, {}
        ids = metadata.to_device(torch.from_numpy(tokens)[positions], device)
        with self._state.rows.hidden():
            for groups in runner.attn_groups:
                for group in groups:
                    made = group.get_metadata_builder().build(0, common, fast_build=True)
                    for name in group.layer_names:
                        by_layer[name], mappings[name] = made, slots
            with (
                torch.inference_mode(),
                set_forward_context(
                    by_layer, self._config, num_tokens=len(positions), slot_mapping=mappings
                ),
            ):
                runner.model(
                    input_ids=ids,
                    positions=metadata.to_device(positions, device),
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )


def batches(spans: Sequence[Span], max_tokens: int, max_rows: int) -> list[list[Span]]:
    """Group spans into forwards, in the order of the text; long spans are split.

    Args:
        spans: Ascending and disjoint.
        max_tokens: Most tokens of a forward.
        max_rows: Most spans of a forward.
    """
    found: list[list[Span]] = []
    room = 0
    for start, end in spans:
        while start < end:
            if not room or len(found[-1]) == max_rows:
                found.append([])
                room = max_tokens
            stop = min(end, start + room)
            found[-1].append((start, stop))
            room -= stop - start
            start = stop
    return found


def with_deviating(
    deviation: Tensor,
    begin: int,
    approximate: Sequence[Span],
    spans: Sequence[Span],
    fraction: float,
) -> list[Span]:
    """Add the tokens that deviate most to the spans to recompute (CacheBlend, 2405.16444).

    Args:
        deviation: Deviation of each token, ``[n]``.
        begin: Position of the first of them.
        approximate: Spans of approximate pieces.
        spans: Spans that are recomputed anyway.
        fraction: Fraction of the approximate tokens to recompute.
    """
    end = begin + len(deviation)
    anyway = torch.zeros(end - begin, dtype=torch.bool)
    for a, b in spans:
        anyway[max(a, begin) - begin : max(min(b, end), begin) - begin] = True
    eligible = torch.zeros_like(anyway)
    for a, b in approximate:
        eligible[a - begin : b - begin] = True
    count = deviating(approximate, spans, fraction)
    eligible &= ~anyway
    picked = anyway.clone()
    if count > 0:
        where = torch.nonzero(eligible)[:, 0]
        picked[where[most_deviating(deviation[where], count)]] = True
    at = torch.nonzero(picked)[:, 0].tolist()
    found = runs([begin + i for i in at])
    before = [(a, min(b, begin)) for a, b in spans if a < begin]
    after = [(max(a, end), b) for a, b in spans if b > end]
    return [*before, *found, *after]
