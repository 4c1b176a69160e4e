"""Speed of tiers by the size of what they store.

``python -m kvplug_lab.tier_speed --tier 'host: {size: 2GiB}' --tier ...`` opens each tier as a
worker does, packs chunks into the wire format and stores them, reads and unpacks them, and removes
them. It reports MiB a second of both ways, packing and checks included, and milliseconds of reading
one chunk. Every chunk is new bytes that do not compress. Rounds go through all sizes in turn, so
that what else the machine does is spread over them; of each cell the median round counts.
"""

from __future__ import annotations

import json as json_module
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvplug.contract import EngineView, Kind, PlaneShape, Tier, TierPlace
from kvplug.registry import plugins
from kvplug.tiers.wire import ChunkHeader, pack, unpack

KIB = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Sizes of payloads."""

IDENTITY = "5eed" * 16


def opened(text: str) -> tuple[str, Tier]:
    """Open the tier that a text describes as a deployment does, ``NAME: {option: value}``.

    Raises:
        typer.BadParameter: There is no such tier.
        TierError: It cannot be opened.
    """
    described = yaml.safe_load(text)
    if not isinstance(described, dict) or len(described) != 1:
        raise typer.BadParameter(f"{text!r} is not of the form 'NAME: {{option: value}}'")
    ((name, options),) = described.items()
    policy = plugins().registry.get(Kind.TIERS, str(name))
    if policy is None or not issubclass(policy, Tier):
        raise typer.BadParameter(f"there is no tier {name!r}")
    label = str(name)
    options = dict(options or {})
    label = str(options.pop("label", label))
    tier = policy(policy.Options.model_validate(options), EngineView(block_size=16))
    tier.open(TierPlace(IDENTITY, 0, 1))
    return label, tier


def chunks(kib: int, count: int) -> list[tuple[ChunkHeader, Tensor]]:
    """Chunks of new bytes."""
    size = kib << 10
    made = []
    for _ in range(count):
        plane = torch.frombuffer(bytearray(os.urandom(size)), dtype=torch.uint8)
        planes = {"cells": PlaneShape("uint8", (1, 1, 1, size))}
        header = ChunkHeader(os.urandom(32), IDENTITY, "raw", 1, "", True, 0, 1, 0, 1, planes)
        made.append((header, plane.view(1, 1, 1, size)))
    return made


def measure(tier: Tier, kib: int, mib: int, at_once: int) -> dict[str, float]:
    """Store, read and remove some MiB in chunks of one size.

    Args:
        tier: An open tier.
        kib: Size of a chunk.
        mib: MiB in all.
        at_once: MiB of one call.

    Returns:
        MiB a second of ``put`` and ``get``, and milliseconds of reading one chunk by itself.

    Raises:
        RuntimeError: A chunk is not stored, or not read back.
    """
    made = chunks(kib, max(4, mib * 1024 // kib))
    batch = max(1, at_once * 1024 // kib)
    batches = [made[i : i + batch] for i in range(0, len(made), batch)]
    began = time.perf_counter()
    for some in batches:
        items = [(header.key, pack(header, {"cells": plane})) for header, plane in some]
        refused = [why for why in tier.put(items) if why]
        if refused:
            raise RuntimeError(f"{tier.name} did not store a chunk: {refused[0]}")
    stored = time.perf_counter()
    for some in batches:
        for (header, _), payload in zip(some, tier.get([h.key for h, _ in some]), strict=True):
            if payload is None:
                raise RuntimeError(f"{tier.name} lost a chunk")
            unpack(payload, header)
    read = time.perf_counter()
    single = []
    for header, _ in made[:16]:
        start = time.perf_counter()
        tier.get([header.key])
        single.append(time.perf_counter() - start)
    for some in batches:
        tier.remove([header.key for header, _ in some])
    total = len(made) * kib / 1024
    return {
        "put": total / (stored - began),
        "get": total / (read - stored),
        "one_ms": statistics.median(single) * 1e3,
    }


def speeds(
    tier: Tier, sizes: Sequence[int], rounds: int, mib: int, at_once: int
) -> list[dict[str, float]]:
    """Measure a tier at several sizes; the median of some rounds of each."""
    measure(tier, sizes[0], 4, at_once)
    found: dict[int, list[dict[str, float]]] = {kib: [] for kib in sizes}
    for _ in range(rounds):
        for kib in sizes:
            found[kib].append(measure(tier, kib, mib, at_once))
    return [
        {"kib": kib} | {what: statistics.median(one[what] for one in each) for what in each[0]}
        for kib, each in found.items()
    ]


def main(
    tier: Annotated[list[str], typer.Option(help="A tier, as a deployment writes it.")],
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    mib: Annotated[int, typer.Option(min=1, help="MiB stored and read in each round.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="MiB of one call.")] = 8,
    json: Annotated[Path | None, typer.Option(help="Write the figures to a file.")] = None,
) -> None:
    """Measure tiers, and print a table."""
    table = Table("tier", "KiB", "put MiB/s", "get MiB/s", "one chunk, ms")
    figures: dict[str, Any] = {
        "command": "python -m kvplug_lab.tier_speed",
        "rounds": rounds,
        "mib": mib,
        "at_once_mib": at_once,
        "cpus": os.cpu_count(),
        "tiers": {},
    }
    for text in tier:
        label, one = opened(text)
        try:
            rows = speeds(one, KIB, rounds, mib, at_once)
        finally:
            one.close()
        figures["tiers"][label] = rows
        for row in rows:
            cells = (f"{row[what]:,.0f}" for what in ("kib", "put", "get"))
            table.add_row(label, *cells, f"{row['one_ms']:.2f}")
    Console().print(table)
    if json is not None:
        json.write_text(json_module.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
