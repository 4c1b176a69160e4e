"""Watches next-token distributions of marked requests, through vLLM's logits processors.

Turned on by ``--logits-processors kvplug.hosts.vllm.guard:GuardProcessor``. It changes no logits
but those of shadows: requests of kvplug's own that are to answer given tokens, whose distributions
are compared with another request's. One class serves both of vLLM's model runners, whose processors
have different interfaces.
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

from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.worker.state import WorkerState, worker_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.sample.logits_processor import BatchUpdate

logger = init_logger("vllm.kvplug")

MAX_REPORTS = 65536
"""Reports kept for a connector that does not take them; later ones are dropped."""

MAX_PENDING = 8
"""Steps whose numbers may still be on their way from a device; then the oldest is waited for."""


LIKELIEST = 16
"""Tokens of each distribution that a shadow compares."""


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


def likeliest(logits: Tensor) -> Tensor:
    """Log-probabilities, in nats, of each row's `LIKELIEST` tokens, and their ids.

    Args:
        logits: ``[rows, vocab]``, any float dtype.

    Returns:
        float32 ``[2 * k, rows]``: log-probabilities, likeliest first, then ids, which float32
        holds up to 2 ** 24.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    values, ids = logprobs.topk(min(LIKELIEST, logits.shape[-1]), dim=-1)
    return torch.cat([values, ids.to(torch.float32)], dim=-1).T


class _Statistics:
    """Numbers on their way to the host, ``[numbers, rows]``."""

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

    def rows(self) -> list[tuple[float, ...]]:
        """Numbers of each row: entropy, log-probability and what else there is; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return list(zip(*self._values.tolist(), strict=True))


@dataclass(frozen=True)
class _Watched:
    """What is asked about a request.

    Attributes:
        name: Its name in reports.
        answers: Tokens it is to answer; None if its likeliest tokens are not compared.
    """

    name: str
    answers: tuple[int, ...] | None


@dataclass(eq=False)
class _Row:
    """A watched request of the first model runner.

    Attributes:
        watched: What is asked about it.
        output: Its output tokens, vLLM's own growing list.
    """

    watched: _Watched
    output: Sequence[int]


class GuardProcessor(LogitsProcessor, SlotLogitsProcessor):
    """Reports entropy and log-probability of requests that kvplug marked, and makes shadows answer.

    The report of a step is in `WorkerState.guard_reports` when the next step's forward ends (on a
    device up to `MAX_PENDING` steps later, without waiting for it), as ``(name, entropy,
    log-probability)``, once per output token and in order. So the report of a request's last step
    comes after it has finished. Where likeliest tokens are compared, they are reported with it, in
    `WorkerState.likeliest`.

    Of a shadow, all logits but that of the token it is to answer become minus infinity, after they
    were read, and on every rank that samples.

    With the first model runner the logits are those after the tokens that may not be sampled, and
    before penalties and temperature; with the second, after penalties.
    """

    def __init__(self, vllm_config: Any, *where: Any):
        """Called by vLLM with device and pinning, or with the runner's request states."""
        self._state: WorkerState | None = None
        self._rows: dict[int, _Row] = {}
        self._slots: dict[int, _Watched] = {}
        self._pending: tuple[list[tuple[_Row, int]], _Statistics] | None = None
        self._in_flight: deque[tuple[list[_Watched | None], _Statistics]] = deque()
        self._prefill = getattr(getattr(where[0], "prefill_len", None), "np", None)
        self._failed = False
        transfer = getattr(vllm_config, "kv_transfer_config", None)
        self._engine_id = str(getattr(transfer, "engine_id", ""))
        self._off = transfer is None
        if transfer is not None and _first_rank():
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
        if self._off or self._failed:
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
            watched = self._watched(params)
            if watched is None:
                rows.pop(index, None)
            else:
                rows[index] = _Row(watched, output)
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
        watched = [row.watched if len(row.output) > length else None for row, length in rows]
        self._in_flight.append((watched, found))

    # -- the second model runner ---------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot; returns whether `apply` is to be called for it."""
        self._slots.pop(req_idx, None)
        if self._off or self._failed:
            return False
        watched = self._watched(sampling_params)
        if watched is not None:
            self._slots[req_idx] = watched
        return watched is not None

    def apply_staged_writes(self) -> None:
        """Report the step before; called before each forward."""
        try:
            self._report()
        except Exception as error:
            self._fail(error)

    # -- both ----------------------------------------------------------------------------------

    def _watched(self, params: Any) -> _Watched | None:
        """What is asked about a request; None for nothing, or nothing on this rank."""
        name = compat.marked_as(params, self._engine_id)
        if name is None:
            return None
        answers = compat.shadow_answers(params, self._engine_id)
        return _Watched(name, answers) if self._state is not None or answers else None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Read the rows of watched requests; returns the logits, changed for shadows alone."""
        if self._off or self._failed or not (self._rows or self._slots):
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
        if self._state is not None:
            self._pending = (rows, _statistics(_select(logits, at), [r.watched for r, _ in rows]))
        for i, (row, length) in zip(at, rows, strict=True):
            _answer(logits[i], row.watched.answers, length)

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
        if not at:
            return
        watched = [self._slots[slots[i]] for i in at]
        if self._state is not None:
            found = _statistics(_select(logits, at), watched)
            self._in_flight.append(([*watched], found))
        for i, one in zip(at, watched, strict=True):
            # Its prompt alone was filled at first: a shadow that starts over is not judged.
            begun = seen[i] - (int(self._prefill[slots[i]]) if self._prefill is not None else 0)
            _answer(logits[i], one.answers, begun)

    def _report(self) -> None:
        """Report what has arrived, oldest first."""
        while self._in_flight and (
            self._in_flight[0][1].ready or len(self._in_flight) > MAX_PENDING
        ):
            watched, found = self._in_flight.popleft()
            assert self._state is not None
            reports, compared = self._state.guard_reports, self._state.likeliest
            for one, numbers in zip(watched, found.rows(), strict=True):
                if one is None or len(reports) >= MAX_REPORTS:
                    continue
                reports.append((one.name, numbers[0], numbers[1]))
                if one.answers is not None and len(compared) < MAX_REPORTS:
                    k = len(numbers) // 2 - 1
                    ids = tuple(int(i) for i in numbers[2 + k :])
                    compared.append((one.name, ids, numbers[2 : 2 + k]))

    def _fail(self, error: Exception) -> None:
        """Stop watching; the engine goes on."""
        self._failed = True
        self._rows, self._slots, self._pending = {}, {}, None
        self._in_flight.clear()
        logger.error("the guard failed and is switched off: %s", error, exc_info=error)


def _statistics(logits: Tensor, watched: Sequence[_Watched]) -> _Statistics:
    """The numbers of rows that are all watched."""
    found = entropy_and_logprob(logits)
    if any(one.answers is not None for one in watched):
        found = torch.cat([found, likeliest(logits)])
    return _Statistics(found)


def _answer(row: Tensor, answers: tuple[int, ...] | None, at: int) -> None:
    """Leave the token that is to be answered next as the only one; waits for no device."""
    if answers and 0 <= at < len(answers):
        row.fill_(-torch.inf)
        row[answers[at]] = 0.0


def _select(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _first_rank() -> bool:
    """True on the first of the ranks that compute the same logits."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return True
    return int(parallel_state.get_tensor_model_parallel_rank()) == 0
