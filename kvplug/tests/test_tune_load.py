"""The requests that `kvplug tune` reads, and what of them was there before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvplug_lab.engine.trial import TrialRequest
from kvplug_lab.tune import load as loads
from kvplug_lab.tune.load import InvalidLoad, Load, read, repeated


def encode(text: Any, tools: Any = None) -> list[int]:
    if isinstance(text, list):
        text = "".join(f"[{t['name']}]" for t in tools or []) + "".join(
            f"<{m['role']}>{m['content']}" for m in text
        )
    return [ord(c) for c in text]


def lines(tmp_path: Path, *bodies: Any) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(json.dumps(b) for b in bodies) + "\n\n", encoding="utf-8")
    return path


def test_bodies_of_completions_chats_and_batches_are_read(tmp_path: Path) -> None:
    own = {"session_id": "s", "segments": [2, 1]}
    path = lines(
        tmp_path,
        {"prompt": "abc", "max_tokens": 3, "kv_transfer_params": {"kvplug": own}},
        {"messages": [{"role": "user", "content": "hi"}], "user": "u", "cache_salt": "x"},
        {"custom_id": "1", "body": {"prompt": [7, 8], "max_completion_tokens": 5}},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"name": "t"}]},
    )
    found = read(path, encode)
    assert [r.prompt for r in found.requests] == [
        encode("abc"),
        encode("<user>hi"),
        [7, 8],
        encode("[t]<user>hi"),
    ]
    assert [r.max_tokens for r in found.requests] == [3, loads.ANSWER, 5, loads.ANSWER]
    assert found.sessions == ("s", "u", "", "") and found.requests[1].salt == "x"
    assert found.requests[0].kvplug == own and found.names_segments
    assert found.longest == len("[t]<user>hi") + loads.ANSWER
    assert len(read(path, encode, 2).requests) == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([1], "no JSON object"),
        ({"max_tokens": 3}, "neither `prompt`"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [1, -2]}, "neither `prompt`"),
        ({"prompt": [True]}, "neither `prompt`"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"messages": "hello"}, "messages must be"),
        ({"prompt": "a", "user": 3}, "must be texts"),
    ],
)
def test_a_line_that_is_no_request_is_refused_by_its_number(
    tmp_path: Path, body: Any, said: str
) -> None:
    path = lines(tmp_path, {"prompt": "good"}, body)
    with pytest.raises(InvalidLoad, match=f"line 2: .*{said}"):
        read(path, encode)


def test_several_prompts_of_a_body_are_requests_of_their_own(tmp_path: Path) -> None:
    found = read(
        lines(tmp_path, {"prompt": ["ab", "c"], "max_tokens": 2}, {"prompt": [[5], [6]]}), encode
    )
    assert [r.prompt for r in found.requests] == [encode("ab"), encode("c"), [5], [6]]
    with pytest.raises(InvalidLoad, match="line 1: has neither"):
        read(lines(tmp_path, {"prompt": [["a"]]}), encode)


def test_files_without_requests_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(InvalidLoad, match="holds no request"):
        read(path, encode)
    path.write_bytes(b'{"prompt": ')
    with pytest.raises(InvalidLoad, match="line 1"):
        read(path, encode)
    with pytest.raises(InvalidLoad, match="cannot read"):
        read(tmp_path / "none.jsonl", encode)


def test_a_request_waits_for_its_session_alone() -> None:
    requests = tuple(TrialRequest([1], 1) for _ in range(5))
    found = Load("x", requests, ("a", "", "b", "a", "a"))
    assert found.before() == [None, None, None, 0, 3]


def of(*prompts: list[int], salts: tuple[str | None, ...] = ()) -> Load:
    given = salts or (None,) * len(prompts)
    requests = [TrialRequest(p, 1, salt=s) for p, s in zip(prompts, given, strict=True)]
    return Load("x", tuple(requests), ("",) * len(prompts))


def test_repeated_prefixes_and_repeated_runs_are_told_apart() -> None:
    a, b = list(range(10, 18)), list(range(20, 28))
    head = [1, 2, 3, 4]
    # Blocks of 4. The second prompt repeats the head, and both texts behind it in another order.
    found = repeated(of([*head, *a, *b, 9], [*head, *b, *a, 9]), 4)
    assert (found.prefix, found.elsewhere, found.tokens) == (4, 16, 42)
    # A run is found where no block begins.
    found = repeated(of([*a, 9], [5, *a, 9]), 4)
    assert (found.prefix, found.elsewhere) == (0, 8)


def test_the_last_token_is_never_a_hit() -> None:
    found = repeated(of(list(range(8)), list(range(8))), 4)
    assert found.prefix == 4


def test_nothing_is_shared_between_salts() -> None:
    found = repeated(of(list(range(9)), list(range(9)), salts=("a", "b")), 4)
    assert (found.prefix, found.elsewhere) == (0, 0)
