"""The page about stored segments says what the code does, and the figures come from a command."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvplug.contract.reuse import Fingerprint
from kvplug.reuse import file as module
from kvplug.reuse.catalog import SegmentState
from kvplug.reuse.file import CAUSES, SegmentHeader, digest, segment_id, write_segment
from kvplug.reuse.hashing import SimHash
from kvplug.reuse.index import SegmentIndex

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "segments.md").read_text("utf-8")


def table(head: str) -> dict[str, list[str]]:
    """First cell to the others, of the table with a heading."""
    body = PAGE.split(f"| {head} |")[1].split("\n\n")[0].split("\n")[2:]
    rows = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in body]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_states_and_causes_are_listed() -> None:
    assert set(table("state")) == {str(state) for state in SegmentState}
    assert set(table("cause")) == {*CAUSES, "incomplete"}


def test_the_file_is_as_the_table_says(tmp_path: Path) -> None:
    keys = {key.strip(" `") for row in table("key of the header") for key in row.split(",")}
    assert keys == {field.name for field in fields(SegmentHeader)}
    tokens = np.arange(3, dtype=np.int32)
    known = Fingerprint(
        *("m", "t", "", "uint8", "", "none", (1, 1, 1), "", "causal", 0, 3),
        context=digest(tokens[:0]),
        tokens=digest(tokens),
        created=0.0,
        request_id="r",
    )
    planes = {"cells": torch.arange(6, dtype=torch.uint8)}
    header = SegmentHeader.of(segment_id(known), known, tokens, tokens[:0], planes)
    write_segment(tmp_path / "x", replace(header, session="s"), planes)
    whole = (tmp_path / "x").read_bytes()
    rows = table("offset")
    assert rows["0"][1] == f"magic: `{whole[:8].hex(' ').upper()}`" and whole[:8] == module.MAGIC
    assert rows["8"][1] == f"version: {int.from_bytes(whole[8:12], 'little')}"
    size = int.from_bytes(whole[12:16], "little")
    assert json.loads(whole[32 : 32 + size])["size"] == 6
    assert whole[32 + size : 32 + size + 6] == bytes(range(6))
    assert len(whole) == 32 + size + 6 + 16
    assert f"`ID.RANK-WORLD{module.SUFFIX}`" in PAGE


def test_the_figures_of_the_index_are_its_own() -> None:
    assert f"{SimHash().bits}-bit SimHash of its pairs" in PAGE and SimHash().grams == 2
    assert f"the {SegmentIndex()._limit} texts that go on longest" in PAGE


def test_the_measurement_runs_and_counts_what_it_finds() -> None:
    reuse_index = pytest.importorskip("kvplug_lab.reuse.index")
    from kvplug_lab.models import ModelUnavailable
    from kvplug_lab.texts import TextUnavailable

    sizes: dict[str, int] = dict(tokens=700, length=64, repeats=4, queries=6, seed=3)
    try:
        found, likely = reuse_index.measure([20, 300], replaced=(0.05,), graph=True, **sizes)
    except (ModelUnavailable, TextUnavailable) as error:
        pytest.skip(str(error))
    assert [(cost.segments, cost.tokens) for cost in found] == [(20, 700), (300, 700)]
    # 700 tokens hold five whole segments and the beginning of a sixth.
    assert all(cost.found == 6.0 for cost in found)
    assert [(cost.way, cost.segments) for cost in likely] == [("exact", 300), ("graph", 300)]
    assert (likely[0].recall_1, likely[0].recall_10, likely[0].source_10) == (1.0, 1.0, 1.0)
    for spread in (found[0].match, found[0].add, likely[0].near):
        assert 0 < spread.low <= spread.median <= spread.high
    printed = reuse_index.tables(found, likely).split("\n")
    heads = [line for line in printed if line.startswith("| segments")]
    assert len(heads) == 2
    assert len(printed) == 4 + 1 + 4
