"""The GPU check without a GPU: what runs its parts, and what it makes of results."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvplug.contract import Kind
from kvplug.errors import KVPlugError
from kvplug_policies.builtin import BUILTIN

pytest.importorskip("kvplug_lab.gpu_check")

from kvplug_lab.gpu_check import benches, cases, exact, kernels, policies, publish, report, speed
from kvplug_lab.gpu_check.engines import EngineFailed, Machine
from kvplug_lab.gpu_check.parts import SCHEMA, Group, Part, Report, Results, run_groups

Said = list[str]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def said() -> Said:
    return []


@pytest.fixture
def results(tmp_path: Path, said: Said) -> Results:
    return Results(tmp_path / "out.json", {"machine": {"gpu": "none"}}, said.append)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine("cpu", {}, tmp_path, ROOT, None)  # type: ignore[arg-type]


def rows_of(results: Results, part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = results.data["parts"][part]["rows"]
    return found


def one_row(name: str, ok: bool = True) -> Callable[[Report, float], None]:
    return lambda report, _: report({"name": name, "ok": ok}, f"{name} is {ok}")


# -- parts ---------------------------------------------------------------------------------------


def test_a_part_that_fails_stops_no_other(results: Results, said: Said) -> None:
    def breaks(report: Report, _: float) -> None:
        report({"name": "first", "ok": True}, "first")
        raise KVPlugError("no card")

    groups = [
        Group([Part("a", breaks), Part("b", one_row("x"))], 0.5),
        Group([], 0.3),
        Group([Part("c", one_row("y"))], 0.2),
    ]
    run_groups(groups, 60, results)
    written = json.loads(results.file.read_text(encoding="utf-8"))
    assert written == results.data
    assert (written["schema"], written["machine"]) == (SCHEMA, {"gpu": "none"})
    assert written["ok"] is results.ok is False
    parts = written["parts"]
    assert [(n, p["ok"], p["error"]) for n, p in sorted(parts.items())] == [
        ("a", False, "KVPlugError: no card"),
        ("b", True, None),
        ("c", True, None),
    ]
    assert parts["a"]["rows"] == [{"name": "first", "ok": True}]
    assert "b: x is True" in said and any(line.startswith("c: 1 of 1 ok") for line in said)


def test_a_row_that_is_not_ok_fails_its_part_and_is_written_at_once(results: Results) -> None:
    seen: list[Any] = []

    def bad(report: Report, _: float) -> None:
        report({"name": "x", "ok": False}, "x")
        seen.append(json.loads(results.file.read_text(encoding="utf-8")))

    run_groups([Group([Part("a", bad), Part("b", one_row("y"))], 1.0)], 60, results)
    assert seen[0]["parts"]["a"]["rows"] == [{"name": "x", "ok": False}]
    assert not results.ok
    assert [results.data["parts"][n]["ok"] for n in "ab"] == [False, True]


def test_parts_of_a_group_run_side_by_side(results: Results) -> None:
    import threading

    both = threading.Barrier(2, timeout=30)
    meet = [Part(name, lambda report, _: both.wait() and None) for name in "ab"]
    run_groups([Group(meet, 1.0)], 60, results)
    assert results.ok


def test_groups_share_the_time_and_leave_what_they_do_not_take(results: Results) -> None:
    left: dict[str, float] = {}

    def note(name: str) -> Part:
        return Part(name, lambda _, deadline: left.update({name: deadline - time.monotonic()}))

    run_groups([Group([note("a")], 0.25), Group([note("b")], 0.75)], 1000, results)
    assert left["a"] == pytest.approx(250, abs=20)
    assert left["b"] == pytest.approx(1000, abs=20)


# -- kernel tests --------------------------------------------------------------------------------


def checkout(folder: Path, tests: str) -> Path:
    (folder / "kernels/tests").mkdir(parents=True)
    (folder / "kernels/tests/test_some.py").write_text(tests, encoding="utf-8")
    return folder


TESTS = """
import time, pytest
@pytest.mark.parametrize("n", range(4))
def test_odd(n): assert n % 2, "even number"
def test_good(): pass
def test_skipped(): pytest.skip("no")
"""


def test_kernel_tests_are_counted_and_failures_grouped(
    tmp_path: Path, results: Results, said: Said
) -> None:
    root = checkout(tmp_path / "root", TESTS)

    def run(report: Report, deadline: float) -> None:
        kernels.run_tests(root, tmp_path, 1, report, deadline, [])

    run_groups([Group([Part("kernels", run)], 1.0)], 120, results)
    one, every = rows_of(results, "kernels")
    assert (one["name"], one["ok"], one["failed"]) == ("test_some.py::test_odd", False, 2)
    assert "even number" in one["message"] and "[0]" in one["example"]
    assert (every["ok"], every["passed"], every["failed"], every["skipped"]) == (False, 3, 2, 1)
    assert results.data["parts"]["kernels"]["error"] is None
    assert not results.ok


def test_kernel_tests_that_cannot_be_collected_or_hang_are_an_error(
    tmp_path: Path, results: Results
) -> None:
    root = checkout(tmp_path / "a", "import no_such_module")
    with pytest.raises(KVPlugError, match="no_such_module"):
        kernels.run_tests(root, tmp_path, 1, lambda row, line: None, time.monotonic() + 60, [])
    slow = "import time\ndef test_hangs(): time.sleep(600)\n"
    root = checkout(tmp_path / "b", slow)
    with pytest.raises(KVPlugError, match="out of time after 0 tests"):
        kernels.run_tests(root, tmp_path, 1, lambda row, line: None, time.monotonic() + 2, [])


# -- benchmarks ----------------------------------------------------------------------------------

BENCH = """
import argparse, json, os, pathlib
p = argparse.ArgumentParser(); p.add_argument("--json", type=pathlib.Path)
p.add_argument("--repetitions"); p.add_argument("--quick", action="store_true"); a = p.parse_args()
{body}
row = dict(op="{name}", path="triton", shape="4", op_us_median=1.0, ratio_median=2.0,
           baseline="a copy")
