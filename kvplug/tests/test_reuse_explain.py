"""Records of reuse, and what `kvplug reuse explain` makes of them on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.contract import LayerView
from kvplug.contract.reuse import Fingerprint, Placement, Verdict
from kvplug.errors import KVPlugError
from kvplug.fingerprint import model_fingerprint
from kvplug.hosts.transformers import Host
from kvplug.reuse import drift_record as record_module
from kvplug.reuse.drift_record import BadRecord, DriftRecord, FamilyRecord, PieceRecord
from kvplug.reuse.guard import Guard
from kvplug.reuse.settings import GuardSettings
from kvplug_lab.models import tiny_llama
from kvplug_lab.reuse.explain import Explanation, adapting_checks, explain
from kvplug_lab.reuse.partial_forward import Piece, forward_reused, frequencies, rotated

Run = Callable[..., Result]
SECTION: dict[str, Any] = {"reuse": {"use": ["structure", "position", "mask"], "approximate": True}}
DOCUMENT = [
    int(t) for t in torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))
]
BEFORE = [int(t) for t in torch.randint(0, 300, (24,), generator=torch.Generator().manual_seed(2))]
OTHER = [int(t) for t in torch.randint(0, 300, (33,), generator=torch.Generator().manual_seed(3))]
QUESTION = [int(t) for t in torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(4))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), layers=3, dtype="float32")


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def recorded(directory: Path, **changes: Any) -> DriftRecord:
    """The document, computed after one text and used after another."""
    piece: dict[str, Any] = {
        "segment": "5e9",
        "offset": 0,
        "length": len(DOCUMENT),
        "start": len(BEFORE),
        "shift": len(BEFORE) - len(OTHER),
        "exact": False,
        "confidence": 0.75,
        "context_ids": OTHER,
        "token_ids": DOCUMENT,
    }
    own = changes.pop("piece", {})
    fields: dict[str, Any] = {
        "created": 1700000000.5,
        "model": str(directory),
        "fingerprint": model_fingerprint(directory),
        "dtype": "float32",
        "kvplug": SECTION,
        "request_id": "cmpl-1/0",
        "prompt_ids": BEFORE + DOCUMENT + QUESTION,
        "output_ids": [5, 6, 7],
        "pieces": [piece | own],
    }
    return DriftRecord.model_validate(fields | changes)


def explained(model: Any, record: DriftRecord) -> Explanation:
    host = Host(model, record.block_size)
    return explain(model, record, adapting_checks(record, host.engine), host.layers)


# -- Records ---------------------------------------------------------------------------------------


def test_a_record_is_for_its_owner_alone(directory: Path, tmp_path: Path) -> None:
    """It holds what users wrote."""
    path = recorded(directory).write(tmp_path)
    assert path.stat().st_mode & 0o077 == 0


def test_a_record_comes_back_as_it_was(directory: Path, tmp_path: Path) -> None:
    guard = Guard(GuardSettings())
    for name in "abc":
        guard.started(name, ["doc"], False)
        guard.observe(name, [1.0, 1.5], [-0.5, -0.25])
        guard.finished(name)
    guard.started("x", ["doc"], True)
    guard.observe("x", [4.0, 4.5], [-1.5, -1.25])
    drift = guard.finished("x")
    assert drift is not None
    made = recorded(
        directory,
        entropies=list(drift.entropies),
        logprobs=list(drift.logprobs),
        families=FamilyRecord.of(drift),
        computed=[(24, 28)],
    )
    path = made.write(tmp_path / "new" / "folder")
    assert path.name == "reuse-cmpl-1_0-1700000000500.json"
    assert list(path.parent.iterdir()) == [path]
    assert DriftRecord.read(path) == made
    (family,) = DriftRecord.read(path).families
    assert (family.entropy, family.over, family.state) == (1.25, True, "closed")
    assert family.entropy_drift == pytest.approx((4.25 - 1.25) / 1.25)


def test_a_write_that_fails_leaves_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_module.os, "fsync", full)
    with pytest.raises(OSError):
        recorded(directory).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"piece": {"length": 41}}, "pieces.0: offset + length exceeds the segment"),
        ({"piece": {"offset": 1}}, "pieces.0: offset + length exceeds the segment"),
        ({"piece": {"length": 0}}, "pieces.0.length: Input should be greater than or equal to 1"),
        ({"piece": {"start": -1}}, "pieces.0.start: Input should be greater than or equal to 0"),
        ({"piece": {"shift": 3}}, "pieces.0: shift does not match where the segment was computed"),
        ({"piece": {"token_ids": [0] * 40}}, "record: pieces.0 does not match the text"),
        ({"piece": {"confidence": 1.5}}, "pieces.0.confidence: Input should be less than"),
        ({"piece": {"extra": 1}}, "pieces.0.extra: Extra inputs are not permitted"),
        ({"prompt_ids": []}, "prompt_ids: List should have at least 1 item"),
        ({"prompt_ids": [-1]}, "prompt_ids.0: Input should be greater than or equal to 0"),
        ({"prompt_ids": [1, 2]}, "record: pieces.0 ends at 64, beyond a text of 5 tokens"),
        ({"computed": [(3, 2)]}, "record: computed.0 is not a span of a text of 76 tokens"),
        ({"computed": [(3, 77)]}, "record: computed.0 is not a span of a text of 76 tokens"),
        ({"entropies": [1.0]}, "record: entropies and logprobs differ in length"),
        ({"version": 2}, "version: is 2, but this release reads 1"),
        ({"dtype": None}, "dtype: Input should be a valid string"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(
    directory: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    data = json.loads(recorded(directory).model_dump_json())
    data["pieces"][0] |= change.pop("piece", {})
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data | change), encoding="utf-8")
    with pytest.raises(BadRecord) as refused:
        DriftRecord.read(path)
    assert str(refused.value).startswith(f"{path}: {says}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100000, "is not valid JSON"),
        (b"[]", "is not a record of reuse: it has no version"),
        (b"{}", "is not a record of reuse: it has no version"),
        (b'{"version": 1}', "model: Field required (and"),
        (b'{"version": 1, "created": NaN}', "created: Input should be a finite number"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(BadRecord) as refused:
        DriftRecord.read(path)
    assert str(refused.value).startswith(f"{path}: {says}")
    with pytest.raises(BadRecord, match="cannot be read: No such file"):
        DriftRecord.read(tmp_path / "none.json")
    with pytest.raises(BadRecord, match="is a folder"):
        DriftRecord.read(tmp_path)


def test_pieces_that_overlap_are_refused(directory: Path) -> None:
    piece = recorded(directory).pieces[0]
    with pytest.raises(ValueError, match=r"pieces\.1 must start after the piece before it"):
        recorded(directory, pieces=[piece, piece])


# -- Explaining ------------------------------------------------------------------------------------


def test_exact_reuse_explains_to_nothing(directory: Path, model: Any) -> None:
    found = explained(
        model, recorded(directory, piece={"context_ids": BEFORE, "shift": 0, "exact": True})
    )
    piece, rest = found.runs
    assert max(*piece.key, *piece.value, *rest.key, *rest.value) < 1e-5
    assert found.parts_at is None and max(o.kl for o in found.outputs) < 1e-9
    assert (piece.start, piece.end, piece.exact, piece.computed) == (24, 64, True, 0)
    assert (rest.start, rest.end, rest.exact, rest.computed) == (64, 73, None, 9)
    assert found.prompt_tokens == 73 and found.loaded_tokens == 40


def test_approximate_reuse_parts_after_the_first_layer(directory: Path, model: Any) -> None:
    found = explained(model, recorded(directory))
    piece, rest = found.runs
    # The first layer's K and V depend on the token and, once rotated, on nothing else.
    assert piece.key[0] < 1e-5 and piece.value[0] < 1e-6
    assert min(*piece.key[1:], *piece.value[1:]) > 1e-3
    assert rest.key[0] < 1e-6 and min(rest.key[2], rest.value[2]) > 1e-4
    assert max(o.kl for o in found.outputs) > 1e-6
    assert len(found.outputs) == 3 and [o.recorded for o in found.outputs] == [5, 6, 7]
    assert not found.follows and found.entropy_off is None


def test_it_is_the_arithmetic_of_reuse(directory: Path, model: Any) -> None:
    """Put together by hand: the document's KV after the other text, turned back and used."""
    record = recorded(directory)
    found = explained(model, record)
    text = BEFORE + DOCUMENT + QUESTION + [5, 6]
    right = forward_reused(model, text)
    source = forward_reused(model, OTHER + DOCUMENT)
    cut = len(OTHER)
    piece = Piece(
        24,
        [rotated(k[cut:], -9, frequencies(model)) for k in source.keys],
        [v[cut:] for v in source.values],
    )
    reused = forward_reused(model, text, [piece])
    for layer in range(3):
        for plane, errors in (("keys", found.runs[0].key), ("values", found.runs[0].value)):
            a, b = (getattr(r, plane)[layer][24:64].double() for r in (reused, right))
            assert errors[layer] == pytest.approx(float((a - b).norm() / b.norm()), abs=1e-6)
    for o, p, q in zip(found.outputs, right.logits[-3:], reused.logits[-3:], strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
        assert o.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-9)
        assert o.entropy_exact == pytest.approx(float(-(p.exp() * p).sum()), abs=1e-4)
        assert o.entropy_reused == pytest.approx(float(-(q.exp() * q).sum()), abs=1e-4)
        assert (o.exact, o.reused) == (int(p.argmax()), int(q.argmax()))


