"""What one engine's worker half shares between its connector, metadata builders and layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.logger import init_logger

from kvplug.hosts.vllm.messages import RowPlan, WorkerCounters

if TYPE_CHECKING:
    from kvplug.contract import FormatPolicy
    from kvplug.hosts.vllm.worker.format import FormatLayer
    from kvplug.hosts.vllm.worker.reuse import ReuseWorker
    from kvplug.hosts.vllm.worker.sequence import LayerCuts

logger = init_logger("vllm.kvplug")

COUNTERS_EVERY = 64
"""Steps between two looks at counters that have to be waited for."""


def tail_blocks(table: Tensor, seq_lens: Tensor, block_size: int) -> Tensor:
    """The block each row writes last, ``[rows]``: it belongs to one request alone, so it names it.

    Args:
        table: ``[rows, max_blocks]``.
        seq_lens: ``[rows]``.
        block_size: Tokens per block.
    """
    last = ((seq_lens - 1).clamp_min(0) // block_size).to(torch.int64)
    return table.gather(1, last[:, None])[:, 0]


class WorkerState:
    """State of one engine in one worker process.

    Attributes:
        counters: Reset whenever they are reported.
        plans: This step's plans of a scoring policy, by the block each row writes last.
        layers: What each layer keeps for a scoring policy, by layer name.
        block_size: Tokens per block.
        ring: Queries remembered per request and layer; 0 without a scoring policy.
        totals: Whether running totals are kept.
        scoring_failed: Why the scoring policy was retired, or None.
        format: The format policy, or None.
        format_layers: What each layer keeps for it, by layer name.
        format_failed: Why it failed first, or None.
        lanes: Lane and assignment of the request that writes a block last in this step, for a
            format that treats requests apart.
        lane_count: Lanes there have been so far.
        unwritten: Blocks whose tokens could not be stored.
        groups: KV-cache groups of the engine.
        waits_for_counters: Whether pages lie on a device that runs behind its host.
        model_runner: vLLM's, where ``--worker-extension-cls`` gave it; None else.
        reuse: The worker half of reuse, or None.
        guard_heard: ``(request, entropy, log-probability)`` of watched answers, since last taken.
        memo_lanes: Lane of each request that may memoize attention, by the block it writes last.
        memo_rows: Decode rows asked for far attention, and those that reused it, since last taken.
    """

    def __init__(self) -> None:
        self.counters = WorkerCounters()
        self.plans: dict[int, RowPlan] = {}
        self.layers: dict[str, LayerCuts] = {}
        self.block_size = 0
        self.ring = 0
        self.totals = False
        self.scoring_failed: str | None = None
        self.format: FormatPolicy | None = None
        self.format_layers: dict[str, FormatLayer] = {}
        self.format_failed: str | None = None
        self.lanes: dict[int, tuple[int, int]] = {}
        self.lane_count = 0
        self.unwritten: set[int] = set()
        self.groups = 1
        self.waits_for_counters = False
        self.model_runner: Any = None
        self.reuse: ReuseWorker | None = None
        self.guard_heard: list[tuple[str, float, float]] = []
        self.memo_lanes: dict[int, int] = {}
        self.memo_rows = (0, 0)
        self._asked = 0
        self._measured: dict[tuple[int, int], tuple[npt.NDArray[np.float64], int]] = {}
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
        return torch.isin(tail_blocks(table, seq_lens, block_size), tails) & (seq_lens > 0)

    def set_lanes(self, rows: npt.NDArray[np.int32] | None) -> None:
        """Take this step's rows of tail block, lane and assignment, ``[n, 3]``, or None."""
        self.lanes = {} if rows is None else {tail: (lane, a) for tail, lane, a in rows.tolist()}
        if rows is not None:
            self.lane_count = max(self.lane_count, 1 + int(rows[:, 1].max()))

    def format_error(self, what: str, name: str, error: Exception) -> None:
        """Count a failure of the format policy; its first cause is logged."""
        self.counters.format_errors += 1
        if self.format_failed is None:
            self.format_failed = f"{what}: {type(error).__name__}: {error}"
            logger.error(
                "format policy %r failed in %s; where it cannot attend, pages are read back, and "
                "requests whose tokens it cannot store are failed: %s: %s",
                name,
                what,
                type(error).__name__,
                error,
                exc_info=error,
            )

    def unwritten_blocks(self) -> set[int]:
        """Blocks to report as lost. They stay so until they are written anew; with several
        KV-cache groups vLLM cannot say whose a block is, and they read as zeros."""
        return set(self.unwritten) if self.groups == 1 else set()

    def take_signals(self) -> list[float] | None:
        """What the format policy measured since last asked."""
        if self.format is None:
            return None
        try:
            found = self.format.signals()
            return None if found is None else [float(x) for x in found]
        except Exception as error:
            self.format_error("signals", self.format.name, error)
            return None

    def format_counters(self) -> dict[str, float]:
        """What the format policy counted itself; nothing once it could not say, and between two
        times on a device whose numbers have to be waited for."""
        if self.format is None:
            return {}
        self._asked += 1
        if self.waits_for_counters and self._asked % COUNTERS_EVERY != 1:
            return {}
        try:
            return {str(k): float(v) for k, v in self.format.counters().items()}
        except Exception:
            logger.exception("policy %r failed in counters(); they are left out", self.format.name)
            self.format = None
            return {}

    def add_measured(self, lanes: list[int], group: int, values: npt.NDArray[np.float64]) -> None:
        """Add what one layer of a group measured of some requests, ``[rows, n]``."""
        for lane, row in zip(lanes, values, strict=True):
            total, layers = self._measured.get((lane, group), (np.zeros_like(row), 0))
            self._measured[lane, group] = (total + row, layers + 1)

    def take_measured(self) -> npt.NDArray[np.float64] | None:
        """What was measured since last asked, ``[requests, 3 + n]``: lane, group, layers, sums."""
        if not self._measured:
            return None
        rows = [(*key, layers, *total) for key, (total, layers) in self._measured.items()]
        self._measured.clear()
        return np.array(rows, dtype=np.float64)


_STATES: dict[str, WorkerState] = {}


def worker_state(vllm_config: Any) -> WorkerState:
    """The state of the engine a config belongs to; made on first use."""
    return _STATES.setdefault(vllm_config.kv_transfer_config.engine_id, WorkerState())


def drop_worker_state(vllm_config: Any) -> None:
    """Forget an engine that stopped."""
    _STATES.pop(vllm_config.kv_transfer_config.engine_id, None)
