from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

decode_peers: Any = importlib.import_module("decode_peers")
BASE, Contender = decode_peers.BASE, decode_peers.Contender
STEP = decode_peers.Step(decode_peers.QUICK[0])


def call() -> object:
    return torch.zeros(1000).sum()


def test_a_quick_run_measures_formats_and_names_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "decode_peers.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert set(decode_peers.layouts(32)) | {BASE, "FA3 fp8", "vLLM int4", "FlashInfer bf16"} == set(
        rows
    )
    assert rows["int4"]["ratio_median"] > 0 and rows["int4"]["left_out"] is None
    if not torch.cuda.is_available():
        assert rows["vLLM int4"]["left_out"] == "RuntimeError: it needs a GPU"
        assert "vLLM int4            left out: RuntimeError: it needs a GPU" in done.stdout


def test_one_repetition_is_refused() -> None:
    command = [sys.executable, str(BENCHMARKS / "decode_peers.py"), "--repetitions", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "--repetitions must be 2 or more" in done.stderr


def test_contenders_are_compared_round_by_round() -> None:
    row = decode_peers.summary([(10.0, 5.0), (20.0, 5.0), (30.0, 5.0)], [(40.0, 9.0)] * 3, 10_000)
    assert (row["ratio_median"], row["op_us_median"], row["times_fa3"]) == (4.0, 20.0, 2.0)
    assert row["gb_per_s"] == pytest.approx(0.5)
    assert decode_peers.summary([(10.0, 5.0)] * 2, None, 1)["times_fa3"] is None


def test_the_table_shows_what_ran_beside_the_baseline() -> None:
    rows = decode_peers.time_in_turn(
        STEP,
        [
            Contender(BASE, 4096, lambda: call),
            Contender("int4", 1152, lambda: call),
            Contender("gone", 1, lambda: object().fwd),
        ],
        3,
        time.monotonic() + 60,
    )
    text = decode_peers.table(rows)
    assert text.splitlines()[0] == str(STEP.shape)
    assert f"times {BASE}" in text.splitlines()[2] and "of a copy" in text.splitlines()[2]
    assert text.splitlines()[3].strip().startswith("gone")
    assert "left out: AttributeError" in text.splitlines()[3]
    assert json.loads(json.dumps(rows)) == rows


def test_without_time_nothing_is_made() -> None:
    def make() -> Any:
        raise AssertionError("made")

    (row,) = decode_peers.time_in_turn(STEP, [Contender("late", 1, make)], 2, 0.0)
    assert row["left_out"] == "no time left"


def test_shapes_cover_what_is_asked() -> None:
    shapes = decode_peers.SHAPES
    assert {(s.rows, s.tokens) for s in shapes} == {(1, 131072), (32, 16384), (256, 2048)}
    assert {s.group for s in shapes} == {4, 7, 8} and {s.size for s in shapes} == {64, 128}
    assert {s.block for s in shapes} == {16, 64}
    assert decode_peers.Shape(2, 33).blocks == 6


def test_vllms_int4_decode_takes_the_arguments() -> None:
    """Its signature, where vLLM is installed: the call itself needs a GPU."""
    pytest.importorskip("vllm.v1.attention.ops.int4_per_token_head")
    made: Any = decode_peers.vllm_int4(STEP)
    bound = inspect.signature(made.func).bind(*made.args, **made.keywords)
    keys, scales = bound.arguments["k_cache"], bound.arguments["k_scale_cache"]
    blocks, block, heads = STEP.shape.blocks, STEP.shape.block, STEP.shape.heads
    assert keys.shape == (blocks, block, heads, STEP.shape.size // 2 + 4)
    assert scales.shape == (blocks, block, heads) and scales.dtype == torch.float32
    # A scale lies behind the packed elements of its head and slot.
    assert scales[1, 2, 1].data_ptr() - keys[1, 2, 1].data_ptr() == STEP.shape.size // 2


def test_flash_attention_3_takes_the_arguments() -> None:
    """Its source is in every build; what it calls is not."""
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    folder = Path(vllm.submodule_search_locations[0]) / "vllm_flash_attn"
    source = ast.parse((folder / "flash_attn_interface.py").read_text(encoding="utf-8"))
    (function,) = (
        node
        for node in source.body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    takes = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    call = ast.parse(inspect.getsource(decode_peers.flash_attention))
    asked = {
        keyword.arg
        for node in ast.walk(call)
        if isinstance(node, ast.Call)
        and node.args
        and getattr(node.args[0], "id", "") == "flash_attn_varlen_func"
        for keyword in node.keywords
    }
    asked = (asked - {None}) | {"q_descale", "k_descale", "v_descale"}
    assert {"fa_version", "seqused_k", "block_table"} <= asked <= takes
