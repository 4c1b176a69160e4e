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
        backends: Attention backend classes made for the engine, by the name vLLM registers.
    """

    def __init__(self) -> None:
        self.rows = StepRows()
        self.kinds: tuple[KindWorker, ...] | None = None
        self.model_runner: Any = None
        self.guard_reports: list[tuple[str, float, float]] = []
        self.backends: dict[str, type[Any]] = {}


_STATES: dict[str, WorkerState] = {}


def worker_state(vllm_config: Any) -> WorkerState:
    """Return the state of the engine a config belongs to, made on first use."""
    return _STATES.setdefault(vllm_config.kv_transfer_config.engine_id, WorkerState())


def drop_worker_state(vllm_config: Any) -> None:
    """Forget the state of an engine that stopped."""
    _STATES.pop(vllm_config.kv_transfer_config.engine_id, None)
