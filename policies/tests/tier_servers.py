"""Servers that tiers are tested against, started on loopback, and a proxy that misbehaves."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SECRET = "loopback-secret"


def absent(what: str) -> None:
    """Skip the test for something that is not installed; in CI, fail it."""
    reason = f"{what} is not installed: see requirements/servers.sh and requirements/cpu.in"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def needs(program: str) -> str:
    """Path of a program."""
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        absent(program)
    return str(found)


def needs_module(name: str) -> None:
    """Go on only where a module loads."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        absent(f"{name} ({error})")


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, and whose successors by 10,000 are free as well."""
    with contextlib.ExitStack() as stack:
        found = []
        while len(found) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port < 55000:
                found.append(port)
        return found


def wait_for(what: Callable[[], bool], seconds: float, name: str) -> None:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            pytest.fail(f"{name} is not ready after {seconds:g} s")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


class Process:
    """A server's process, which can be killed, started again and stopped for a while."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str] | None = None):
        self.command = command
        self.folder = folder
        self.environment = {**os.environ, **(environment or {})}
        self.running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.running = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait()
            self.running = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop it from running, so that it accepts connections and never answers."""
        assert self.running is not None
        self.running.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.running.send_signal(signal.SIGCONT)


class RedisServer:
    """A Redis server with a password, which keeps nothing on disk."""

    def __init__(self, folder: Path, *options: str):
        (self.port,) = free_ports(1)
        command = [needs("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--requirepass", SECRET, *options]
        self.process = Process(command, folder)
        self.start()

    def start(self) -> None:
        self.process.start()
        wait_for(lambda: listens(self.port), 20, "redis-server")

    def url(self, port: int | None = None, password: str = SECRET) -> str:
        return f"redis://:{password}@127.0.0.1:{port or self.port}/0"


class SeaweedServer:
    """SeaweedFS with its S3 gateway, and a bucket."""

    bucket = "kvplug"

    def __init__(self, folder: Path, volumes: int = 100, volume_mib: int = 64):
        self.folder = folder
        self.port, master, volume, filer = free_ports(4)
        weed = needs("weed")
        identities = (
            '{"identities": [{"name": "test", "credentials": [{"accessKey": "test", "secretKey": "'
            + SECRET
            + '"}], "actions": ["Admin", "Read", "Write", "List"]}]}'
        )
        (folder / "s3.json").write_text(identities, "utf-8")
        (folder / "data").mkdir()
        command = [weed, "server", f"-dir={folder / 'data'}", "-s3", "-ip=127.0.0.1"]
        command += [f"-s3.port={self.port}", f"-master.port={master}", f"-volume.port={volume}"]
        command += [f"-filer.port={filer}", f"-s3.config={folder / 's3.json'}"]
        command += [f"-master.volumeSizeLimitMB={volume_mib}", f"-volume.max={volumes}"]
        command += ["-master.electionTimeout=1s"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-ip.bind=127.0.0.1"]
        self.process = Process(command, folder)
        self.start()

    def start(self) -> None:
        self.process.start()
        wait_for(self._made, 60, "weed server")

    def _made(self) -> bool:
        """True once an object is stored; the server makes the bucket for it."""
        import obstore
        from obstore.store import S3Store

        config = {"endpoint": self.endpoint(), "region": "us-east-1"}
        config |= {"access_key_id": "test", "secret_access_key": SECRET}
        store = S3Store(
            self.bucket,
            config=config,  # type: ignore[arg-type]
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )
        with contextlib.suppress(Exception):
            obstore.put(store, "ready", b"yes")
            return True
        return False

    def endpoint(self, port: int | None = None) -> str:
        return f"http://127.0.0.1:{port or self.port}"

    def credentials(self, secret: str = SECRET) -> str:
        path = self.folder / f"credentials-{len(secret)}"
        path.write_text(
            f"[default]\naws_access_key_id = test\naws_secret_access_key = {secret}\n", "utf-8"
        )
        return str(path)


class MooncakeServers:
    """A master and a metadata server of a Mooncake store."""

    def __init__(self, folder: Path):
        self.port, self.metadata_port, self.metrics_port = free_ports(3)
        master = [needs("mooncake_master"), "--port", str(self.port)]
        master += ["--metrics_port", str(self.metrics_port), "--rpc_address", "127.0.0.1"]
        master += ["--client_ttl", "2"]
        metadata = [needs("mooncake_http_metadata_server"), "--port", str(self.metadata_port)]
        metadata += ["--host", "127.0.0.1"]
        self.master = Process(master, folder)
        self.metadata_server = Process(metadata, folder)
        self.metadata_server.start()
        self.start()

    def start(self) -> None:
        self.master.start()
        wait_for(lambda: listens(self.port), 30, "mooncake_master")
        wait_for(lambda: listens(self.metadata_port), 30, "mooncake_http_metadata_server")

    @property
    def metadata(self) -> str:
        return f"http://127.0.0.1:{self.metadata_port}/metadata"


class Proxy:
    """Passes connections on to a server; can be slow, or go silent half-way.

    Attributes:
        delay: Seconds before anything of an answer is passed on.
        silent: True while connections are accepted, and nothing is ever answered.
    """

    def __init__(self, to: int):
        self._to = to
        self.delay = 0.0
        self.silent = False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._open.append(client)
            try:
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                client.close()
                continue
            self._open.append(server)
            for source, target, back in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._pass, args=(source, target, back), daemon=True
                ).start()

    def _pass(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.silent:
                    continue
                if back and self.delay:
                    time.sleep(self.delay)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listening.close()
        for one in self._open:
            one.close()


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    needs_module("redis")
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), *options)
        try:
            yield server
        finally:
            server.process.kill()


@contextlib.contextmanager
def seaweed_server(volumes: int = 100, volume_mib: int = 64) -> Iterator[SeaweedServer]:
    needs_module("obstore")
    with tempfile.TemporaryDirectory() as folder:
        server = SeaweedServer(Path(folder), volumes, volume_mib)
        try:
            yield server
        finally:
            server.process.kill()


@contextlib.contextmanager
def mooncake_servers() -> Iterator[MooncakeServers]:
    needs_module("mooncake.store")
    with tempfile.TemporaryDirectory() as folder:
        servers = MooncakeServers(Path(folder))
        try:
            yield servers
        finally:
            servers.master.kill()
            servers.metadata_server.kill()


@contextlib.contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    one = Proxy(port)
    try:
        yield one
    finally:
        one.close()


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that says the same whatever it is asked, and hangs up where that is HTTP; its
    port."""

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            while client.recv(1 << 16):
                client.sendall(answer)
                if answer.startswith(b"HTTP"):
                    return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listening.getsockname()[1])
        # Wakes the thread that accepts.
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
