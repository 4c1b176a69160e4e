"""Access to a worker's model runner, for recomputation inside a reused run.

Turned on by vLLM's own flag ``--worker-extension-cls kvplug.hosts.vllm.extension.WorkerExtension``:
vLLM adds the class to the bases of its worker. A connector has no access to the model. A worker
that has made its model runner calls ``init_worker_extension``; where vLLM has no such call, a
property sees the worker assign it.
"""

from __future__ import annotations

from typing import Any

from kvplug.hosts.vllm import compat, engine
from kvplug.hosts.vllm.worker.state import worker_state

PATH = f"{__name__}.WorkerExtension"


def _pass_on(worker: Any, runner: Any) -> None:
    config = getattr(worker, "vllm_config", None)
    if runner is not None and config is not None and engine.is_kvplug(config):
        worker_state(config).model_runner = runner


def _get(worker: Any) -> Any:
    return worker.__dict__["_kvplug_model_runner"]


def _set(worker: Any, runner: Any) -> None:
    worker.__dict__["_kvplug_model_runner"] = runner
    _pass_on(worker, runner)


class WorkerExtension:
    """Base class that vLLM adds to its worker: passes the model runner on, changes nothing else."""

    if not compat.announces_worker():
        model_runner = property(_get, _set)

    def init_worker_extension(self) -> None:
        """Called by vLLM once the worker has its device and its model runner."""
        _pass_on(self, getattr(self, "model_runner", None))
