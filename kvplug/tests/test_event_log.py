"""The event log: whole lines, bounded files, private, one writer."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from kvplug.contract import Kind
from kvplug.observe import log as event_log
from kvplug.observe.events import Event, EventType
from kvplug.observe.log import MIB, EventLog, of_rank, rotated
from kvplug.observe.settings import ObserveSettings


def event(step: int = 1, **facts: Any) -> Event:
    return Event(EventType.MISSED, None, "", step, 2, "why", "r1", ("ab" * 8,), facts)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_what_the_event_has(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, MIB, {"block_size": 16})
    log.put(
        [event(3, causes={"evicted": 2}), Event(EventType.EVICTED, Kind.PREFIX_CACHE, "lru", 4)]
    )
    log.close()
    head, first, second = lines(path)
    assert head["event"] == "log" and head["block_size"] == 16 and head["v"] == 1
    assert first.pop("t") > 1e9 and first == {
        "v": 1,
        "step": 3,
        "event": "missed",
        "count": 2,
        "request": "r1",
        "detail": "why",
        "blocks": ["ab" * 8],
        "facts": {"causes": {"evicted": 2}},
    }
    assert (second["kind"], second["policy"], second["count"]) == ("prefix_cache", "lru", 1)
    assert log.lost == 0


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.touch(mode=0o666)
    EventLog(path, MIB).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_files_stay_below_the_size(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, 20_000)
    for step in range(1000):
        log.put([event(step)])
    log.close()
    assert log.lost == 0
    newer, older = lines(path), lines(rotated(path))
    assert path.stat().st_size + rotated(path).stat().st_size <= 20_000
    assert newer[0]["event"] == older[0]["event"] == "log"
    steps = [line["step"] for line in older[1:] + newer[1:]]
    assert steps == list(range(1000 - len(steps), 1000)) and len(steps) > 60
    assert stat.S_IMODE(rotated(path).stat().st_mode) == 0o600


def test_a_log_is_continued_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        log = EventLog(path, MIB)
        log.put([event()])
        log.close()
        with path.open("a") as file:
            file.write('{"v":1,"t":1')
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["event"] for line in whole] == ["log", "missed"] * 2


def test_one_engine_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, MIB)
    with pytest.raises(ValueError, match="another engine writes it"):
        EventLog(path, MIB)
    log.close()
    EventLog(path, MIB).close()


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (
        ("link", "a symbolic link"),
        ("pipe", "no plain file"),
        ("no/such", "no such file or directory"),
        (".", "is a directory"),
    ):
        with pytest.raises(ValueError, match=problem):
            EventLog(tmp_path / name, MIB)


def test_a_full_disk_loses_events_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, MIB)
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._file)
    log.put([event()])
    log.put([event(), event()])
    log.close()
    assert log.lost == 3
    assert [r.getMessage() for r in caplog.records if r.name == "vllm.kvplug"] == [
        f"kvplug: events cannot be written to {path}: no space left on device"
    ]


def test_what_a_disk_took_a_part_of_does_not_take_the_next_line_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, answers = tmp_path / "events.jsonl", [9, OSError(errno.ENOSPC, "full")]
    log, written = EventLog(path, MIB), threading.Event()

    def write(file: int, data: Any) -> int:
        if file != log._file or not answers:
            return write_all(file, data)
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            written.set()
            raise answer
        return write_all(file, data[:answer])

    write_all = os.write
    monkeypatch.setattr(os, "write", write)
    log.put([event(1)])
    assert written.wait(20)
    log.put([event(2)])
    log.close()
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line).get("step") for line in whole] == [None, 2] and log.lost == 1


def test_the_scheduler_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "WAITING", 10)
    log = EventLog(tmp_path / "events.jsonl", MIB)
    gate, stuck = threading.Event(), threading.Event()

    def slow(_: bytes) -> None:
        stuck.set()
        assert gate.wait(60)

    log._write = slow  # type: ignore[method-assign, assignment]
    log.put([event()])
    assert stuck.wait(60)
    log.put([event()] * 10)
    log.put([event()] * 5)
    assert log.lost == 5
    gate.set()
    log.close()
    log.put([event()])
    assert log.lost == 6


def test_each_rank_has_a_file() -> None:
    path = Path("/logs/events.jsonl")
    assert [of_rank(path, rank).name for rank in range(3)] == [
        "events.jsonl",
        "events.rank1.jsonl",
        "events.rank2.jsonl",
    ]


@pytest.mark.parametrize("name", ["", " ", "folder/", "a\0b"])
def test_a_setting_that_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must name a file"):
        ObserveSettings(events=name)
