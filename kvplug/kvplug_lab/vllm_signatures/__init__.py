"""Holds kvplug against releases of vLLM that are not installed, by their signatures.

``python -m kvplug_lab.vllm_signatures WHEEL`` reads a wheel of vLLM without importing it, says what
kvplug uses that the release lacks or has otherwise, and writes what it read beside this file, for a
test to compare the code with ever after.
"""

from __future__ import annotations

from pathlib import Path

import kvplug.hosts.vllm
import kvplug_lab.engine
from kvplug.hosts.vllm import compat, plugin
from kvplug_lab.vllm_signatures.fit import STOCK, Fit, Use, added, moved
from kvplug_lab.vllm_signatures.library import Found, Library, Member, SignaturesError

__all__ = [
    "FOLDER",
    "Fit",
    "Found",
    "Library",
    "Member",
    "SignaturesError",
    "Use",
    "added",
    "compare",
    "moved",
    "older",
    "recorded",
]

FOLDER = Path(__file__).resolve().parent

REGISTRY = "vllm.v1.attention.backends.registry:AttentionBackendEnum"

GROUP = ("vllm.plugins:DEFAULT_PLUGINS_GROUP", "'vllm.general_plugins'")
"""Where vLLM names the entry-point group that kvplug registers in."""

ALSO = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.lora.request",
    "vllm.multimodal.inputs",
    "vllm.utils.argparse_utils",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu.model_runner",
)
"""Modules worth a record beside those whose names are used."""


def older(version: str, since: str) -> bool:
    """True if a release came before another, both as numbers with dots."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split("+")[0].split(".") if part.isdecimal()]

    return numbers(version) < numbers(since)


def recorded() -> dict[str, Path]:
    """Releases whose signatures lie beside this file, by version."""
    return {path.stem.partition("-")[2]: path for path in sorted(FOLDER.glob("vllm-*.json"))}


def compare(library: Library, beside: Fit | None = None) -> Fit:
    """Compare everything that kvplug's host and the lab's engines use with a release.

    Args:
        library: The release.
        beside: The comparison with another release, whose overridden methods must all be here,
            but those which ``compat.NEWER`` says came later.
    """
    fit = Fit(library)
    fit.declared(compat.EXTENSION_POINTS, compat.ATTRIBUTES)
    fit.values([GROUP])
    for name in plugin.BACKENDS:
        fit.values([(f"{REGISTRY}.{name}", None)])
    for targets in STOCK.values():
        fit.declared([(target, ()) for target in targets], [])
    for package in (kvplug.hosts.vllm, kvplug_lab.engine):
        fit.files(sorted(Path(package.__path__[0]).rglob("*.py")))
    for module in ALSO:
        library.module(module)
    overridden = {**beside.overrides} if beside is not None else {}
    overridden |= dict.fromkeys(compat.NEWER, "compat.py")
    fit.expect(
        {
            point: where
            for point, where in overridden.items()
            if not older(library.version, compat.NEWER.get(point, "0"))
        }
    )
    return fit
