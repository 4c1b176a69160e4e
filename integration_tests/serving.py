"""`kvplug serve` in a process of its own, spoken to over HTTP."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

SECONDS = 600
"""For anything to happen on a busy machine."""


KVPLUG_SERVE = ("-c", "from kvplug.cli import app; app()", "serve", "--")
"""`kvplug serve`, and what vLLM's own flags come after."""

VLLM_SERVE = (str(Path(__file__).with_name("vllm_serve.py")), "serve", "")
"""`vllm serve`, for what `kvplug serve` has no flag for."""

EAGER = ("--enforce-eager",)
"""A model that is compiled, as that of `test_serve.py` is, takes longer to start than to test."""


class Server:
    """One `kvplug serve` process, its log and its address."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int):
        self.process, self.log_file, self.port = process, log, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=SECONDS) as answer:
            return str(answer.read().decode())

    def is_healthy(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the server ended with {self.process.returncode}:\n{self.log()}")
        self.get("/health")
        return True

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over its series with some labels."""
        return sum(value for own, value in self.series(name) if labels.items() <= own.items())

    def series(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of a metric."""
        found = []
        for line in self.get("/metrics").splitlines():
            if line.startswith((f"{name}{{", f"{name} ")):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                found.append((labels, float(line.rsplit(" ", 1)[1])))
        return found

    def running(self) -> float:
        return self.metric("vllm:num_requests_running")


def free_port() -> int:
    """A free port below the range that the kernel takes ephemeral ports from."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start(
    folder: Path,
    *arguments: str,
    program: Sequence[str] = KVPLUG_SERVE,
    flags: Sequence[str] = (),
) -> Server:
    """Start `kvplug serve` in its own session, so that nothing of it outlives the test.

    Args:
        folder: Where its log goes.
        arguments: What follows ``kvplug serve``.
        program: What is started in its place, and what separates its own arguments from vLLM's.
        flags: More of vLLM's own arguments.
    """
    port, log = free_port(), folder / "server.log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *program[:-1], *arguments]
    command += [
        *filter(None, program[-1:]),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "tiny",
        *flags,
    ]
    # vLLM kills an engine that has not stopped in this time, and its summary is lost.
    command += ["--shutdown-timeout", str(SECONDS)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    return Server(process, log, port)


@contextlib.contextmanager
def ended(server: Server) -> Iterator[Server]:
    """Leave nothing of a server behind."""
    try:
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


@contextlib.contextmanager
def serving(
    folder: Path,
    *arguments: str,
    program: Sequence[str] = KVPLUG_SERVE,
    flags: Sequence[str] = (),
) -> Iterator[Server]:
    """A healthy server while the block runs; the arguments are those of `start`."""
    with ended(start(folder, *arguments, program=program, flags=flags)) as server:
        wait_for(server.is_healthy, "a healthy server", SECONDS)
        yield server


def connected(server: Server) -> Any:
    """A client of the server."""
    openai = pytest.importorskip("openai")
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", timeout=SECONDS, max_retries=0)
