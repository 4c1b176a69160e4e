"""Files in folders: laws, and every way in which a disk goes wrong."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kvplug.contract import EngineView, PlaneShape, TierError, TierPlace
from kvplug.testing.tiers import IDENTITY, LAWS, Law, Opener, key, put, read
from kvplug.tiers.wire import ChunkHeader, RefusedPayload, pack, unpack
from kvplug_policies import whole_files
from kvplug_policies.tiers import disk as module
from kvplug_policies.tiers.disk import MARKER, PASSING, Disk

MIB = 1 << 20


def built(*paths: Path, size: object = "64MiB", **options: Any) -> Disk:
    stated = {"path": [str(path) for path in paths], "size": size, **options}
    return Disk(Disk.Options.model_validate(stated), EngineView(block_size=16))


def opened(*paths: Path, rank: int = 0, world: int = 1, **options: Any) -> Disk:
    tier = built(*paths, **options)
    tier.open(TierPlace(IDENTITY, rank, world))
    return tier


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{IDENTITY}/??/*"))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, tmp_path: Path) -> None:
    law(Opener(lambda: built(tmp_path)))


@pytest.mark.parametrize(
    "options",
    [{"direct": True}, {"fsync": "each"}, {"fsync": "interval", "fsync_seconds": 0.1}],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("law", LAWS[:-2], ids=lambda law: law.__name__)
def test_law_on_two_folders(law: Law, options: dict[str, Any], tmp_path: Path) -> None:
    law(Opener(lambda: built(tmp_path / "a", tmp_path / "b", **options)))


def test_files_are_the_owners_and_the_folder_says_whose_it_is(tmp_path: Path) -> None:
    tier, name = opened(tmp_path / "new" / "deep"), key()
    put(tier, (name, b"payload"))
    base = tmp_path / "new" / "deep" / IDENTITY
    assert (base / MARKER).read_text("ascii") == f"kvplug tier 1\nidentity {IDENTITY}\n"
    (found,) = files(tmp_path / "new" / "deep")
    assert found == base / name.hex()[:2] / f"{name.hex()}.0-1"
    assert found.read_bytes() == b"payload"
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    assert stat.S_IMODE(base.stat().st_mode) == 0o700
    assert not list((base / PASSING).iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": []}, "must name a folder"),
        ({"path": [""]}, "must name a folder"),
        ({"path": ["/a", "/b/../a"]}, "each folder once"),
        ({"path": ["/a", "/b"], "size": ["1GiB"]}, "as many as path has folders"),
        ({"path": ["/a", "/b"], "size": "1MiB"}, "at least 1MiB for each folder"),
        ({"size": "much"}, "must be a size such as"),
        ({"fsync": "always"}, "never"),
    ],
    ids=range(7),
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Disk.Options.model_validate({"path": "/a", "size": "1GiB", **options})


# -- Several folders -------------------------------------------------------------------------------


def test_keys_spread_over_folders_by_their_sizes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    tier = opened(a, b, size=["10MiB", "30MiB"])
    put(tier, *((key(), b"x") for _ in range(1000)))
    assert 180 < len(files(a)) < 320
    assert len(files(a)) + len(files(b)) == 1000


def test_a_folder_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    tier = opened(a, b)
    names = [key() for _ in range(40)]
    put(tier, *((name, name) for name in names))
    kept = len(files(b))
    assert 0 < kept < 40
    shutil.rmtree(a)
    a.write_text("a file where a disk was")
    found = read(tier, *names)
    assert sum(one is not None for one in found) == kept
    more = [key() for _ in range(20)]
    put(tier, *((name, name) for name in more))
    assert read(tier, *more) == more and len(files(b)) == kept + 20
    assert tier.counters()["folders_left_out"] == 1
    # It comes back, and is made ready again.
    a.unlink()
    monkeypatch.setattr(module, "RETRY", 0.0)
    for root in tier._roots:
        root.unreadable = root.unwritable = 0.0
    put(tier, *((key(), b"y") for _ in range(20)))
    assert files(a) and (a / IDENTITY / MARKER).exists()
    assert read(tier, *more) == more


def test_no_folder_left_is_an_error_and_not_a_miss(tmp_path: Path) -> None:
    tier, name = opened(tmp_path / "a"), key()
    put(tier, (name, b"x"))
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("a file where a disk was")
    with pytest.raises(TierError, match="unreadable"):
        tier.get([name])
    assert tier.put([(key(), b"x")]) == ["unwritable"]
    assert tier.has([name]) == [False]


def test_a_folder_that_cannot_be_used_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TierError, match="name a folder that the engine's user can write to"):
        opened(tmp_path / "file" / "below")
    tier = opened(tmp_path / "file" / "below", tmp_path / "good")
    put(tier, *((key(), b"x") for _ in range(10)))
    assert len(files(tmp_path / "good")) == 10
    assert tier.described()[str(tmp_path / "file" / "below")].startswith("left out")


# -- What is not ours ------------------------------------------------------------------------------


def test_a_folder_of_another_identity_is_neither_read_nor_removed(tmp_path: Path) -> None:
    other = Disk(
        Disk.Options.model_validate({"path": str(tmp_path), "size": MIB}), EngineView(block_size=16)
    )
    other.open(TierPlace("f" * 64, 0, 1))
    name = key()
    put(other, (name, bytes(900_000)))
    mine = opened(tmp_path, size=MIB)
    assert read(mine, name) == [None]
    for _ in range(5):
        put(mine, (key(), bytes(500_000)))
    mine.remove([name])
    assert read(other, name) == [bytes(900_000)]


def test_a_folder_that_says_it_is_anothers_is_refused(tmp_path: Path) -> None:
    base = tmp_path / IDENTITY
    base.mkdir()
    (base / "letter.txt").write_text("dear reader")
    with pytest.raises(TierError, match=r"is not empty and has no \.kvplug"):
        opened(tmp_path)
    (base / MARKER).write_text(f"kvplug tier 1\nidentity {'f' * 64}\n")
    with pytest.raises(TierError, match="is of another identity"):
        opened(tmp_path)
    (base / MARKER).unlink()
    (base / MARKER).symlink_to("letter.txt")
    with pytest.raises(TierError):
        opened(tmp_path)
    assert (base / "letter.txt").read_text() == "dear reader"


@pytest.mark.parametrize("torn", ["", "kvplug tier 1\niden", "kvplug tier 1\n" + "\0" * 40])
def test_what_a_crash_of_the_machine_leaves_of_the_marker_is_written_again(
    tmp_path: Path, torn: str
) -> None:
    name, marker = key(), tmp_path / IDENTITY / MARKER
    put(opened(tmp_path), (name, b"x"))
    whole = marker.read_text()
    marker.write_text(torn)
    assert read(opened(tmp_path), name) == [b"x"]
    assert marker.read_text() == whole


def test_workers_that_start_at_once_make_one_folder(tmp_path: Path) -> None:
    for i in range(20):
        root = tmp_path / str(i)
        with ThreadPoolExecutor(8) as pool:
            starts = [
                pool.submit(opened, root, rank=rank, world=8, direct=i % 2 == 1)
                for rank in range(8)
            ]
            assert [start.result().described()[str(root)][:8] for start in starts] == [
                "0 chunks"
            ] * 8
        assert not list((root / IDENTITY / PASSING).iterdir())


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    tier = opened(tmp_path, size=MIB)
    put(tier, (key(), b"x"))
    folder = files(tmp_path)[0].parent
    strange = [folder / "notes.txt", folder / ("0" * 64), folder / f"{folder.name}{'0' * 62}.1-1"]
    for path in strange:
        path.write_bytes(bytes(600_000))
    again = opened(tmp_path, size=MIB)
    assert again.usage().entries == 1
    for _ in range(4):
        put(again, (key(), bytes(400_000)))
    assert all(path.exists() for path in strange)


def test_what_lies_at_a_chunks_place_and_is_no_file_is_a_miss(tmp_path: Path) -> None:
    tier, secret = opened(tmp_path), tmp_path / "secret"
    secret.write_text("not yours")
    name = key()
    put(tier, (name, b"x"))
    (path,) = files(tmp_path)

    def huge() -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    makers = [
        lambda: path.symlink_to(secret),
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
        lambda: path.write_bytes(b""),
        huge,
    ]
    for make in makers:
        path.unlink()
        make()
        assert read(tier, name) == [None]
        put(tier, (name, b"again"))
        assert read(tier, name) == [b"again"] and stat.S_ISREG(path.lstat().st_mode)
    assert secret.read_text() == "not yours"
    path.unlink()
    path.mkdir()
    assert read(tier, name) == [None]
    (path / "inside").write_text("kept")
    assert tier.put([(name, b"x")]) == ["unwritable"]
    assert (path / "inside").exists()


def test_a_folder_of_keys_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tier, name = opened(tmp_path / "root"), key()
    (tmp_path / "root" / IDENTITY / name.hex()[:2]).symlink_to(elsewhere)
    assert tier.put([(name, b"x")]) == ["unwritable"]
    assert not list(elsewhere.iterdir())


# -- Damage ----------------------------------------------------------------------------------------


def chunk(name: bytes) -> tuple[ChunkHeader, memoryview]:
    planes = {"cells": PlaneShape("uint8", (2, 16, 1, 8))}
    header = ChunkHeader(name, IDENTITY, "raw", 1, "", True, 0, 16, 0, 1, planes)
    return header, pack(header, {"cells": torch.arange(256, dtype=torch.uint8).view(2, 16, 1, 8)})


@pytest.mark.parametrize("damage", ["truncated", "flipped", "appended", "zeros"])
def test_a_damaged_file_is_refused_and_can_be_stored_again(damage: str, tmp_path: Path) -> None:
    tier, name = opened(tmp_path), key()
    header, payload = chunk(name)
    put(tier, (name, payload))
    (path,) = files(tmp_path)
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        del raw[-100:]
    elif damage == "flipped":
        raw[-100] ^= 1
    elif damage == "appended":
        raw += b"\0"
    else:
        raw[:] = bytes(len(raw))
    path.write_bytes(raw)
    (found,) = tier.get([name])
    with pytest.raises(RefusedPayload):
        unpack(found, header)
    tier.remove([name])
    put(tier, (name, payload))
    assert unpack(tier.get([name])[0], header)["cells"].sum() == 255 * 128


# -- Full and read-only ----------------------------------------------------------------------------


def test_files_of_a_limited_size_are_refused_as_full(tmp_path: Path) -> None:
    tier, small = opened(tmp_path), key()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        answers = tier.put([(key(), bytes(200_000)), (small, b"fits")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answers == ["full", ""] and read(tier, small) == [b"fits"]
    assert not list((tmp_path / IDENTITY / PASSING).iterdir())
    assert tier.counters()["folders_left_out"] == 0


@contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_and_goes_on(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small"):
        tier = opened(tmp_path / "small")
        names = [key() for _ in range(8)]
        answers = tier.put([(name, bytes(MIB)) for name in names])
        assert answers.count("") >= 3 and set(answers) == {"", "full"}
        stored = [name for name, answer in zip(names, answers, strict=True) if not answer]
        assert read(tier, *stored) == [bytes(MIB)] * len(stored)
        assert not list((tmp_path / "small" / IDENTITY / PASSING).iterdir())
        tier.remove(stored[:2])
        put(tier, (key(), bytes(MIB)))


def test_a_full_disk_beside_another_takes_nothing_and_the_other_all(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small"):
        tier = opened(tmp_path / "small", tmp_path / "large")
        put(tier, *((key(), bytes(MIB)) for _ in range(16)))
        assert len(files(tmp_path / "large")) >= 12


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of a user whom permissions bind."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        user = os.geteuid()
        if not user:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if not user:
                os.seteuid(user)


def test_a_read_only_folder_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", 0.0)
    with unprivileged() as folder:
        tier, name = opened(folder), key()
        put(tier, (name, b"there"))
        base = folder / IDENTITY
        writable = [base, *base.iterdir()]
        for path in writable:
            if path.is_dir():
                path.chmod(0o500)
        assert tier.put([(key(), b"x")]) == ["unwritable"]
        assert read(tier, name) == [b"there"]
        tier.remove([name])
        assert read(tier, name) == [b"there"]
        for path in writable:
            if path.is_dir():
                path.chmod(0o700)
        put(tier, (key(), b"x"))


def test_a_folder_without_permission_is_refused_at_start() -> None:
    with unprivileged() as folder:
        folder.chmod(0o500)
        with pytest.raises(TierError, match=f"{folder}.*Permission denied"):
            opened(folder / "below")
        folder.chmod(0o700)


def test_a_medium_that_fails_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, name = opened(tmp_path), key()
    put(tier, (name, b"x"))
    calls = []

    def broken(*_: object, **__: object) -> None:
        calls.append(1)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "write_whole", broken)
    for _ in range(3):
        assert tier.put([(key(), b"y")]) == ["unwritable"]
    assert len(calls) == 1
    monkeypatch.setattr(module, "read_whole", broken)
    for _ in range(3):
        with pytest.raises(TierError, match="Input/output error"):
            tier.get([name])
    assert len(calls) == 2


# -- Quota -----------------------------------------------------------------------------------------


def test_the_size_is_kept_by_removing_what_was_used_longest_ago(tmp_path: Path) -> None:
    tier = opened(tmp_path, size=MIB)
    names = [key() for _ in range(10)]
    for i, name in enumerate(names):
        put(tier, (name, bytes(100_000)))
        os.utime(files_of(tmp_path, name), (1000 + i, 1000 + i))
    read(tier, names[0])
    put(tier, (key(), bytes(100_000)))
    there = [one is not None for one in tier.get(names)]
    assert there[0] and not there[1] and there[-1]
    for _ in range(50):
        put(tier, (key(), bytes(random.randrange(1, 200_000))))
        used = sum(path.stat().st_size for path in files(tmp_path))
        assert used == tier.usage().size <= MIB
    assert tier.counters()["removed_over_size"] > 10
    assert tier.put([(key(), bytes(MIB + 1))]) == ["full"]


def files_of(folder: Path, name: bytes) -> Path:
    return folder / IDENTITY / name.hex()[:2] / f"{name.hex()}.0-1"


def test_two_engines_of_one_folder_keep_its_size_together(tmp_path: Path) -> None:
    engines = [opened(tmp_path, size=2 * MIB) for _ in range(2)]
    for i in range(100):
        put(engines[i % 2], (key(), bytes(50_000)))
        used = sum(path.stat().st_size for path in files(tmp_path))
        assert used <= 2 * MIB + 2 * (2 * MIB // 16) + 100_000
    assert used > MIB


def test_entries_of_another_number_of_workers_leave_in_their_turn(tmp_path: Path) -> None:
    old = opened(tmp_path, rank=1, world=2, size=4 * MIB)
    stale = key()
    put(old, (stale, bytes(900_000)))
    os.utime(next(iter(files(tmp_path))), (1000, 1000))
    new = opened(tmp_path, size=MIB)
    assert new.usage().size == 900_000
    put(new, (key(), bytes(400_000)))
    assert read(old, stale) == [None] and new.usage().size == 400_000


def test_what_is_stored_is_listed_when_a_tier_is_opened(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    ranks = [opened(a, b, rank=rank, world=2) for rank in range(2)]
    whole, half = [key() for _ in range(30)], key()
    for rank in ranks:
        put(rank, *((name, bytes(100 + rank._place.rank)) for name in whole))
    put(ranks[0], (half, b"half"))
    scheduler = opened(a, b, rank=-1, world=2)
    listed = {name: (size, used) for name, size, used in scheduler.stored()}
    assert listed.keys() == set(whole)
    assert all(size == 201 and abs(used - time.time()) < 600 for size, used in listed.values())
    assert {name for name, *_ in ranks[0].stored()} == {*whole, half}
    assert scheduler.usage().entries == 61
    scheduler.remove(whole)
    assert files(a) == files(b) == [] or len(files(a)) + len(files(b)) == 1


# -- Crashes ---------------------------------------------------------------------------------------

WRITER = """
import os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
from kvplug.contract import EngineView, TierPlace
from kvplug_policies.tiers.disk import Disk

