"""Refuses requests whose kvplug options are invalid, before they enter the engine.

Two flags of vLLM's, both added by ``kvplug serve`` where a deployment says
``on_bad_request: refuse``:

* ``--logits-processors kvplug.hosts.vllm.request_check:RequestCheck``: vLLM's front end asks the
  classes named there to validate each request's parameters, for the server and for `LLM` alike.
  An answer that is streamed has begun by then, so its client gets an error event.
* ``--middleware kvplug.hosts.vllm.request_check.RequestCheckMiddleware``: the server answers
  HTTP 400 before anything is streamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as SlotLogitsProcessor,
)

from kvplug.hosts.vllm.asgi import PostMiddleware
from kvplug.request_options import RequestOptions

if TYPE_CHECKING:
    from torch import Tensor

    from kvplug.hosts.vllm.asgi import Message, Receive, Scope, Send

KEY = "kv_transfer_params"

MAX_BODY = 64 << 20
"""Bytes of a request's body that the middleware reads; larger ones it leaves to the engine."""


def refusal_of(params: Any) -> str | None:
    """Sentences about every refused option of a request, or None.

    The prompt's length is not known here, so ``segments`` that exceed it are only reported in the
    answer.

    Args:
        params: The request's ``kv_transfer_params``.
    """
    if params is not None and not isinstance(params, Mapping):
        return f"{KEY} must be a mapping, got {type(params).__name__}"
    refused = RequestOptions.parse(params).sentences
    return f"{KEY}.kvplug: {'; '.join(refused.values())}" if refused else None


class RequestCheck(LogitsProcessor, SlotLogitsProcessor):
    """Validates the kvplug options of each request; changes no logits."""

    def __init__(self, vllm_config: Any, *where: Any):
        """Made by either of vLLM's model runners; needs nothing of them."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError with what is wrong; vLLM answers it with HTTP 400."""
        if refusal := refusal_of((sampling_params.extra_args or {}).get(KEY)):
            raise ValueError(refusal)

    def is_argmax_invariant(self) -> bool:
        """True, so that the first model runner leaves it out of greedy batches."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Do nothing: no request has state here."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Return False: `apply` need not be called for the request."""
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Return the logits as they are."""
        return logits


class RequestCheckMiddleware(PostMiddleware):
    """Answers HTTP 400 to requests whose kvplug options are invalid.

    Args:
        app: The server, an ASGI application.
    """

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with the body that was read."""
        messages, body = await _read(receive)
        refusal = _refusal_in(body) if body is not None else None
        if refusal is not None:
            await _answer_400(send, refusal)
            return

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)


async def _read(receive: Receive) -> tuple[list[Message], bytes | None]:
    """The messages that carry a body, and the body; None if it is too long or was not sent."""
    messages: list[Message] = []
    body = bytearray()
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            return messages, None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return messages, None
        if not message.get("more_body", False):
            return messages, bytes(body)


def _refusal_in(body: bytes) -> str | None:
    # An escaped letter could hide the key, or UTF-16; everything else is not worth parsing twice.
    if KEY.encode() not in body and b"\\u" not in body and b"\0" not in body:
        return None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    extra = data.get("vllm_xargs")  # vLLM's other way to `extra_args`, under which KEY stands there
    inside = extra.get(KEY) if isinstance(extra, dict) else None
    return refusal_of(data.get(KEY)) or refusal_of(inside)


async def _answer_400(send: Send, message: str) -> None:
    error = {"message": message, "type": "BadRequestError", "param": KEY, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
