"""The way of snapshots from an engine's process to the API servers of the same machine.

An engine listens on a Unix socket whose name and password are digests of the engine id in its
KV-transfer config. vLLM makes that id once, where it reads the command line, and hands it on with
the config to every process of one server, in all of its layouts; nobody else knows it. So nothing
has to be configured, and two servers never meet. The socket has a name of the kernel's and no file:
it ends with its process, whatever ends that.

Either side also asks the kernel who is at the other end, and goes on only with a process of its own
user, or root. While nobody is connected, the engine's thread waits in the kernel and nothing is
sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import selectors
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable

from kvplug.observe.live import MAX_BYTES

__all__ = ["INTERVAL", "Publisher", "follow"]

logger = logging.getLogger("kvplug")

INTERVAL = 1.0
"""Seconds between two snapshots, at least."""

MAX_READERS = 16
"""API servers that one engine sends to."""

PATIENCE = 2.0
"""Seconds that the other side has to take or give what is due."""

_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")
_PASSWORD = 32

# vLLM adds the rank to the id of each data-parallel engine.
_RANK = re.compile(r"(_dp\d+)+\Z")


def _digest(engine_id: str, what: bytes, size: int) -> bytes:
    shared = _RANK.sub("", engine_id).encode("utf-8", "surrogatepass")
    key = hashlib.blake2b(shared).digest()
    return hashlib.blake2b(what, key=key, digest_size=size).digest()


def _address(engine_id: str, rank: int) -> str:
    return f"\0kvplug-live-{_digest(engine_id, b'address', 16).hex()}-{rank}"


def _password(engine_id: str) -> bytes:
    return _digest(engine_id, b"password", _PASSWORD)


def _is_own(connection: socket.socket) -> bool:
    """True if the process at the other end is of this process's user, or root's."""
    size = _CREDENTIALS.size
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    return user in (0, os.geteuid())


class Publisher:
    """Sends an engine's snapshots to whoever is connected, from a thread of its own.

    Args:
        engine_id: The engine's, of its KV-transfer config.
        rank: Its data-parallel index.
        take: Called at most once in `INTERVAL`, and only while somebody is connected; returns a
            snapshot as JSON, or None for none now. Must not raise.
        interval: Seconds between two snapshots, at least.

    Raises:
        OSError: Another engine with the same id and index listens already.
    """

    def __init__(
        self,
        engine_id: str,
        rank: int,
        take: Callable[[], bytes | None],
        interval: float = INTERVAL,
    ):
        self._take = take
        self._interval = interval
        self._password = _password(engine_id)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(_address(engine_id, rank))
            self._listener.listen(MAX_READERS)
        except OSError:
            self._listener.close()
            raise
        self._bell, self._ring = socket.socketpair()
        self._readers: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, name="kvplug live", daemon=True)

    @property
    def watched(self) -> bool:
        """True while somebody is connected."""
        return bool(self._readers)

    def start(self) -> None:
        """Start to listen."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and end all connections. Idempotent."""
        with contextlib.suppress(OSError):
            self._ring.send(b"x")
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            logger.error("kvplug: the live page's state is not sent any more: %s", error)
        finally:
            for one in (*self._readers, self._listener, self._bell, self._ring):
                one.close()
            self._readers.clear()

    def _serve(self) -> None:
        due = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                wait = max(0.0, due - now) if self._readers else None
                for key, _ in selector.select(wait):
                    if key.fileobj is self._bell:
                        return
                    if key.fileobj is self._listener:
                        if (reader := self._admitted()) is not None:
                            self._readers.append(reader)
                            selector.register(reader, selectors.EVENT_READ)
                            due = min(due, now)
                    else:
                        # A reader has nothing to say after its password: it has left.
                        self._drop(selector, key.fileobj)
                if not self._readers or time.monotonic() < due:
                    continue
                due = time.monotonic() + self._interval
                taken = self._take()
                if taken is None or len(taken) > MAX_BYTES:
                    continue
                for reader in list(self._readers):
                    try:
                        reader.sendall(_LENGTH.pack(len(taken)) + taken)
                    except OSError:
                        self._drop(selector, reader)

    def _admitted(self) -> socket.socket | None:
        """Take a connection of one who may see it; None for others."""
        try:
            reader, _ = self._listener.accept()
        except OSError:
            return None
        reader.settimeout(PATIENCE)
        try:
            if len(self._readers) < MAX_READERS and _is_own(reader):
                given = reader.recv(_PASSWORD, socket.MSG_WAITALL)
                if hmac.compare_digest(given, self._password):
                    return reader
        except OSError:
            pass
        reader.close()
        return None

    def _drop(self, selector: selectors.BaseSelector, reader: object) -> None:
        assert isinstance(reader, socket.socket)
        selector.unregister(reader)
        reader.close()
        self._readers.remove(reader)


async def follow(engine_id: str, rank: int) -> AsyncIterator[bytes]:
    """Yield an engine's snapshots as they come, as bytes that nobody has checked yet.

    Args:
        engine_id: Id of the server's engines, of its KV-transfer config.
        rank: The engine's data-parallel index.

    Raises:
        OSError: No engine of this id and index listens on this machine, or it has ended.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        # By hand: uvloop, which vLLM's server runs on, cuts such a name at its first byte, 0.
        await asyncio.get_running_loop().sock_connect(connection, _address(engine_id, rank))
        if not _is_own(connection):
            raise PermissionError("the socket belongs to another user")
        reader, writer = await asyncio.open_unix_connection(sock=connection)
    except BaseException:
        connection.close()
        raise
    try:
        writer.write(_password(engine_id))
        await writer.drain()
        while True:
            try:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                if length > MAX_BYTES:
                    raise ConnectionError(f"a snapshot of {length:,} bytes")
                taken = await reader.readexactly(length)
            except asyncio.IncompleteReadError:
                raise ConnectionError("the engine has ended") from None
            yield taken
    finally:
        writer.close()
