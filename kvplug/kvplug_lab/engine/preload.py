"""Imports what every engine imports, for a process that forks engines; builds nothing."""

from __future__ import annotations

import contextlib
import importlib

MODULES = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.triton_attn",
    "transformers",
)

for _name in MODULES:
    # A machine may lack one of them; the engine that needs it then says so itself.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
