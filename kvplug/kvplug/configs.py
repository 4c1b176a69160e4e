"""Finds the deployments that ship with kvplug, by name.

They are in two sets: ``gpu``, with vLLM's defaults for a GPU, and ``cpu``, sized for a small model
on a CPU. A name alone is one of the set for this machine; ``cpu/NAME`` and ``gpu/NAME`` are
looked up as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from kvplug.errors import DeploymentError, Refusal

SETS = ("cpu", "gpu")
NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)?")


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
    if file.exists() or not NAME.fullmatch(name):
        return file
    of, _, rest = name.rpartition("/")
    of = of or machine_set()
    if of in SETS and rest in known(of):
        return shipped(f"{of}/{rest}")
    other = [f"{one}/{rest}" for one in SETS if rest in known(one)]
    if other:
        problem = f"ships as {other[0]} only, and this machine's deployments are in {of}/."
        fix = f"pass {other[0]} to use it here, or choose from {_listed(of)}."
    else:
        problem = "no such file, and kvplug ships no deployment of that name."
        fix = f"check the path, or choose from {'; '.join(map(_listed, SETS))}."
    raise DeploymentError(name, [Refusal("file", problem, fix)])


def machine_set() -> str:
    """Return the set for this machine: ``gpu`` where torch sees a CUDA device."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _listed(of: str) -> str:
    return f"{of}/: {', '.join(known(of))}"
