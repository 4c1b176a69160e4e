from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvplug_attention_memo import measure as memo
from kvplug_attention_memo.measure import Decoder, Passage, main, measure, read
from kvplug_attention_memo.memory import MemoOptions
from kvplug_lab.models import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), dtype="float32")


@pytest.fixture(scope="module")
def texts(model: Path) -> list[Passage]:
    return read(model, 90, 12, 2)


def test_the_continuation_is_the_models_own(model: Path, texts: list[Passage]) -> None:
    """With transformers' own attention and generate."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = memo.passages(memo.shakespeare(), 2, 90, seed=0)
    for text, passage in zip(found, texts, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :90]
        with torch.inference_mode():
            out = plain.generate(ids, max_new_tokens=13, do_sample=False, eos_token_id=-1)
        assert out[0, 90:].tolist() == passage.chosen


def test_a_bound_of_one_is_full_attention(texts: list[Passage]) -> None:
    found = measure(texts, MemoOptions(cosine=1.0, near=16))
    assert (found.skipped, found.agreed, found.before, found.identical) == (0, 1, 12, 2)
    assert found.read == 1 and found.error is None


def test_a_loose_bound_skips_reads_less_and_errs(texts: list[Passage]) -> None:
    tight, loose = (measure(texts, MemoOptions(cosine=c, near=16, every=4)) for c in (0.9, 0.01))
    assert loose.skipped > tight.skipped
    assert loose.read < tight.read <= 1
    assert loose.error is not None and loose.worst is not None
    assert 0 < loose.error <= loose.worst
    low, high = loose.layers
    assert 0 <= low <= loose.skipped <= high <= 0.75, "three steps of four at most"


def test_what_the_audit_reads_is_not_counted() -> None:
    """One step remembers and reads all, the next reads what is near: 49 and 17 tokens of 99."""
    decoder = Decoder(MemoOptions(near=16, cosine=0.5))
    rng = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 50, 16, generator=rng) for _ in "kv")
    query = torch.randn(1, 4, 1, 16, generator=rng)
    for held in (49, 50):
        decoder.attend(0, query, key[:, :, :held], value[:, :, :held], 0.25, 0.0)
    assert decoder.skipped == {0: 1} and decoder.rows == {0: 2}
    assert (decoder.read, decoder.tokens) == (49 + 17, 49 + 50)


def test_the_command_prints_a_row_a_bound_and_writes_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "memo.json"
    given = ["--tokens", "60", "--generate", "4", "--passages", "1", "--near", "16"]
    given += ["--model", str(model), "--cosine", "0.5", "1.0", "--json", str(report)]
    assert main(given) == 0
    *lines, empty, last = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["cosine", "--:", "0.5", "1"]
    assert empty == "" and last.startswith("Cosine of a query with the one of the step before")
    assert [row["cosine"] for row in json.loads(report.read_text())] == [0.5, 1.0]


@pytest.mark.parametrize(
    "given", [["--tokens", "0"], ["--cosine", "1.5"], ["--near", "1"], ["--every", "0"]]
)
def test_the_command_refuses_what_cannot_be(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    assert capsys.readouterr().err
