from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvplug_lab.fidelity import decoded, variants
from kvplug_lab.fidelity.decoded import BLOCK, Passage, Reader, main, row, table
from kvplug_lab.models import tiny_llama

FIRST, TOKENS = 2 * BLOCK, 2 * BLOCK + 48
LABELS = ["kivi:bits=2", "kivi:recent=32:bits=2", "vllm_int4:exact_chunk=true"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), dtype="float32")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 320, (TOKENS,), generator=torch.Generator().manual_seed(5))


def loaded(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("label", LABELS)
def test_one_pass_is_a_thousand_decode_steps(
    directory: Path, ids: torch.Tensor, label: str
) -> None:
    """The host computes the same tokens one by one, through the format's own attention."""
    (variant,) = variants.formats([label])
    reader = Reader(loaded(directory), FIRST)
    reader.begin(ids)
    got = torch.cat(list(reader.go_on(ids, variant.build(reader.host))))

    host = decoded.Host(loaded(directory), BLOCK, FIRST, torch.bfloat16)
    policy = variant.build(host)
    begun = host.open(FIRST)
    host.feed(begun, ids[:FIRST], 1)
    text = begun.branch(policy) if begun.can_branch(policy) else host.read(ids[:FIRST], policy)[0]
    steps = host.feed(text, ids[FIRST:-1], TOKENS - FIRST - 1, 1).log_softmax(-1)
    full = torch.cat(list(reader.go_on(ids, None)))
    # The host rounds keys and values to bfloat16 only where it stores them.
    assert float((got - steps).abs().mean()) < 0.15 * float((got - full).abs().mean())


def test_the_full_cache_agrees_with_itself(directory: Path, ids: torch.Tensor) -> None:
    reader = Reader(loaded(directory), FIRST)
    formats = [v.build(reader.host) for v in variants.formats(["bf16", "kivi:bits=2"])]
    same, coarse = decoded.measure(reader, ids, formats)
    assert same.agree == 1 and abs(same.nll) < 1e-5 and abs(same.kl) < 1e-5
    assert coarse.agree < 1 and coarse.kl > 1e-3


def test_a_row_has_bytes_of_64_and_intervals_over_the_passages(directory: Path) -> None:
    reader = Reader(loaded(directory), FIRST)
    (variant,) = variants.formats(["kivi:key_bits=3:value_bits=2"])
    passages = [Passage(0.01, 0.9, 0.02), Passage(0.03, 0.8, 0.04)]
    found = row(variant.label, variant.build(reader.host), passages, 127)
    assert (found.bytes, found.bytes_of_64, found.exact, found.tokens) == (52, 52, BLOCK, 254)
    assert found.perplexity[0] == pytest.approx(0.0202, abs=1e-4)
    assert found.perplexity[1:] == pytest.approx((0.01005, 0.03045), abs=1e-4)
    (line,) = table([found]).splitlines()[2:]
    assert line.startswith("| kivi:key_bits=3:value_bits=2 | 52 | 128 | 254 | +2.02% (+1.01% to")
    assert line.endswith("| 85.0% (80.0% to 90.0%) | 0.0300 |")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "600"], "--tokens must be a multiple of 256 from 512"),
        (["--format", "kivi:bits=9"], "bits"),
        (["--format", "nope"], "nope"),
    ],
)
def test_what_cannot_be_measured_is_said(
    capsys: pytest.CaptureFixture[str], directory: Path, arguments: list[str], said: str
) -> None:
    own = [] if "--format" in arguments else ["--format", "int8"]
    assert main(["--model", str(directory), *own, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_file_has_every_row_and_passage(
    capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n) for n in range(3000)), encoding="utf-8")
    asked = ["--format", "int8,kivi", "--passages", "2", "--tokens", "512"]
    out = tmp_path / "rows.json"
    assert main(["--model", str(directory), *asked, "--text", str(text), "--json", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [one["format"] for one in written["rows"]] == ["int8", "kivi"]
    assert [len(one["passages"]) for one in written["rows"]] == [2, 2]
    assert all(one["tokens"] == 510 for one in written["rows"])
    assert "| kivi | 76 | 128 | 510 |" in capsys.readouterr().out