def test_what_was_computed_anew_is_computed(directory: Path, model: Any) -> None:
    whole = explained(model, recorded(directory, computed=[(24, 64)]))
    assert whole.loaded_tokens == 0 and whole.runs[0].computed == 40
    assert max(o.kl for o in whole.outputs) < 1e-9
    part = explained(model, recorded(directory, computed=[(24, 34)]))
    assert part.loaded_tokens == 30 and part.runs[0].computed == 10
    # The rest of the run is not contiguous with what follows it: it spans all of it.
    assert (part.runs[1].start, part.runs[1].end, part.runs[1].computed) == (24, 73, 19)


def test_a_part_of_a_segment_is_that_part(directory: Path, model: Any) -> None:
    inner = {"offset": 8, "length": 20, "start": 4, "context_ids": OTHER}
    record = recorded(
        directory,
        prompt_ids=BEFORE[:4] + DOCUMENT[8:28] + QUESTION,
        piece=inner | {"shift": 4 - 8 - len(OTHER)},
    )
    piece, _ = explained(model, record).runs
    assert (piece.start, piece.end) == (4, 24) and piece.key[0] < 1e-5


def test_recorded_entropies_are_compared_with_the_replay(directory: Path, model: Any) -> None:
    first = explained(model, recorded(directory))
    entropies = [o.entropy_reused + 0.25 for o in first.outputs]
    output = [first.outputs[0].reused]
    again = explained(
        model,
        recorded(directory, output_ids=output, entropies=entropies[:2], logprobs=[-1.0, -2.0]),
    )
    assert again.follows and len(again.outputs) == 1
    assert again.entropy_off == pytest.approx(0.25, abs=1e-5)
    assert again.outputs[0].logprob_recorded == -1.0


