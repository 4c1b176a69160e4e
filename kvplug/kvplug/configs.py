"""Where the deployments that ship with kvplug lie."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """Path of ``configs/<name>.yaml``, in a checkout or in an installed wheel.

    Raises:
        FileNotFoundError: There is no such deployment.
    """
    package = Path(__file__).parent
    for folder in (package.parents[1] / "configs", package / "_configs"):
        if (found := folder / f"{name}.yaml").is_file():
            return found
    raise FileNotFoundError(f"kvplug ships no deployment named {name!r}")
