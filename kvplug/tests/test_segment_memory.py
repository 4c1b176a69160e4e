"""One worker's segments: in memory, in files beside it, and in step with what it is told."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvplug.contract.reuse import Fingerprint
from kvplug.errors import KVPlugError
from kvplug.reuse import memory as module
from kvplug.reuse.file import (
    SegmentHeader,
    digest,
    file_name,
    read_segment,
    segment_id,
    write_segment,
)
from kvplug.reuse.memory import PagePlane, SegmentMemory, StoreReport


def made(
    number: int, rank: int = 0, world: int = 1, ancestry: int = 0
) -> tuple[SegmentHeader, dict[str, Tensor]]:
    tokens = np.arange(number, number + 16, dtype=np.int32)
    known = Fingerprint(
        model="m",
        tokenizer="t",
        lora="",
        dtype="bfloat16",
        format="",
        position="rope/neox/0",
        geometry=(1, 2 * world, 4),
        tenant="",
        mask="causal",
        start=0,
        length=16,
        context=digest(tokens[:0]),
        tokens=digest(tokens),
        created=1.0,
        request_id="r",
        ancestry=ancestry,
    )
    planes = {
        name: torch.full((1, 16, 2, 4), float(number + i), dtype=torch.bfloat16)
        for i, name in enumerate(("key", "value"))
    }
    header = SegmentHeader.of(segment_id(known), known, tokens, tokens[:0], planes, rank, world)
    return header, planes


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SegmentMemory]:
    memory = SegmentMemory(str(tmp_path / "segments"))
    yield memory
    memory.close()


def path_of(tmp_path: Path, header: SegmentHeader) -> Path:
    return tmp_path / "segments" / file_name(header.id, header.rank, header.world)


class Gate:
    """Holds the thread before its next job until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        real = getattr(module, name)

        def held(*arguments: Any) -> Any:
            self.reached.set()
            assert self.open.wait(300)
            return real(*arguments)

        monkeypatch.setattr(module, name, held)


def test_without_a_folder_it_is_memory_alone() -> None:
    memory = SegmentMemory("")
    header, planes = made(1)
    memory.put(header, planes)
    assert memory.get(header.id).planes is planes
    assert header.id in memory and len(memory) == 1 and memory.bytes == header.size
    memory.delete([header.id])
    memory.flush()
    assert not memory.take_report()
    memory.fetch([header.id])
    assert memory.take_report() == StoreReport(failed={header.id: "missing"})
    memory.drop([header.id, "0" * 32])
    with pytest.raises(KeyError):
        memory.get(header.id)
    memory.close()


def test_what_is_put_is_written_and_comes_back(store: SegmentMemory, tmp_path: Path) -> None:
    header, planes = made(1)
    store.put(header, planes)
    store.flush()
    assert store.take_report() == StoreReport(written=[header.id])
    assert not store.take_report()
    store.drop([header.id])
    assert header.id not in store and path_of(tmp_path, header).exists()
    store.fetch([header.id])
    store.flush()
    assert store.take_report() == StoreReport(fetched=[header.id])
    back = store.get(header.id)
    assert back.header.fingerprint == header.fingerprint
    assert all(torch.equal(back.planes[name], planes[name]) for name in planes)
    assert store.counters()["written"] == store.counters()["fetched"] == 1


def test_fetching_tells_the_folder_what_is_used(store: SegmentMemory, tmp_path: Path) -> None:
    header, planes = made(1)
    store.put(header, planes)
    store.flush()
    path = path_of(tmp_path, header)
    os.utime(path, (1.0, 1.0))
    store.fetch([header.id])
    store.flush()
    assert path.stat().st_mtime > 1e9


