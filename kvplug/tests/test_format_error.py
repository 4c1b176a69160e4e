from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvplug.contract import LayerView
from kvplug.errors import KVPlugError
from kvplug_lab.fidelity import format_error
from kvplug_lab.fidelity.format_error import Read, _recent, build, errors, exact, main, relative


def layers(n: int = 100) -> list[Read]:
    random = torch.Generator().manual_seed(0)
    return [
        Read(
            LayerView(index, 2, 2, 6, 64, "float32"),
            64**-0.5,
            torch.randn(n, 6, 64, generator=random),
            torch.randn(n, 2, 64, generator=random),
            torch.randn(n, 2, 64, generator=random),
        )
        for index in range(2)
    ]


def test_the_right_output_is_that_of_causal_attention() -> None:
    (one, _) = layers()
    query, key, value = (x.transpose(0, 1) for x in (one.query, one.key, one.value))
    right = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(exact(one, 7), right.transpose(0, 1)[-7:], atol=1e-5, rtol=1e-5)


def test_a_format_without_error_has_none_and_coarser_codes_have_more() -> None:
    read = layers()
    found = [
        errors(build(use, options, read), read, 9)
        for use, options in (("plain", {}), ("int8", {}), ("int4", {}), ("hack", {"bits": 2}))
    ]
    assert found[0].key == found[0].value == 0
    assert found[0].output < 1e-5
    assert [e.output for e in found] == sorted(e.output for e in found)
    assert found[1].bytes_per_token_head == 136
    assert all(e.worst >= e.output for e in found)


def test_the_ring_of_each_step_holds_the_tokens_before_it() -> None:
    (one, _) = layers()
    recent = _recent(32, one, torch.tensor([65, 70, 97]))
    assert recent is not None
    for lane, before in enumerate((64, 69, 96)):
        for at in range(before - 32, before):
            assert torch.equal(recent.key[lane, at % 32], one.key[at])
            assert torch.equal(recent.value[lane, at % 32], one.value[at])


def test_the_open_group_has_no_error() -> None:
    read = layers(31)
    assert errors(build("kivi", {}, read), read, 9).output < 1e-5


def test_relative_error() -> None:
    assert relative(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == pytest.approx(1.25)


def test_what_cannot_be_measured_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format_error, "read", lambda *_: layers())
    monkeypatch.setattr(format_error, "smollm2", lambda: None)
    for arguments, said in (
        (["--use", "int5", "{}"], "unknown format 'int5'. Fix: did you mean int"),
        (["--use", "int4", "{"], "options of int4 are not JSON"),
        (["--use", "int4", "[]"], "must be a JSON object"),
        (["--use", "int4", '{"group": 48}'], "groups of 48 channels do not divide"),
        (["--queries", "0"], "--queries must be from 1 to 1024, not 0"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(KVPlugError):
        build("int5", {}, layers())


def test_the_table_has_a_row_for_each_format(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(format_error, "read", lambda *_: layers())
    monkeypatch.setattr(format_error, "smollm2", lambda: None)
    asked = ["--use", "int4", '{"group": 32}', "--use", "fp8", "{}"]
    assert main(["--queries", "4", *asked, "--json", str(tmp_path / "rows.json")]) == 0
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [(row["format"], row["bytes"]) for row in written] == [
        ("int4:group=32", 80),
        ("fp8", 132),
    ]
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4
    assert rows[2].startswith("| int4 | `group: 32` | 80 | ")
    assert rows[3].startswith("| fp8 |  | 132 | ")
    assert f" {written[0]['keys']:.2%} " in rows[2] and f" {written[1]['worst']:.2%} " in rows[3]
