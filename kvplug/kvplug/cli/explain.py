"""``kvplug explain``: the story of a request, of a block, or of all misses, from the event log."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug.cli.json_output import print_json
from kvplug.cli.refusals import refusing
from kvplug.cli.tables import say

if TYPE_CHECKING:
    from kvplug.observe.story import Entry, MissTable, Story

WIDTH = 120
"""Columns where the output is not a terminal."""

POSITIONS = 10
"""Positions at which prompts differ that are shown."""


def explain(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="The file of `observe: events`.")],
    request: Annotated[
        str | None,
        typer.Option(help="A request's id, or the beginning of one.", show_default=False),
    ] = None,
    block: Annotated[
        str | None, typer.Option(help="A block's hash, as the log names it.", show_default=False)
    ] = None,
    misses: Annotated[
        bool, typer.Option("--misses", help="All misses by cause; without another choice as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell why a prompt missed, or what became of a request or a block, from an event log.

    Reads the file that `observe: {events: FILE}` names in a deployment, and what a rotation left
    beside it.
    """
    from kvplug.observe.story import BadLog, block_story, miss_table, request_story

    with refusing():
        if sum((request is not None, block is not None, misses)) > 1:
            raise BadLog("explain: use one of --request, --block and --misses")
        if request is not None:
            story = request_story(log, request)
        elif block is not None:
            story = block_story(log, block)
        else:
            table = miss_table(log)
            if as_json:
                print_json(_table_data(table))
            else:
                _show_table(table)
            return
    if as_json:
        typer.echo(json.dumps(asdict(story), indent=2, default=str))
    else:
        _show_story(story, "request" if request is not None else "block")


def _show_story(story: Story, what: str) -> None:
    from kvplug.plain_text import one_line

    first = story.entries[0].at
    began = datetime.fromtimestamp(first, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    typer.echo(f"{what} {one_line(story.of, 128)}, from {began}")
    if story.left_out:
        typer.echo(f"{story.left_out:,} earlier events are left out")
    for entry in story.entries:
        say(f"{entry.at - first:+9.3f} s  step {entry.step:<6} {sentence(entry)}", " " * 24)
        for line in _evictions(entry, story):
            say(f"{'':24}{line}", " " * 24)
    _show_ignored(story.ignored)


def _evictions(entry: Entry, story: Story) -> list[str]:
    """Who took the missed blocks that the log saw leave."""
    from kvplug.observe.events import EventType
    from kvplug.plain_text import one_line

    if entry.event is not EventType.MISSED:
        return []
    by: dict[tuple[str, int, str], list[str]] = {}
    for block in entry.blocks:
        taken = story.evicted_by.get(block)
        if taken is not None and taken.at <= entry.at:
            by.setdefault((taken.request, taken.step, taken.policy), []).append(block)
    found = []
    for (request, step, policy), blocks in by.items():
        whose = f"for request {one_line(request, 80)}" if request else "for a running request"
        order = policy or "vLLM's own order"
        found.append(f"{_blocks(len(blocks))} evicted {whose} in step {step}, by {order}")
    return found


def sentence(entry: Entry) -> str:
    """An event in words."""
    from kvplug.observe.events import EventType

    count, detail, facts = entry.count, entry.detail, entry.facts
    by = f" by {entry.policy}" if entry.policy else ""
    match entry.event:
        case None:
            return "an engine started"
        case EventType.ADMITTED:
            parts = [
                f"{facts[key]:,} {word}"
                for key, word in (
                    ("hit", "cached"),
                    ("segment", "from segments"),
                    ("tier", "from a tier"),
                    ("missed", "to compute"),
                )
                if isinstance(facts.get(key), int)
            ]
            return f"admitted: {_blocks(count)} of prompt: {', '.join(parts) or 'no full one'}"
        case EventType.MISSED:
            return f"missed {_blocks(count)}: {_causes(facts)}; first: {detail}"
        case EventType.EVICTED:
            room = " to make room for it" if entry.request else ""
            return f"evicted {_blocks(count)}{room}{by or ' in vLLM own order'}"
        case EventType.PREEMPTED:
            return "preempted: its blocks went to other requests"
        case EventType.AGAIN:
            why = detail.replace("_", " ")
            return f"admitted again ({why}): {_blocks(count)} to compute again"
        case EventType.THRASHED:
            return f"{_blocks(count)} of these had been evicted within one pool of evictions"
        case EventType.ENDED:
            return f"ended ({detail or 'unknown'}) after {count:,} tokens"
        case EventType.REUSED:
            return f"used stored KV for {count:,} tokens"
        case EventType.LOADED:
            return f"loaded {count:,} tokens from {entry.policy or 'a tier'}"
        case EventType.REFUSED:
            return f"refused {count:,}{by}: {detail}"
        case _:
            said = f": {detail}" if detail else ""
            return f"{entry.event} {count:,}{by}{said}"


def _causes(facts: dict[str, Any]) -> str:
    causes = facts.get("causes")
    if not isinstance(causes, dict):
        return "causes unknown"
    pairs = [(n, str(cause)[:40]) for cause, n in causes.items() if isinstance(n, int)]
    return ", ".join(f"{n:,} {cause}" for n, cause in sorted(pairs, reverse=True))


def _blocks(count: int) -> str:
    return f"{count:,} block" if count == 1 else f"{count:,} blocks"


def _show_table(found: MissTable) -> None:
    from rich.table import Table

    from kvplug.cli.tables import console, print_table

    on = console(WIDTH)
    total, missed = sum(found.blocks.values()), sum(found.causes.values())
    on.print(f"{found.requests:,} requests, {total:,} full blocks of prompts")
    shown = Table()
    for name in ("blocks", "share"):
        shown.add_column(name, justify="right")
    shown.add_column("where from, or why not")
    for source, word in (("hit", "cached"), ("segment", "segments"), ("tier", "tiers")):
        if found.blocks[source]:
            shown.add_row(f"{found.blocks[source]:,}", _share(found.blocks[source], total), word)
    for cause, count in found.causes.most_common():
        shown.add_row(f"{count:,}", _share(count, total), f"missed: {cause}")
    print_table(on, shown)
    if found.thrashed:
        on.print(f"{found.thrashed:,} blocks were evicted and soon computed again")
    if found.positions:
        on.print("prompts differ from a known text most often at")
        for token, requests in found.positions.most_common(POSITIONS):
            on.print(f"  token {token:,}: {requests:,} requests")
    if missed != found.blocks["missed"]:
        on.print(
            f"causes are given for {missed:,} of {found.blocks['missed']:,} missed blocks: a part "
            "of the log is missing"
        )
    _show_ignored(found.ignored)


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else ""


def _table_data(found: MissTable) -> dict[str, Any]:
    data = dict(vars(found))
    data["causes"] = dict(found.causes.most_common())
    data["positions"] = dict(found.positions.most_common())
    return data


def _show_ignored(ignored: int) -> None:
    if ignored:
        typer.echo(f"{ignored:,} lines are no events and were left out", err=True)
