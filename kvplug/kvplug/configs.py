"""Finds the deployments that ship with kvplug, by name.

They are in three sets: ``gpu``, one policy each with vLLM's defaults for a GPU; ``cpu``, sized for
a small model on a CPU; and ``presets``, one for each kind of load, with what it costs. A name alone
is one of the set for this machine, or else a preset; ``cpu/NAME``, ``gpu/NAME`` and
``presets/NAME`` are looked up as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvplug.errors import DeploymentError, Refusal
from kvplug.near_names import did_you_mean

PRESETS = "presets"
SETS = ("cpu", "gpu", PRESETS)
NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)?")


COST = "What it costs: "
"""What begins a preset's price, in the comment that its file begins with."""


@dataclass(frozen=True)
class Preset:
    """A preset as its file describes it.

    Attributes:
        name: Its name.
        what: What it is for and does, some sentences.
        cost: What it costs, some sentences.
    """

    name: str
    what: str
    cost: str


def presets() -> list[Preset]:
    """Return the presets, by name."""
    found = []
    for name in known(PRESETS):
        lines = shipped(f"{PRESETS}/{name}").read_text(encoding="utf-8").splitlines()
        comment = lines[: lines.index("")]
        said = " ".join(line.removeprefix("#").strip() for line in comment)
        what, _, cost = said.partition(COST)
        cost = cost.partition("  kvplug serve ")[0].strip()
        found.append(Preset(name, what.strip(), cost[:1].upper() + cost[1:]))
    return found


def folder() -> Path:
    """Return the folder of the sets, in a checkout or an installed wheel."""
    package = Path(__file__).parent
    checkout = package.parents[1] / "configs"
    return checkout if checkout.is_dir() else package / "_configs"


def known(of: str) -> list[str]:
    """Return the names of a set's deployments, without the set."""
    return sorted(file.stem for file in (folder() / of).glob("*.yaml"))


def shipped(name: str) -> Path:
    """Return the path of a deployment that ships with kvplug.

    Args:
        name: Set and name, such as ``cpu/lru``.

    Raises:
        FileNotFoundError: No deployment of that name ships with kvplug.
    """
    found = folder() / f"{name}.yaml"
    if not found.is_file():
        raise FileNotFoundError(f"kvplug ships no deployment named {name!r}")
    return found


def find(file: Path) -> Path:
    """Return the deployment file that an argument stands for.

    Args:
        file: A path; or the name of a shipped deployment where no such path exists.

    Returns:
        The path of the shipped deployment, or ``file`` itself where it exists or is no name.

    Raises:
        DeploymentError: It is a name, and none of the shipped deployments has it on this machine.
    """
    name = str(file)
    if (file.exists() and not file.is_dir()) or not NAME.fullmatch(name):
        return file
    of, _, rest = name.rpartition("/")
    for one in (of,) if of else (machine_set(), PRESETS):
        if one in SETS and rest in known(one):
            return shipped(f"{one}/{rest}")
    of = of or machine_set()
    other = [f"{one}/{rest}" for one in SETS if rest in known(one)]
    if other:
        problem = f"ships as {other[0]} only, and this machine's deployments are in {of}/."
        fix = f"pass {other[0]} to use it here, or choose from {_listed(of)}."
    else:
        problem = "no such file, and kvplug ships no deployment of that name."
        everything = dict.fromkeys(one for kind in (PRESETS, *SETS) for one in known(kind))
        meant = did_you_mean(rest, everything)
        fix = f"{meant}check the path, or choose from {'; '.join(map(_listed, SETS))}."
    raise DeploymentError(name, [Refusal("file", problem, fix)])


def machine_set() -> str:
    """Return the set for this machine: ``gpu`` where torch sees a CUDA device."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _listed(of: str) -> str:
    return f"{of}/: {', '.join(known(of))}"