a.json.write_text(json.dumps([row]))
"""


def test_a_benchmark_that_ends_its_process_costs_the_others_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "kernels/benchmarks"
    folder.mkdir(parents=True)
    bodies = {"a": "", "b": "os._exit(3)", "c": "raise ValueError('no')", "d": ""}
    for name, body in bodies.items():
        code = BENCH.format(name=name, body=body)
        (folder / f"bench_{name}.py").write_text(code, encoding="utf-8")
    found: list[Mapping[str, Any]] = []
    benches.run_benches(
        tmp_path,
        tmp_path,
        lambda row, line: found.append(row),
        time.monotonic() + 60,
        repetitions=3,
        quick=True,
    )
    assert [(row["name"], row["ok"]) for row in found] == [
        ("a", True),
        ("b", False),
        ("c", False),
        ("d", True),
    ]
    assert "exit code 3" in found[1]["error"] and "ValueError: no" in found[2]["error"]


def test_benchmarks_without_time_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "kernels/benchmarks"
    folder.mkdir(parents=True)
    code = BENCH.format(name="a", body="import time; time.sleep(600)")
    (folder / "bench_a.py").write_text(code, encoding="utf-8")
    with pytest.raises(KVPlugError, match="out of time before a"):
        benches.run_benches(
            tmp_path,
            tmp_path,
            lambda row, line: None,
            time.monotonic() + 1,
            repetitions=3,
            quick=True,
        )


# -- cases ---------------------------------------------------------------------------------------


class FakeEngine:
    """Stands for `Engine`: what it answers is set by the test."""

    answers: Callable[[str, Mapping[str, Any]], Any]
    started: list[str]

    def __init__(self, machine: Machine, name: str, model: Path, section: Any, *_: Any, **__: Any):
        self.name, self.facts = name.split(" ", 1)[1], {}
        type(self).started.append(self.name)

    def ready(self, deadline: float) -> dict[str, Any]:
        if self.name == "dead":
            raise EngineFailed("no memory\nlog")
        self.facts = {"runner": 2, "graphs": "FULL_AND_PIECEWISE", "backend": "b", "start_s": 1.0}
        self.facts |= {"blocks": 100, "block_size": 16}
        return self.facts

    def ask(self, work: Mapping[str, Any], deadline: float) -> Any:
        return type(self).answers(self.name, work)

    def stop(self) -> None:
        pass


def result(work: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    found = {
        "tokens": [[7] * r["max_tokens"] for r in work["requests"]],
        "seconds": 2.0,
        "stopped": False,
        "peak_running": 8,
        "peak_blocks": 90,
        "preemptions": 0,
        "evictions": 9,
        "blocks_freed": 5,
        "step_ms": {8: 3.0},
        "reports": [],
    }
    return found | own


def acted(kind: str, name: str, **own: Any) -> dict[str, Any]:
    return {"kind": kind, "name": name, "acted": 5, "errors": 0, "counters": {}} | own


def test_cases_report_what_is_wrong(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cases, "Engine", FakeEngine)
    FakeEngine.started = []
    FakeEngine.answers = staticmethod(lambda name, work: result(work))  # type: ignore[assignment]
    work = [{"prompt": [1], "max_tokens": 3}]
    good = exact.compares(lambda: [[7, 7, 7]])
    bad = exact.compares(lambda: [[7, 7, 8]])
    some = [
        cases.Case("good", None, work, good),
        cases.Case("bad", None, work, bad),
        cases.Case("dead", None, work, good),
        cases.Case("idle", {}, work, exact.compares(lambda: [[7, 7, 7]], "format")),
    ]
    found: dict[str, Mapping[str, Any]] = {}
    report: Report = lambda row, line: found.update({row["name"]: row})  # noqa: E731
    cases.serve_cases("part", machine, tmp_path, some, 2, report, time.monotonic() + 60)
    assert {name: (row["ok"], row["problem"].splitlines()[:1]) for name, row in found.items()} == {
        "good": (True, []),
        "bad": (False, ["other tokens than expected: request 0 from token 2"]),
        "dead": (False, ["no memory"]),
        "idle": (False, ["no format policy acted"]),
    }
    assert found["good"]["graphs"] == "FULL_AND_PIECEWISE"
    cases.serve_cases("part", machine, tmp_path, some[:1], 1, report, time.monotonic() - 1)
    assert found["good"]["problem"] == "not run: out of time"


def test_short_answers_and_errors_of_policies_are_problems() -> None:
    work = [{"max_tokens": 3}, {"max_tokens": 3}]
    assert cases.unfinished({"tokens": [[1, 2, 3], [1]]}, work) == "requests [1] did not finish"
    assert exact.problem_of({"reports": [acted("format", "int4")]}, ["format"]) == ""
    broken = {"reports": [acted("sequence", "knorm", errors=2, counters={"fallbacks": 1})]}
    assert exact.problem_of(broken, []) == "knorm counts 2 errors, knorm counts 1 fallbacks"
    assert "2 answers, expected 1" in cases.differences([[1], [2]], [[1]])
    # Another length is another answer.
    assert cases.differences([[1, 2]], [[1]]) != ""


def test_every_policy_is_served_or_named_as_left_out(machine: Machine) -> None:
    named = {
        Kind.SEQUENCE: {"sink_window", *policies.SCORING},
        Kind.FORMAT: {*policies.FORMATS, *policies.CALIBRATED},
        Kind.PREFIX_CACHE: {*policies.QUEUES, *policies.RECORDED},
        Kind.REUSE: {*policies.CHAIN},
    }
    for kind, names in named.items():
        assert names == {p.name for p in BUILTIN if p.kind is kind}
    served = [
        name
        for case in policies.policy_cases(machine)
        for kind, section in (case.section or {}).items()
        for name in ([section["use"]] if isinstance(section["use"], str) else section["use"])
    ]
    left_out = {*policies.CALIBRATED, *policies.RECORDED}
    assert set().union(*named.values()) - left_out <= set(served)


@pytest.mark.parametrize("block", [16, 32])
def test_sections_of_cases_are_valid(machine: Machine, block: int) -> None:
    from kvplug.parser import load_deployment

    class Ahead:
        def ahead(self, kind: str, **options: Any) -> Callable[[], list[list[int]]]:
            assert kind in exact.ORACLES
            return list

    machine.device = "cuda" if block == 16 else "cpu"
    assert machine.block_size == block
    found = [*exact.exact_cases(machine, Ahead()), *policies.policy_cases(machine)]  # type: ignore[arg-type]
    sections = [case.section for case in found] + [section for section, _ in speed.ROWS.values()]
    for section in sections:
        if section is not None:
            load_deployment(section)
    only = policies.policy_cases(machine, ["snapkv"])
    assert [case.name for case in only] == ["snapkv, s3fifo", "snapkv with int4"]


# -- speed ---------------------------------------------------------------------------------------


@pytest.fixture
def measured(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, results: Results
) -> Callable[..., list[dict[str, Any]]]:
    """Rows of deployments whose engines answer at made-up speeds."""
    monkeypatch.setattr(speed, "Engine", FakeEngine)
    FakeEngine.started = []

    def run(seconds: dict[str, float], steps: dict[str, float], **own: Any) -> list[dict[str, Any]]:
        def answers(name: str, work: Mapping[str, Any]) -> dict[str, Any]:
            short = len(work["requests"]) == speed.DECODE_REQUESTS
            if name == "int8" and not short:
                raise EngineFailed("an illegal memory access")
            reports = [acted("sequence", name)]
            how = {"step_ms": {8: steps.get(name, 3.0)}} if short else {}
            return result(work, seconds=seconds.get(name, 2.0), reports=reports, **how)

        FakeEngine.answers = staticmethod(answers)  # type: ignore[assignment]
        load = speed.Load(requests=4, prompt=20, output=10)
        names = own.get("names", [*seconds])
        left = own.get("left", 100.0)

        def part(report: Report, _: float) -> None:
            speed.run_speed(machine, names, load, None, 2, report, time.monotonic() + left)

        run_groups([Group([Part("speed", part)], 1.0)], 100, results)
        return rows_of(results, "speed")

    return run


def test_rows_are_ratios_to_stock_of_the_same_run(
    measured: Callable[..., list[dict[str, Any]]], results: Results
) -> None:
    seconds = {"sink_window": 0.5, "stock": 2.0, "int8": 1.0, "{}": 2.0}
    rows = {row["name"]: row for row in measured(seconds, {"{}": 3.06})}
    # Waves of two; stock first, whatever the order asked for.
    assert FakeEngine.started == ["stock", "sink_window", "int8", "{}"]
    assert rows["stock"]["tokens_per_s"] == 20.0 and rows["stock"]["ratio"] == 1.0
    assert rows["sink_window"]["ratio"] == 4.0 and rows["sink_window"]["evictions"] == 9
    assert rows["sink_window"]["blocks_freed"] == 5
    assert rows["{}"]["decode_ratio"] == 1.02 and rows["stock"]["decode_ratio"] == 1.0
    assert rows["int8"]["ok"] is False and "illegal memory" in rows["int8"]["error"]
    assert [rows[n]["ok"] for n in ("stock", "sink_window", "{}")] == [True] * 3
    assert not results.ok
    text = report.summary(results.data)
    assert "failed: int8" in text
    (line,) = [one for one in text.splitlines() if one.startswith("sink_window")]
    assert "4.00 of 2.5x stock: met" in line and "full and piecewise" in line
    cells = report.speed_cells(list(rows.values()))
    assert {len(row) for row in cells} == {len(report.speed_heads())}


def test_rows_without_time_are_not_started(
    measured: Callable[..., list[dict[str, Any]]], results: Results
) -> None:
    rows = measured({"stock": 1.0}, {}, left=1.0)
    assert [(row["ok"], row["error"]) for row in rows] == [(False, speed.LATE)]
    assert FakeEngine.started == [] and not results.ok


def test_unknown_rows_are_refused(
    measured: Callable[..., list[dict[str, Any]]], results: Results
) -> None:
    assert measured({}, {}, names=["stok"]) == []
    assert "unknown rows stok. Fix: choose from stock," in results.data["parts"]["speed"]["error"]


def test_every_row_has_the_same_kv_bytes(machine: Machine, tmp_path: Path) -> None:
    model = speed.make_model(tmp_path)
    assert speed.kv_bytes_per_token(model) == 28 * 8 * 128 * 2 * 2
    load = speed.Load()
    assert 8 * 2560 <= load.kv_tokens < 9 * 2560
    machine.device = "cuda"
    for _, own in speed.ROWS.values():
        arguments = speed.engine_arguments(machine, model, load, True, own)
        assert arguments["kv_cache_memory_bytes"] == load.kv_tokens * 28 * 8 * 128 * 4
        assert "num_gpu_blocks_override" not in arguments and "enforce_eager" not in arguments


def test_targets_are_met_or_below() -> None:
    rates = {"stock": 100.0, "snapkv": 219.0, "int8": 90.0}
    assert report.target_text("snapkv", rates) == "2.19 of 2.2x stock: below"
    assert report.target_text("int8", rates) == "1x stock_fp8"
    assert report.target_text("int8", rates | {"stock_fp8": 90.0}).endswith("met")
    assert report.target_text("kivi", rates) == ""
    assert set(speed.TARGETS) <= set(speed.ROWS)


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speeed"], "--only: unknown part 'speeed'. Fix: choose from kernels,"),
        (["--device", "tpu"], "--device: must be cuda or cpu, not 'tpu'."),
        (["--device", "cpu"], "--device cpu: speed measures a GPU. Fix: pass --only"),
        (["--root", str(Path(__file__).parent)], "is no checkout: its tests are missing."),
    ],
)
def test_options_that_cannot_be_used(arguments: list[str], message: str, tmp_path: Path) -> None:
    import typer

    from kvplug_lab.gpu_check.command import gpu_check

    alone = typer.Typer()
    alone.command()(gpu_check)
    done = CliRunner().invoke(alone, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_command_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, kvplug_lab.gpu_check.command\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'triton', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the page ------------------------------------------------------------------------------------


def run_of(commit: str | None = "abcdef1", gpu: str = "H100", **parts: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "date": "2026-11-26T10:00:00+00:00",
        "kvplug": "0.1.0",
        "commit": commit,
        "machine": {"gpu": gpu, "vllm": "0.32.0", "torch": "2.11", "triton": "3.6", "cores": 16},
        "load": speed.load_facts(speed.Load()),
        "seconds": 10.0,
        "ok": True,
        "parts": {
            name: {"ok": True, "seconds": 5.0, "error": None, "rows": rows}
            for name, rows in parts.items()
        },
    }


STOCK_ROW = {
    "name": "stock",
    "ok": True,
    "tokens_per_s": 1000.0,
    "ratio": 1.0,
    "running": 8,
    "kv_tokens": 20608,
    "blocks_freed": 0,
    "evictions": 0,
    "step_ms": {"8": 3.3},
    "decode_ms": 3.1,
    "decode_ratio": 1.0,
    "runner": 2,
    "graphs": "FULL_AND_PIECEWISE",
    "reports": [1],
}


def test_runs_of_different_parts_become_one() -> None:
    bad = {"name": "int4", "ok": False, "problem": "other tokens\nlog", "reports": []}
    one, two = run_of(exact=[bad, {"name": "h2o", "ok": True}]), run_of(speed=[STOCK_ROW])
    data = publish.merged([one, two])
    assert set(data["parts"]) == {"exact", "speed"} and not data["ok"]
    assert data["parts"]["exact"]["rows"][0]["problem"] == "other tokens"
    assert "reports" not in data["parts"]["speed"]["rows"][0] and data["seconds"] == 20.0
    again = publish.merged([one, run_of(exact=[{"name": "int4", "ok": True}])])
    assert again["ok"] and len(again["parts"]["exact"]["rows"]) == 2
    with pytest.raises(KVPlugError, match="different machines: gpu H100 and H200"):
        publish.merged([one, run_of(gpu="H200")])
    with pytest.raises(KVPlugError, match="schema 0"):
        publish.merged([one | {"schema": 0}])


def test_the_page_shows_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("kvplug_gpu_macros", ROOT / "docs/macros.py")
    assert spec is not None and spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    monkeypatch.setattr(macros, "FIGURES", tmp_path)
    four = (macros.gpu_machine, macros.gpu_speed, macros.gpu_checks, macros.gpu_kernels)
    assert "Not measured yet" in four[0]() and "Not measured yet" in four[1]()
    assert "not run" in four[2]() and "Not measured yet" in four[3]()

    (tmp_path / "sources.json").write_text("{}", encoding="utf-8")
    bench = {"op": "quant_write", "shape": "4", "op_us_median": 2.0, "ratio_median": 1.5}
    bench |= {"name": "quant_write", "ok": True, "baseline": "a copy"}
    failed = {"name": "kivi", "ok": False, "problem": "requests [1] did not finish"}
    tests = [
        {"name": "all", "ok": False, "passed": 6000, "failed": 1},
        {"name": "test_x.py::test_y", "ok": False, "failed": 1, "message": "no"},
    ]
    file = tmp_path / "run.json"
    data = run_of(None, kernels=tests, exact=[failed], speed=[STOCK_ROW], bench=[bench])
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(KVPlugError, match="Fix: pass --commit HASH"):
        publish.publish([file], tmp_path, None, "One run.")
    publish.publish([file], tmp_path, "abcdef1", "One run.")
    said = [macro() for macro in four]
    assert "**H100**" in said[0] and "vLLM 0.32.0" in said[0] and "2026-11-26" in said[0]
    assert "| `stock` | 1,000 | 1.00 | 8 | 20,608 |" in said[1]
    assert "48 requests of 2,048 + 512 tokens" in said[1]
    assert "kivi: requests [1] did not finish" in said[2] and "6,000 tests" in said[2]
    assert "| policies | not run |" in said[2] and "test_x.py::test_y: no" in said[2]
    assert "1.50 of a copy" in said[3]
    sources = json.loads((tmp_path / "sources.json").read_text(encoding="utf-8"))
    assert sources["gpu"]["date"] == "2026-11-26" and sources["gpu"]["commit"] == "abcdef1"
