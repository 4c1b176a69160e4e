"""Watches next-token distributions of marked requests, through vLLM's logits processors.

Turned on by ``--logits-processors kvplug.hosts.vllm.guard:GuardProcessor``. It changes no logits.
One class serves both of vLLM's model runners, whose processors have different interfaces.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as SlotLogitsProcessor,
)

from kvplug.hosts.vllm.compat import GUARD_MARK
from kvplug.hosts.vllm.worker.state import WorkerState, worker_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.sample.logits_processor import BatchUpdate

logger = init_logger("vllm.kvplug")

MAX_REPORTS = 65536
"""Reports kept for a connector that does not take them; later ones are dropped."""

MAX_PENDING = 8
"""Steps whose numbers may still be on their way from a device; then the oldest is waited for."""


def entropy_and_logprob(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax and the log-probability of its most likely token, in nats.

    Tokens at minus infinity are left out.

    Args:
        logits: ``[rows, vocab]``, any float dtype.

    Returns:
        float32 ``[2, rows]``: entropies, then log-probabilities.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return torch.stack([entropy, logprobs.amax(-1)])


class _Statistics:
    """Numbers on their way to the host, ``[2, rows]``."""

    def __init__(self, values: Tensor):
        self._event: Any = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._values = values

    @property
    def ready(self) -> bool:
        return self._event is None or bool(self._event.query())

    def rows(self) -> list[tuple[float, float]]:
        """Entropy and log-probability of each row; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        entropies, logprobs = self._values.tolist()
        return list(zip(entropies, logprobs, strict=True))


@dataclass(eq=False)
class _Row:
    """A watched request of the first model runner.

    Attributes:
        name: Its name in reports.
        output: Its output tokens, vLLM's own growing list.
    """

    name: str
    output: Sequence[int]


class GuardProcessor(LogitsProcessor, SlotLogitsProcessor):
    """Reports entropy and log-probability of requests marked by `GUARD_MARK`; changes no logits.

    The report of a step is in `WorkerState.guard_reports` when the next step's forward ends (on a
    device up to `MAX_PENDING` steps later, without waiting for it), as ``(name, entropy,
    log-probability)``, once per output token and in order. So the report of a request's last step
    comes after it has finished.

    With the first model runner the logits are those after the tokens that may not be sampled, and
    before penalties and temperature; with the second, after penalties.
    """

    def __init__(self, vllm_config: Any, *where: Any):
        """Called by vLLM with device and pinning, or with the runner's request states."""
        self._state: WorkerState | None = None
        self._rows: dict[int, _Row] = {}
        self._slots: dict[int, str] = {}
        self._pending: tuple[list[tuple[_Row, int]], _Statistics] | None = None
        self._in_flight: deque[tuple[list[str | None], _Statistics]] = deque()
        self._prefill = getattr(getattr(where[0], "prefill_len", None), "np", None)
        self._failed = False
        if getattr(vllm_config, "kv_transfer_config", None) is not None and _first_rank():
            self._state = worker_state(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Accept every request."""

    def is_argmax_invariant(self) -> bool:
        """False although nothing changes: vLLM calls the invariant ones for random sampling only,
        and greedy answers are watched too."""
        return False

    # -- the first model runner ----------------------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the batch, and report the step before."""
        if self._state is None or self._failed:
            return
        try:
            self._sampled()
            self._report()
            if batch_update is not None:
                self._follow(batch_update)
        except Exception as error:
            self._fail(error)

    def _follow(self, update: BatchUpdate) -> None:
        rows = self._rows
        for index in update.removed:
            rows.pop(index, None)
        for index, params, _, output in update.added:
            name = _mark_of(params)
            if name is None:
                rows.pop(index, None)
            else:
                rows[index] = _Row(name, output)
        for one, two, how in update.moved:
            moved, replaced = rows.pop(one, None), rows.pop(two, None)
            if moved is not None:
                rows[two] = moved
            if replaced is not None and how == MoveDirectionality.SWAP:
                rows[one] = replaced

    def _sampled(self) -> None:
        """Name the rows that were sampled from: their request has a token more since. A prompt read
        in chunks has logits at the end of each chunk, which are not sampled from."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        rows, found = pending
        names = [row.name if len(row.output) > length else None for row, length in rows]
        self._in_flight.append((names, found))

    # -- the second model runner ---------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot; returns whether `apply` is to be called for it."""
        self._slots.pop(req_idx, None)
        if self._state is None or self._failed:
            return False
        name = _mark_of(sampling_params)
        if name is not None:
            self._slots[req_idx] = name
        return name is not None

    def apply_staged_writes(self) -> None:
        """Report the step before; called before each forward."""
        try:
            self._report()
        except Exception as error:
            self._fail(error)

    # -- both ----------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Read the rows of watched requests; returns the logits unchanged."""
        if self._state is None or self._failed or not (self._rows or self._slots):
            return logits
        try:
            if ctx is None:
                self._read(logits)
            else:
                self._read_slots(logits, ctx)
        except Exception as error:
            self._fail(error)
        return logits

    def _read(self, logits: Tensor) -> None:
        at = sorted(i for i in self._rows if i < len(logits))
        if not at:
            return
        rows = [(self._rows[i], len(self._rows[i].output)) for i in at]
        self._pending = (rows, _Statistics(entropy_and_logprob(_select(logits, at))))

    def _read_slots(self, logits: Tensor, ctx: Any) -> None:
        slots = ctx.idx_mapping_np.tolist()
        if len(slots) != len(logits):
            return  # rows of drafted tokens, some of which will not be taken
        seen = ctx.seq_lens_upper_bound_np.tolist()
        at = [
            i
            for i, slot in enumerate(slots)
            if slot in self._slots
            and (self._prefill is None or seen[i] >= int(self._prefill[slot]))
        ]
        if at:
            names: list[str | None] = [self._slots[slots[i]] for i in at]
            self._in_flight.append((names, _Statistics(entropy_and_logprob(_select(logits, at)))))

    def _report(self) -> None:
        """Report what has arrived, oldest first."""
        while self._in_flight and (
            self._in_flight[0][1].ready or len(self._in_flight) > MAX_PENDING
        ):
            names, found = self._in_flight.popleft()
            assert self._state is not None
            reports = self._state.guard_reports
            pairs = zip(names, found.rows(), strict=True)
            new = [(name, *pair) for name, pair in pairs if name is not None]
            reports += new[: max(0, MAX_REPORTS - len(reports))]

    def _fail(self, error: Exception) -> None:
        """Stop watching; the engine goes on."""
        self._failed = True
        self._rows, self._slots, self._pending = {}, {}, None
        self._in_flight.clear()
        logger.error("the guard failed and is switched off: %s", error, exc_info=error)


def _select(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _mark_of(params: Any) -> str | None:
    name = (getattr(params, "extra_args", None) or {}).get(GUARD_MARK)
    return name if isinstance(name, str) and name else None


def _first_rank() -> bool:
    """True on the first of the ranks that compute the same logits."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return True
    return int(parallel_state.get_tensor_model_parallel_rank()) == 0
