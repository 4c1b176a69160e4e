"""Writes requests as they arrive to a file that `kvplug tune` reads: their text, so only if asked.

``kvplug record --prompts FILE`` sets vLLM's flag ``--middleware`` to `RequestLog` and the file in
the environment. A line of the file is what the laboratory needs of a request's body to send it
again; nothing of the answer is written.
"""

from __future__ import annotations

import json
import logging
import os
import time
from typing import TYPE_CHECKING

from kvplug.hosts.vllm.asgi import PostMiddleware

if TYPE_CHECKING:
    from kvplug.hosts.vllm.asgi import Application, Message, Receive, Scope, Send

FILE = "KVPLUG_REQUEST_LOG"
"""Environment variable that names the file."""

PATHS = ("/v1/completions", "/v1/chat/completions")
KEPT = (
    "prompt",
    "messages",
    "tools",
    "max_tokens",
    "max_completion_tokens",
    "user",
    "cache_salt",
    "kv_transfer_params",
)
"""Keys of a body that are written."""

MAX_BODY = 16 << 20
"""Bytes of a body that is written at most; longer ones are left out."""

MAX_FILE = 256 << 20
"""Bytes of the file, from which on nothing more is written."""

logger = logging.getLogger("vllm.kvplug.request_log")


class RequestLog(PostMiddleware):
    """Appends requests' bodies to a file, one a line, and passes them on unchanged.

    A file that cannot be written, or is full, ends the recording with a line in the log; requests
    are served as before.

    Args:
        app: The server, an ASGI application.
    """

    def __init__(self, app: Application):
        super().__init__(app)
        self._path = os.environ.get(FILE, "")
        self._begun = time.monotonic()
        self._over = not self._path
        if self._over:
            logger.warning("kvplug: requests are not recorded: %s names no file", FILE)

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and write it down."""
        wanted = not self._over and str(scope.get("path", "")).endswith(PATHS)
        await self.app(scope, self._tee(receive) if wanted else receive, send)

    def _tee(self, receive: Receive) -> Receive:
        """The same messages; the body is written with its last one."""
        body = bytearray()
        left_out = False
        at = time.monotonic() - self._begun

        async def tee() -> Message:
            nonlocal left_out
            message = await receive()
            if message["type"] == "http.request" and not left_out:
                body.extend(message.get("body", b""))
                if len(body) > MAX_BODY:
                    left_out = True
                    body.clear()
                elif not message.get("more_body", False):
                    left_out = True
                    self._write(bytes(body), at)
                    body.clear()
            return message

        return tee

    def _write(self, body: bytes, at: float) -> None:
        if self._over:
            return
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            return  # The server answers that it is no JSON.
        if not isinstance(data, dict):
            return
        kept = {key: data[key] for key in KEPT if data.get(key) is not None}
        try:
            # Line breaks of the text are escaped, so that a request is a line.
            line = json.dumps({"at": round(at, 3), "body": kept}, ensure_ascii=True) + "\n"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            file = os.open(self._path, flags, 0o600)
            try:
                full = os.fstat(file).st_size + len(line) > MAX_FILE
                if not full:
                    os.write(file, line.encode())
            finally:
                os.close(file)
        except (OSError, ValueError, RecursionError) as error:
            self._over = True
            logger.warning("kvplug: requests are no longer recorded: %s", error)
            return
        if full:
            self._over = True
            logger.warning(
                "kvplug: requests are no longer recorded: %s has %d MiB", self._path, MAX_FILE >> 20
            )
