"""A segment's file: what was written is read, and everything else is refused with its cause."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvplug.contract.reuse import Fingerprint
from kvplug.reuse import file as module
from kvplug.reuse.file import (
    CAUSES,
    BadSegment,
    Plane,
    SegmentHeader,
    digest,
    file_name,
    parse_name,
    read_header,
    read_segment,
    segment_id,
    write_segment,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8]


def fingerprint(tokens: Any, context: Any, **changes: Any) -> Fingerprint:
    base = Fingerprint(
        model="llama/0123",
        tokenizer="t@1",
        lora="",
        dtype="bfloat16",
        format="",
        position="rope/neox/ab12",
        geometry=(2, 3, 8),
        tenant="s\u00e4lt\0\u2028",
        mask="causal",
        start=len(context),
        length=len(tokens),
        context=digest(context),
        tokens=digest(tokens),
        created=1234567890.1234567,
        request_id="req-1",
        ancestry=2,
        measures={"k_drift": 0.1, "outgoing": 1 / 3, "tiny": 5e-324, "sparsity": -0.0},
    )
    return replace(base, **changes)


def made(
    tokens: int = 20, context: int = 7, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[SegmentHeader, dict[str, Tensor]]:
    source = np.random.default_rng(5)
    own = source.integers(0, 1 << 31, tokens).astype(np.int32)
    before = source.integers(-(1 << 31), 1 << 31, context).astype(np.int32)
    shape = (2, tokens, 3, 8)
    raw = torch.from_numpy(source.integers(0, 256, (2, math.prod(shape) * 4), dtype=np.uint8))
    size = math.prod(shape) * dtype.itemsize
    planes = {
        name: raw[i, :size].clone().view(dtype).view(shape)
        for i, name in enumerate(("key", "value"))
    }
    stated = {"dtype": str(dtype).removeprefix("torch."), **changes}
    known = fingerprint(own, before, **stated)
    return SegmentHeader.of(segment_id(known), known, own, before, planes), planes


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


@pytest.fixture
def written(tmp_path: Path) -> Path:
    header, planes = made()
    path = tmp_path / file_name(header.id, 0, 1)
    write_segment(path, header, planes)
    return path


def refused(path: Path) -> str:
    """Why both ways of reading refuse a file; empty where reading the header does not."""
    with pytest.raises(BadSegment) as whole:
        read_segment(path)
    assert whole.value.cause in CAUSES
    assert str(path) in str(whole.value) and whole.value.cause in str(whole.value)
    try:
        read_header(path)
    except BadSegment as error:
        assert error.cause == whole.value.cause
    else:
        assert whole.value.cause in ("bad checksum", "unreadable")
    return whole.value.cause


# -- There and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [0, 7])
def test_what_is_written_is_read_bit_for_bit(
    dtype: torch.dtype, context: int, tmp_path: Path
) -> None:
    header, planes = made(context=context, dtype=dtype)
    path = tmp_path / "x"
    assert write_segment(path, header, planes) == path.stat().st_size
    for found in (read_header(path), read_segment(path)[0]):
        for name in ("id", "fingerprint", "planes", "rank", "world", "size", "session"):
            assert getattr(found, name) == getattr(header, name)
        for name in ("token_ids", "context_ids"):
            mine, theirs = getattr(header, name), getattr(found, name)
            assert theirs.dtype == np.int32 and np.array_equal(mine, theirs)
    back = read_segment(path)[1]
    assert list(back) == ["key", "value"]
    for name, tensor in planes.items():
        assert back[name].dtype == dtype and back[name].shape == tensor.shape
        assert bits(back[name]) == bits(tensor)
        assert back[name].is_contiguous()
        back[name].zero_()


def test_a_tensor_of_any_strides_is_written_as_its_elements_stand(tmp_path: Path) -> None:
    header, planes = made()
    strided = {name: t.transpose(0, 2).contiguous().transpose(0, 2) for name, t in planes.items()}
    assert not strided["key"].is_contiguous()
    write_segment(tmp_path / "x", header, strided)
    assert bits(read_segment(tmp_path / "x")[1]["key"]) == bits(planes["key"])


def test_cells_of_a_format(tmp_path: Path) -> None:
    known, _ = made(format="int4")
    cells = {"cells": torch.arange(2 * 20 * 3 * 36).view(2, 20, 3, 36).to(torch.uint8)}
    header = SegmentHeader.of(
        known.id, known.fingerprint, known.token_ids, known.context_ids, cells, 1, 2, "chat 7"
    )
    assert header.planes == (Plane("cells", "uint8", (2, 20, 3, 36)),)
    write_segment(tmp_path / "x", header, cells)
    found, planes = read_segment(tmp_path / "x")
    assert (found.rank, found.world, found.session, found.size) == (1, 2, "chat 7", 4320)
    assert torch.equal(planes["cells"], cells["cells"])


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=40),
    st.text(max_size=40),
    st.floats(-1e17, 1e17),
    st.integers(0, 1 << 31),
    st.dictionaries(st.text(max_size=20), st.floats(allow_nan=False), max_size=5),
)
def test_a_fingerprint_comes_back_as_it_was(
    tmp_path_factory: Any,
    tenant: str,
    mask: str,
    created: float,
    ancestry: int,
    measures: dict[str, float],
) -> None:
    try:
        (tenant + mask + "".join(measures)).encode()
    except UnicodeEncodeError:
        return
    header, planes = made(
        4, 2, tenant=tenant, mask=mask, created=created, ancestry=ancestry, measures=measures
    )
    path = tmp_path_factory.mktemp("there") / "x"
    write_segment(path, header, planes)
    found = read_header(path).fingerprint
    assert found == header.fingerprint
    assert isinstance(found.context, bytes) and isinstance(found.geometry, tuple)
    assert [str(v) for v in found.measures.values()] == [str(v) for v in measures.values()]


def test_a_measure_nobody_could_take_comes_back_as_none_was(tmp_path: Path) -> None:
    header, planes = made(measures={"outgoing": math.nan})
    write_segment(tmp_path / "x", header, planes)
    assert math.isnan(read_header(tmp_path / "x").fingerprint.measures["outgoing"])


def test_only_the_owner_may_read_a_file_and_no_other_is_left(written: Path) -> None:
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert list(written.parent.iterdir()) == [written]


def test_writing_again_replaces_the_file_whole(written: Path) -> None:
    header, planes = made()
    header = replace(header, session="later")
    write_segment(written, header, planes)
    assert read_segment(written)[0].session == "later"
    assert list(written.parent.iterdir()) == [written]


def test_a_full_disk_leaves_nothing_and_the_earlier_file_as_it_was(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    header, planes = made()
    with pytest.raises(OSError, match="No space"):
        write_segment(written, replace(header, session="new"), planes)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    header, planes = made()
    wrong: list[tuple[SegmentHeader, dict[str, Tensor]]] = [
        (header, {"key": planes["key"]}),
        (header, {"key": planes["key"], "value": planes["value"].float()}),
        (replace(header, size=header.size + 1), planes),
        (replace(header, id="../../etc/passwd"), planes),
        (replace(header, rank=1), planes),
        (replace(header, token_ids=header.token_ids[1:]), planes),
        (replace(header, fingerprint=replace(header.fingerprint, created=math.inf)), planes),
        (replace(header, fingerprint=replace(header.fingerprint, tenant="x" * 5000)), planes),
        (header, {n: t.to(torch.float64) for n, t in planes.items()}),
    ]
    for bad, tensors in wrong:
        with pytest.raises(ValueError):
            write_segment(tmp_path / "x", bad, tensors)
    assert list(tmp_path.iterdir()) == []


# -- Names -----------------------------------------------------------------------------------------


def test_names_come_from_hexadecimal_ids_alone() -> None:
    name = "0123456789abcdef" * 2
    assert file_name(name, 1, 4) == f"{name}.1-4.kvseg"
    assert parse_name(file_name(name, 1, 4)) == (name, 1, 4)
    for bad in ("", "../" + name[3:], name.upper(), name + "\n", name[1:], "/" + name[1:]):
        with pytest.raises(ValueError, match="not a segment id"):
            file_name(bad, 0, 1)
    for rank, world in ((1, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="rank must be below world"):
            file_name(name, rank, world)
    for bad in (
        f"{name}.4-4.kvseg",
        f"{name}.01-4.kvseg",
        f"{name}.1-4.kvseg.tmp",
        f"x{name}.1-4.kvseg",
        f"{name}.1-4.kvseg\n",
        f"{name}.\u0661-4.kvseg",
        "kvseg",
    ):
        assert parse_name(bad) is None


def test_an_id_depends_on_what_the_bytes_depend_on_and_on_nothing_else() -> None:
    header, _ = made()
    known = header.fingerprint
    same = replace(known, created=0.0, request_id="z", ancestry=0, measures={})
    assert segment_id(same) == segment_id(known) == header.id
    others = {
        segment_id(replace(known, **change))
        for change in (
            {"model": "m"},
            {"tokenizer": "u"},
            {"lora": "l"},
            {"dtype": "float16"},
            {"format": "int8"},
            {"position": "rope/neox/ab13"},
            {"geometry": (2, 3, 9)},
            {"tenant": ""},
            {"mask": "window:8"},
            {"start": 8},
            {"length": 21},
            {"context": bytes(16)},
            {"tokens": bytes(16)},
        )
    }
    assert len(others - {header.id}) == 13


# -- Damage ----------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_refused(written: Path) -> None:
    """Every byte of everything before the planes, and of the planes a sample."""
    whole = written.read_bytes()
    planes = made()[0].size
    begin = len(whole) - 16 - planes
    places = [
        *range(begin),
        *range(begin, len(whole) - 16, 61),
        *range(len(whole) - 17, len(whole)),
    ]
    causes: dict[str, set[int]] = {}
    for place in places:
        for bit in (0, 7) if place < 32 else (place % 8,):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            written.write_bytes(broken)
            causes.setdefault(refused(written), set()).add(place)
    assert causes["not a segment file"] == set(range(8))
    assert causes["other version"] == set(range(8, 12))
    assert causes["bad header"] | causes["truncated"] <= set(range(12, 16))
    assert causes["bad checksum"] >= set(range(16, begin)) | {begin, len(whole) - 1}
    assert set().union(*causes.values()) == set(places)


def test_a_truncated_file_is_refused_at_every_length(written: Path) -> None:
    whole = written.read_bytes()
    begin = len(whole) - 16 - made()[0].size
    for length in [
        *range(begin + 2),
        *range(begin, len(whole), 53),
        *range(len(whole) - 17, len(whole)),
    ]:
        written.write_bytes(whole[:length])
        assert refused(written) == "truncated", length


def test_a_longer_file_is_refused(written: Path) -> None:
    written.write_bytes(written.read_bytes() + b"\0")
    assert refused(written) == "bad header"


def test_a_hole_in_the_file_is_refused(written: Path) -> None:
    """As a crash leaves it where a file system had the length before the bytes."""
    whole = written.read_bytes()
    written.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    assert refused(written) == "bad checksum"


def test_the_planes_of_another_file_are_refused(tmp_path: Path) -> None:
    paths = []
    for n, tenant in enumerate(("me", "them")):
        header, planes = made(tenant=tenant)
        paths.append(tmp_path / str(n))
        write_segment(paths[-1], header, {name: t + n for name, t in planes.items()})
    mine, theirs = (path.read_bytes() for path in paths)
    tail = made()[0].size + 16
    paths[0].write_bytes(mine[:-tail] + theirs[-tail:])
    assert refused(paths[0]) == "bad checksum"


def test_another_version_is_refused_before_its_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(module.MAGIC + struct.pack("<II", 2, 5) + bytes(16) + b"hello")
    assert refused(path) == "other version"


@pytest.mark.parametrize("size", [(64 << 20) + 1, (1 << 32) - 1])
def test_a_huge_header_is_refused_and_not_allocated(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(module.MAGIC + struct.pack("<II", 1, size) + bytes(16) + b"{}")
    assert refused(path) == "bad header"


def test_what_is_no_regular_file_is_refused(tmp_path: Path, written: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(written)
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path):
        assert refused(path) == "not a segment file"
    assert refused(tmp_path / "nowhere") == "missing"
    text = tmp_path / "text"
    text.write_text("a text\n" * 50)
    assert refused(text) == "not a segment file"


def test_a_file_that_cannot_be_read_is_refused(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*arguments: Any, **options: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "open", denied)
    assert refused(written) == "unreadable"


def test_a_disk_that_fails_while_reading_is_refused(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "_bytes", broken)
    with pytest.raises(BadSegment) as error:
        read_segment(written)
    assert error.value.cause == "unreadable"


def test_a_refusal_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadSegment("a/b", "truncated", "5 of 6 bytes")))
    assert (error.cause, str(error)) == ("truncated", "a/b: truncated: 5 of 6 bytes")


# -- Headers with right checksums that say what they must not --------------------------------------


def resealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a file's header, all checksums made right again."""
    whole = path.read_bytes()
    size = struct.unpack_from("<I", whole, 12)[0]
    facts = json.loads(whole[32 : 32 + size])
    other = change(facts)
    text = other if isinstance(other, bytes) else json.dumps(facts).encode()
    start = module.MAGIC + struct.pack("<II", 1, len(text))
    head = xxhash.xxh3_128(start + text).digest()
    body = whole[32 + size : -16]
    tail = xxhash.xxh3_128(head + body).digest()
    path.write_bytes(start + head + text + body + tail)


