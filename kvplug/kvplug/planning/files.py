"""Writes a planned deployment as a file that `kvplug serve` takes."""

from __future__ import annotations

from typing import Any

import yaml

from kvplug.hosts.vllm.connector_flag import CONNECTOR, MODULE
from kvplug.planning.model import Model
from kvplug.planning.plan import GIB, Planned, Question

SHUTDOWN_SECONDS = 10


def deployment_file(model: Model, question: Question, planned: Planned) -> str:
    """Write a deployment with what it was planned for, and what was measured of it, as comments.

    Args:
        model: The model.
        question: What was asked.
        planned: The deployment; one that is not refused.

    Returns:
        The text of a vLLM ``--config`` file.
    """
    assert planned.pool is not None, "a refused deployment is not written"
    flags: dict[str, Any] = {}
    if model.folder is not None:
        flags["model"] = model.name
    flags |= {
        "dtype": model.dtype,
        "block-size": planned.block_size,
        "max-model-len": question.context,
        "max-num-seqs": planned.slots,
        "max-num-batched-tokens": question.batched,
        "gpu-memory-utilization": question.utilization,
    }
    if question.ranks > 1:
        flags["tensor-parallel-size"] = question.ranks
    flags |= {**planned.candidate.flags, "shutdown-timeout": SHUTDOWN_SECONDS}
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        **planned.candidate.transfer,
        "kv_connector_extra_config": {"kvplug": dict(planned.candidate.section)},
    }
    lines = [*_comments(model, question, planned), ""]
    lines.append(yaml.safe_dump(flags, sort_keys=False).rstrip())
    lines.append("")
    lines.append(yaml.safe_dump({"kv-transfer-config": transfer}, sort_keys=False).rstrip())
    return "\n".join(lines) + "\n"


def _comments(model: Model, question: Question, planned: Planned) -> list[str]:
    assert planned.pool is not None
    gpus = f"{question.ranks} x " if question.ranks > 1 else ""
    said = [
        f"{planned.candidate.name}, planned for {_plain(model.name)} on {gpus}"
        f"{question.memory / GIB:.1f} GiB: {planned.users} requests of {question.context:,} "
        f"tokens at once, {planned.pool.tokens:,} tokens in the pool.",
        f"Assumed: {question.weights.bytes / question.ranks / GIB:.1f} GiB of weights "
        f"({_plain(question.weights.source)}), {question.overhead / GIB:.1f} GiB beside weights "
        "and KV.",
    ]
    needs = planned.needs
    said.append(
        f"CUDA graphs: {needs.graphs}; prefix cache: {needs.prefix_cache}; model runner: "
        f"{needs.runner}."
    )
    said += [f"Measured: {price}." for price in planned.prices] or ["Measured: nothing."]
    if model.folder is None:
        said.append("Pass --model, or set `model:` here.")
    return [f"# {line}" for line in said]


def _plain(text: str) -> str:
    """A name that somebody gave, fit for one line of a comment."""
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
