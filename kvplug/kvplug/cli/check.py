"""``kvplug check``: validates deployment files without starting an engine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug.cli import complete
from kvplug.cli.json_output import print_json
from kvplug.cli.refusals import print_refusals, refusing
from kvplug.cli.tables import say
from kvplug.configs import find

if TYPE_CHECKING:
    from kvplug.errors import DeploymentError, Refusal
    from kvplug.hosts.vllm.flags import ConfigFile
    from kvplug.planning.model import Model

FILE_HELP = (
    "A vLLM --config file with a kvplug section, a file that is only the section, or the name of a "
    "deployment that ships with kvplug: NAME for this machine or a preset, cpu/NAME, gpu/NAME or "
    "presets/NAME."
)


STDIN = "-"
"""Name of a file that stands for standard input, and what messages call it."""
STDIN_SHOWN = "<stdin>"


def check(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help=f"{FILE_HELP} `-` reads standard input.",
            show_default=False,
            autocompletion=complete.deployments,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="A model that they are to run on, as `kvplug plan` takes it: refuses what its "
            "layers do not allow.",
            show_default=False,
            autocompletion=complete.models,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Validate deployment files without starting an engine.

    Prints what each file would run; or one line per problem, with file, line, key and fix, and
    exits with code 2. vLLM's own parser reads its flags where vLLM is installed.
    """
    from kvplug.errors import DeploymentError, KVPlugError
    from kvplug.planning.model import read_model
    from kvplug.registry import plugins

    code, verdicts, described = 0, [], None
    if model is not None:
        with refusing():
            described = read_model(model)
    for file in files:
        verdict: dict[str, Any] = {"file": str(file), "ok": True, "policies": [], "problems": []}
        verdicts.append(verdict)
        try:
            with _as_file(file) as (path, shown):
                verdict["file"] = shown
                config = _read(path, shown, described)
                verdict |= _found(config)
        except DeploymentError as error:
            code = error.exit_code
            verdict |= {"ok": False, "problems": _problems(error)}
            if not as_json:
                print_refusals(error)
        except KVPlugError as error:
            code = 2
            problem, _, fix = str(error).partition(" Fix: ")
            said = {"file": str(file), "line": None, "key": "file", "problem": problem, "fix": fix}
            verdict |= {"ok": False, "problems": [said]}
            if not as_json:
                typer.echo(f"{file}: {error}", err=True)
        else:
            if not as_json:
                _print(verdict)
    if as_json:
        broken = dict(plugins().registry.broken)
        print_json({"ok": code == 0, "files": verdicts, "broken": broken})
    raise typer.Exit(code)


@contextmanager
def _as_file(file: Path) -> Iterator[tuple[Path, str]]:
    """The file to read and what to call it; standard input is written to one.

    Raises:
        DeploymentError: Standard input is empty, or too long for a deployment.
    """
    from kvplug.errors import DeploymentError, Refusal
    from kvplug.yaml_file import MAX_BYTES

    if str(file) != STDIN:
        found = find(file)
        yield found, str(found)
        return
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    problem = "is empty." if not data.strip() else ""
    if len(data) > MAX_BYTES:
        problem = f"has more than the {MAX_BYTES:,} bytes that are read."
    if problem:
        fix = "pipe a deployment into `kvplug check -`."
        raise DeploymentError(STDIN_SHOWN, [Refusal("file", problem, fix)])
    with tempfile.TemporaryDirectory(prefix="kvplug-check-") as scratch:
        path = Path(scratch) / "deployment.yaml"
        path.write_bytes(data)
        yield path, STDIN_SHOWN


def _read(path: Path, shown: str, model: Model | None) -> ConfigFile:
    """Read and check a file; errors call it what is shown."""
    from kvplug.errors import DeploymentError, Refusal

    try:
        return read_checked(path, model=model)
    except DeploymentError as error:
        if shown == str(path):
            raise

        def named(text: str) -> str:
            return text.replace(str(path), shown)

        refusals = [Refusal(r.key, named(r.problem), named(r.fix), r.line) for r in error.refusals]
        raise DeploymentError(named(error.source), refusals) from None


def _problems(error: DeploymentError) -> list[dict[str, Any]]:
    return [{"file": error.source, **asdict(refusal)} for refusal in error.refusals]


def _found(config: ConfigFile) -> dict[str, Any]:
    """What a deployment without problems would run, as plain data."""
    from kvplug.hosts.vllm.features import features_from_flags

    features = None if config.standalone else sorted(map(str, features_from_flags(config.flags)))
    return {
        "section_only": config.standalone,
        "policies": [
            {
                "kind": str(choice.policy.kind),
                "name": choice.policy.name,
                "exact": choice.policy.exact,
                "options": choice.options.model_dump(mode="json"),
            }
            for choice in config.deployment.all()
        ],
        "features": features,
        "notes": notes(config),
    }


