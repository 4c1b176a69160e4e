"""``kvplug policies``: lists the installed policies with their options and requirements."""

from __future__ import annotations

import importlib.metadata
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug.cli import complete
from kvplug.cli.json_output import print_json
from kvplug.cli.refusals import refusing
from kvplug.cli.tables import room, say
from kvplug.errors import KVPlugError
from kvplug.near_names import did_you_mean

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from kvplug.contract import Policy

BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "multiple of"))
PAGES = "docs/policies"
OWN = (
    "kvplug_policies.",
    "kvplug_reuse_learned.",
    "kvplug_attention_memo.",
    "kvplug_kvpress.",
)
"""Packages whose policies have pages."""


def policies(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...]",
            help="Policies to show in full, with options and an example.",
            show_default=False,
            autocompletion=complete.policies,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Policies of one kind alone, e.g. format.",
            show_default=False,
            autocompletion=complete.kinds,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed policies by kind, or show some in full."""
    from kvplug.registry import plugins

    broken = plugins().registry.broken
    with refusing():
        found = _chosen(names or [], kind)
    if as_json:
        print_json({"policies": found, "broken": broken})
        return
    if names:
        for i, policy in enumerate(found):
            if i:
                typer.echo()
            _print_one(policy)
        return
    _print_list(found, kind)
    for name, cause in sorted(broken.items()):
        say(f"Plugin {name} failed to load: {cause}")


def _chosen(names: Sequence[str], kind: str | None) -> list[dict[str, Any]]:
    """The policies asked for, all of them if no name is given.

    Raises:
        UnknownPolicy: There is no such kind or policy.
    """
    from kvplug.contract import Kind

    kinds = [str(one) for one in Kind]
    if kind is not None and kind not in kinds:
        raise UnknownPolicy(
            f"--kind: {kind[:64]!r} is no kind.",
            did_you_mean(kind.lower(), kinds),
            f"choose from {', '.join(kinds)}.",
        )
    known = [one for one in describe_all() if kind in (None, one["kind"])]
    if not names:
        return known
    found = []
    for name in names:
        these = [one for one in known if one["name"] == name]
        if not these:
            of = f" of the kind {kind}" if kind else ""
            raise UnknownPolicy(
                f"{name[:64]!r} is no installed policy{of}.",
                did_you_mean(name.lower(), [one["name"] for one in known]),
                "see `kvplug policies`.",
            )
        found += [one for one in these if one not in found]
    for one in found:
        one["example"] = example(one["kind"], one["name"])
    return found


class UnknownPolicy(KVPlugError):
    """A policy or a kind that is not there."""

    exit_code = 2

    def __init__(self, problem: str, meant: str, fix: str):
        super().__init__(f"{problem} Fix: {meant}{fix}")


def page(policy: type[Policy]) -> str | None:
    """Path of the page of one of kvplug's own policies, in its repository."""
    if not policy.__module__.startswith(OWN):
        return None
    stem = policy.name
    if str(policy.kind) == "transfer" and stem in SHARED:
        stem = f"transfer_{stem}"
    return f"{PAGES}/{stem}.md"


SHARED = ("fp8", "int8", "int4")
"""Names that a format and a transfer codec share."""


def example(kind: str, name: str) -> dict[str, Any] | None:
    """A deployment that uses a policy: a shipped one if there is any.

    Returns:
        The name of the shipped ``deployment`` or None, and the kvplug ``section``; None for a
        policy that needs more than its name.
    """
    from kvplug import configs
    from kvplug.errors import DeploymentError
    from kvplug.parser import load_deployment
    from kvplug.yaml_file import read_yaml

    # Every set of deployments, those of its own name first.
    files = [f"{of}/{stem}" for of in configs.SETS for stem in configs.known(of)]
    section: dict[str, Any]
    for file in sorted(files, key=lambda one: one.rpartition("/")[2] != name):
        data, _ = read_yaml(configs.shipped(file))
        section = data["kv-transfer-config"]["kv_connector_extra_config"]["kvplug"]
        if name not in str(section):
            continue
        try:
            used = load_deployment(section).all()
        except DeploymentError:  # it needs what is not installed
            continue
        if any((str(one.policy.kind), one.policy.name) == (kind, name) for one in used):
            return {"deployment": file, "section": section}
    section = {kind: {"use": name}}
    if kind in ("transfer", "lifecycle"):
        section = {"tiers": [{"host": {"size": "8GiB"}}], kind: {"use": name}}
    try:
        load_deployment(section)
    except DeploymentError:  # it has options that only you know
        return None
    return {"deployment": None, "section": section}


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
        "summary": _summary(policy),
        "changes": policy.changes,
        "options": [_option(n, f) for n, f in policy.Options.model_fields.items()],
        "requires": sorted(map(str, policy.requires)),
        "not_supported": sorted(map(str, ALL_FEATURES - policy.supports)),
        "excludes": dict(policy.excludes),
        "paper": policy.paper,
        "page": page(policy),
        "plugin": plugin,
        "distribution": distribution,
        "class": f"{policy.__module__}.{policy.__qualname__}",
    }


def _summary(policy: type[Policy]) -> str:
    """The first sentence of a policy's own docstring; what it changes where there is none."""
    paragraph = " ".join((policy.__doc__ or policy.changes).split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".").replace("``", "")


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


def _print_list(found: list[dict[str, Any]], kind: str | None) -> None:
    """A line a policy."""
    from kvplug.contract import Kind

    width = max((len(one["name"]) for one in found), default=0)
    for of in dict.fromkeys(one["kind"] for one in found):
        typer.echo(of)
        for one in (one for one in found if one["kind"] == of):
            outputs = "exact" if one["exact"] else "approximate"
            start = f"  {one['name']:<{width}}  {outputs:<11}  "
            most = (room() or COLUMNS) - 1 - len(start)
            say(start + textwrap.shorten(one["summary"], max(most, 16), placeholder=" …"))
    none = [str(k) for k in Kind if str(k) not in {one["kind"] for one in found}]
    if none and kind in (None, *none):
        say(f"No policies installed for: {', '.join(none)}.")
    if found:
        say("`kvplug policies NAME` shows one in full.")


COLUMNS = 80
"""Columns of a line where nothing says how many there are."""


def _print_one(policy: dict[str, Any]) -> None:
    import yaml

    outputs = "exact" if policy["exact"] else "approximate"
    say(f"{policy['kind']}: {policy['name']} ({outputs})")
    say(f"  {policy['summary']}.", "  ")
    for line in _details(policy):
        say(f"  {line}", "    ")
    if (shown := policy["example"]) is not None:
        of = shown["deployment"]
        say(f"  example, of `kvplug serve {of}`:" if of else "  example:")
        text = yaml.safe_dump(
            {"kvplug": shown["section"]}, sort_keys=False, allow_unicode=True, width=68
        )
        typer.echo(textwrap.indent(text, "    "), nl=False)


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
    for name in ("paper", "page"):
        if policy[name]:
            lines.append(f"{name}: {policy[name]}")
    origin = policy["distribution"] or policy["class"]
    lines.append(f"plugin: {policy['plugin'] or 'not by entry point'} ({origin})")
    return lines
