"""`kvplug gain` before any engine starts; what it measures is printed by engines that do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.errors import KVPlugError
from kvplug.parser import load_deployment
from kvplug_lab.cli.gain import BLOCK, COLUMNS, _block_bytes, _groups, _work, section_of
from kvplug_lab.cpu_dtype import fast_dtype
from kvplug_lab.engine.trial import (
    Answer,
    Step,
    TrialResult,
    TrialSpec,
    environment_of,
    pool_tokens,
)
from kvplug_lab.models import tiny_llama


def test_an_unknown_policy_is_refused_before_anything_runs() -> None:
    result = CliRunner().invoke(app, ["gain", "--policy", "snapkv,snipkv"])
    assert result.exit_code == 2
    assert "--policy: unknown sequence policy 'snipkv'. Fix: did you mean snapkv" in result.output


@pytest.mark.parametrize("name", ["snapkv", "sink_window"])
def test_every_kind_of_policy_gets_the_same_budget(name: str) -> None:
    section = section_of(name, 256)
    (choice,) = load_deployment(section).all()
    options = choice.options.model_dump()
    kept = options["budget"] if "budget" in options else options["sink"] + options["window"]
    assert kept == 256


def test_layers_in_groups_get_as_many_times_the_blocks(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, layers=6)
    assert _groups(section_of("snapkv", 256), model) == 1
    assert _groups(section_of("sink_window", 256), model) == 1
    assert _groups(section_of("pyramidkv", 256), model) == 3


def test_long_prompts_and_long_outputs_come_mixed() -> None:
    work = _work(2, 3, 200, 99)
    assert [r.max_tokens for r in work] == [48, 99, 48, 99, 99]
    assert len({str(r.prompt) for r in work}) == 5
    assert BLOCK == 32


def test_an_unknown_format_is_refused_before_anything_runs() -> None:
    result = CliRunner().invoke(app, ["gain", "--format", "int4,int5"])
    assert result.exit_code == 2
    assert "unknown format policy 'int5'" in result.output


@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", 2), ("float32", 4)])
def test_memory_is_counted_in_stocks_blocks(tmp_path: Path, dtype: str, element: int) -> None:
    model = tiny_llama(tmp_path, layers=3)
    assert _block_bytes(model, dtype) == BLOCK * 3 * 2 * 64 * 2 * element


@dataclass
class Engines:
    """What engines would have been started, and what they hold beside pages."""

    held: dict[str, int]
    started: list[TrialSpec] = field(default_factory=list)

    def run(self, spec: TrialSpec, *, log: Path) -> TrialResult:
        self.started.append(spec)
        log.write_text("CPU KV cache size: 1,024 tokens")
        name = "stock" if spec.section is None else spec.section["format"]["use"]
        speed = {"stock": 1.0, "int8": 0.5}.get(name, 0.25) * len(self.started)
        answers = [Answer(3, 0, [1, 2], "", None) for _ in spec.requests]
        steps = [Step(0.1, 2, 0, 3, 2)] * len(answers)
        return TrialResult(
            answers,
            steps,
            num_blocks=31,
            block_size=BLOCK,
            block_bytes=1024,
            seconds=1 / speed,
            preemptions=0,
            handed_over=0,
            reports=[],
            cap_blocks=[],
            classes={},
            held_bytes=self.held.get(name, 0),
            cpu_seconds=2 / speed,
        )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    made = Engines({"kivi": 4096})
    monkeypatch.setattr("kvplug_lab.engine.trial.run_fresh", made.run)
    return made


def _run(model: Path, *arguments: str) -> Any:
    asked = ("gain", "--model", str(model), "--words", "20", "--blocks", "32", *arguments)
    return CliRunner().invoke(app, asked, catch_exceptions=False)


def test_vllm_makes_the_pool_of_bytes_less_what_is_held(tmp_path: Path, engines: Engines) -> None:
    model = tiny_llama(tmp_path, layers=3)
    done = _run(model, "--format", "int8,kivi", "--rounds", "2")
    assert done.exit_code == 0, done.output
    memory = 32 * _block_bytes(model, fast_dtype())
    wanted = {None: memory, "int8": memory, "kivi": memory - 4096}
    served = [spec for spec in engines.started if spec.requests]
    assert len(engines.started) - len(served) == 2, "each section is asked once what it holds"
    for spec in served:
        own = None if spec.section is None else spec.section["format"]["use"]
        assert spec.engine["kv_cache_memory_bytes"] == wanted[own]
        assert "num_gpu_blocks_override" not in spec.engine
        assert spec.engine["max_num_seqs"] == len(spec.requests)
    names = [spec.section and spec.section["format"]["use"] for spec in served]
    assert names == [None, "int8", "kivi", None, "int8", "kivi", None]


def test_ratios_are_to_the_runs_of_stock_on_both_sides(tmp_path: Path, engines: Engines) -> None:
    """Engines that are started later are faster, as on a machine that others leave."""
    file = tmp_path / "gain.json"
    _run(tiny_llama(tmp_path, layers=3), "--format", "int8", "--rounds", "2", "--json", str(file))
    runs = json.loads(file.read_text())["runs"]
    assert [r["policy"] for r in runs] == ["stock", "int8", "stock", "int8", "stock"]
    assert [r["ratio"] for r in runs if r["policy"] == "int8"] == pytest.approx([0.5, 0.5])
    assert [r["cpu_ratio"] for r in runs if r["policy"] == "int8"] == pytest.approx([0.5, 0.5])


def test_the_table_keeps_its_columns_where_there_is_no_terminal(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    done = _run(tiny_llama(tmp_path, layers=3), "--format", "int8,kivi", "--rounds", "2")
    (head,) = [line for line in done.output.splitlines() if "policy" in line]
    for heading, _ in COLUMNS.values():
        assert heading in head
    (row,) = [line for line in done.output.splitlines() if "int8" in line and "│" in line]
    assert "0.46 [0.44, 0.47]" in row


def test_a_policy_that_holds_all_of_the_memory_is_named(tmp_path: Path, engines: Engines) -> None:
    engines.held["kivi"] = 2**30
    done = _run(tiny_llama(tmp_path, layers=3), "--format", "kivi")
    assert done.exit_code == 1
    assert "kivi holds 1024.0 MiB beside pages" in " ".join(done.output.split())


def test_bytes_for_pages_are_not_overruled_by_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    sized = TrialSpec("model", [], {"kv_cache_memory_bytes": 1 << 20})
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment_of(sized, {})
    assert environment_of(TrialSpec("model", []), {})["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_the_pool_is_what_vllm_says() -> None:
    assert pool_tokens("... CPU KV cache size: 46,592 tokens, Maximum ...") == 46592
    with pytest.raises(KVPlugError, match="does not state"):
        pool_tokens("nothing of the kind")
