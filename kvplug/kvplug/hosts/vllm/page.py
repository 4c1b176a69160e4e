"""The page `/kvplug` on vLLM's own server, a value of vLLM's ``--middleware``.

``kvplug serve`` adds ``--middleware kvplug.hosts.vllm.page.LivePage`` where a deployment says
``observe: {page: true}``. The middleware answers four paths and hands on all others:

* ``/kvplug``: the page, which holds no data;
* ``/kvplug/static/...``: its files;
* ``/kvplug/state``: the state once, as JSON (`kvplug.observe.live.LiveState`);
* ``/kvplug/events``: the state whenever it is new, as server-sent events.

The last two ask for the server's key, as vLLM does under ``/v1``: its own check guards no other
path. Nothing here changes the engine, and engines are listened to only while somebody watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvplug.observe.live import Snapshot, UnreadableSnapshot, state_bytes
from kvplug.observe.live_socket import INTERVAL, follow
from kvplug.observe.page import FILES, HEADERS, file, html

if TYPE_CHECKING:
    from kvplug.hosts.vllm.asgi import Application, Receive, Scope, Send

__all__ = ["LivePage"]

logger = logging.getLogger("vllm.kvplug")

ROOT = "/kvplug"

MAX_WATCHERS = 32
"""Streams that one server process has open at once."""

FIRST = 10.0
"""Seconds that a request waits for the first snapshots."""

LINGER = 5.0
"""Seconds that engines are listened to after the last watcher has left."""

QUIET = 15.0
"""Seconds after which a stream without news says that it is still there."""

TURN_ON = (
    "No engine of this server shows its state. Set `observe: {page: true}` in its deployment and "
    "start it with `kvplug serve`."
)
NOT_KVPLUG = (
    "This server's engine runs without kvplug. Start it with `kvplug serve` and a deployment that "
    "sets `observe: {page: true}`."
)
FULL = f"{MAX_WATCHERS} pages of this server are open already. Close one of them."


class LivePage:
    """Serves the page; see the module.

    Args:
        app: The server, an ASGI application.
    """

    def __init__(self, app: Application):
        self.app = app
        self._hub: _Hub | None = None
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        own = path == ROOT or path.startswith(f"{ROOT}/")
        if scope["type"] != "http" or not own:
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, head=scope["method"] == "HEAD")
        if scope["method"] not in ("GET", "HEAD"):
            await answer.text(405, "This page is read only.", {"allow": "GET, HEAD"})
            return
        name = path.removeprefix(ROOT)
        if name == "":
            await answer.whole(
                200, html(), "text/html; charset=utf-8", {"cache-control": "no-cache"}
            )
        elif name == "/":
            await answer.text(307, "", {"location": f"..{ROOT}"})
        elif name.startswith("/static/") and (found := name.removeprefix("/static/")) in FILES:
            cached = {"cache-control": "public, max-age=86400"}
            await answer.whole(200, file(found), FILES[found][1], cached)
        elif name in ("/state", "/events"):
            await self._data(name, scope, receive, answer)
        else:
            await answer.text(404, "There is no such page.")

    async def _data(self, name: str, scope: Scope, receive: Receive, answer: _Answer) -> None:
        app = scope["app"]
        if not _may_see(app, scope["headers"]):
            await answer.text(
                401, "The server's API key is needed.", {"www-authenticate": "Bearer"}
            )
            return
        hub = self._hub = self._hub or _Hub.of(app)
        if hub is None:
            await answer.text(503, NOT_KVPLUG)
            return
        if self._streams >= MAX_WATCHERS:
            await answer.text(503, FULL)
            return
        self._streams += 1
        try:
            with hub.watched():
                await hub.first()
                if name == "/state":
                    status = 200 if hub.parts else 503
                    await answer.whole(status, hub.state(), "application/json", NO_STORE)
                elif not hub.parts:
                    await answer.text(503, hub.problem())
                else:
                    await self._stream(app, hub, receive, answer)
        finally:
            self._streams -= 1

    async def _stream(self, app: Any, hub: _Hub, receive: Receive, answer: _Answer) -> None:
        """Send the state until the client leaves or the server ends."""
        await answer.begin(200, "text/event-stream; charset=utf-8", NO_STORE)
        left = asyncio.ensure_future(_left(receive))
        try:
            seen, spoke = -1, time.monotonic()
            # An open page must not keep a server from ending.
            while not left.done() and not _ends(app):
                if hub.version != seen:
                    seen, spoke = hub.version, time.monotonic()
                    await answer.more(b"data: " + hub.state() + b"\n\n")
                elif time.monotonic() - spoke > QUIET:
                    spoke = time.monotonic()
                    await answer.more(b": still here\n\n")
                await asyncio.wait({left, hub.news()}, timeout=INTERVAL, return_when=FIRST_OF)
            await answer.end()
        finally:
            left.cancel()


NO_STORE = {"cache-control": "no-store"}
FIRST_OF = asyncio.FIRST_COMPLETED


def _may_see(app: Any, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """True if a request has one of the server's keys, or the server asks for none."""
    # As vLLM reads them: the command line comes before the environment.
    asked = app.state.args.api_key or [os.environ.get("VLLM_API_KEY")]
    keys = [hashlib.sha256(str(key).encode()).digest() for key in asked if key]
    if not keys:
        return True
    given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
    scheme, _, key = given.partition(b" ")
    digest = hashlib.sha256(key).digest()
    matches = [secrets.compare_digest(digest, one) for one in keys]
    return scheme.lower() == b"bearer" and any(matches)


