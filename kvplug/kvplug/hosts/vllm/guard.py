"""Listens to next-token distributions of watched requests, through vLLM's logits processors.

Switched on by ``--logits-processors kvplug.hosts.vllm.guard:GuardProcessor``. It changes no logits.
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

from kvplug.hosts.vllm.worker.state import WorkerState, worker_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.sample.logits_processor import BatchUpdate

logger = init_logger("vllm.kvplug")

MARK = "kvplug_guard"
"""Key in a request's ``extra_args`` whose value, a text, names it in what is heard."""

MOST = 65536
"""Distributions held for a connector that does not take them; later ones are not noted."""

BEHIND = 8
"""Steps whose numbers may still be on their way from a device; then the oldest is waited for."""


def entropy_and_logprob(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax and the log-probability of its likeliest token, in nats.

    Tokens at minus infinity have no part in it.

    Args:
        logits: ``[rows, vocab]``, any float dtype.

    Returns:
        float32 ``[2, rows]``: entropies, then log-probabilities.
    """
    logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    return torch.stack([entropy, logprobs.amax(-1)])


class _Found:
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
    """A watched request of the first runner.

    Attributes:
        name: What it is called in what is heard.
        output: Its output tokens, vLLM's own list that grows.
    """

    name: str
    output: Sequence[int]


class GuardProcessor(LogitsProcessor, SlotLogitsProcessor):
    """Notes entropy and log-probability of requests marked by `MARK`; changes nothing.

    What it notes of a step is in `WorkerState.guard_heard` when the next step's forward ends (on a
    device up to `BEHIND` steps later, without waiting for it), as ``(name, entropy,
    log-probability)``, once per output token and in order. So what a request's last step said
    comes after it has finished.

    With the first model runner the logits are those after the tokens that may not be sampled, and
    before penalties and temperature; with the second, after penalties.
    """

    def __init__(self, vllm_config: Any, *where: Any):
        """Made by vLLM: with device and pinning, or with the runner's request states."""
        self._state: WorkerState | None = None
        self._rows: dict[int, _Row] = {}
        self._slots: dict[int, str] = {}
        self._pending: tuple[list[tuple[_Row, int]], _Found] | None = None
        self._told: deque[tuple[list[str | None], _Found]] = deque()
        self._prefill = getattr(getattr(where[0], "prefill_len", None), "np", None)
        self._failed = False
        if getattr(vllm_config, "kv_transfer_config", None) is not None and _first_rank():
            self._state = worker_state(vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Nothing a request says is refused."""

    def is_argmax_invariant(self) -> bool:
        """False although nothing changes: vLLM calls the invariant ones for random sampling only,
        and greedy answers are watched too."""
        return False

    # -- the first model runner ----------------------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the batch, and give out what the step before said."""
        if self._state is None or self._failed:
            return
        try:
            self._settle()
            self._give_out()
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

    def _settle(self) -> None:
        """A row said something if its request has a token more since: a prompt read in chunks has
        logits at the end of each, which nobody samples from."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        rows, found = pending
        names = [row.name if len(row.output) > length else None for row, length in rows]
        self._told.append((names, found))

    # -- the second model runner ---------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a slot; whether `apply` is to be called for it."""
        self._slots.pop(req_idx, None)
        if self._state is None or self._failed:
            return False
        name = _mark_of(sampling_params)
        if name is not None:
            self._slots[req_idx] = name
        return name is not None

    def apply_staged_writes(self) -> None:
        """Before each forward: give out what the step before said."""
        try:
            self._give_out()
        except Exception as error:
            self._fail(error)

    # -- both ----------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Look at the rows of watched requests; the logits come back as they are."""
        if self._state is None or self._failed or not (self._rows or self._slots):
            return logits
        try:
            if ctx is None:
                self._look(logits)
            else:
                self._look_at_slots(logits, ctx)
        except Exception as error:
            self._fail(error)
        return logits

    def _look(self, logits: Tensor) -> None:
        at = sorted(i for i in self._rows if i < len(logits))
        if not at:
            return
        rows = [(self._rows[i], len(self._rows[i].output)) for i in at]
        self._pending = (rows, _Found(entropy_and_logprob(_taken(logits, at))))

    def _look_at_slots(self, logits: Tensor, ctx: Any) -> None:
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
            self._told.append((names, _Found(entropy_and_logprob(_taken(logits, at)))))

    def _give_out(self) -> None:
        """Note what has arrived, oldest first."""
        while self._told and (self._told[0][1].ready or len(self._told) > BEHIND):
            names, found = self._told.popleft()
            assert self._state is not None
            held = self._state.guard_heard
            pairs = zip(names, found.rows(), strict=True)
            heard = [(name, *pair) for name, pair in pairs if name is not None]
            held += heard[: max(0, MOST - len(held))]

    def _fail(self, error: Exception) -> None:
        """The step goes on without the guard."""
        self._failed = True
        self._rows, self._slots, self._pending = {}, {}, None
        self._told.clear()
        logger.error("the guard failed and listens no more: %s", error, exc_info=error)


def _taken(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _mark_of(params: Any) -> str | None:
    name = (getattr(params, "extra_args", None) or {}).get(MARK)
    return name if isinstance(name, str) and name else None


def _first_rank() -> bool:
    """Whether this is the first of the ranks that hold the same logits."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return True
    return int(parallel_state.get_tensor_model_parallel_rank()) == 0
