"""Computing some tokens inside a run that is otherwise loaded.

A connector may say that a run of tokens is there, not that some of it is missing. What is missing
is computed by a forward of its own before the engine's: each contiguous span is one row over the
request's block table, as long as the text up to its end, so vLLM's own kernels see it as the last
tokens of a chunked prefill. All spans go through the model together, and each layer writes all
their K and V before any of them attends.

Needs the model: ``--worker-extension-cls kvplug.hosts.vllm.extension.WorkerExtension``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvplug.reuse.deviation import most_deviating
from kvplug.reuse.deviation import spans as runs
from kvplug.reuse.plan import deviating

if TYPE_CHECKING:
    from kvplug.hosts.vllm.worker.state import WorkerState

Span = tuple[int, int]


class UnlikeStored(Exception):
    """Ends a forward once a layer has said how far stored K and V are from fresh ones."""


class Recomputer:
    """Runs the model on spans of a request.

    Args:
        vllm_config: The engine's config.
        state: The worker's; it holds the model runner.
    """

    def __init__(self, vllm_config: Any, state: WorkerState):
        self._config = vllm_config
        self._state = state
        self._size = int(vllm_config.cache_config.block_size)
        scheduler = vllm_config.scheduler_config
        self._most_tokens = int(scheduler.max_num_batched_tokens)
        self._most_rows = int(scheduler.max_num_seqs)

    @property
    def ready(self) -> bool:
        """Whether the model is at hand."""
        return self._state.model_runner is not None

    def compute(self, tokens: npt.NDArray[np.int32], blocks: Tensor, spans: Sequence[Span]) -> None:
        """Compute K and V of some spans and write them into the request's pages.

        Args:
            tokens: Token ids of the request, at least up to the last span's end.
            blocks: Ids of its blocks, ``[n]`` int64.
            spans: What to compute, ascending and disjoint. Everything else before the last span's
                end lies in the pages already.
        """
        for batch in self.batches(spans):
            self.forward(tokens, blocks, batch)

    def batches(self, spans: Sequence[Span]) -> list[list[Span]]:
        """Spans in groups that one forward takes each."""
        return batches(spans, self._most_tokens, self._most_rows)

    def forward(self, tokens: npt.NDArray[np.int32], blocks: Tensor, spans: Sequence[Span]) -> None:
        """One forward over some spans; as `compute`, and no more than `batches` puts together."""
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        runner = self._state.model_runner
        assert runner is not None, "recomputing needs --worker-extension-cls"
        device = runner.device
        positions = torch.cat([torch.arange(a, b) for a, b in spans])
        slots = (blocks[positions // self._size] * self._size + positions % self._size).to(device)
        widths = [b - a for a, b in spans]
        starts = torch.tensor([0, *np.cumsum(widths)], dtype=torch.int32)
        lens = torch.tensor([b for _, b in spans], dtype=torch.int32)
        table = blocks.to(device, torch.int32)[None].expand(len(spans), -1).contiguous()
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lens.to(device),
            num_reqs=len(spans),
            num_actual_tokens=len(positions),
            max_query_len=max(widths),
            max_seq_len=int(lens.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
            seq_lens_cpu_upper_bound=lens,
        )
        metadata, mappings = {}, {}
        for groups in runner.attn_groups:
            for group in groups:
                made = group.get_metadata_builder().build(0, common)
                for name in group.layer_names:
                    metadata[name], mappings[name] = made, slots
        ids = torch.from_numpy(tokens)[positions].to(device)
        with (
            torch.inference_mode(),
            set_forward_context(
                metadata, self._config, num_tokens=len(positions), slot_mapping=mappings
            ),
        ):
            runner.model(
                input_ids=ids,
                positions=positions.to(device),
                intermediate_tensors=None,
                inputs_embeds=None,
            )


def batches(spans: Sequence[Span], most_tokens: int, most_rows: int) -> list[list[Span]]:
    """Spans in the order of the text, in groups one forward takes; long ones are cut.

    Args:
        spans: Ascending and disjoint.
        most_tokens: Tokens of a forward.
        most_rows: Spans of a forward.
    """
    found: list[list[Span]] = []
    room = 0
    for start, end in spans:
        while start < end:
            if not room or len(found[-1]) == most_rows:
                found.append([])
                room = most_tokens
            cut = min(end, start + room)
            found[-1].append((start, cut))
            room -= cut - start
            start = cut
    return found


def chosen(
    deviation: Tensor, begin: int, loose: Sequence[Span], spans: Sequence[Span], share: float
) -> list[Span]:
    """Spans to compute: those given, and the tokens that deviate most (CacheBlend, 2405.16444).

    Args:
        deviation: How far each token is off, ``[n]``.
        begin: Position of the first of them.
        loose: What approximate pieces cover.
        spans: What is computed anyway.
        share: Of the tokens in ``loose``, how many to compute.
    """
    end = begin + len(deviation)
    anyway = torch.zeros(end - begin, dtype=torch.bool)
    for a, b in spans:
        anyway[max(a, begin) - begin : max(min(b, end), begin) - begin] = True
    eligible = torch.zeros_like(anyway)
    for a, b in loose:
        eligible[a - begin : b - begin] = True
    count = deviating(loose, spans, share)
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
