"""What answers say of themselves where vLLM leaves it out: streamed, or ended by a stop string.

vLLM gives a request's ``kv_transfer_params`` to the server with its last token, and the server
puts them into an answer that comes in one piece, but into no streamed chunk; and a stop string ends
an answer in the server, before the engine has said anything. What such a request says therefore
travels with the step's statistics, which reach the server in the same message as its last token
(`kvplug.hosts.vllm.metrics`); `AnswerMiddleware`, a value of vLLM's ``--middleware``, adds it to
the chunk that states why the answer ended, or to the answer.

The statistics reach one server process, and only if vLLM collects any. Where they do not, and for
requests whose ids do not tell them apart, the chunk says ``{"exact": null}``: not known.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from kvplug.hosts.vllm.asgi import PostMiddleware

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvplug.hosts.vllm.asgi import Message, Receive, Scope, Send

__all__ = ["ANSWERS", "SAID", "AnswerMiddleware", "Answers"]

SAID = "said"
"""Key of the statistics that holds what finished requests say, by their ids."""

KEY = "kv_transfer_params"
UNKNOWN: Mapping[str, Any] = {"kvplug": {"exact": None}}

MAX_KEPT = 4096
"""Most requests whose words wait for their last chunk."""

WAIT_SECONDS = 5.0
"""Longest wait for the words of a request that a stop string ended: the engine hears of it then."""

_INTERNAL = re.compile(r"(?:(\d+)_)?(.+)-[0-9a-f]{8}")
_COMPLETION = re.compile(r"(cmpl-.+)-(\d+)")
_ID = re.compile(rb'"id": ?"([^"\\]+)"')
_ENDS = re.compile(rb'"(?:finish|stop)_reason": ?"')
_STOPPED = re.compile(rb'"stop_reason": ?"')
"""In an answer of one piece: the text of the stop string, or Anthropic's reason."""

MAX_BODY = 16 << 20
"""Largest answer of one piece that is looked into, in bytes."""


class Answers:
    """What finished requests say, until their last chunks take it. Used by one event loop."""

    def __init__(self) -> None:
        self.connected = False
        self._kept: OrderedDict[tuple[str, int], Mapping[str, Any] | None] = OrderedDict()
        self._waiting: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._open: Counter[str] = Counter()
        self._shared: set[str] = set()

    def put(self, request_id: str, said: Mapping[str, Any] | None) -> None:
        """Take in what a finished request says.

        Args:
            request_id: Its id in the engine.
            said: Its ``kv_transfer_params``; None where it has nothing to say.
        """
        key = stream_of(request_id)
        if key is None:
            return
        answer_id, index = key
        if index is None:
            if answer_id in self._open:
                self._shared.add(answer_id)
            ended = [k for k in self._waiting if k[0] == answer_id]
        else:
            one = (answer_id, index)
            self._kept[one] = UNKNOWN if one in self._kept else said
            ended = [one]
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        for one in ended:
            if (waiting := self._waiting.pop(one, None)) is not None and not waiting.done():
                waiting.set_result(None)

    async def take(self, answer_id: str, index: int) -> Mapping[str, Any] | None:
        """What an answer says, once it is known.

        Args:
            answer_id: Id of the answer, as its chunks state it.
            index: Index of the choice.
        """
        if not self.connected or answer_id in self._shared:
            return UNKNOWN
        key = (answer_id, index)
        if key not in self._kept:
            waiting = self._waiting.setdefault(key, asyncio.get_running_loop().create_future())
            try:
                await asyncio.wait_for(asyncio.shield(waiting), WAIT_SECONDS)
            except TimeoutError:
                self._waiting.pop(key, None)
        if answer_id in self._shared:
            return UNKNOWN
        return self._kept.pop(key, UNKNOWN)

    def opened(self, answer_id: str) -> None:
        """Take note that an answer is being streamed."""
        self._open[answer_id] += 1
        if self._open[answer_id] > 1:
            self._shared.add(answer_id)

    def closed(self, answer_id: str) -> None:
        """Take note that its stream has ended."""
        self._open[answer_id] -= 1
        if self._open[answer_id] <= 0:
            del self._open[answer_id]
            self._shared.discard(answer_id)


ANSWERS = Answers()
"""Those of this process's server."""


