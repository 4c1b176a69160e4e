"""Writes a deployment with the evidence that it was chosen on as comments."""

from __future__ import annotations

import datetime
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from kvplug_lab.tune.proposals import Proposal
from kvplug_lab.tune.search import Figures, Found, Measured

WIDTH = 98
"""Columns of a comment."""

SHUTDOWN_SECONDS = 10
KEPT = (
    "dtype",
    "block_size",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "enforce_eager",
    "worker_extension_cls",
)
"""Arguments of the measured engine that the file sets, in its order."""


@dataclass(frozen=True)
class Where:
    """Where a deployment was measured.

    Attributes:
        model: The model's name.
        machine: The machine.
        command: The command.
        date: The day.
    """

    model: str
    machine: str
    command: str
    date: str

    @classmethod
    def here(cls, model: Path, command: str) -> Where:
        """This machine, today."""
        return cls(model.resolve().name, machine(), command, datetime.date.today().isoformat())


def machine() -> str:
    """The accelerator, or the processor and its cores."""
    import os

    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}, no GPU"


def deployment_text(
    model: Path,
    arguments: Mapping[str, Any],
    proposal: Proposal,
    comments: Sequence[str],
) -> str:
    """A vLLM ``--config`` file.

    Args:
        model: The model's directory.
        arguments: Arguments of ``vllm.LLM`` that it was measured with.
        proposal: The deployment; with a section or flags.
        comments: Paragraphs that stand above it.
    """
    from kvplug_lab.engine.trial import connector_flags

    flags: dict[str, Any] = {"model": str(model.resolve())}
    flags |= {
        name.replace("_", "-"): arguments[name]
        for name in KEPT
        if arguments.get(name) is not None and arguments.get(name) is not False
    }
    flags["shutdown-timeout"] = SHUTDOWN_SECONDS
    lines = [
        line
        for one in comments
        for line in textwrap.wrap(
            " ".join(one.split()),
            WIDTH,
            initial_indent="# ",
            subsequent_indent="#   " if one.startswith("  ") else "# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        or ["#"]
    ]
    if lines:
        lines.append("")
    lines.append(yaml.safe_dump(flags, sort_keys=False).rstrip())
    transfer = {"kv-transfer-config": connector_flags(dict(proposal.section or {}))}
    lines += ["", yaml.safe_dump(transfer, sort_keys=False).rstrip()]
    return "\n".join(lines) + "\n"


def evidence(found: Found, load: str, where: Where) -> list[str]:
    """Paragraphs on what a verified deployment was chosen on."""
    won = found.winner
    assert won is not None and won.quality is not None
    question, gain = found.question, won.ratio(found.question.objective)
    base, own = won.base[-1], won.own[-1]
    quality = won.quality
    proposal = won.proposal
    same = quality.same if quality.same is not None else 0.0
    paragraphs = [
        f"{proposal.name}, chosen by kvplug tune for {question.objective}: {gain.text('.2f')} "
        f"times as good as stock vLLM, over {gain.n} rounds of new engines that took turns (95% "
        "interval).",
        "",
        f"Load: {load}; {question.concurrency} in flight. Model: {where.model}. Machine: "
        f"{where.machine}. Date: {where.date}. vLLM {version('vllm')}, kvplug {version('kvplug')}.",
        f"Command: {where.command}",
        "",
        "Bottleneck of stock: " + "; ".join(str(b) for b in found.held) + ".",
        f"Why this: {proposal.reason}.",
        f"Stock, last round: {_figures(base)}.",
        f"This, last round: {_figures(own)}.",
        f"Answers: perplexity of stock's own answers {quality.rise.text('+.2%')}, bound "
        f"{question.bound}; {same:.0%} of answers are stock's word for word"
        + (
            f" ({quality.stock_same:.0%} of stock's own in another of its rounds)"
            if quality.stock_same is not None
            else ""
        )
        + f". {'Exact' if proposal.exact else 'Approximate'} by its policies.",
    ]
    if proposal.takes:
        paragraphs.append(f"It takes {proposal.takes} beside the pool.")
    paragraphs += [f"Measured elsewhere: {price}." for price in proposal.prices]
    if proposal.asks:
        wanted = ", ".join(f'"{k}": "{v}"' for k, v in proposal.asks.items())
        paragraphs.append(
            "It acts for requests that ask for it: "
            f'"kv_transfer_params": {{"kvplug": {{{wanted}}}}}.'
        )
    others = [m for m in found.tried if m.proposal.name != proposal.name]
    if others:
        paragraphs.append("")
        paragraphs.append("What else was tried:")
        paragraphs += [f"  {lost(m, question.objective)}" for m in others]
    paragraphs.append("")
    paragraphs.append(
        "kv-cache-memory-bytes is what every engine was given; set it to what your server has."
    )
    return [plain(one) for one in paragraphs]


def lost(measured: Measured, objective: str) -> str:
    """One line on a proposal that is not the one."""
    parts = []
    if measured.own:
        gain = measured.ratio(objective)
        parts.append(f"{gain.value:.2f} times as good as stock in {gain.n} rounds")
    if measured.quality is not None:
        parts.append(f"perplexity {measured.quality.rise.value:+.2%}")
    if measured.out:
        parts.append(measured.out)
    return f"{measured.proposal.name}: " + ", ".join(parts) + "."


def _figures(own: Figures) -> str:
    return (
        f"{own.tokens_per_second:.1f} tokens/s, {own.ttft:.2f} s to the first token (p95 "
        f"{own.ttft_p95:.2f} s), {1e3 * own.tpot:.0f} ms for each further one, {own.running} "
        f"running at most, {own.hit:.0%} of prompt tokens not computed"
    )


def version(package: str) -> str:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def plain(text: str) -> str:
    """Text fit for a comment: no character that ends its line or hides."""
    head = "  " if text.startswith("  ") else ""
    return head + "".join(c if c.isprintable() else "?" for c in text[len(head) :])
