"""The server's side of an ASGI connection, for values of vLLM's ``--middleware``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["Application", "Message", "PostMiddleware", "Receive", "Scope", "Send"]

Scope = MutableMapping[str, Any]
"""What a connection is."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class PostMiddleware:
    """Serves POST requests by `post` and hands everything else on.

    Args:
        app: The server, an ASGI application.
    """

    def __init__(self, app: Application):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and scope.get("method") == "POST":
            await self.post(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a POST request."""
        raise NotImplementedError
