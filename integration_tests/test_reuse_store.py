"""Segments in a folder: they outlive the engine, and whatever was done to them in between, requests
are served and the cause is counted."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from reuse_oracle import ReuseOracle

from kvplug.fingerprint import ONCE
from kvplug.reuse.file import read_header
from kvplug_lab import models
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

N = 8
ENGINE: dict[str, Any] = {"max_model_len": 1024, "num_gpu_blocks_override": 128, "dtype": "float32"}
LENGTHS = {"A": 70, "B": 90, "C": 64, "D": 80}

choose = random.Random(11)


def text(n: int) -> list[int]:
    return [choose.randrange(10, 300) for _ in range(n)]


S = text(40)
DOCS = {name: text(n) for name, n in LENGTHS.items()}
CHAT = text(100)
Q = text(20)


def section(folder: Path) -> dict[str, Any]:
    return {
        "reuse": {
            "use": ["structure", "position", "mask"],
            "segments": {"by": "request", "min_tokens": 16},
            "store": {"directory": str(folder)},
        }
    }


def asking(name: str, wave: int) -> TrialRequest:
    ask = {"segments": [len(S), len(DOCS[name])]}
    return TrialRequest(S + DOCS[name] + Q, N, wave, ask)


@dataclass
class Stored:
    """A folder that an engine left behind.

    Attributes:
        folder: The folder.
        chat: What the session's text had become.
    """

    folder: Path
    chat: list[int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("deep"), layers=4, seed=2)


@pytest.fixture(scope="module")
def oracle(model: Path) -> ReuseOracle:
    return ReuseOracle(model)


@pytest.fixture(scope="module")
def stored(run: Run, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("segments")
    work = [
        *(
            TrialRequest(S + doc, 1, wave, {"segments": [len(S), len(doc)]})
            for wave, doc in enumerate(DOCS.values())
        ),
        TrialRequest(CHAT, 40, 4, {"session_id": "one"}, salt="ann"),
        # What a request leaves is stored with the step after its last.
        TrialRequest(text(40), 1, 5, {"reuse": "off"}),
    ]
    result = run(model, work, section(folder), **ENGINE)
    assert result.reports[0]["errors"] == 0
    assert len(list(folder.glob("*.kvseg"))) == 6
    return Stored(folder, CHAT + result.answers[4].token_ids)


def test_segments_and_sessions_outlive_the_engine(
    run: Run, model: Path, oracle: ReuseOracle, stored: Stored
) -> None:
    work = [
        asking("A", 0),
        TrialRequest(stored.chat + Q, N, 1, {"session_id": "one"}, salt="ann"),
        TrialRequest(stored.chat + Q, N, 2, {"session_id": "one"}, salt="bob"),
    ]
    result = run(model, work, section(stored.folder), **ENGINE)
    one, ann, bob = result.answers
    assert one.kvplug == {
        "exact": True,
        "reused": 110,
        "recomputed": 0,
        "segments": 2,
        "shifted": 0,
    }
    assert one.token_ids == oracle.greedy(S + DOCS["A"] + Q, [], [], N)
    # The last token of an answer was never computed.
    assert ann.kvplug["reused"] == len(stored.chat) - 1
    assert ann.kvplug["exact"]
    assert ann.token_ids == bob.token_ids == oracle.greedy(stored.chat + Q, [], [], N)
    assert bob.kvplug is None, "a session is its tenant's own"
    counters = result.reports[0]["counters"]
    assert counters["waited"] > 0
    assert counters["fetched"] == 3


def test_a_reset_and_new_weights_leave_nothing_of_before(
    run: Run, model: Path, oracle: ReuseOracle, stored: Stored, tmp_path: Path
) -> None:
    folder = tmp_path / "segments"
    shutil.copytree(stored.folder, folder)
    second = models.tiny_llama(tmp_path / "second", layers=4, seed=5)
    work = [
        asking("A", 0),
        replace(asking("A", 1), reset=True),
        asking("A", 2),
        replace(asking("A", 3), weights=str(second), reset=True),
        replace(asking("A", 4), weights=str(model)),
        asking("A", 5),
        asking("A", 6),
    ]
    result = run(model, work, section(folder), enable_prefix_caching=False, **ENGINE)
    stale, gone, again, other, back, learning, last = result.answers
    own = oracle.greedy(S + DOCS["A"] + Q, [], [], N)
    # What is asked may be stored too, after the document.
    assert stale.kvplug["reused"] >= 110 and stale.token_ids == own
    # Nothing of an earlier engine, nor of this one before.
    assert gone.kvplug is None and gone.token_ids == own
    assert again.kvplug["reused"] >= 110 and again.token_ids == own
    assert other.kvplug is None
    assert other.token_ids == ReuseOracle(second).greedy(S + DOCS["A"] + Q, [], [], N)
    # Without a reset, the weights that were loaded are noticed in time.
    assert back.token_ids == own and (back.kvplug or {}).get("reused", 0) == 0
    # It had begun when that was noticed, so it left nothing.
    assert learning.kvplug is None and learning.token_ids == own
    assert last.kvplug["reused"] >= 110 and last.token_ids == own
    assert result.reports[0]["errors"] == 0
    # What is left belongs to that run alone, and the next start removes it.
    found = {read_header(path).fingerprint.model for path in folder.glob("*.kvseg")}
    assert all(name.startswith(ONCE) for name in found)
    run(
        model,
        [TrialRequest(text(40), 1, wave, {"reuse": "off"}) for wave in (0, 1)],
        section(folder),
        **ENGINE,
    )
    assert not list(folder.glob("*.kvseg"))


def files(folder: Path) -> dict[str, Path]:
    """A document's file, by its name: the length in the header tells them apart."""
    found = {}
    for path in folder.glob("*.kvseg"):
        header = read_header(path)
        for name, n in LENGTHS.items():
            if header.fingerprint.length == n and header.fingerprint.start == len(S):
                found[name] = path
    return found


