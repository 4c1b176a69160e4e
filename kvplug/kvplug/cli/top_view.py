"""What `kvplug top` draws of a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from kvplug.observe.live import (
    BlockState,
    LiveState,
    Rates,
    RequestSpan,
    Snapshot,
    decode_map,
    plain,
)

__all__ = ["Screen"]

LOOK = {
    BlockState.EMPTY: ("·", "bright_black"),
    BlockState.CACHED: ("▒", "blue"),
    BlockState.HELD: ("█", "bright_blue"),
    BlockState.PARTLY_EVICTED: ("▓", "yellow"),
    BlockState.APPROXIMATE: ("≈", "red"),
    BlockState.LOADING: ("↓", "magenta"),
    BlockState.RESERVED: ("x", "bright_black"),
}
"""Character and colour of a state: the characters alone tell them apart."""

MAP_LINES = 4
REQUESTS = 12
OUTCOMES = 10
SPAN = 20
FAINT = "bright_black"


class Screen:
    """The latest state, as rich prints it."""

    def __init__(self) -> None:
        self._state: LiveState | None = None
        self._before: dict[int, Snapshot] = {}
        self._rates: dict[int, Rates] = {}

    def take(self, state: LiveState) -> None:
        """Take in a state; rates are those since the one before."""
        for engine in state.engines:
            before = self._before.get(engine.engine)
            if (found := Rates.between(before, engine)) is not None:
                self._rates[engine.engine] = found
            self._before[engine.engine] = engine
        self._state = state

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        state = self._state
        if state is None:
            return
        width = max(40, options.max_width)
        if state.problem:
            yield Text(plain(state.problem), style="yellow")
        for engine in state.engines:
            yield from _engine(engine, self._rates.get(engine.engine), state.expected, width)


def _engine(
    engine: Snapshot, rates: Rates | None, expected: int, width: int
) -> Iterator[RenderableType]:
    which = f"  engine {engine.engine} of {expected}" if expected > 1 else ""
    yield Text.assemble(
        ("kvplug ", "bold"),
        plain(engine.model),
        (f"{which}  step {engine.totals.steps:,}", FAINT),
        (f"  vLLM {plain(engine.vllm)}", FAINT),
    )
    running = sum(request.status == "running" for request in engine.requests)
    waiting = len(engine.requests) - running + engine.more
    facts = [
        ("running", f"{running:,}"),
        ("waiting", f"{waiting:,}"),
        ("computed", "-" if rates is None else f"{rates.scheduled:,.0f} tok/s"),
        ("generated", "-" if rates is None else f"{rates.generated:,.0f} tok/s"),
        ("hits", _hit_rate(engine)),
    ]
    yield _flowed([Text.assemble((f"{name} ", FAINT), value) for name, value in facts], width)
    yield Text()
    yield from _pool(engine, width)
    if engine.requests:
        yield Text()
        yield _requests(engine.requests, engine.more, engine.block_size)
    if engine.policies:
        yield Text()
        yield _policies(engine)
    if engine.tiers:
        yield Text()
        yield _tiers(engine)
    if engine.outcomes:
        yield Text()
        yield _outcomes(engine)


def _hit_rate(engine: Snapshot) -> str:
    found = {o.cause: o.count for o in engine.outcomes if o.level == "prefix cache"}
    total = sum(found.values())
    return f"{found.get('hit', 0) / total:.0%}" if total else "-"


def _pool(engine: Snapshot, width: int) -> Iterator[RenderableType]:
    states = decode_map(engine.map, engine.blocks)
    cells = min(width * MAP_LINES, max(1, len(states)))
    drawn = Text()
    for part in np.array_split(states, cells):
        # The state that most of the cell's blocks are in.
        state = BlockState(int(np.bincount(part, minlength=1).argmax())) if len(part) else None
        if state is not None:
            drawn.append(*LOOK[state])
    yield drawn
    each = -(-engine.blocks // cells)
    items = [Text(f"{engine.blocks:,} blocks, {each:,} a character:", style=FAINT)]
    for state, count in zip(BlockState, engine.states, strict=True):
        if count and state is not BlockState.RESERVED:
            share = f" {state.label} {count / max(1, engine.blocks):.1%}"
            items.append(Text.assemble(LOOK[state], share))
    yield _flowed(items, width)


def _flowed(items: Sequence[Text], width: int) -> Text:
    """Items one after the other, broken between them only."""
    found, left = Text(), width
    for item in items:
        if found and item.cell_len + 2 > left:
            found.append("\n")
            left = width
        elif found:
            found.append("  ")
            left -= 2
        found.append(item)
        left -= item.cell_len
    return found


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, header_style=FAINT)
    for i, column in enumerate(columns):
        right = column.endswith(">")
        table.add_column(
            column.removesuffix(">"),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if i == 0 else None,
        )
    return table


def _requests(requests: Sequence[RequestSpan], more: int, block_size: int) -> Table:
    table = _table("request", "state", "tokens>", "hit>", "resident")
    for request in requests[:REQUESTS]:
        table.add_row(
            Text(plain(request.id)),
            plain(request.status),
            f"{request.computed:,}/{request.prompt + request.output:,}",
            f"{request.hit + request.loaded:,}",
            _span(request, block_size),
        )
    rest = max(0, len(requests) - REQUESTS) + more
    if rest:
        table.add_row(Text(f"and {rest:,} more", style=FAINT), "", "", "", "")
    return table


def _span(request: RequestSpan, block_size: int) -> Text:
    """The request's text, in which what is resident is drawn full."""
    if not request.table:
        return Text("·" * SPAN, style=FAINT)
    first = request.approximate_from
    drawn = Text()
    for i in range(SPAN):
        at = (2 * i + 1) * request.table // (2 * SPAN)
        held = any(begin <= at < end for begin, end in request.resident)
        state = BlockState.HELD if held else BlockState.EMPTY
        if held and request.status == "loading":
            state = BlockState.LOADING
        elif held and first is not None and at * block_size >= first:
            state = BlockState.APPROXIMATE
        drawn.append(*LOOK[state])
    return drawn


def _policies(engine: Snapshot) -> Table:
    table = _table("policy", "kind", "", "acted>", "failed>")
    for policy in engine.policies:
        table.add_row(
            Text(plain(policy.name)),
            Text(plain(policy.kind)),
            "exact" if policy.exact else "approximate",
            f"{policy.acted:,}",
            Text(f"{policy.errors:,}", style="bold red" if policy.errors else ""),
        )
    return table


def _tiers(engine: Snapshot) -> Table:
    table = _table("tier", "used>", "of>", "chunks>", "read>", "write>")
    for tier in engine.tiers:
        table.add_row(
            Text(plain(tier.name) + (" (down)" if tier.down else "")),
            _bytes(tier.used),
            _bytes(tier.capacity) if tier.capacity else "-",
            f"{tier.chunks:,}",
            f"{_bytes(tier.read)}/s" if tier.read else "-",
            f"{_bytes(tier.write)}/s" if tier.write else "-",
        )
    return table


def _outcomes(engine: Snapshot) -> Table:
    table = _table("hits, misses and refusals", "where", "since the start>", "")
    most = sorted(engine.outcomes, key=lambda one: one.count, reverse=True)
    for one in most[:OUTCOMES]:
        style = "green" if one.cause == "hit" else ""
        table.add_row(
            Text(plain(one.cause), style=style),
            Text(plain(one.level)),
            f"{one.count:,}",
            Text(plain(one.unit)),
        )
    return table


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