def test_using_tells_the_folder_too_but_not_at_every_turn(
    store: SegmentMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, planes = made(1)
    store.put(header, planes)
    store.flush()
    path = path_of(tmp_path, header)
    for expected in (True, False):
        os.utime(path, (1.0, 1.0))
        store.get(header.id)
        store.flush()
        assert (path.stat().st_mtime > 1e9) == expected
    monkeypatch.setattr(module, "_MARK", 0.0)
    store.get(header.id)
    store.flush()
    assert path.stat().st_mtime > 1e9
    path.unlink()
    store.get(header.id)
    store.flush()
    assert not path.exists()


def test_deleting_leaves_what_is_in_memory(store: SegmentMemory, tmp_path: Path) -> None:
    header, planes = made(1)
    store.put(header, planes)
    store.flush()
    store.delete([header.id])
    store.flush()
    assert not path_of(tmp_path, header).exists()
    assert header.id in store
    # Nobody is told of a file that is gone.
    assert not store.take_report()


def test_what_waits_to_be_written_is_given_up_with_its_file(
    store: SegmentMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "write_segment")
    busy, waiting = made(1), made(2)
    store.put(*busy)
    assert gate.reached.wait(300)
    store.put(*waiting)
    store.drop([busy[0].id, waiting[0].id])
    store.delete([busy[0].id, waiting[0].id])
    gate.open.set()
    store.flush()
    assert list((tmp_path / "segments").glob("*.kvseg*")) == []
    assert not store.take_report()
    assert store.counters()["written"] == 0


def test_a_segment_saved_anew_is_the_one_on_the_disk(
    store: SegmentMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted, put and deleted again in any order with the thread late: the last word holds."""
    gate = Gate(monkeypatch, "write_segment")
    blocker, first, second = made(9), made(1, ancestry=3), made(1)
    store.put(*blocker)
    assert gate.reached.wait(300)
    store.put(*first)
    store.delete([first[0].id])
    store.put(*second)
    gate.open.set()
    store.flush()
    assert store.take_report().written == [blocker[0].id, second[0].id]
    assert read_segment(path_of(tmp_path, second[0]))[0].fingerprint.ancestry == 0
    assert store.get(second[0].id).header is second[0]


def test_fetches_come_before_writes(
    store: SegmentMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, blocker, late = made(1), made(2), made(3)
    store.put(*stored)
    store.flush()
    store.drop([stored[0].id])
    store.take_report()
    done: list[str] = []
    gate = Gate(monkeypatch, "write_segment")
    for name in ("_write", "_read"):
        real = getattr(store, name)

        def told(*arguments: Any, name: str = name, real: Any = real) -> None:
            real(*arguments)
            done.append(name)

        monkeypatch.setattr(store, name, told)
    store.put(*blocker)
    assert gate.reached.wait(300)
    store.put(*late)
    store.fetch([stored[0].id])
    gate.open.set()
    store.flush()
    assert done == ["_write", "_read", "_write"]


def test_a_fetch_that_nobody_waits_for_brings_nothing(
    store: SegmentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, planes = made(1)
    store.put(header, planes)
    store.flush()
    store.drop([header.id])
    store.take_report()
    gate = Gate(monkeypatch, "read_segment")
    store.fetch([header.id])
    assert gate.reached.wait(300)
    store.drop([header.id])
    gate.open.set()
    store.flush()
    assert header.id not in store and not store.take_report()


# -- What goes wrong -------------------------------------------------------------------------------


def test_a_full_disk_is_counted_told_once_and_stops_nothing(
    store: SegmentMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = module.write_segment
    monkeypatch.setattr(module, "write_segment", full)
    with caplog.at_level(logging.ERROR, "kvplug.reuse"):
        for number in range(3):
            store.put(*made(number))
        store.flush()
    assert store.take_report().failed == {
        made(n)[0].id: "no space left on device" for n in range(3)
    }
    assert len(caplog.records) == 1
    assert store.counters()["write_errors"] == 3 and len(store) == 3
    monkeypatch.setattr(module, "write_segment", real)
    store.put(*made(7))
    store.flush()
    assert store.take_report().written == [made(7)[0].id]


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(whole[:-40])
    elif kind == "other version":
        path.write_bytes(whole[:8] + b"\x07" + whole[9:])
    elif kind == "bad checksum":
        path.write_bytes(whole[:-30] + bytes([whole[-30] ^ 4]) + whole[-29:])
    else:
        path.write_bytes(b"no segment at all, a note somebody left" * 4)


@pytest.mark.parametrize(
    "cause", ["missing", "truncated", "other version", "bad checksum", "not a segment file"]
)
def test_a_damaged_file_is_refused_with_its_cause(
    cause: str, store: SegmentMemory, tmp_path: Path
) -> None:
    header, planes = made(1)
    store.put(header, planes)
    store.flush()
    store.drop([header.id])
    store.take_report()
    path = path_of(tmp_path, header)
    damage(path, cause)
    store.fetch([header.id])
    store.flush()
    assert store.take_report() == StoreReport(failed={header.id: cause})
    assert header.id not in store
    assert store.counters()[f"refused {cause}"] == 1
    assert path.exists() == (cause != "missing")


def test_another_ranks_file_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "segments")
    header, planes = made(1, rank=1, world=2)
    other = SegmentMemory(folder, 1, 2)
    other.put(header, planes)
    other.close()
    mine = SegmentMemory(folder, 0, 2)
    path = path_of(tmp_path, header)
    path.rename(path.with_name(file_name(header.id, 0, 2)))
    mine.fetch([header.id])
    mine.flush()
    assert mine.take_report().failed == {header.id: "other rank"}
    with pytest.raises(ValueError, match="rank 1 of 2"):
        mine.put(header, planes)
    mine.close()


def test_another_segment_under_its_name_is_refused(store: SegmentMemory, tmp_path: Path) -> None:
    one, two = made(1), made(2)
    store.put(*one)
    store.flush()
    path_of(tmp_path, one[0]).rename(path_of(tmp_path, two[0]))
    store.fetch([two[0].id])
    store.flush()
    assert store.take_report().failed == {two[0].id: "bad header"}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"tenant": "other"}, "bad header"),
        ({"model": "other"}, "bad header"),
        ({"ancestry": 1}, "bad header"),
        ({"geometry": (1, 4, 4)}, "bad header"),
        ({}, ""),
    ],
)
def test_a_file_swapped_since_the_scan_is_believed_for_what_it_holds(
    change: dict[str, Any], cause: str, store: SegmentMemory, tmp_path: Path
) -> None:
    header, planes = made(1)
    if "geometry" in change:
        planes = {name: torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16) for name in planes}
    other = SegmentHeader.of(
        header.id,
        replace(header.fingerprint, **change),
        header.token_ids,
        header.context_ids,
        planes,
    )
    path = path_of(tmp_path, header)
    write_segment(path, other, planes)
    store.fetch({header.id: 0})
    store.flush()
    report = store.take_report()
    assert report.failed == ({header.id: cause} if cause else {})
    assert (header.id in store) is (not cause)


def test_planes_that_are_not_those_of_the_pages_are_refused(
    store: SegmentMemory, tmp_path: Path
) -> None:
    header, planes = made(1)
    store.put(header, planes)
    store.flush()
    store.take_report()
    for dtype, layers, shape in (
        ("float16", 1, (2, 4)),
        ("bfloat16", 2, (2, 4)),
        ("bfloat16", 1, (1, 4)),
        ("bfloat16", 1, (2, 8)),
    ):
        page = PagePlane(dtype, layers, shape)
        store.expect({"key": page, "value": page})
        store.fetch([header.id])
        store.flush()
        assert store.take_report().failed == {header.id: "other geometry"}
    page = PagePlane("bfloat16", 1, (2, 4))
    store.expect({"key": page, "value": page})
    store.fetch([header.id])
    store.flush()
    assert store.take_report().fetched == [header.id]


def test_ids_that_are_none_touch_no_file(store: SegmentMemory, tmp_path: Path) -> None:
    outside = tmp_path / "keep.0-1.kvseg"
    outside.write_text("mine")
    for bad in ("../keep", "", "x" * 32, str(outside)):
        for call in (store.delete, store.fetch):
            with pytest.raises(ValueError, match="not a segment id"):
                call([bad])
    header, planes = made(1)
    with pytest.raises(ValueError, match="not a segment id"):
        store.put(replace(header, id="../../x"), planes)
    assert len(store) == 0
    store.flush()
    assert outside.read_text() == "mine"


def test_an_error_nobody_thought_of_does_not_end_the_thread(
    store: SegmentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("?")

    monkeypatch.setattr(module, "read_segment", broken)
    store.fetch([made(1)[0].id])
    store.flush()
    assert store.take_report().failed == {made(1)[0].id: "unreadable"}
    monkeypatch.undo()
    store.put(*made(2))
    store.flush()
    assert store.take_report().written == [made(2)[0].id]


# -- Start and end ---------------------------------------------------------------------------------


def test_closing_writes_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SegmentMemory(str(tmp_path / "segments"))
    gate = Gate(monkeypatch, "write_segment")
    for number in range(4):
        memory.put(*made(number))
    gate.open.set()
    memory.close()
    memory.close()
    assert len(list((tmp_path / "segments").glob("*.kvseg"))) == 4
    memory.put(*made(9))
    memory.fetch([made(1)[0].id])
    memory.flush()
    assert len(list((tmp_path / "segments").glob("*.kvseg"))) == 4
    assert memory.take_report().failed == {made(1)[0].id: "missing"}


def test_what_a_killed_process_was_writing_is_swept_away(tmp_path: Path) -> None:
    folder = tmp_path / "segments"
    folder.mkdir()
    name = "0" * 32
    unfinished = [folder / f".{name}.{rank}-2.kvseg.abcd1234.tmp" for rank in (0, 1)]
    others = [
        folder / ".notes.0-2.kvseg.x.tmp",
        folder / f"{name}.0-2.kvseg",
        folder / "README",
    ]
    for path in (*unfinished, *others):
        path.write_text("?")
    SegmentMemory(str(folder), 1, 2).close()
    assert all(path.exists() for path in (*unfinished, *others)), "the first rank's engine has it"
    SegmentMemory(str(folder), 0, 2).close()
    assert not any(path.exists() for path in unfinished)
    assert all(path.exists() for path in others)


def test_the_folder_is_made_and_is_its_owners(tmp_path: Path) -> None:
    SegmentMemory(str(tmp_path / "a" / "b")).close()
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("x")
    with pytest.raises(KVPlugError, match=r"reuse\.store\.directory: .*file.*Fix:"):
        SegmentMemory(str(tmp_path / "file"))