def test_a_record_without_an_answer_looks_at_the_next_token(directory: Path, model: Any) -> None:
    found = explained(model, recorded(directory, output_ids=[]))
    (token,) = found.outputs
    assert token.recorded is None and not found.follows


def test_what_a_replay_leaves_out_is_said(directory: Path, model: Any) -> None:
    record = recorded(directory, piece={"ancestry": 1}, kvplug=SECTION | {"format": "int8"})
    assert len(explained(model, record).notes) == 2
    assert explained(model, recorded(directory)).notes == ()
    beside = SECTION["reuse"] | {"recompute": {"fraction": 0.1}}
    section = {"reuse": beside, "attention": "memo"}
    notes = explained(model, recorded(directory, kvplug=section)).notes
    assert len(notes) == 2
    assert "recompute.fraction" in notes[0] and "attention policy" in notes[1]


def test_tokens_beyond_the_vocabulary_are_refused(directory: Path, model: Any) -> None:
    with pytest.raises(KVPlugError, match="beyond the model's vocabulary of"):
        explained(model, recorded(directory, output_ids=[5, 999999]))


def test_a_check_that_cannot_correct_is_named(directory: Path, model: Any) -> None:
    record = recorded(directory)
    host = Host(model, 16)
    flat = tuple(LayerView(i, 3, 2, 4, 64, "float32", None) for i in range(3))
    with pytest.raises(KVPlugError, match="position cannot correct 5e9"):
        explain(model, record, adapting_checks(record, host.engine), flat)


