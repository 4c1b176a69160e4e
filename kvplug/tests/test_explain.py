"""`kvplug explain`: what a log says of a request, a block and all misses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from kvplug.cli import app
from kvplug.contract import Kind
from kvplug.observe.events import Event, EventType
from kvplug.observe.log import line_of, rotated
from kvplug.observe.misses import MAX_BLOCKS, MIN_BLOCKS, MissCause
from kvplug.observe.story import BadLog, block_story, miss_table, request_story

A, B = "aaaaaaaa00000001", "bbbbbbbb00000002"


def line(what: EventType, at: float = 1000.0, step: int = 1, **more: Any) -> bytes:
    kind = Kind.PREFIX_CACHE if what is EventType.EVICTED else None
    fields: dict[str, Any] = {
        "count": 1,
        "detail": "",
        "request": "",
        "blocks": (),
        "facts": {},
        "policy": "",
    }
    return line_of(Event(what, kind, step=step, **(fields | more)), at)


STORY = [
    line(EventType.EVICTED, 999.0, 3, count=2, request="r2-x", blocks=(A, B), policy="foresight"),
    line(EventType.ADMITTED, 1000.0, 5, count=9, request="r1-y", facts={"hit": 4, "missed": 5}),
    line(
        EventType.MISSED,
        1000.0,
        5,
        count=5,
        request="r1-y",
        blocks=(A,),
        detail="block 4: evicted 1.0 s before, in step 3, by foresight",
        facts={"causes": {"evicted": 2, "never_seen": 3}, "block": 4, "token": 70},
    ),
    line(EventType.THRASHED, 1000.0, 5, count=2, request="r1-y"),
    line(EventType.PREEMPTED, 1001.0, 8, request="r1-y"),
    line(EventType.AGAIN, 1001.5, 9, count=3, request="r1-y", detail="preempted"),
    line(EventType.ENDED, 1002.25, 12, count=16, request="r1-y", detail="length"),
]


START = b'{"v":1,"t":990.0,"event":"log","kvplug":"0.1.0","block_size":16,"pool_blocks":40}\n'


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    path.write_bytes(START + b"".join(STORY))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["explain", *(str(a) for a in arguments)])


def test_a_request_s_story(log: Path) -> None:
    done = run(log, "--request", "r1")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "request r1-y, from 1970-01-01 00:16:40 UTC",
        "   +0.000 s  step 5      admitted: 9 blocks of prompt: 4 cached, 5 to compute",
        "   +0.000 s  step 5      missed 5 blocks: 3 never_seen, 2 evicted; first: block 4: "
        "evicted 1.0 s before, in step 3, by foresight",
        "                        1 block evicted for request r2-x in step 3, by foresight",
        "   +0.000 s  step 5      2 blocks of these had been evicted within one pool of evictions",
        "   +1.000 s  step 8      preempted: its blocks went to other requests",
        "   +1.500 s  step 9      admitted again (preempted): 3 blocks to compute again",
        "   +2.250 s  step 12     ended (length) after 16 tokens",
    ]


def test_a_block_s_story(log: Path) -> None:
    done = run(log, "--block", A[:8])
    assert done.exit_code == 0, done.output
    assert "evicted 2 blocks to make room for it by foresight" in done.stdout
    assert "missed 5 blocks" in done.stdout and len(done.stdout.splitlines()) == 3
    assert json.loads(run(log, "--block", B, "--json").stdout)["of"] == B


def test_all_misses(log: Path) -> None:
    done = run(log)
    assert done.exit_code == 0, done.output
    assert "1 requests, 9 full blocks of prompts" in done.stdout
    assert "token 70: 1 requests" in done.stdout
    data = json.loads(run(log, "--misses", "--json").stdout)
    assert data["causes"] == {"never_seen": 3, "evicted": 2} and data["thrashed"] == 2
    assert data["blocks"] == {"hit": 4, "missed": 5} and data["ignored"] == 0


def test_the_older_file_comes_first(log: Path) -> None:
    rotated(log).write_bytes(b"".join(STORY[:2]))
    log.write_bytes(b"".join(STORY[2:]))
    assert [entry.event for entry in request_story(log, "r1-y").entries][:2] == [
        EventType.ADMITTED,
        EventType.MISSED,
    ]
    assert request_story(log, "r1").evicted_by[A].step == 3


def test_a_torn_last_line_is_no_fault_and_a_hostile_one_is_counted(log: Path) -> None:
    hostile = [
        b"\xff\xfe\n",
        b"[" * 5000 + b"\n",
        b"{}\n",
        b'{"v":2,"t":1,"event":"missed"}\n',
        b'{"v":1,"t":NaN,"event":"missed"}\n',
        b'{"v":1,"t":1,"event":"gone"}\n',
        b'{"v":1,"t":1,"event":"missed","request":["r1-y"]}\n',
        b'{"v":1,"t":1,"event":"missed","count":-1}\n',
        b'{"v":1,"t":1e300,"event":"missed"}\n',
        b'{"v":1,"t":1,"event":"missed","facts":[]}\n',
        b'"' + b"x" * (1 << 21) + b'"\n',
    ]
    log.write_bytes(b"".join(hostile) + b"".join(STORY) + STORY[0][:40])
    found = miss_table(log)
    assert found.ignored == len(hostile) and found.causes == {"never_seen": 3, "evicted": 2}
    done = run(log)
    assert f"{len(hostile)} lines are no events" in done.stderr


def test_names_in_a_log_are_plain_when_they_are_printed(log: Path) -> None:
    evil = "r9\x1b[31m\n"
    log.write_bytes(
        line(EventType.ENDED, request=evil, detail="a\x1b]0;b\x07", policy="[bold]x[/bold]")
    )
    done = run(log, "--request", "r9")
    assert done.exit_code == 0 and "\x1b" not in done.output and "\x07" not in done.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--request", "r3"], "has no request 'r3'"),
        (["--block", "xyz"], "is no hash of at least 6 digits"),
        (["--block", "cccccccc"], "says nothing of a block cccccccc"),
        (["--misses", "--block", A], "use one of --request, --block and --misses"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(
    log: Path, arguments: list[str], problem: str
) -> None:
    done = run(log, *arguments)
    assert done.exit_code == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1


def test_several_requests_are_named(log: Path) -> None:
    with log.open("ab") as file:
        file.write(line(EventType.ENDED, request="r1-z"))
    with pytest.raises(BadLog, match=r"2 requests begin with 'r1', e\.g\. 'r1-y', 'r1-z'"):
        request_story(log, "r1")
    assert len(request_story(log, "r1-z").entries) == 1


def test_another_file_is_refused_by_what_it_is(tmp_path: Path, log: Path) -> None:
    record = tmp_path / "reuse-r1.json"
    record.write_text(json.dumps({"version": 1, "fingerprint": "x", "pieces": [], "families": []}))
    done = run(record)
    assert done.exit_code == 2 and f"use `kvplug reuse explain {record}`" in done.stderr
    record.write_text("hello\n" * 3)
    assert "is no event log of kvplug" in run(record).stderr
    assert run(tmp_path).exit_code == run(tmp_path / "none").exit_code == 2


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(max_size=60) | st.sampled_from(STORY), max_size=12), st.randoms())
def test_bytes_of_any_kind_are_read(tmp_path: Path, parts: list[bytes], choose: Any) -> None:
    path = tmp_path / "any.jsonl"
    whole = bytearray(b"".join(parts))
    for _ in range(min(3, len(whole))):
        whole[choose.randrange(len(whole))] = choose.randrange(256)
    path.write_bytes(bytes(whole))
    for ask in (miss_table, lambda p: request_story(p, "r1"), lambda p: block_story(p, A)):
        try:
            ask(path)
        except BadLog as error:
            assert str(path) in str(error)


def test_the_example_on_the_page_is_what_the_command_says(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    page = (root / "docs" / "misses.md").read_text(encoding="utf-8")
    command, said = page.split("```text\n$ kvplug ")[1].split("\n```")[0].split("\n", 1)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0 and done.stdout == said + "\n" and not done.stderr


def test_the_page_has_every_cause_and_every_event() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "misses.md").read_text(encoding="utf-8")
    causes = page.split("| cause |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", causes, re.MULTILINE) == [str(c) for c in MissCause]
    (events,) = re.findall(r"^\| `event` \| (.*) \|$", page, re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", events)) == {*map(str, EventType), "log"}
    assert f"at least {MIN_BLOCKS:,} and at most {MAX_BLOCKS:,}" in page
