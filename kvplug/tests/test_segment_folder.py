"""A folder of stored segments belongs to one engine for as long as that lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvplug.errors import KVPlugError
from kvplug.reuse.file import file_name
from kvplug.reuse.folder import OwnedFolder, engine_folder, remove_files
from kvplug.reuse.memory import SegmentMemory

OWNER = """
import sys
from kvplug.reuse.folder import OwnedFolder
folder = OwnedFolder(sys.argv[1], owns=True)
print("mine", flush=True)
sys.stdin.read()
"""


def test_a_second_engine_is_refused_by_name(tmp_path: Path) -> None:
    first = OwnedFolder(str(tmp_path), owns=True)
    with pytest.raises(KVPlugError) as error:
        OwnedFolder(str(tmp_path), owns=True)
    said = str(error.value)
    assert said.startswith(f"reuse.store.directory: {tmp_path} belongs to another engine")
    assert f"process {os.getpid()}" in said and "Fix: name a folder of its own" in said
    first.close()
    first.close()
    OwnedFolder(str(tmp_path), owns=True).close()


def test_the_first_rank_has_it_for_all(tmp_path: Path) -> None:
    ranks = [SegmentMemory(str(tmp_path), rank, 2) for rank in (0, 1)]
    with pytest.raises(KVPlugError, match="belongs to another engine"):
        SegmentMemory(str(tmp_path), 0, 1)
    for rank in ranks:
        rank.close()
    SegmentMemory(str(tmp_path), 0, 1).close()


def test_an_engine_that_is_killed_gives_it_back(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"mine\n"
    with pytest.raises(KVPlugError, match=f"process {owner.pid} on "):
        OwnedFolder(str(tmp_path), owns=True)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    OwnedFolder(str(tmp_path), owns=True).close()


def test_what_is_forgotten_without_being_closed_is_given_back(tmp_path: Path) -> None:
    folder = OwnedFolder(str(tmp_path), owns=True)
    del folder
    OwnedFolder(str(tmp_path), owns=True).close()


def test_a_lock_that_is_no_file_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("keep")
    folder = tmp_path / "segments"
    folder.mkdir()
    (folder / ".kvplug.lock").symlink_to(outside)
    with pytest.raises(KVPlugError, match=r"cannot be locked .*Fix:"):
        OwnedFolder(str(folder), owns=True)
    assert outside.read_text() == "keep"


def test_data_parallel_ranks_have_folders_of_their_own() -> None:
    found = [engine_folder("/store", rank) for rank in range(3)]
    assert found == ["/store", "/store/data-parallel-1", "/store/data-parallel-2"]
    assert engine_folder("", 2) == ""


def test_files_of_all_ranks_are_removed_and_no_others(tmp_path: Path) -> None:
    gone, stays = "0" * 32, "1" * 32
    for name in (gone, stays):
        for rank in range(2):
            (tmp_path / file_name(name, rank, 2)).write_bytes(b"x")
    assert remove_files(str(tmp_path), [gone, "2" * 32], 2)
    assert sorted(p.name[:1] for p in tmp_path.iterdir()) == ["1", "1"]
    (tmp_path / file_name(gone, 0, 2)).mkdir()
    assert not remove_files(str(tmp_path), [gone], 2)
