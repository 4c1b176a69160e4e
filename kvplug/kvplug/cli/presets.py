"""``kvplug presets``: lists the deployments for kinds of load, or prints one."""

from __future__ import annotations

from typing import Annotated

import typer

from kvplug.cli import complete
from kvplug.cli.json_output import print_json
from kvplug.cli.refusals import refusing
from kvplug.cli.tables import say

WHICH = "A preset to print instead: its file, which says what it costs and can be served."


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help=WHICH,
            show_default=False,
            autocompletion=complete.presets,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the deployments that ship with kvplug for kinds of load, a line each.

    `kvplug serve NAME --model MODEL` serves one, `kvplug presets NAME` prints its file.
    """
    from kvplug import configs
    from kvplug.errors import DeploymentError, Refusal
    from kvplug.near_names import did_you_mean

    rows = [
        {"name": one.name, "exact": _exact(one.name), "for": one.what, "costs": one.cost}
        for one in configs.presets()
        if name is None or one.name == name
    ]
    with refusing():
        if name is not None and not rows:
            names = configs.known(configs.PRESETS)
            fix = f"{did_you_mean(name, names)}choose from {', '.join(names)}."
            raise DeploymentError("presets", [Refusal(name, "is no preset.", fix)])
    if as_json:
        print_json({"presets": rows})
    elif name is not None:
        file = configs.shipped(f"{configs.PRESETS}/{name}")
        typer.echo(file.read_text(encoding="utf-8"), nl=False)
    else:
        width = max(len(str(row["name"])) for row in rows)
        for row in rows:
            outputs = "exact" if row["exact"] else "approximate"
            first = str(row["for"]).partition(": ")[0].partition(". ")[0]
            line = f"{row['name']:<{width}}  {outputs:<11}  {first.rstrip('.')}"
            say(line, " " * (width + 15))


def _exact(name: str) -> bool:
    """True if a preset changes no answer."""
    from kvplug.configs import PRESETS, shipped
    from kvplug.parser import load_deployment
    from kvplug.yaml_file import read_yaml

    data, _ = read_yaml(shipped(f"{PRESETS}/{name}"))
    section = data["kv-transfer-config"]["kv_connector_extra_config"]["kvplug"]
    return all(choice.policy.exact for choice in load_deployment(section).all())