def _ends(app: Any) -> bool:
    return bool(getattr(getattr(app.state, "server", None), "should_exit", False))


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """An HTTP answer."""

    def __init__(self, send: Send, head: bool):
        self._send = send
        self._head = head

    async def begin(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        found = {"content-type": kind, **HEADERS, **headers}
        encoded = [(name.encode(), value.encode()) for name, value in found.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def more(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": body})

    async def whole(self, status: int, body: bytes, kind: str, headers: Mapping[str, str]) -> None:
        length = {"content-length": str(len(body))}
        await self.begin(status, kind, {**headers, **length})
        await self.end(b"" if self._head else body)

    async def text(self, status: int, text: str, headers: Mapping[str, str] = NO_STORE) -> None:
        await self.whole(status, text.encode(), "text/plain; charset=utf-8", headers)


class _Hub:
    """Latest snapshot of each of the server's engines, while somebody watches.

    Args:
        engine_id: Their id.
        ranks: Their data-parallel indices.

    Attributes:
        parts: Snapshots by index, as JSON that was checked.
        version: Grows with each change.
    """

    def __init__(self, engine_id: str, ranks: Sequence[int]):
        self.parts: dict[int, bytes] = {}
        self.version = 0
        self._engine_id = engine_id
        self._ranks = ranks
        self._tried: set[int] = set()
        self._news: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watchers = 0
        self._refused = False

    @classmethod
    def of(cls, app: Any) -> _Hub | None:
        """The hub of a server's engines; None for an engine without a connector."""
        config = app.state.vllm_config
        transfer = config.kv_transfer_config
        if transfer is None:
            return None
        parallel = config.parallel_config
        # As vLLM's own client counts the engines that it talks to.
        local = parallel.local_engines_only
        count = parallel.data_parallel_size_local if local else parallel.data_parallel_size
        first = int(parallel.data_parallel_index)
        return cls(str(transfer.engine_id), range(first, first + max(1, int(count))))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Listen to the engines while the block runs."""
        self._watchers += 1
        if not self._tasks:
            self._tried.clear()
            self._tasks = [asyncio.ensure_future(self._listen(rank)) for rank in self._ranks]
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                asyncio.get_running_loop().call_later(LINGER, self._rest)

    def _rest(self) -> None:
        """Stop to listen if nobody watches."""
        if self._watchers:
            return
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        self.parts.clear()

    async def first(self) -> None:
        """Wait until each engine has sent a snapshot or is found not to listen."""
        until = time.monotonic() + FIRST
        while len(self._tried) < len(self._ranks) and (wait := until - time.monotonic()) > 0:
            await asyncio.wait({self.news()}, timeout=wait)

    def news(self) -> asyncio.Future[None]:
        """A future that is done with the next change."""
        if self._news is None or self._news.done():
            self._news = asyncio.get_running_loop().create_future()
        return self._news

    def problem(self) -> str:
        """Why engines are missing, or an empty text."""
        missing = len(self._ranks) - len(self.parts)
        if not missing:
            return ""
        if not self.parts:
            return TURN_ON
        return (
            f"{missing} of {len(self._ranks)} engines do not show their state: they have ended, or "
            "run on another machine."
        )

    def state(self) -> bytes:
        """The state as JSON."""
        parts = [self.parts[rank] for rank in sorted(self.parts)]
        return state_bytes(parts, len(self._ranks), self.problem())

    def _changed(self, rank: int) -> None:
        self.version += 1
        self._tried.add(rank)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _listen(self, rank: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                async for taken in _checked(follow(self._engine_id, rank)):
                    if taken is None:
                        self._refuse()
                        break
                    self.parts[rank] = taken
                    self._changed(rank)
            self.parts.pop(rank, None)
            self._changed(rank)
            await asyncio.sleep(INTERVAL)

    def _refuse(self) -> None:
        if not self._refused:
            self._refused = True
            logger.error("kvplug: what an engine sent to the live page is no snapshot of it")


async def _checked(taken: AsyncIterator[bytes]) -> AsyncIterator[bytes | None]:
    """Snapshots that may be handed on; None for one that may not."""
    async for data in taken:
        try:
            # A line break would end an event early.
            if b"\n" in data or b"\r" in data:
                raise UnreadableSnapshot("is not one line")
            Snapshot.parse(data)
        except UnreadableSnapshot as error:
            logger.debug("kvplug: %s", error)
            yield None
        else:
            yield data
