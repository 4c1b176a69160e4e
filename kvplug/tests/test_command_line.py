"""What all commands have in common: help, `--json`, completion, width, pipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from kvplug import __version__, configs
from kvplug.cli import app, installed
from kvplug.cli.json_output import Command
from kvplug.cli.tables import console, print_table, say
from kvplug.hosts.trace import traces

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/command_line.md"
PROGRAM = get_command(app)


def leaves(
    group: Any = PROGRAM, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that runs something, with the words that name it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(leaves())


def run(*arguments: object, columns: int | None = None, **how: Any) -> Any:
    environment = {"COLUMNS": None if columns is None else str(columns), "TERMINAL_WIDTH": None}
    return CliRunner().invoke(
        app, [str(a) for a in arguments], env=environment, prog_name="kvplug", **how
    )


def too_long(text: str, columns: int) -> list[str]:
    """Lines longer than there is room for; a word that is as long as a line may be."""
    found = [line for line in text.splitlines() if len(line) > columns]
    return [line for line in found if max(map(len, line.split())) < columns - 12]


# -- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [(), ("calibrate",), ("reuse",), *COMMANDS], ids=" ".join)
def test_help_by_a_letter_fits_80_columns(path: tuple[str, ...]) -> None:
    done = run(*path, "-h", columns=80)
    assert done.exit_code == 0
    assert f"Usage: kvplug {' '.join(path)}".strip() in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    if path and path != ("calibrate",):
        assert done.stdout == run(*path, "--help", columns=80).stdout


def test_paragraphs_of_help_are_wrapped_whole() -> None:
    told = run("check", "-h", columns=80).stdout
    (line,) = [one for one in told.splitlines() if one.strip().startswith("Prints what each file")]
    assert len(line.rstrip()) > 70


def test_commands_are_grouped_by_what_one_wants() -> None:
    told = run("-h", columns=80).stdout
    assert installed.OTHER not in told
    headings = re.findall(r"^╭─ (.+?) ─", told, flags=re.MULTILINE)
    known = [
        name for name in installed.PANELS if set(installed.PANELS[name]) & set(PROGRAM.commands)
    ]
    assert headings == ["Options", *known]


def test_an_unknown_command_has_near_names() -> None:
    done = run("polices")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Did you mean 'policies'" in done.stderr


def test_the_module_is_the_program() -> None:
    command = [sys.executable, "-m", "kvplug", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"kvplug {__version__}\n"


# -- the page ----------------------------------------------------------------------------------


def rows_of_the_page() -> dict[str, list[str]]:
    found = re.findall(r"^\| `kvplug ([a-z- ]+)` \|(.+)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found}


def test_the_page_lists_every_command_and_its_options() -> None:
    rows = rows_of_the_page()
    assert set(rows) == {" ".join(path) for path in COMMANDS}
    for path, command in COMMANDS.items():
        options = {option for one in command.params for option in one.opts}
        model, shape = rows[" ".join(path)][1:]
        assert (model == "yes") is ("--model" in options), path
        assert (shape != "") is ("--json" in options), path


def test_every_command_that_shows_figures_has_json() -> None:
    """Servers, and what only writes a file or prints a deployment, have none."""
    without = {
        " ".join(path)
        for path, command in COMMANDS.items()
        if "--json" not in {option for one in command.params for option in one.opts}
    }
    assert without - {"new"} == {"serve", "record", "calibrate transfer"}


def keys_of(name: str) -> list[str]:
    """The keys that the page states for a command."""
    return re.findall(r"`(\w+)`", rows_of_the_page()[name][2])


# -- --json ------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "small.jsonl"
    lines = [
        {"timestamp": i, "input_length": 1024, "output_length": 1, "hash_ids": [i % 3, 9]}
        for i in range(9)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert traces.read(file).num_requests == 9
    return file


PLAN = ("--model", ROOT / "kvplug/tests/model_configs/llama-3.1-8b.json", "--memory", "80GiB")


@pytest.mark.parametrize(
    "arguments",
    [
        ("policies",),
        ("policies", "int4"),
        ("presets",),
        ("check", "cpu/lru"),
        ("plan", *PLAN, "--context", "4096", "cpu/int4"),
        ("doctor", "--hardware"),
    ],
    ids=lambda a: a[0],
)
def test_json_is_all_of_stdout_and_as_the_page_says(arguments: tuple[object, ...]) -> None:
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    if arguments[0] != "doctor":
        assert list(told) == keys_of(str(arguments[0]))
    else:
        assert list(told) == ["hardware"]


def test_json_without_a_file_goes_to_stdout_and_tables_to_stderr(trace: Path) -> None:
    shown = run("simulate", trace, "--policy", "fifo", "--capacity", "2,3")
    assert shown.exit_code == 0 and "fifo" in shown.stdout
    file = trace.with_name("rows.json")
    for ending in (["--json"], ["--json", "-"]):
        done = run("simulate", trace, "--policy", "fifo", "--capacity", "2,3", *ending)
        assert done.exit_code == 0 and "fifo" in done.stderr and "figures" not in done.stderr
        rows = json.loads(done.stdout)
        assert list(rows[0]) == keys_of("simulate")
    middle = run("simulate", trace, "--json", "--policy", "fifo", "--capacity", "2,3")
    assert json.loads(middle.stdout) == rows
    written = run("simulate", trace, "--policy", "fifo", "--capacity", "2,3", "--json", file)
    assert written.stdout.startswith(shown.stdout) and json.loads(file.read_text()) == rows


def test_json_before_an_argument_does_not_overwrite_it(trace: Path) -> None:
    before = trace.read_bytes()
    done = run("simulate", "--json", trace, trace)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"--json: {trace} is there and is no .json file. Fix: name ano")
    assert trace.read_bytes() == before


def test_an_error_beside_json_goes_to_stderr(tmp_path: Path) -> None:
    for arguments in (
        ("simulate", tmp_path / "no.npz", "--json"),
        ("policies", "nothing", "--json"),
        ("explain", tmp_path / "no.jsonl", "--json"),
        ("tune", "--json"),
        ("plan", "--model", "/not/here", "--memory", "1GiB", "--context", "9", "--json"),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (2, ""), arguments
        assert done.stderr


Program = Callable[..., Any]


@pytest.fixture
def program(capfd: pytest.CaptureFixture[str]) -> Program:
    """Run a command that prints in every way, writes figures and ends with a code."""
    made = typer.Typer()

    @made.command(cls=Command)
    def measure(
        names: Annotated[list[str] | None, typer.Argument()] = None,
        json: Annotated[Path | None, typer.Option()] = None,
        end: int = 0,
    ) -> None:
        typer.echo("a table")
        os.write(1, b"from below\n")
        subprocess.run(["echo", "a child"], check=True)
        if json is not None and end != 3:
            json.write_text('{"rate": NaN, "rows": [1, Infinity]}', encoding="utf-8")
        if end:
            raise typer.Exit(end)

    def invoke(*arguments: str) -> tuple[int, str, str]:
        try:
            get_command(made).main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        return (code, *capfd.readouterr())

    return invoke


def test_whatever_a_command_prints_stays_out_of_the_document(program: Program) -> None:
    code, out, err = program("--json")
    assert code == 0 and json.loads(out) == {"rate": None, "rows": [1, None]}
    assert sorted(err.splitlines()) == ["a child", "a table", "from below"]
    code, out, err = program()
    assert (code, err) == (0, "") and "a table" in out and "a child" in out


@pytest.mark.parametrize(("end", "printed"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_document_is_printed_unless_the_input_was_refused(
    program: Program, end: int, printed: bool
) -> None:
    code, out, _ = program("--json", "--end", str(end))
    assert code == end and (out != "") is printed


def test_json_ends_at_two_dashes(program: Program, tmp_path: Path) -> None:
    code, out, _ = program("--json", "--", "--json")
    assert code == 0 and json.loads(out)["rows"] == [1, None]
    file = tmp_path / "figures.json"
    code, out, _ = program("--json", str(file))
    assert code == 0 and "a table" in out and "NaN" in file.read_text()
    assert program("--json", str(file))[0] == 0, "a file of figures is written again"


# -- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pol", {"policies"}),
        ("policies snap", {"snapkv"}),
        ("policies --kind for", {"format"}),
        ("presets mul", {"multi_turn", "multimodal"}),
        ("check cpu/quick", {"cpu/quickstart"}),
        ("serve gpu/snap", {"gpu/snapkv"}),
        ("serve x --model smol", {"smollm2"}),
        ("eval --model smol", {"smollm2"}),
        ("calibrate tr", {"transfer"}),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes(
    line: str, expected: set[str], shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = f"kvplug {line}"
    environment = {
        "_KVPLUG_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": words,
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = CliRunner().invoke(app, [], env=environment, prog_name="kvplug")
    found = set(re.findall(r"[\w/]+(?=[\s\":]|$)", done.stdout))
    assert expected <= found, done.output
    if shell == "bash":
        assert set(done.stdout.split()) == expected


def test_files_of_deployments_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvplug.cli import complete

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "minerals").mkdir()
    assert complete.deployments("min") == ["mine.yaml", "minerals/"]
    assert complete.deployments("/no/such/") == []
    assert complete.models("./min") == ["./minerals/"]
    assert "~nobody/" not in complete.models("~nobody/")


# -- width -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("policies",),
        ("policies", "memo", "fp8", "structure", "host"),
        ("presets",),
        ("check", "cpu/quickstart", "presets/agent_sessions"),
        ("doctor", "--hardware"),
        ("plan", *PLAN, "--context", "4096", "--host", "1GiB", "--users", "9"),
    ],
    ids=lambda a: a[0],
)
@pytest.mark.parametrize("columns", [80, 100])
def test_output_fits_the_columns(arguments: tuple[object, ...], columns: int) -> None:
    done = run(*arguments, columns=columns)
    assert done.exit_code == 0
    assert too_long(done.stdout, columns) == []


def test_traces_and_narrow_windows_fit(trace: Path) -> None:
    tiers = ("simulate", trace, "--tiers", "host:size=2", "--capacity", "2")
    for arguments, columns in (
        (tiers, 80),
        ((*tiers[:2], *tiers[-2:]), 80),
        (("policies",), 20),
        (("presets",), 1),
    ):
        done = run(*arguments, columns=columns)
        assert done.exit_code == 0, done.output
        assert too_long(done.stdout, max(columns, 20)) == []


def test_a_table_without_room_is_told_row_after_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.table import Table

    table = Table("policy", *(f"figure {i}" for i in range(12)), title="a title")
    table.add_row("lru", *(f"{i * 1000:,}" for i in range(11)), "")
    monkeypatch.setenv("COLUMNS", "60")
    print_table(console(200), table)
    title, first, *rest = capsys.readouterr().out.splitlines()
    assert (title, first) == ("a title", "lru")
    assert " ".join(" ".join(rest).split()) == "; ".join(
        f"figure {i} {i * 1000:,}" for i in range(11)
    )
    monkeypatch.delenv("COLUMNS")
    print_table(console(200), table)
    assert "┃ figure 0 ┃" in capsys.readouterr().out


def test_a_line_is_wrapped_at_words_where_there_is_a_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "problem: " + "word " * 20 + "/a/very/long/path" * 9
    monkeypatch.delenv("COLUMNS", raising=False)
    say(line, "  ", colour="red")
    assert capsys.readouterr().out == f"{line}\n", "no colours in a pipe, and one line"
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    say(line, "  ", colour="red")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("problem: word") and all(one.startswith("  ") for one in rest)
    assert rest[-1].strip() == "/a/very/long/path" * 9
    assert max(map(len, [first, *rest[:-1]])) < 40


# -- pipes -------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_without_a_traceback() -> None:
    for arguments in ("policies", "policies --json"):
        command = f"{sys.executable} -m kvplug {arguments} | head -1"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 1
        assert done.stderr == ""


def test_a_pipe_gets_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for arguments in (("-h",), ("policies",), ("plan", *PLAN, "--context", "4096")):
        assert "\x1b" not in run(*arguments).stdout


def test_presets_are_those_that_ship() -> None:
    told = json.loads(run("presets", "--json").stdout)
    assert [one["name"] for one in told["presets"]] == configs.known("presets")
