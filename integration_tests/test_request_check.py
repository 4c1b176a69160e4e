"""`on_bad_request: refuse`: a server, and its parts without one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving import EAGER, Server, connected, serving

from kvplug.hosts.vllm.admission import SECTION, _request_refusals
from kvplug.hosts.vllm.flags import REQUEST_CHECK, REQUEST_CHECK_MIDDLEWARE
from kvplug.hosts.vllm.request_check import MAX_BODY, RequestCheck, RequestCheckMiddleware
from kvplug.parser import load_deployment

openai = pytest.importorskip("openai")

DEPLOYMENT = """
sequence: {use: sink_window, sink: 64, window: 448}
on_bad_request: refuse
"""
TYPO = {"sequnce": "off"}
SENTENCE = "kv_transfer_params.kvplug: unknown option 'sequnce'; did you mean 'sequence'?"


# -- without a server ------------------------------------------------------------------------------


def test_parameters_are_validated_as_vllm_asks() -> None:
    asked = SimpleNamespace(extra_args={"kv_transfer_params": {"kvplug": TYPO}})
    with pytest.raises(ValueError, match="did you mean 'sequence'"):
        RequestCheck.validate_params(asked)
    for fine in (None, {}, {"kv_transfer_params": {"kvplug": {"sequence": "off"}}}):
        RequestCheck.validate_params(SimpleNamespace(extra_args=fine))


def test_logits_are_left_alone_and_no_row_asks_for_it() -> None:
    check, logits = RequestCheck(None), torch.randn(3, 5)
    assert check.apply(logits) is logits
    assert check.add_request(0, None) is False
    assert check.is_argmax_invariant()


def refusals(processors: Any, **keys: Any) -> list[Any]:
    config = SimpleNamespace(
        model_config=SimpleNamespace(logits_processors=processors), speculative_config=None
    )
    return _request_refusals(load_deployment(keys, key=SECTION), config)


def test_an_engine_without_the_check_is_refused() -> None:
    (found,) = refusals(None, on_bad_request="refuse")
    assert found.key == f"{SECTION}.on_bad_request"
    assert f"--logits-processors {REQUEST_CHECK}" in found.fix
    assert REQUEST_CHECK_MIDDLEWARE in found.fix
    assert len(refusals(["other:Processor"], on_bad_request="refuse")) == 1


@pytest.mark.parametrize("processor", [REQUEST_CHECK, RequestCheck])
def test_an_engine_with_the_check_is_not(processor: Any) -> None:
    assert refusals([processor], on_bad_request="refuse") == []


def test_reporting_needs_no_check() -> None:
    assert refusals(None) == refusals(None, on_bad_request="report") == []


class App:
    """An ASGI server that reads a body and answers 200."""

    def __init__(self) -> None:
        self.body: bytes | None = None
        self.disconnected = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = b""
        more = scope.get("method") == "POST"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected = True
                return
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def request(
    *parts: bytes, method: str = "POST", kind: str = "http", cut: bool = False
) -> tuple[App, int, bytes]:
    """What a server behind the middleware was given, and the status and body of its answer."""
    app, sent = App(), []
    waiting = [
        {"type": "http.request", "body": part, "more_body": cut or i + 1 < len(parts)}
        for i, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(RequestCheckMiddleware(app)({"type": kind, "method": method}, receive, send))
    status = sent[0]["status"] if sent else 0
    return app, status, b"".join(m.get("body", b"") for m in sent[1:])


def body(options: Any, **more: Any) -> bytes:
    return json.dumps({"kv_transfer_params": {"kvplug": options}, **more}).encode()


def test_the_middleware_answers_400_as_vllm_does() -> None:
    app, status, answer = request(body(TYPO, stream=True))
    assert status == 400 and app.body is None
    assert json.loads(answer) == {
        "error": {
            "message": SENTENCE,
            "type": "BadRequestError",
            "param": "kv_transfer_params",
            "code": 400,
        }
    }


@pytest.mark.parametrize(
    ("extra", "told"), [({"kvplug": TYPO}, SENTENCE), ("x", "must be a mapping, got str")]
)
def test_the_other_way_to_a_requests_parameters_is_checked_too(extra: Any, told: str) -> None:
    sent = json.dumps({"vllm_xargs": {"kv_transfer_params": extra}}).encode()
    _, status, answer = request(sent)
    assert status == 400 and told in json.loads(answer)["error"]["message"]


def test_a_body_in_parts_is_read_whole_and_handed_on_whole() -> None:
    good, bad = body({"sequence": "off"}), body(TYPO)
    app, status, _ = request(good[:20], good[20:30], good[30:])
    assert (status, app.body) == (200, good)
    assert request(bad[:20], bad[20:30], bad[30:])[1] == 400


def test_a_key_written_in_escapes_is_found() -> None:
    escaped = body(TYPO).replace(b"kvplug", b"k\\u0076plug").replace(b"params", b"\\u0070arams")
    assert request(escaped)[1] == 400
    assert request(body(TYPO).decode().encode("utf-16"))[1] == 400, "JSON may be in UTF-16"


@pytest.mark.parametrize(
    "other",
    [b"", b"not JSON kv_transfer_params", b'"kv_transfer_params"', b"[" * 100_000 + b"\\u", b"{}"],
)
def test_what_else_is_wrong_is_left_to_vllm(other: bytes) -> None:
    app, status, _ = request(other)
    assert (status, app.body) == (200, other)


def test_a_client_that_leaves_is_left_to_vllm() -> None:
    app, status, _ = request(body(TYPO)[:10], cut=True)
    assert app.disconnected and status == 0


def test_a_body_too_long_to_read_twice_is_left_to_the_engine() -> None:
    long = body(TYPO, prompt="x" * MAX_BODY)
    app, status, _ = request(long[:MAX_BODY], long[MAX_BODY:])
    assert (status, app.body) == (200, long)


def test_nothing_but_posts_is_read() -> None:
    assert request(method="GET")[1] == 200
    assert request(kind="websocket", method="GET")[1] == 200


# -- a server --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("refuse")
    (folder / "deployment.yaml").write_text(DEPLOYMENT)
    file = str(folder / "deployment.yaml")
    with serving(folder, file, "--model", str(tiny), flags=EAGER) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return connected(server)


def asked(options: Any, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "max_tokens": 2,
        "temperature": 0,
        "extra_body": {"kv_transfer_params": {"kvplug": options}},
        **more,
    }


@pytest.mark.engine
def test_kvplug_serve_adds_the_flags(server: Server) -> None:
    command = server.log()
    assert f"--logits-processors {REQUEST_CHECK}" in command
    assert f"--middleware {REQUEST_CHECK_MIDDLEWARE}" in command


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_option_is_answered_with_400(client: Any, stream: bool) -> None:
    chat = [{"role": "user", "content": "Say something."}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=chat, stream=stream, **asked(TYPO))
    assert refused.value.status_code == 400
    assert refused.value.body["message"] == SENTENCE
    with pytest.raises(openai.BadRequestError, match="sequence must be 'on' or 'off', got 'of'"):
        client.completions.create(prompt="Say", stream=stream, **asked({"sequence": "of"}))


@pytest.mark.engine
def test_a_valid_one_is_answered(client: Any) -> None:
    answer = client.completions.create(prompt="Say", **asked({"sequence": "off"}))
    assert answer.usage.completion_tokens == 2
    stream = client.completions.create(prompt="Say", stream=True, **asked({"sequence": "off"}))
    # vLLM joins the tokens that a slow reader has not taken yet: only the text is certain.
    streamed = "".join(choice.text for part in stream for choice in part.choices)
    assert streamed == answer.choices[0].text