def test_damaged_files_are_refused_by_cause_and_requests_served(
    run: Run, model: Path, oracle: ReuseOracle, stored: Stored, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(stored.folder, folder)
    at = files(folder)
    flipped = bytearray(at["A"].read_bytes())
    flipped[-1000] ^= 1
    at["A"].write_bytes(bytes(flipped))
    at["B"].write_bytes(at["B"].read_bytes()[:-7])
    other = bytearray(at["C"].read_bytes())
    other[8] = 9
    at["C"].write_bytes(bytes(other))
    (folder / f"{'0' * 32}.0-1.kvseg").write_bytes(b"no segment at all")
    work = [asking(name, wave) for wave, name in enumerate(DOCS)]
    result = run(model, work, section(folder), **ENGINE)
    for answer, doc in zip(result.answers, DOCS.values(), strict=True):
        assert answer.token_ids == oracle.greedy(S + doc + Q, [], [], N)
        assert answer.kvplug is None or answer.kvplug["exact"]
    counters = result.reports[0]["counters"]
    # What the header gives away is found when the folder is read, the others when they are needed.
    for cause in ("truncated", "other version", "not a segment file"):
        assert counters[f"refused {cause}"] == 1, cause
    assert counters["failed bad checksum"] == 1
    assert result.answers[0].kvplug["not_reused"] == {"bad checksum": 1}
    assert result.answers[3].kvplug["reused"] == 80 + len(S) % 32, "D was whole"


def test_another_rope_base_and_another_model_share_nothing(
    run: Run, model: Path, oracle: ReuseOracle, stored: Stored, tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    turned = run(
        model,
        [asking("A", 0)],
        section(stored.folder),
        hf_overrides={"rope_parameters": rope},
        **ENGINE,
    )
    assert turned.reports[0]["counters"]["refused other model"] > 0
    assert turned.reports[0]["counters"]["tokens"] == 0
    assert turned.answers[0].token_ids != oracle.greedy(S + DOCS["A"] + Q, [], [], N)
    second = models.tiny_llama(tmp_path / "second", layers=4, seed=5)
    other = run(second, [asking("A", 0)], section(stored.folder), **ENGINE)
    assert other.reports[0]["counters"]["refused other model"] > 0
    assert other.answers[0].token_ids == ReuseOracle(second).greedy(S + DOCS["A"] + Q, [], [], N)
