"""What answers say that are streamed or that a stop string ends; without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvplug.hosts.vllm import answers
from kvplug.hosts.vllm.answers import ANSWERS, KEY, UNKNOWN, AnswerMiddleware, Answers, stream_of
from kvplug.hosts.vllm.metrics import PolicyStats

SAID = {"kvplug": {"exact": False, "blocks_freed": 6}}
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
WHOLE = [(b"content-type", b"application/json"), (b"content-length", b"1")]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    monkeypatch.setattr(answers, "WAIT_SECONDS", 0.05)
    made = Answers()
    made.connected = True
    monkeypatch.setattr(answers, "ANSWERS", made)
    yield made


def chunk(finish: str | None = None, index: int = 0, answer: str = "cmpl-a") -> bytes:
    choice = {"index": index, "text": 'é "finish_reason":"x"', "finish_reason": finish}
    text = json.dumps({"id": answer, "choices": [choice]}, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


async def _answered(parts: list[bytes], headers: Any, method: str = "POST") -> list[Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, part in enumerate(parts):
            more = i + 1 < len(parts)
            await send({"type": "http.response.body", "body": part, "more_body": more})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await AnswerMiddleware(app)({"type": "http", "method": method}, None, send)  # type: ignore[arg-type]
    return sent


def streamed(*parts: bytes) -> list[bytes]:
    return [m["body"] for m in asyncio.run(_answered([*parts], STREAM))[1:]]


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps(answer, separators=(",", ":")).encode()
    start, message = asyncio.run(_answered([body], WHOLE))
    length = dict(start["headers"])[b"content-length"]
    if message["body"] != body:
        assert length == b"%d" % len(message["body"])
    return dict(json.loads(message["body"]))


def last(body: bytes) -> Any:
    return json.loads(body.removeprefix(b"data: ")).get(KEY)


def test_the_last_chunk_says_what_the_request_said(fresh: Answers) -> None:
    fresh.put("cmpl-a-0-01234567", SAID)
    first, ended, done = streamed(chunk(), chunk("stop"), b"data: [DONE]\n\n")
    assert (first, done) == (chunk(), b"data: [DONE]\n\n")
    assert last(ended) == SAID
    assert {**json.loads(ended[6:]), KEY: None} == {**json.loads(chunk("stop")[6:]), KEY: None}


def test_nothing_is_added_where_nothing_is_said(fresh: Answers) -> None:
    fresh.put("cmpl-a-0-01234567", None)
    assert streamed(chunk("stop")) == [chunk("stop")]


def test_words_that_come_later_are_waited_for(
    fresh: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "WAIT_SECONDS", 600)

    async def run() -> Any:
        answer = asyncio.create_task(_answered([chunk("stop")], STREAM))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not answer.done()
        fresh.put("cmpl-a-0-01234567", SAID)
        return (await answer)[1]["body"]

    assert last(asyncio.run(run())) == SAID


def test_what_is_not_known_is_said_so(fresh: Answers) -> None:
    assert last(streamed(chunk("stop"))[0]) == UNKNOWN
    fresh.put("cmpl-a-0-01234567", SAID)
    fresh.connected = False
    assert last(streamed(chunk("stop"))[0]) == UNKNOWN
    assert json.loads(json.dumps(UNKNOWN)) == {"kvplug": {"exact": None}}


def test_choices_and_prompts_have_their_own_words(fresh: Answers) -> None:
    for index in range(3):
        fresh.put(f"cmpl-a-{index}-01234567", {"kvplug": {"exact": False, "blocks_freed": index}})
    ended = streamed(*(chunk("stop", index) for index in (2, 0, 1)))
    assert [last(body)["kvplug"]["blocks_freed"] for body in ended] == [2, 0, 1]


@pytest.mark.parametrize(
    ("internal", "stream"),
    [
        ("chatcmpl-x-01234567", ("chatcmpl-x", 0)),
        ("2_chatcmpl-x-01234567", ("chatcmpl-x", 2)),
        ("cmpl-x-0-01234567", ("cmpl-x", 0)),
        ("cmpl-x-5-01234567", ("cmpl-x", 5)),
        ("3_cmpl-x-0-01234567", ("cmpl-x", 3)),
        ("0_cmpl-x-1-01234567", ("cmpl-x", None)),
        ("cmpl-my-id-7-0-01234567", ("cmpl-my-id-7", 0)),
        ("chatcmpl-my-7-01234567", ("chatcmpl-my-7", 0)),
        ("no random part", None),
    ],
)
def test_ids_of_requests_belong_to_answers(internal: str, stream: Any) -> None:
    assert stream_of(internal) == stream


def test_two_answers_of_one_id_are_told_nothing_of_each_other(fresh: Answers) -> None:
    fresh.put("cmpl-a-0-01234567", SAID)
    fresh.put("cmpl-a-0-89abcdef", None)
    assert last(streamed(chunk("stop"))[0]) == UNKNOWN

    async def run() -> Any:
        fresh.opened("cmpl-b")
        other = await _answered([chunk(answer="cmpl-b"), chunk("stop", answer="cmpl-b")], STREAM)
        fresh.closed("cmpl-b")
        return other[2]["body"]

    fresh.put("cmpl-b-0-01234567", SAID)
    assert last(asyncio.run(run())) == UNKNOWN
    fresh.put("cmpl-b-0-01234567", SAID)
    assert last(streamed(chunk("stop", answer="cmpl-b"))[0]) == UNKNOWN  # one was not taken
    fresh.put("cmpl-b-0-01234567", SAID)
    assert last(streamed(chunk("stop", answer="cmpl-b"))[0]) == SAID


def test_a_stop_string_ends_a_whole_answer(fresh: Answers) -> None:
    plain = {"id": "cmpl-a", KEY: None}
    choices = [{"index": 0, "finish_reason": "stop", "stop_reason": "!!"}]
    fresh.put("cmpl-a-0-01234567", SAID)
    assert whole(plain | {"choices": choices})[KEY] == SAID
    assert whole(plain | {"choices": choices})[KEY] == UNKNOWN
    for reason in (None, 7):  # by a token, of which the engine speaks itself
        choices[0]["stop_reason"] = reason
        assert whole(plain | {"choices": choices})[KEY] is None
    fresh.put("chatcmpl-a-01234567", SAID)
    anthropic = {"id": "chatcmpl-a", "type": "message", "stop_reason": "stop_sequence"}
    assert whole(anthropic)[KEY] == SAID
    assert KEY not in whole(anthropic | {"stop_reason": "end_turn"})


def test_anthropics_last_event(fresh: Answers) -> None:
    fresh.put("chatcmpl-a-01234567", SAID)
    start = (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"chatcmpl-a"}}\n\n'
    )
    delta = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}}
    end = f"event: message_delta\ndata: {json.dumps(delta)}\n\n".encode()
    first, ended = streamed(start, end)
    assert first == start
    before, _, data = ended.partition(b"data: ")
    assert before == b"event: message_delta\n" and json.loads(data) == {**delta, KEY: SAID}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"data: [DONE]\n\n",
        b'data: {"finish_reason":"x"\n\n',
        b'data: ["finish_reason":"x"]\n\n',
        b'data: {"id":"a","choices":7,"finish_reason":"x"}\n\n',
        b'"finish_reason":"x"',
    ],
)
def test_what_is_no_chunk_is_passed_on(body: bytes) -> None:
    assert streamed(body) == [body]


def test_other_connections_are_passed_on(fresh: Answers) -> None:
    fresh.put("cmpl-a-0-01234567", SAID)
    body = chunk("stop")
    assert asyncio.run(_answered([body], STREAM, "GET"))[1]["body"] == body
    assert asyncio.run(_answered([body], [(b"content-type", b"text/plain")]))[1]["body"] == body


def test_what_nobody_takes_is_bounded(fresh: Answers) -> None:
    for i in range(answers.MAX_KEPT + 10):
        fresh.put(f"cmpl-{i}-0-01234567", SAID)
    assert len(fresh._kept) == answers.MAX_KEPT
    for _ in range(3):
        streamed(chunk("stop", answer="cmpl-1"))
    assert not fresh._open and not fresh._shared and not fresh._waiting


def test_words_are_no_counters() -> None:
    stats = PolicyStats(data={"counters": {"a_total\tb": 1.0}, answers.SAID: {"x": SAID}})
    other = {"counters": {"a_total\tb": 2.0, "c_total": 1.0}, answers.SAID: {"y": None}}
    stats.aggregate(PolicyStats(data=other))
    assert stats.data == {
        "counters": {"a_total\tb": 3.0, "c_total": 1.0},
        answers.SAID: {"x": SAID, "y": None},
    }
    assert stats.reduce() == {"a_total{b}": 3.0, "c_total": 1.0}


def test_the_servers_own_is_not_connected_before_an_engine() -> None:
    assert ANSWERS.connected is False
