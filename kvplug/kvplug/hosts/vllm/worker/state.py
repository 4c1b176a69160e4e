"""State of one engine in one worker process, shared by its connector, builders and layers."""

from __future__ import annotations

from typing import Any

from kvplug.hosts.vllm.worker.kind import KindWorker
from kvplug.hosts.vllm.worker.rows import StepRows


class WorkerState:
    """State that vLLM's objects of one engine share; vLLM builds some before the connector.

    Attributes:
        rows: Slots of the step's attention rows.
        kinds: The deployment's kinds on this worker; None until they are made.
        model_runner: vLLM's model runner where ``--worker-extension-cls`` gives it, else None.
        guard_reports: ``(request, entropy, log-probability)`` of watched answers, one per output
            token, since the last report.
        likeliest: ``(request, token ids, log-probabilities)`` of answers that a shadow compares,
            one per output token, since the last report.
        backends: The engine's attention backend classes by the stock ones that they extend; None
            where its layers are vLLM's own.
        built: Names of the layers that one of the engine's metadata builders was made for.
    """

    def __init__(self) -> None:
        self.rows = StepRows()
        self.kinds: tuple[KindWorker, ...] | None = None
        self.model_runner: Any = None
        self.guard_reports: list[tuple[str, float, float]] = []
        self.likeliest: list[tuple[str, tuple[int, ...], tuple[float, ...]]] = []
        self.backends: dict[type[Any], type[Any] | None] = {}
        self.built: set[str] = set()


_STATES: dict[str, tuple[Any, WorkerState]] = {}
"""State by engine id, with the config that it belongs to: an id may be given to several engines,
and one whose start failed never stops."""


def worker_state(vllm_config: Any) -> WorkerState:
    """Return the state of the engine a config belongs to, made on first use."""
    transfer = vllm_config.kv_transfer_config
    found = _STATES.get(transfer.engine_id)
    if found is None or found[0] is not transfer:
        found = _STATES[transfer.engine_id] = (transfer, WorkerState())
    return found[1]


def drop_worker_state(vllm_config: Any) -> None:
    """Forget the state of an engine that stopped."""
    transfer = vllm_config.kv_transfer_config
    found = _STATES.get(transfer.engine_id)
    if found is not None and found[0] is transfer:
        del _STATES[transfer.engine_id]
