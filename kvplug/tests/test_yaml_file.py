"""YAML from others: read with lines, or refused in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvplug.errors import DeploymentError
from kvplug.yaml_file import MAX_BYTES, MAX_DEPTH, MAX_VALUES, read_yaml


def refused(folder: Path, text: str | bytes) -> str:
    file = folder / "x.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DeploymentError) as caught:
        read_yaml(file)
    return str(caught.value).removeprefix(str(file))


def aliases(levels: int, each: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * each)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (aliases(10, 10), ":6: YAML: has more than 50,000 values. Fix: write less, or less often."),
        (aliases(80, 1), ":64: YAML: nested more than 64 deep. Fix: nest less."),
        ("a: &a {b: *a}\n", ":1: YAML: anchor 'a' contains itself. Fix: remove the alias."),
        ("a: " + "[" * 100 + "]" * 100, ":1: YAML: nested more than 64 deep."),
        ("[" * 100_000, ":1: YAML: nested more than 64 deep."),
        ("a: " + "9" * 5000, ":1: YAML: has a number of 5,000 characters. Fix: write it shorter."),
        ("a: " + "1:" * 3000 + "1", ":1: YAML: has a number of 6,001 characters."),
        ("a: !!int '" + "9" * 5000 + "'", ":1: YAML: has a number of 5,000 characters."),
        ("a: 1\n'a': 2\n", ":2: YAML: duplicate key 'a'."),
        ("{1: a, '1': b}", ":1: YAML: duplicate key '1'."),
        ("{true: a, 'true': b}", ":1: YAML: duplicate key 'true'."),
        ("{null: a, 'null': b}", ":1: YAML: duplicate key 'null'."),
        (f"- {'x' * MAX_BYTES}", f": file: has {MAX_BYTES + 2:,} bytes; at most 262,144 are read."),
        (b"a: \xff\n", ": file: cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("a: !!python/object/apply:os.getcwd []", ":1: YAML: could not determine a constructor"),
        ("a: 2001-99-99", ": YAML: month must be in 1..12."),
        ("*a", ":1: YAML: found undefined alias 'a'."),
        ("a: 1\n---\nb: 2\n", ":2: YAML: but found another document."),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str | bytes, told: str) -> None:
    assert refused(tmp_path, text).startswith(told)


def test_what_just_fits_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("[" * MAX_DEPTH + "]" * MAX_DEPTH, encoding="utf-8")
    assert read_yaml(file)[1].keys() >= {"[0]", "[0][0]"}
    count = MAX_VALUES - 8
    file.write_text(f"a: &a [{', '.join(['1'] * (count // 4))}]\nb: [*a, *a, *a]\n", "utf-8")
    data, lines = read_yaml(file)
    assert len(data["b"]) == 3 and lines["b"] == 2


def test_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfa:\r\n  b: 1\r\nc: &x {d: 1}\r\ne: {<<: *x, d: 2}\r\n")
    data, lines = read_yaml(file)
    assert data == {"a": {"b": 1}, "c": {"d": 1}, "e": {"d": 2}}
    assert (lines["a.b"], lines["c.d"], lines["e.d"]) == (2, 3, 4)