def read_checked(
    file: Path, arguments: Sequence[str] = (), model: Model | None = None
) -> ConfigFile:
    """Read a deployment file, or a shipped one by name, and check it against its engine.

    A file that is only the section describes no engine, so only its policies are checked, each
    against its own options and against the others.

    Args:
        file: The file, or the name of a shipped one.
        arguments: Arguments of vLLM's server that go with it.
        model: The model that it is to run on; None leaves what only a model tells to the engine.

    Raises:
        DeploymentError: The file cannot be read, or what it describes cannot run.
        KVPlugError: vLLM is installed and cannot be imported; or what the model keeps in the
            file's dtype is not known, or its heads cannot be divided among the tensor-parallel
            ranks.
    """
    from kvplug.contract import EngineView, Feature
    from kvplug.errors import DeploymentError
    from kvplug.hosts.vllm.features import number
    from kvplug.hosts.vllm.flags import EXTENSION, RUNS, engine_from_flags, read_config
    from kvplug.hosts.vllm.needs import RECOMPUTE, Stated, unmet

    config = read_config(find(file), arguments)
    deployment = config.deployment
    # `kvplug serve` sets the connector's flag for a section.
    transfer = {"kv_load_failure_policy": RECOMPUTE} if config.standalone else config.transfer
    if config.standalone and not arguments:
        needed = (choice.policy.requires for choice in deployment.all())
        engine = EngineView(block_size=16, features=frozenset().union(*needed))
        stated = Stated(engine.features | {Feature.PREFIX_CACHING}, RECOMPUTE, EXTENSION)
    else:
        engine = engine_from_flags(config.flags)
        stated = Stated.of_flags(config.flags, transfer)
    if model is not None:
        model = model.served_in(str(config.flags.get("dtype", "auto")))
        model.require_runnable(deployment)
        layers = model.views(number(config.flags, "tensor-parallel-size", 1))
        engine = replace(engine, features=engine.features | model.features, layers=layers)
    deployment.require_compatible(engine, runs=RUNS, host="vllm")
    refusals = unmet(deployment, stated)
    if not config.standalone or arguments:
        refusals += [*_guard_refusals(config), *_identity_refusals(config)]
    if refusals:
        raise DeploymentError(deployment.source, refusals)
    return config


def _guard_refusals(config: ConfigFile) -> list[Refusal]:
    """Refuse a guard that sees nothing; what `kvplug serve` adds is there."""
    from kvplug.errors import Refusal
    from kvplug.hosts.vllm.features import speculation
    from kvplug.hosts.vllm.flags import GUARD, has_processor
    from kvplug.hosts.vllm.needs import SHADOW_WITH_DRAFTS

    deployment = config.deployment
    if deployment.guard is None:
        return []
    key = next((key for key in deployment.lines if key.split(".")[-1] == "guard"), "guard")
    found = []
    if not has_processor(config, GUARD):
        problem, fix = (
            "needs a logits processor that is not enabled.",
            f"set --logits-processors {GUARD}.",
        )
        found.append((key, problem, fix))
    if deployment.guard.shadow is not None and speculation(config.flags):
        found.append((f"{key}.shadow", *SHADOW_WITH_DRAFTS))
    return [Refusal(at, problem, fix, deployment.lines.get(at)) for at, problem, fix in found]


def _identity_refusals(config: ConfigFile) -> list[Refusal]:
    """Refuse to keep KV beyond the engine where weights are no files, which would tell whose."""
    from kvplug.contract import Kind
    from kvplug.errors import Refusal
    from kvplug.fingerprint import reads_files

    deployment, load_format = config.deployment, str(config.flags.get("load-format", "auto"))
    # A format that a plugin brings is asked at the engine's start.
    if reads_files(load_format) is not False:
        return []
    found = []
    why = f"load-format {load_format} reads no files that tell its model from another."
    chosen = deployment.choices.get(Kind.REUSE)
    if chosen and deployment.reuse.store.directory:
        key = f"{chosen[0].key.split('.use')[0]}.store.directory"
        problem, fix = f"segments outlive the engine, and {why}", "remove the directory"
        found.append((key, problem, fix))
    for one in deployment.tiers:
        if getattr(one.tier.policy, "shared", False) or getattr(one.tier.policy, "durable", False):
            problem = f"chunks in tier {one.name} outlive the engine or are seen by others, and "
            found.append((one.tier.key, problem + why, "remove the tier"))
    return [
        Refusal(
            key,
            problem,
            f"load the weights from files on this machine, or {fix}.",
            deployment.lines.get(key),
        )
        for key, problem, fix in found
    ]


def relative_section(config: ConfigFile) -> Path | None:
    """The file that holds a ``--config`` file's section, where that names it by a relative path.

    vLLM looks for it in its working directory, whichever way the ``--config`` file is named.
    """
    if config.standalone:
        return None
    written = config.transfer["kv_connector_extra_config"]["kvplug"]
    relative = isinstance(written, str) and not Path(written).is_absolute()
    return Path(config.deployment.source) if relative else None


def notes(config: ConfigFile) -> list[str]:
    """Notes on a deployment that has no problems, one sentence each."""
    from kvplug.hosts.vllm.features import number

    if config.standalone:
        return ["only a section: engine features are checked when an engine starts with it."]
    found = [*config.remarks]
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
    store = config.deployment.reuse.store.directory
    if store and number(config.flags, "data-parallel-size", 1) > 1:
        found.append(
            f"each data-parallel rank keeps its segments in a folder of its own: rank 0 in "
            f"{store}, the others in {store}/data-parallel-1 and so on."
        )
    if (section := relative_section(config)) is not None:
        found.append(
            f"the section's path is relative: `kvplug serve` passes {section.absolute()}, vLLM "
            "itself resolves it against its working directory."
        )
    return found


def _print(verdict: dict[str, Any]) -> None:
    from kvplug.registry import plugins

    typer.echo(f"{verdict['file']}: OK")
    for policy in verdict["policies"]:
        how = "exact" if policy["exact"] else "approximate"
        options = " ".join(f"{k}={v}" for k, v in policy["options"].items())
        say(
            f"  {policy['kind']}: {policy['name']} ({how})" + (f": {options}" if options else ""),
            "    ",
        )
    if not verdict["policies"]:
        say("  no policy: the engine runs as stock", "    ")
    if verdict["features"] is not None:
        say(f"  features enabled: {', '.join(verdict['features'])}", "    ")
    for note in verdict["notes"]:
        say(f"  note: {note}", "    ")
    for name, cause in plugins().registry.broken.items():
        say(f"  note: plugin {name} failed to load: {cause}", "    ")
