"""Finds the deployments that ship with kvplug."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """Return the path of ``configs/<name>.yaml``, in a checkout or an installed wheel.

    Raises:
        FileNotFoundError: No deployment of that name ships with kvplug.
    """
    package = Path(__file__).parent
    for folder in (package.parents[1] / "configs", package / "_configs"):
        if (found := folder / f"{name}.yaml").is_file():
            return found
    raise FileNotFoundError(f"kvplug ships no deployment named {name!r}")
