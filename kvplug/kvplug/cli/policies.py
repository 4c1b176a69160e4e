"""``kvplug policies``: lists the installed policies with their options and requirements."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from kvplug.contract import Policy

BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "multiple of"))
WIDTH = 120
"""Columns where the output is not a terminal."""


def policies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed policies by kind, with their options and what they do not support."""
    from kvplug.registry import plugins

    registry = plugins().registry
    found = describe_all()
    if as_json:
        typer.echo(json.dumps({"policies": found, "broken": registry.broken}, indent=2))
        return
    _print_tables(found)
    for name, cause in sorted(registry.broken.items()):
        typer.echo(f"Plugin {name} failed to load: {cause}")


def describe_all() -> list[dict[str, Any]]:
    """Every installed policy as plain data, sorted by kind and name."""
    from kvplug.contract import Kind
    from kvplug.registry import plugins

    registry = plugins().registry
    entries = _entries()
    return [
        _describe(policy, entries)
        for kind in Kind
        for name in registry.names(kind)
        if (policy := registry.get(kind, name)) is not None
    ]


def _entries() -> list[importlib.metadata.EntryPoint]:
    from kvplug.registry import ENTRY_POINT_GROUP

    return list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


def _describe(policy: type[Policy], entries: list[importlib.metadata.EntryPoint]) -> dict[str, Any]:
    from kvplug.contract import ALL_FEATURES

    plugin, distribution = _origin(policy, entries)
    return {
        "kind": str(policy.kind),
        "name": policy.name,
        "exact": policy.exact,
        "changes": policy.changes,
        "options": [_option(n, f) for n, f in policy.Options.model_fields.items()],
        "requires": sorted(map(str, policy.requires)),
        "not_supported": sorted(map(str, ALL_FEATURES - policy.supports)),
        "excludes": dict(policy.excludes),
        "paper": policy.paper,
        "plugin": plugin,
        "distribution": distribution,
        "class": f"{policy.__module__}.{policy.__qualname__}",
    }


def _origin(
    policy: type[Policy], entries: list[importlib.metadata.EntryPoint]
) -> tuple[str | None, str | None]:
    """The plugin whose package the policy lives in, and the distribution that declares it."""

    def shared(entry: importlib.metadata.EntryPoint) -> int:
        pairs = zip(entry.module.split("."), policy.__module__.split("."), strict=False)
        count = 0
        for mine, its in pairs:
            if mine != its:
                break
            count += 1
        return count

    best = max(entries, key=shared, default=None)
    if best is None or not shared(best):
        return None, None
    dist = best.dist
    return best.name, f"{dist.name} {dist.version}" if dist is not None else None


def _option(name: str, info: FieldInfo) -> dict[str, Any]:
    required = info.is_required()
    default = None if required else info.get_default(call_default_factory=True)
    bounds = [
        f"{sign} {value}"
        for m in info.metadata
        for attribute, sign in BOUNDS
        if (value := getattr(m, attribute, None)) is not None
    ]
    kind = info.annotation
    return {
        "name": name,
        "type": kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind),
        "required": required,
        "default": default if isinstance(default, int | float | str | None) else repr(default),
        "range": ", ".join(bounds),
        "description": info.description or "",
    }


def _print_tables(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvplug.contract import Kind

    terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if terminal else WIDTH, highlight=False)
    for kind in dict.fromkeys(p["kind"] for p in found):
        table = Table(title=kind, title_justify="left", show_lines=True)
        for heading in ("policy", "outputs", "what it changes, options, limits"):
            table.add_column(heading, overflow="fold")
        for policy in (p for p in found if p["kind"] == kind):
            table.add_row(
                Text(policy["name"]),
                Text("exact" if policy["exact"] else "approximate"),
                Text("\n".join(_details(policy))),
            )
        console.print(table)
    none = [str(k) for k in Kind if str(k) not in {p["kind"] for p in found}]
    if none:
        typer.echo(f"No policies installed for: {', '.join(none)}.")


def _details(policy: dict[str, Any]) -> list[str]:
    lines = [f"changes: {policy['changes']}"]
    for option in policy["options"]:
        facts = "required" if option["required"] else f"default {option['default']}"
        if option["range"]:
            facts += f", {option['range']}"
        lines.append(f"option {option['name']}: {option['type']}, {facts}: {option['description']}")
    if not policy["options"]:
        lines.append("no options")
    if policy["requires"]:
        lines.append(f"needs: {', '.join(policy['requires'])}")
    if policy["not_supported"]:
        lines.append(f"not with: {', '.join(policy['not_supported'])}")
    for other, reason in policy["excludes"].items():
        lines.append(f"not with {other}: {reason}")
    if policy["paper"]:
        lines.append(f"paper: {policy['paper']}")
    origin = policy["distribution"] or policy["class"]
    lines.append(f"plugin: {policy['plugin'] or 'not by entry point'} ({origin})")
    return lines
