"""What a shell completes: names of policies, kinds, deployments, presets and models."""

from __future__ import annotations

__all__ = ["deployments", "kinds", "models", "policies", "presets"]


def policies(incomplete: str) -> list[str]:
    """Names of installed policies."""
    from kvplug.registry import plugins

    return _beginning({policy.name for policy in plugins().registry}, incomplete)


def kinds(incomplete: str) -> list[str]:
    """Kinds of policies."""
    from kvplug.contract import Kind

    return _beginning({str(kind) for kind in Kind}, incomplete)


def presets(incomplete: str) -> list[str]:
    """Names of presets."""
    from kvplug import configs

    return _beginning(set(configs.known(configs.PRESETS)), incomplete)


def deployments(incomplete: str) -> list[str]:
    """Names of shipped deployments, with and without their set, and files here."""
    from kvplug import configs

    names = {f"{of}/{name}" for of in configs.SETS for name in configs.known(of)}
    names |= {name for of in configs.SETS for name in configs.known(of)}
    return [*_beginning(names, incomplete), *_files(incomplete, (".yaml", ".yml"))]


def models(incomplete: str) -> list[str]:
    """Models that are made here, those of the hub that were downloaded, and directories here."""
    from kvplug.model_source import downloaded, made_here

    names = {*made_here(), *downloaded()}
    return [*_beginning(names, incomplete), *_files(incomplete, ())]


def _beginning(names: set[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def _files(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    """Directories, and files with an ending, that begin so."""
    from pathlib import Path

    folder, slash, begin = incomplete.rpartition("/")
    try:
        found = sorted(Path(f"{folder}{slash}" or ".").expanduser().iterdir())[:500]
    except (OSError, RuntimeError):
        return []
    names = [
        f"{folder}{slash}{one.name}{'/' if one.is_dir() else ''}"
        for one in found
        if one.name.startswith(begin)
        and (begin or not one.name.startswith("."))
        and (one.is_dir() or one.name.endswith(endings or ("\0",)))
    ]
    return names
