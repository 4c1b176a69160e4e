"""What one engine's worker half shares between its connector and its metadata builders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class WorkerCounters:
    """What the worker did since it was last asked: attention rows compacted, rows added by
    splitting prefill chunks."""

    rows: int = 0
    split_rows: int = 0


class WorkerState:
    """State of one engine in one worker process.

    Attributes:
        counters: Reset whenever they are reported.
    """

    def __init__(self) -> None:
        self.counters = WorkerCounters()
        self._exempt_tails: Tensor | None = None

    def set_exempt_tails(self, block_ids: Any) -> None:
        """Blocks being written by requests that keep everything, ``[n]`` int32 numpy, or None.

        A block that is being written belongs to one request alone, so it names the row.
        """
        self._exempt_tails = None if block_ids is None else torch.from_numpy(block_ids)

    def exempt_rows(self, table: Tensor, seq_lens: Tensor, block_size: int) -> Tensor | None:
        """Mask ``[rows]`` of rows that keep everything, or None when there are none."""
        if self._exempt_tails is None:
            return None
        tails = self._exempt_tails.to(table.device)
        last = ((seq_lens - 1).clamp_min(0) // block_size).to(torch.int64)
        written = table.gather(1, last[:, None])[:, 0]
        return torch.isin(written, tails) & (seq_lens > 0)


_STATES: dict[str, WorkerState] = {}


def worker_state(vllm_config: Any) -> WorkerState:
    """The state of the engine a config belongs to; made on first use."""
    return _STATES.setdefault(vllm_config.kv_transfer_config.engine_id, WorkerState())


def drop_worker_state(vllm_config: Any) -> None:
    """Forget an engine that stopped."""
    _STATES.pop(vllm_config.kv_transfer_config.engine_id, None)
