"""``kvplug check``: validates deployment files without starting an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvplug.cli.refusals import print_refusals
from kvplug.configs import find

if TYPE_CHECKING:
    from kvplug.hosts.vllm.flags import ConfigFile

FILE_HELP = (
    "A vLLM --config file with a kvplug section, a file that is only the section, or the name of a "
    "deployment that ships with kvplug: NAME for this machine, cpu/NAME or gpu/NAME."
)

SUFFIXES = (".yaml", ".yml")
"""What vLLM's ``--config`` accepts."""


def check(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help=FILE_HELP,
            show_default=False,
        ),
    ],
) -> None:
    """Validate deployment files without starting an engine.

    Prints what each file would run; or one line per problem, with file, line, key and fix, and
    exits with code 2. Flags that are not kvplug's are left to vLLM to validate.
    """
    from kvplug.errors import DeploymentError

    code = 0
    for file in files:
        try:
            config = read_checked(file)
        except DeploymentError as error:
            print_refusals(error)
            code = error.exit_code
        else:
            for line in _lines(config):
                typer.echo(line)
    raise typer.Exit(code)


def read_checked(file: Path) -> ConfigFile:
    """Read a deployment file, or a shipped one by name, and check it against its engine.

    A file that is only the section describes no engine, so only its policies are checked, each
    against its own options and against the others.

    Raises:
        DeploymentError: The file cannot be read, or what it describes cannot run.
    """
    from kvplug.contract import EngineView
    from kvplug.errors import DeploymentError, Refusal
    from kvplug.hosts.vllm.flags import RUNS, engine_from_flags, read_config

    file = find(file)
    config = read_config(file)
    if config.standalone:
        needed = (choice.policy.requires for choice in config.deployment.all())
        engine = EngineView(block_size=16, features=frozenset().union(*needed))
    else:
        if file.suffix not in SUFFIXES:
            raise DeploymentError(
                str(file),
                [
                    Refusal(
                        "file",
                        f"vLLM reads --config files named {' or '.join(SUFFIXES)} only.",
                        f"rename it to {file.stem}.yaml.",
                    )
                ],
            )
        engine = engine_from_flags(config.flags)
    config.deployment.require_compatible(engine, runs=RUNS, host="vllm")
    return config


def section_file(config: ConfigFile) -> Path | None:
    """The file that holds a ``--config`` file's section when it is another file."""
    elsewhere = not config.standalone and config.deployment.source != str(config.path)
    return Path(config.deployment.source) if elsewhere else None


def notes(config: ConfigFile) -> list[str]:
    """Notes on a deployment that has no problems, one sentence each."""
    if config.standalone:
        return ["only a section: engine features are checked when an engine starts with it."]
    found = []
    if "block-size" not in config.flags:
        found.append(
            "block-size is not set: vLLM uses its default (16 on most GPUs, 128 on a CPU); "
            "the file was checked with 16."
        )
    if "shutdown-timeout" not in config.flags:
        found.append(
            "shutdown-timeout is not set: vLLM then stops the engine immediately on SIGTERM and "
            "kvplug's closing summary is not printed; set shutdown-timeout: 10 to get it."
        )
    section = section_file(config)
    if section is not None and not section.is_absolute():
        found.append(
            f"the section's path {section} is relative: `kvplug serve` makes it absolute, "
            "vLLM itself resolves it against its working directory."
        )
    return found


def _lines(config: ConfigFile) -> list[str]:
    from kvplug.hosts.vllm.features import features_from_flags
    from kvplug.registry import plugins

    lines = [f"{config.path}: OK"]
    for choice in config.deployment.all():
        policy = choice.policy
        how = "exact" if policy.exact else "approximate"
        options = " ".join(f"{k}={v}" for k, v in choice.options.model_dump().items())
        lines.append(
            f"  {policy.kind}: {policy.name} ({how})" + (f": {options}" if options else "")
        )
    if not config.deployment.all():
        lines.append("  no policy: the engine runs as stock")
    if not config.standalone:
        on = ", ".join(sorted(features_from_flags(config.flags)))
        lines.append(f"  features enabled: {on}")
    lines += [f"  note: {note}" for note in notes(config)]
    for name, cause in plugins().registry.broken.items():
        lines.append(f"  note: plugin {name} failed to load: {cause}")
    return lines