def test_resealing_alone_changes_nothing(written: Path) -> None:
    resealed(written, lambda facts: None)
    assert read_segment(written)[0].fingerprint == made()[0].fingerprint


JUNK: list[Any] = [None, True, -1, 1.5, 1 << 80, "x", [], {}, [[]], {"a": 1}, math.nan]
TOP = ("id", "fingerprint", "token_ids", "context_ids", "planes", "rank", "world", "size")


@pytest.mark.parametrize("key", [*TOP, "session"])
def test_a_field_of_another_type_is_a_bad_header(key: str, written: Path) -> None:
    whole = written.read_bytes()
    fine = {"session": ["x"]}.get(key, [])
    for junk in JUNK:
        if junk in fine:
            continue
        written.write_bytes(whole)
        resealed(written, lambda facts, junk=junk: facts.update({key: junk}))
        assert refused(written) == "bad header", junk


@pytest.mark.parametrize("key", sorted(Fingerprint.__dataclass_fields__))
def test_a_field_of_the_fingerprint_of_another_type_is_a_bad_header(
    key: str, written: Path
) -> None:
    whole = written.read_bytes()
    words = ("model", "tokenizer", "lora", "dtype", "format", "position", "tenant", "mask")
    fine: list[Any] = []
    if key in (*words, "request_id"):
        fine = ["x"]
    elif key == "created":
        fine = [-1, 1.5]
    elif key == "measures":
        fine = [{}]
    for junk in JUNK:
        if any(junk is f or (type(junk) is type(f) and junk == f) for f in fine):
            continue
        written.write_bytes(whole)
        resealed(written, lambda facts, junk=junk: facts["fingerprint"].update({key: junk}))
        assert refused(written) == "bad header", junk


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts.pop(key) and None


