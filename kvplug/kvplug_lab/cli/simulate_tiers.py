"""``kvplug simulate --tiers``: pool, tiers and their lines on traces, without an engine."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from kvplug.cli.tables import print_table
from kvplug.errors import KVPlugError
from kvplug_lab.cli.outputs import print_written
from kvplug_lab.policy_text import policy_section

if TYPE_CHECKING:
    from kvplug.contract import EngineView, LifecyclePolicy, PrefixCachePolicy
    from kvplug.hosts.trace.tiers import SimulatedModel, SimulatedTier, TierResult
    from kvplug.hosts.trace.traces import Trace

EAGER = "eager"
"""Stands for storing every block as soon as it is computed, with LRU, as other offloading does."""

ALONE = "none"
"""The pool without tiers, which every run is compared with."""

EXAMPLE = "host:size=5%:gbit=100,disk:size=20%:gbit=25"


@dataclass(frozen=True)
class TierOptions:
    """What ``--tiers`` and the options beside it ask for.

    Attributes:
        tiers: Lists of tiers, each ``NAME[:OPTION=VALUE...],...``.
        lifecycle: Lifecycle policies, ``NAME[:OPTION=VALUE...]`` or `EAGER`.
        orders: Tiers' orders, ``NAME[:OPTION=VALUE...]``.
        gbit: Bandwidths that replace every tier's, in Gbit/s; none to leave them.
        model: What the model's KV and its prefill cost.
    """

    tiers: Sequence[str]
    lifecycle: Sequence[str]
    orders: Sequence[str]
    gbit: Sequence[float]
    model: SimulatedModel


@dataclass(frozen=True)
class _Cell:
    """One replay to make."""

    trace: Trace
    pool: str
    capacity: int
    tiers: str
    sizes: tuple[SimulatedTier, ...]
    lifecycle: str
    order: str
    gbit: float | None


def run_tiers(
    traces: Sequence[Trace],
    pools: Sequence[tuple[str, Callable[[Trace, EngineView], PrefixCachePolicy]]],
    capacities: Callable[[Trace], list[int]],
    options: TierOptions,
    json: Path | None,
    shown: Callable[[int], Any],
    console: Console,
) -> None:
    """Replay every combination and print a table for each trace and pool.

    Args:
        traces: The traces.
        pools: The pool's orders: labels, and how to build one.
        capacities: Blocks of the pool, for a trace.
        options: Tiers and what is compared.
        json: File for the rows, or None.
        shown: Context of a progress bar, given the number of requests in all.
        console: Where the tables go.

    Raises:
        KVPlugError: A tier, policy or number is not valid; the message names the option.
    """
    from kvplug.hosts.trace.tiers import TierReplay

    cells = [cell for trace in traces for cell in _cells(trace, pools, capacities, options)]
    building = dict(pools)
    replays = {id(trace): TierReplay(trace, options.model) for trace in traces}
    found: list[tuple[_Cell, TierResult]] = []
    with shown(sum(cell.trace.num_requests for cell in cells)) as step:
        for cell in cells:
            replay = replays[id(cell.trace)]
            order, lifecycle = _order(cell.order), _lifecycle(cell.lifecycle)
            found.append(
                (
                    cell,
                    replay.run_tiers(
                        building[cell.pool](cell.trace, replay.engine(cell.capacity)),
                        cell.capacity,
                        cell.sizes,
                        order,
                        lifecycle,
                        eager=cell.lifecycle == EAGER,
                        step=step,
                    ),
                )
            )
    groups: dict[tuple[int, str, int], list[tuple[_Cell, TierResult]]] = {}
    for cell, result in found:
        groups.setdefault((id(cell.trace), cell.pool, cell.capacity), []).append((cell, result))
    for rows in groups.values():
        print_table(console, _table(rows, options.model))
    if json is not None:
        rows_ = [_row(cell, result, options.model) for cell, result in found]
        json.write_text(json_module.dumps(rows_, indent=1) + "\n", encoding="utf-8")
        print_written(console, "rows", json)


def _cells(
    trace: Trace,
    pools: Sequence[tuple[str, Any]],
    capacities: Callable[[Trace], list[int]],
    options: TierOptions,
) -> Iterator[_Cell]:
    from kvplug.hosts.trace.tiers import with_link

    for pool, _ in pools:
        for capacity in capacities(trace):
            yield _Cell(trace, pool, capacity, ALONE, (), ALONE, "lru", None)
            for text in options.tiers:
                tiers = _tiers(trace, text)
                for gbit in options.gbit or (None,):
                    sizes = tuple(t if gbit is None else with_link(t, gbit) for t in tiers)
                    for lifecycle in options.lifecycle:
                        for order in options.orders:
                            yield _Cell(trace, pool, capacity, text, sizes, lifecycle, order, gbit)


def _tiers(trace: Trace, text: str) -> list[SimulatedTier]:
    from kvplug.hosts.trace.tiers import SimulatedTier

    found = []
    for label in filter(None, (part.strip() for part in text.split(","))):
        given = policy_section(label, "--tiers", EXAMPLE)
        name = str(given.pop("use"))
        unknown = given.keys() - {"size", "gbit", "latency", "coded"}
        if unknown or "size" not in given:
            problem = f"{', '.join(sorted(unknown))} is unknown" if unknown else "size is missing"
            raise KVPlugError(
                f"--tiers: {label}: {problem}; a tier has size, gbit, latency (seconds) and coded "
                f"(its bytes over the pool's), e.g. {EXAMPLE}"
            )
        try:
            chunks = trace.capacity(str(given["size"]))
        except ValueError as error:
            raise KVPlugError(f"--tiers: {label}: {error}") from None
        gbit, latency, coded = (
            _number(label, name_, given.get(name_, default))
            for name_, default in (("gbit", 100), ("latency", 1e-4), ("coded", 1))
        )
        found.append(SimulatedTier(name, chunks, gbit * 1e9 / 8, latency, coded))
    names = [tier.name for tier in found]
    if not found or len(set(names)) != len(names):
        raise KVPlugError(f"--tiers: {text!r} needs tiers of different names, e.g. {EXAMPLE}")
    return found


def _number(label: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise KVPlugError(f"--tiers: {label}: {name} is {value!r}; it must be a number above 0")
    return float(value)


def _order(label: str) -> Callable[[EngineView], PrefixCachePolicy]:
    from kvplug.contract import PrefixCachePolicy
    from kvplug.parser import load_deployment

    section = policy_section(label, "--order", "lfu:half_life=9")
    tier = {"host": {"size": 1 << 30, "order": section}}
    choice = load_deployment({"tiers": [tier]}, source="--order", key="").tiers[0].order

    def build(engine: EngineView) -> PrefixCachePolicy:
        policy = choice.build(engine)
        assert isinstance(policy, PrefixCachePolicy)
        return policy

    return build


def _lifecycle(label: str) -> Callable[[EngineView], LifecyclePolicy]:
    from kvplug.contract import Kind, LifecyclePolicy
    from kvplug.parser import load_deployment

    name = "everything" if label in (EAGER, ALONE) else label
    section = {
        "tiers": [{"host": {"size": 1 << 30}}],
        "lifecycle": policy_section(name, "--lifecycle", "watermarks:high=0.9"),
    }
    choice = load_deployment(section, source="--lifecycle", key="").choice(Kind.LIFECYCLE)
    assert choice is not None

    def build(engine: EngineView) -> LifecyclePolicy:
        policy = choice.build(engine)
        assert isinstance(policy, LifecyclePolicy)
        return policy

    return build


# -- what is shown ---------------------------------------------------------------------------------


def _table(rows: Sequence[tuple[_Cell, TierResult]], model: SimulatedModel) -> Table:
    cell = rows[0][0]
    table = Table(
        title=f"{cell.trace.name}: pool of {cell.capacity:,} blocks in the order {cell.pool}, "
        f"{model.bytes_per_token:,} bytes a token, {model.prefill:,.0f} tokens/s of prefill; "
        "lines and times are simulated",
        title_justify="left",
    )
    for head in ("tiers", "lifecycle", "order"):
        table.add_column(head)
    for head in (
        "hits",
        "of tiers",
        "computed\nMtokens",
        "stored\nblocks",
        "never\nread",
        "written\nGB",
        "read\nGB",
        "TTFT\nmean s",
        "TTFT\n95% s",
    ):
        table.add_column(head, justify="right")
    for cell, result in rows:
        link = "" if cell.gbit is None else f" at {cell.gbit:g} Gbit/s"
        alone = cell.lifecycle == ALONE
        table.add_row(
            f"{cell.tiers}{link}",
            "" if alone else cell.lifecycle,
            "" if alone else cell.order,
            f"{result.hit_rate:.4f}",
            f"{result.tier_hit_rate:.4f}",
            f"{result.computed_tokens / 1e6:.2f}",
            f"{result.stored:,}",
            f"{result.useless / result.stored:.0%}" if result.stored else "",
            f"{result.written_bytes / 1e9:,.0f}",
            f"{result.read_bytes / 1e9:,.0f}",
            f"{result.mean_ttft:.3f}",
            f"{result.p95_ttft:.3f}",
            style="dim" if alone else None,
        )
    return table


def _row(cell: _Cell, result: TierResult, model: SimulatedModel) -> dict[str, Any]:
    return {
        "trace": cell.trace.name,
        "policy": cell.pool,
        "capacity": cell.capacity,
        "tiers": cell.tiers,
        "gbit": cell.gbit,
        "lifecycle": cell.lifecycle,
        "order": cell.order,
        "hit_rate": result.hit_rate,
        "tier_hit_rate": {
            name: hits / result.references for name, hits in result.tier_hits.items()
        },
        "passed": result.passed,
        "prompt_tokens": result.prompt_tokens,
        "computed_tokens": result.computed_tokens,
        "stored": result.stored,
        "useless": result.useless,
        "moved": result.moved,
        "written_bytes": result.written_bytes,
        "read_bytes": result.read_bytes,
        "ttft_mean": result.mean_ttft,
        "ttft_p95": result.p95_ttft,
        "thrash": result.counters.get("thrash", 0.0),
        "bytes_per_token": model.bytes_per_token,
        "prefill": model.prefill,
        "quadratic": model.quadratic,
    }
