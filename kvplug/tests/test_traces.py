"""Reading traces: both formats, and every way a file can be wrong."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracegen import conversations

from kvplug.hosts.trace import traces
from kvplug.hosts.trace.traces import TraceError

GOOD: dict[str, Any] = {
    "off": np.array([0, 3, 5, 5]),
    "ids": np.array([0, 1, 2, 0, 3], dtype=np.int32),
    "t": np.array([0.5, 1.5, 2.0]),
    "inp": np.array([50, 33, 4]),
    "outp": np.array([7, 8, 9]),
    "sess": np.array([4, 5, 4], dtype=np.int32),
    "bs": np.int64(16),
    "nblk": np.int64(4),
}


def saved(folder: Path, **changes: Any) -> Path:
    """A trace with arrays replaced; None leaves one out."""
    path = folder / "made.npz"
    arrays = {k: v for k, v in (GOOD | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


def test_an_npz_is_read(tmp_path: Path) -> None:
    trace = traces.read(saved(tmp_path, extra=np.zeros(3)))
    assert trace.name == "made"
    assert trace.off.tolist() == [0, 3, 5, 5] and trace.ids.tolist() == [0, 1, 2, 0, 3]
    assert trace.arrival.tolist() == [0.5, 1.5, 2.0]
    assert trace.prompt_tokens.tolist() == [50, 33, 4]
    assert trace.output_tokens.tolist() == [7, 8, 9]
    assert trace.session.tolist() == [4, 5, 4]
    assert (trace.block_size, trace.num_distinct) == (16, 4)
    assert (trace.num_requests, trace.num_references, trace.names_sessions) == (3, 5, True)
    assert trace.positions().tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_read(tmp_path: Path, seed: int) -> None:
    made = conversations(seed)
    traces.write(tmp_path / "made.npz", made)
    again = traces.read(tmp_path / "made.npz")
    for name in ("off", "ids", "arrival", "prompt_tokens", "output_tokens", "session"):
        assert np.array_equal(getattr(again, name), getattr(made, name)), name
    assert (again.block_size, again.num_distinct) == (made.block_size, made.num_distinct)
    with np.load(tmp_path / "made.npz") as stored:
        assert {k: str(stored[k].dtype) for k in stored.files} == {
            "off": "int64",
            "ids": "int32",
            "t": "float64",
            "inp": "int64",
            "outp": "int64",
            "sess": "int32",
            "bs": "int64",
            "nblk": "int64",
        }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"t": None, "nblk": None}, "lacks the arrays t, nblk"),
        ({"ids": np.zeros((2, 2), dtype=np.int32)}, r"ids has shape \(2, 2\), expected \(N,\)"),
        ({"bs": np.array([16])}, r"bs has shape \(1,\), expected \(\)"),
        ({"ids": np.zeros(5)}, "ids has dtype float64, expected integers"),
        ({"inp": np.array(["a", "b", "c"])}, "inp has dtype <U1, expected integers"),
        ({"t": np.zeros(2)}, "t has 2 entries, but off has 3 requests"),
        ({"off": np.array([0])}, "it has no requests"),
        ({"off": np.array([0, 3, 2, 5])}, "off must rise from 0 to the 5 entries"),
        ({"off": np.array([1, 3, 5, 5])}, "off must rise from 0 to the 5 entries"),
        ({"off": np.array([0, 3, 5, 6])}, "off must rise from 0 to the 5 entries"),
        ({"ids": np.array([0, 1, 2, 0, 4])}, "ids run from 0 to 4, outside the 4 distinct"),
        ({"ids": np.array([0, 1, 2, 0, -3])}, "ids run from -3 to 2"),
        ({"nblk": np.int64(1 << 50)}, "distinct blocks, for 5 references"),
        ({"ids": np.array([0, 1, 0, 0, 3])}, "request 0 names block 0 twice"),
        ({"bs": np.int64(0)}, "bs must be at least 1 token per block, not 0"),
        ({"bs": np.int64(512)}, "request 0 has 3 blocks of 512 tokens, and 57 tokens of prompt"),
        ({"inp": np.array([50, 1, 4])}, "request 1 has 2 blocks of 16 tokens, and 9 tokens of"),
        ({"t": np.array([0, np.nan, 1])}, "arrival times must be finite"),
        ({"outp": np.array([1, -2, 3])}, "numbers of tokens must not be negative"),
        ({"off": np.zeros(4, dtype=int), "ids": np.zeros(0, dtype=int)}, "references a block"),
    ],
)
def test_a_wrong_npz_is_refused_by_name(tmp_path: Path, changes: Any, says: str) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(TraceError, match=says) as refused:
        traces.read(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert refused.value.exit_code == 2


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (tmp_path / "exploded").touch, ()

    path = saved(tmp_path, sess=np.array([Bomb()] * 3, dtype=object))
    with pytest.raises(TraceError, match=r"not a readable \.npz"):
        traces.read(path)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TraceError, match="is no trace"):
        traces.read(tmp_path / "b.npz")
    assert not (tmp_path / "exploded").exists()


def test_any_cut_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(TraceError):
            traces.read(path)


def test_any_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = bytearray(path.read_bytes())
    refused = 0
    for at in range(0, len(whole), 13):
        whole[at] ^= 0xFF
        path.write_bytes(whole)
        whole[at] ^= 0xFF
        try:
            traces.read(path)
        except TraceError:
            refused += 1
    assert refused > 10


def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "MAX_BYTES", 100)
    with pytest.raises(TraceError, match="unpacks to"):
        traces.read(saved(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.npz", "cannot be read: No such file"),
        ("a.csv", r"neither an \.npz nor a \.jsonl"),
        ("empty.npz", r"neither an \.npz nor a \.jsonl"),
        ("pipe.npz", "is a named pipe, not a regular file"),
        ("zero.npz", "is a device, not a regular file"),
        (".", "is a folder, not a regular file"),
    ],
)
def test_no_trace(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "a.csv").write_text("Timestamp,Model,Request tokens\n")
    (tmp_path / "empty.npz").touch()
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    with pytest.raises(TraceError, match=says):
        traces.read(tmp_path / name)


def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    file = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (npy((1 << 40,)), r"states the shape \(1099511627776,\) of other data"),
        (npy((0, 1 << 62), b"12345678"), "of other data"),
        (b"\x93NUMPY\x01\x00" + b"\xff\xff" + b" " * 65535, r"not a readable \.npz"),
        (b"\x93NUMPY\x09\x00", "version"),
    ],
)
def test_an_array_that_states_more_than_it_holds(tmp_path: Path, member: bytes, says: str) -> None:
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, "ids.npy": member}.items():
            archive.writestr(name, data)
    with pytest.raises(TraceError, match=says):
        traces.read(path)


def test_a_file_of_too_many_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for i in range(traces.MAX_MEMBERS + 1):
            archive.writestr(str(i), b"")
    with pytest.raises(TraceError, match="holds 257 arrays"):
        traces.read(tmp_path / "x.npz")


# -- Mooncake --------------------------------------------------------------------------------------

LINE: dict[str, Any] = {
    "timestamp": 27482,
    "input_length": 1100,
    "output_length": 52,
    "hash_ids": [46, 47, 2353],
}


def lines(folder: Path, *rows: Any) -> Path:
    path = folder / "mooncake.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_a_jsonl_is_read(tmp_path: Path) -> None:
    other = LINE | {"timestamp": 30000, "hash_ids": [46, 47, 9], "output_length": 1}
    trace = traces.read(
        lines(tmp_path, LINE, "", other, LINE | {"input_length": 4, "hash_ids": []})
    )
    assert trace.off.tolist() == [0, 3, 6, 6]
    first, second = trace.ids[:3].tolist(), trace.ids[3:].tolist()
    assert first[:2] == second[:2] and first[2] != second[2]
    assert set(first + second) == set(range(4)) and trace.num_distinct == 4
    assert trace.arrival.tolist() == [27.482, 30.0, 27.482]
    assert trace.prompt_tokens.tolist() == [1100, 1100, 4]
    assert trace.output_tokens.tolist() == [52, 1, 52]
    assert (trace.block_size, trace.names_sessions, trace.name) == (512, False, "mooncake")
    assert traces.read(tmp_path / "mooncake.jsonl", 400).block_size == 400


@pytest.mark.parametrize("name", ["mooncake.jsonl", "mooncake.npz", "mooncake"])
def test_a_format_is_told_by_what_a_file_holds(tmp_path: Path, name: str) -> None:
    path = lines(tmp_path, LINE).rename(tmp_path / name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    assert traces.read(path).block_size == 512
    npz = saved(tmp_path).rename(tmp_path / "x.jsonl")
    assert traces.read(npz).block_size == 16


CHAT: dict[str, Any] = {
    "chat_id": 159,
    "parent_chat_id": -1,
    "timestamp": 61.114,
    "input_length": 40,
    "output_length": 32,
    "type": "text",
    "turn": 1,
    "hash_ids": [1, 2, 3],
}


def test_chats_have_seconds_sessions_and_small_blocks(tmp_path: Path) -> None:
    second = CHAT | {"chat_id": 160, "parent_chat_id": 159, "timestamp": 92.5}
    other = CHAT | {"chat_id": 170, "timestamp": 93.0, "hash_ids": [7, 8]}
    trace = traces.read(lines(tmp_path, CHAT, other, second))
    assert trace.arrival.tolist() == [61.114, 93.0, 92.5]
    assert trace.session.tolist() == [1, 2, 1]
    assert (trace.block_size, trace.names_sessions) == (16, True)
    with pytest.raises(TraceError, match="in some of the lines only"):
        traces.read(lines(tmp_path, CHAT, LINE | {"input_length": 40}))


def test_hashes_of_64_bits_are_told_apart_signed_or_not(tmp_path: Path) -> None:
    hashes = [(1 << 64) - 1, 1 << 63, 5]
    trace = traces.read(lines(tmp_path, LINE | {"hash_ids": hashes}))
    assert trace.num_distinct == 3
    signed = traces.read(lines(tmp_path, LINE | {"hash_ids": [-1, -(1 << 63), 5]}))
    assert signed.ids.tolist() == trace.ids.tolist()


@pytest.mark.parametrize(("tokens", "blocks"), [(20, 2), (1100, 1), (1100, 4), (0, 1), (600, 0)])
def test_blocks_that_a_prompt_does_not_fill(tmp_path: Path, tokens: int, blocks: int) -> None:
    row = LINE | {"input_length": tokens, "hash_ids": list(range(blocks))}
    told = f":1: input_length is {tokens} tokens, which do not make {blocks} blocks of 512"
    with pytest.raises(TraceError, match=told):
        traces.read(lines(tmp_path, row))


def test_bounds_of_a_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path, LINE, LINE)
    monkeypatch.setattr(traces, "MAX_REFERENCES", 5)
    with pytest.raises(TraceError, match=":2: refers to more than 5 blocks"):
        traces.read(path)
    monkeypatch.setattr(traces, "MAX_LINE", 50)
    with pytest.raises(TraceError, match=":1: is longer than"):
        traces.read(path)
    monkeypatch.setattr(traces, "MAX_FILE", 50)
    with pytest.raises(TraceError, match="at most 50 are read"):
        traces.read(path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([1], "is not a JSON object"),
        ('{"hash_ids": [1], "hash_ids": [2]}', "is not JSON: 'hash_ids' stands there twice"),
        (LINE | {"parent_chat_id": 3}, "chat_id is missing beside parent_chat_id"),
        (LINE | {"timestamp": "now"}, "timestamp is not a number"),
        (LINE | {"timestamp": True}, "timestamp is not a number"),
        (LINE | {"timestamp": float("nan")}, "timestamp is not a number"),
        (LINE | {"input_length": -1}, "input_length is not a number of tokens"),
        (LINE | {"output_length": 1.5}, "output_length is not a number of tokens"),
        (LINE | {"hash_ids": None}, "hash_ids is not a list of integers"),
        (LINE | {"hash_ids": [1, "2"]}, "hash_ids is not a list of integers"),
        ({}, "timestamp is not a number"),
    ],
)
def test_a_wrong_line_is_refused_by_number(tmp_path: Path, row: Any, says: str) -> None:
    path = lines(tmp_path, LINE, row)
    with pytest.raises(TraceError, match=says) as refused:
        traces.read(path)
    assert str(refused.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "has no requests"),
        ([LINE | {"hash_ids": [1, 1], "input_length": 1024}], "request 0 names block 0 twice"),
        ([LINE | {"hash_ids": [1 << 70, 1, 2]}], "must fit in 64 bits"),
        ([LINE | {"hash_ids": [-(1 << 64), 1, 2]}], "must fit in 64 bits"),
        ([LINE | {"hash_ids": [], "input_length": 4}], "references a block"),
    ],
)
def test_a_wrong_jsonl_is_refused(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        traces.read(lines(tmp_path, *rows))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"\xff\xfe\x00{')
    with pytest.raises(TraceError, match="is not JSON"):
        traces.read(tmp_path / "x.jsonl")


# -- capacities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "blocks"),
    [("7", 7), (" 7 ", 7), ("1%", 2), ("2.5%", 5), ("250%", 500), ("1_000", 1000)],
)
def test_capacities(text: str, blocks: int) -> None:
    trace = conversations(0)
    object.__setattr__(trace, "num_distinct", 200)
    assert trace.capacity(text) == blocks


@pytest.mark.parametrize("text", ["", "x", "1.5", "0", "-3", "0%", "nan%", "inf%", "%", "9" * 12])
def test_no_capacities(text: str) -> None:
    with pytest.raises(ValueError, match="capacity"):
        conversations(0).capacity(text)