# -- The command -----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["reuse", "explain", *(str(a) for a in arguments)])

    return invoke


def test_the_command_shows_where_they_part(directory: Path, tmp_path: Path, run: Run) -> None:
    path = recorded(directory, entropies=[1.0], logprobs=[-1.0]).write(tmp_path)
    figures = tmp_path / "figures.json"
    done = run(path, "--json", figures, "--threads", 1)
    assert done.exit_code == 0, done.output
    assert "request cmpl-1/0: 73 prompt tokens, 40 of them from stored KV" in done.stdout
    assert "approximate" in done.stdout and "0.75" in done.stdout and "-9" in done.stdout
    assert "greedy answers:" in done.stdout and "KL of the next token:" in done.stdout
    assert "recorded entropies:" in done.stdout
    data = json.loads(figures.read_text())
    assert data["request_id"] == "cmpl-1/0" and len(data["runs"][0]["key"]) == 3
    assert [o["index"] for o in data["outputs"]] == [0, 1, 2]


def test_another_place_of_the_same_model_will_do(directory: Path, tmp_path: Path, run: Run) -> None:
    path = recorded(directory, model="elsewhere/model").write(tmp_path)
    done = run(path)
    assert done.exit_code == 2 and "pass one with --model" in done.stderr
    assert run(path, "--model", directory).exit_code == 0


def test_another_model_is_refused(directory: Path, tmp_path: Path, run: Run) -> None:
    path = recorded(directory).write(tmp_path)
    other = tiny_llama(tmp_path / "other", layers=3, seed=1, dtype="float32")
    done = run(path, "--model", other)
    assert done.exit_code == 2 and "is another model" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dtype": "int7"}, "dtype: 'int7' is not a float dtype"),
        ({"dtype": "int64"}, "dtype: 'int64' is not a float dtype"),
        ({"kvplug": {"reuse": {"use": ["structur"]}}}, "unknown reuse policy 'structur'"),
        ({"output_ids": [5, 999999]}, "beyond the model's vocabulary"),
    ],
)
def test_a_record_that_cannot_be_replayed_is_one_message(
    directory: Path, tmp_path: Path, run: Run, changes: dict[str, Any], says: str
) -> None:
    done = run(recorded(directory, **changes).write(tmp_path))
    assert done.exit_code == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_bad_arguments_are_one_message(directory: Path, tmp_path: Path, run: Run) -> None:
    path = recorded(directory).write(tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text("{}", encoding="utf-8")
    for arguments in (
        [tmp_path / "none.json"],
        [bad],
        [path, "--model", tmp_path],
        [path, "--json", tmp_path / "no" / "folder.json"],
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and not done.stdout
        assert len(done.stderr.splitlines()) == 1


def test_a_piece_is_made_of_a_placement(directory: Path) -> None:
    (piece,) = recorded(directory, piece={"ancestry": 2, "measures": {"k_drift": 0.5}}).pieces
    fingerprint = Fingerprint(
        *("m", "t", "", "float32", "", "none"), (3, 2, 64), "", "causal", len(OTHER), 40,
        b"", b"", 0.0, "r", 2, {"k_drift": 0.5, "outgoing": float("nan")},
    )  # fmt: skip
    placement = Placement(fingerprint, 0, 40, 24, Verdict(True, "", False, -9, 0.75))
    assert PieceRecord.of("5e9", placement, np.array(OTHER), np.array(DOCUMENT)) == piece


def test_pieces_are_validated_by_themselves() -> None:
    piece = PieceRecord(
        segment="a", offset=1, length=2, start=5, exact=True, context_ids=[], token_ids=[1, 2, 3]
    )
    assert piece.end == 7
