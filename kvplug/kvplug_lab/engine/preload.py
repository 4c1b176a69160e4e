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

ARCHITECTURE = "LlamaForCausalLM"
"""Of every model that is checked here."""

for _name in MODULES:
    # A machine may lack one of them; the engine that needs it then says so itself.
    with contextlib.suppress(Exception):
        importlib.import_module(_name)

with contextlib.suppress(Exception):
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.registry import ModelRegistry

    # Otherwise vLLM imports itself in one process more, to look at a class that is here already.
    ModelRegistry.register_model(ARCHITECTURE, LlamaForCausalLM)