tier = Disk(Disk.Options(path={folder!r}, size=1 << 30), EngineView(block_size=16))
tier.open(TierPlace({identity!r}, 0, 1))
tier.put([(bytes(32), b"whole" * 1000)])
rename = Path.rename

def killed(path, target):
    os.kill(os.getpid(), signal.SIGKILL)

Path.rename = killed
tier.put([(bytes([1]) * 32, b"never" * 1000)])
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    code = WRITER.format(path=sys.path, folder=str(tmp_path), identity=IDENTITY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    passing = tmp_path / IDENTITY / PASSING
    assert len(list(passing.iterdir())) == 1
    tier = opened(tmp_path)
    assert not list(passing.iterdir())
    assert tier.counters()["unfinished_removed"] == 1
    assert read(tier, bytes(32), bytes([1]) * 32) == [b"whole" * 1000, None]


def test_what_a_living_writer_has_not_finished_is_not_swept(tmp_path: Path) -> None:
    opened(tmp_path)
    path = tmp_path / IDENTITY / PASSING / "0123456789abcdef"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opened(tmp_path)
        assert path.exists()
    opened(tmp_path)
    assert not path.exists()


def test_a_file_that_a_sweep_took_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, name, taken = opened(tmp_path), key(), []

    def write(handle: int, payload: memoryview, *, direct: bool) -> None:
        if not taken:
            (path,) = (tmp_path / IDENTITY / PASSING).iterdir()
            path.unlink()
            taken.append(path)
        whole_files.write_whole(handle, payload, direct=direct)

    monkeypatch.setattr(module, "write_whole", write)
    put(tier, (name, b"payload"))
    assert taken and read(tier, name) == [b"payload"]


# -- Forcing to the medium -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["never", "each", "interval"])
def test_files_are_forced_to_the_medium_as_stated(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[str] = []

    def force(handle: int) -> None:
        forced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))

    monkeypatch.setattr(os, "fsync", force)
    monkeypatch.setattr(os, "fdatasync", force)
    seconds = {"fsync_seconds": 3600.0} if policy == "interval" else {}
    tier, name = opened(tmp_path, fsync=policy, **seconds), key()
    tier._sync_written()
    forced.clear()
    put(tier, (name, b"x"))
    path = files_of(tmp_path, name)
    during = len(forced)
    tier.close()
    assert during == (2 if policy == "each" else 0)
    if policy == "each":
        assert PASSING in forced[0] and forced[1] == str(path.parent)
    elif policy == "interval":
        assert forced == [str(path), str(path.parent)]
    else:
        assert not forced


def test_an_interval_is_kept_by_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda handle: done.set())
    tier = opened(tmp_path, fsync="interval", fsync_seconds=0.1)
    put(tier, (key(), b"x"))
    assert done.wait(60)
    tier.close()


def test_a_file_system_without_direct_access_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "takes_direct", lambda path: False)
    tier, name = opened(tmp_path, direct=True), key()
    put(tier, (name, b"x"))
    assert read(tier, name) == [b"x"]
    assert "refuses O_DIRECT" in tier.described()[str(tmp_path)]


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 1_000_001])
def test_direct_files_have_their_own_length(size: int, tmp_path: Path) -> None:
    tier, name, payload = opened(tmp_path, direct=True), key(), os.urandom(size)
    put(tier, (name, payload))
    assert files_of(tmp_path, name).read_bytes() == payload
    assert read(tier, name) == [payload]
