"""Access to a worker's model runner, for recomputation inside a reused run.

Turned on by vLLM's own flag ``--worker-extension-cls kvplug.hosts.vllm.extension.WorkerExtension``:
vLLM adds the class to the bases of its worker. A connector has no access to the model; a worker
assigns its model runner, and a property sees the assignment.
"""

from __future__ import annotations

from typing import Any

from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.worker.state import worker_state

PATH = f"{__name__}.WorkerExtension"


def _get(worker: Any) -> Any:
    return worker.__dict__["_kvplug_model_runner"]


def _set(worker: Any, runner: Any) -> None:
    worker.__dict__["_kvplug_model_runner"] = runner
    config = getattr(worker, "vllm_config", None)
    if runner is not None and config is not None and engine.is_kvplug(config):
        worker_state(config).model_runner = runner


class WorkerExtension:
    """Base class that vLLM adds to its worker: passes the model runner on, changes nothing else."""

    model_runner = property(_get, _set)
