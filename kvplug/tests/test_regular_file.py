"""What is opened of what somebody else may have put there."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import pytest

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, open_regular, read_regular


def refused(path: str | Path, max_bytes: int = 100) -> str:
    with pytest.raises(UnreadableFile) as caught:
        read_regular(path, max_bytes)
    assert isinstance(caught.value, KVPlugError) and isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.problem) == (caught.value.path, caught.value.problem)
    assert str(caught.value) == f"{path}: {caught.value.problem}"
    return caught.value.problem


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_regular(tmp_path / "b", 100) == b"x" * 100
    assert refused(tmp_path / "b", 99) == "has 100 bytes; at most 99 are read"


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert refused(tmp_path / "s") == "is a socket, not a regular file"
    assert refused(tmp_path / "pipe") == "is a named pipe, not a regular file"
    assert refused(tmp_path / "link") == "is a named pipe, not a regular file"
    assert refused("/dev/zero") == "is a device, not a regular file"
    assert refused(tmp_path) == "is a folder, not a regular file"
    assert refused(tmp_path / "none") == "cannot be read: No such file or directory"
    assert refused(tmp_path / "loop").startswith("cannot be read: Too many levels")
    assert refused("a\0b").startswith("cannot be read: ")
    assert refused("a" * 5000) == "cannot be read: File name too long"


def test_a_file_that_states_no_size_is_bounded_as_it_is_read() -> None:
    with open_regular("/proc/self/status", 100) as file:  # of size 0 to `stat`
        assert file.read(4) == b"Name"
    assert refused("/proc/self/status") == "has 101 bytes; at most 100 are read"