def stream_of(request_id: str) -> tuple[str, int | None] | None:
    """The answer's id, and the choice's index, that a request's id in the engine belongs to.

    vLLM writes the ids of an answer's requests as ``[CHILD_]ANSWER[-PROMPT]-RANDOM``. The index is
    None where several prompts with several choices each leave it open; no answer has an id of
    another form.
    """
    found = _INTERNAL.fullmatch(request_id)
    if found is None:
        return None
    child, answer_id, prompt = found[1], found[2], 0
    if several := _COMPLETION.fullmatch(answer_id):
        answer_id, prompt = several[1], int(several[2])
    return answer_id, None if child and prompt else int(child or prompt)


class AnswerMiddleware(PostMiddleware):
    """Adds what kvplug says of an answer where vLLM's server leaves it out.

    Args:
        app: The server, an ASGI application.
    """

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and look into its answer."""
        answer = _Answer(send)
        try:
            await self.app(scope, receive, answer.send)
        finally:
            answer.close()


class _Answer:
    """One answer on its way to the client."""

    def __init__(self, to_client: Send):
        self._to_client = to_client
        self._id: str | None = None
        self._streams = False
        self._start: Message | None = None  # of an answer of one piece, whose length may change

    async def send(self, message: Message) -> None:
        """Pass a message on, with what there is to say."""
        if message["type"] == "http.response.start":
            self._streams = _has_type(message, b"text/event-stream")
            if _has_type(message, b"application/json"):
                self._start = message
                return
        elif self._streams and (body := message.get("body")):
            self._open(body)
            if _ENDS.search(body):
                message = {**message, "body": await self._in_events(body)}
        elif self._start is not None:
            start, self._start = self._start, None
            body = message.get("body", b"")
            if not message.get("more_body") and len(body) <= MAX_BODY and _STOPPED.search(body):
                self._open(body)
                body = await _in_whole(body)
                message = {**message, "body": body}
                start = {**start, "headers": _of_length(start["headers"], len(body))}
            await self._to_client(start)
        await self._to_client(message)

    def close(self) -> None:
        """End with the connection."""
        if self._id is not None:
            ANSWERS.closed(self._id)

    def _open(self, body: bytes) -> None:
        if self._id is None and (found := _ID.search(body)):
            self._id = found[1].decode("utf-8", "replace")
            ANSWERS.opened(self._id)

    async def _in_events(self, body: bytes) -> bytes:
        events = body.split(b"\n\n")
        for at, event in enumerate(events):
            if _ENDS.search(event):
                events[at] = await self._in_event(event)
        return b"\n\n".join(events)

    async def _in_event(self, event: bytes) -> bytes:
        before, mark, data = event.partition(b"data: ")
        try:
            chunk = json.loads(data)
            if chunk.get("type") == "message_delta" and chunk["delta"]["stop_reason"]:
                said = await ANSWERS.take(self._id or "", 0)
            else:
                (choice,) = [c for c in chunk["choices"] if c.get("finish_reason")]
                said = await ANSWERS.take(chunk["id"], choice["index"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return event  # no last chunk of a choice
        if said is None:
            return event
        return before + mark + _encoded({**chunk, KEY: said})


async def _in_whole(body: bytes) -> bytes:
    """An answer of one piece, with what its choices say that a stop string ended."""
    try:
        answer = json.loads(body)
        if answer.get("stop_reason") == "stop_sequence":
            ended = [0]
        else:
            choices = answer["choices"]
            ended = [c["index"] for c in choices if isinstance(c.get("stop_reason"), str)]
        if not ended or answer.get(KEY) is not None:
            return body
        said = [await ANSWERS.take(answer["id"], index) for index in ended]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return body  # no answer of a completion
    # vLLM, too, lets one request of several speak; here it is the one that is least exact.
    found = min((one for one in said if one is not None), key=_exactness, default=None)
    return body if found is None else _encoded({**answer, KEY: found})


def _exactness(said: Mapping[str, Any]) -> int:
    return {False: 0, None: 1}.get(said["kvplug"]["exact"], 2)


def _encoded(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def _has_type(start: Message, kind: bytes) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(kind)
        for name, value in start.get("headers", ())
    )


def _of_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", b"%d" % length)]
