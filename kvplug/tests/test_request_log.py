"""Requests are written as `kvplug tune` reads them, and passed on as they came."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvplug.hosts.vllm import request_log
from kvplug.hosts.vllm.request_log import FILE, RequestLog
from kvplug_lab.tune.load import read

PATH = "/v1/completions"


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body that it was sent."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.body", "body": body})


def sent(app: Any, *parts: bytes, path: str = PATH, method: str = "POST") -> bytes:
    """What the server behind the middleware saw of a body in parts."""
    messages = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}
        for i, part in enumerate(parts)
    ]
    seen: list[bytes] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        seen.append(message["body"])

    asyncio.run(app({"type": "http", "method": method, "path": path}, receive, send))
    return seen[0]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "requests.jsonl"
    monkeypatch.setenv(FILE, str(path))
    return path


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["body"] for line in file.read_text(encoding="utf-8").splitlines()]


def encode(text: Any, tools: Any) -> list[int]:
    return [ord(c) for c in json.dumps(text)]


def test_a_request_is_written_once_and_passed_on(file: Path) -> None:
    body = {"model": "m", "prompt": "a\nb ü", "max_tokens": 3, "user": "u", "temperature": 0.5}
    data = json.dumps(body).encode()
    app = RequestLog(_app)
    assert sent(app, data[:7], data[7:]) == data
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    sent(app, json.dumps(chat).encode(), path="/v1/chat/completions")
    assert written(file) == [
        {"prompt": "a\nb ü", "max_tokens": 3, "user": "u"},
        {"messages": chat["messages"]},
    ], "what is not needed to send it again is not kept"
    assert file.stat().st_mode & 0o777 == 0o600
    found = read(file, encode)
    assert found.requests[0].prompt == encode("a\nb ü", None) and found.sessions == ("u", "")


@pytest.mark.parametrize(
    ("parts", "path", "method"),
    [
        ([b"{"], PATH, "POST"),
        ([b"[1]"], PATH, "POST"),
        ([b'{"prompt": "x"}'], "/v1/embeddings", "POST"),
        ([b'{"prompt": "x"}'], PATH, "GET"),
        ([b"[" * 100_000], PATH, "POST"),
    ],
)
def test_what_is_no_request_is_not_written(
    file: Path, parts: Sequence[bytes], path: str, method: str
) -> None:
    assert sent(RequestLog(_app), *parts, path=path, method=method) == parts[0]
    assert not file.exists()


def test_long_bodies_and_full_files_are_left_out(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_log, "MAX_BODY", 100)
    monkeypatch.setattr(request_log, "MAX_FILE", 150)
    app = RequestLog(_app)
    long = json.dumps({"prompt": "x" * 100}).encode()
    assert sent(app, long) == long and not file.exists()
    short = json.dumps({"prompt": "x" * 40}).encode()
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert sent(app, short) == short
    assert len(written(file)) == 1 and file.stat().st_size <= 150
    said = [r.message for r in caplog.records if "no longer recorded" in r.message]
    assert len(said) == 1


def test_a_file_that_cannot_be_written_ends_the_recording_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FILE, str(tmp_path / "none" / "requests.jsonl"))
    app = RequestLog(_app)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert sent(app, b'{"prompt": "x"}') == b'{"prompt": "x"}'
    assert len([r for r in caplog.records if "no longer recorded" in r.message]) == 1