@pytest.mark.parametrize(
    "change",
    [
        lambda f: b"",
        lambda f: b"[]",
        lambda f: b"null",
        lambda f: b"\xff\xfe",
        lambda f: b"[" * 100_000,
        lambda f: b'{"id":' * 50_000,
        lambda f: b"1" * 100_000,
        lambda f: json.dumps(f).encode()[:-1],
        lambda f: f.update(more=1),
        drop("session"),
        lambda f: f["fingerprint"].update(more=1),
        lambda f: f["fingerprint"].pop("mask") and None,
        lambda f: f.update(id=f["id"].upper().replace("0", "A")),
        lambda f: f.update(id=f["id"] + "\n"),
        lambda f: f["planes"].append(["key", "uint8", [1]]),
        lambda f: f["planes"][0].__setitem__(0, "../key"),
        lambda f: f["planes"][0].__setitem__(1, "float64"),
        lambda f: f["planes"][0].__setitem__(1, "object"),
        lambda f: f["planes"][0].__setitem__(2, [1 << 30, 1 << 30, 1 << 30]),
        lambda f: f["planes"][0].__setitem__(2, [-2, 20, -3, 8]),
        lambda f: f["planes"][0].__setitem__(2, [0]),
        lambda f: f["planes"][0].__setitem__(2, [1] * 9),
        lambda f: f["planes"][0].__setitem__(2, [2, 20, 3, True]),
        lambda f: f.update(planes=f["planes"] * 20),
        lambda f: f.update(rank=1),
        lambda f: f.update(world=0),
        lambda f: f.update(size=f["size"] - 1),
        lambda f: f.update(token_ids=f["token_ids"][:-8]),
        lambda f: f.update(token_ids=f["context_ids"]),
        lambda f: f.update(token_ids="AAA="),
        lambda f: f.update(token_ids="!" + f["token_ids"]),
        lambda f: f.update(context_ids=""),
        lambda f: f["fingerprint"].update(length=19),
        lambda f: f["fingerprint"].update(start=8),
        lambda f: f["fingerprint"].update(tokens="0" * 32),
        lambda f: f["fingerprint"].update(context="g" * 32),
        lambda f: f["fingerprint"].update(geometry=[2, 3, 0]),
        lambda f: f["fingerprint"].update(geometry=[2, 3]),
        lambda f: f["fingerprint"].update(tenant="x" * 4097),
        lambda f: f["fingerprint"].update(measures={"a": 1}),
        lambda f: f["fingerprint"].update(measures={str(n): 0.5 for n in range(65)}),
        lambda f: f["fingerprint"].update(created=math.inf),
    ],
)
def test_a_header_that_does_not_agree_with_itself_is_bad(change: Any, written: Path) -> None:
    resealed(written, change)
    assert refused(written) == "bad header"


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "x"
    path.write_bytes(pickle.dumps(Trap()))
    assert refused(path) == "not a segment file"
    torch.save({"key": torch.zeros(3)}, path)
    assert refused(path) == "not a segment file"
    assert not (tmp_path / "sprung").exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_refused_and_nothing_else_happens(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x"
    header, planes = made(3, 1)
    write_segment(path, header, planes)
    whole = path.read_bytes()
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    broken = whole[:begin] + data.draw(st.binary(max_size=40)) + whole[end:]
    path.write_bytes(broken)
    if broken == whole:
        assert read_segment(path)[0].id == header.id
    else:
        refused(path)
