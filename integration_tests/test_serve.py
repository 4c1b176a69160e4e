"""`kvplug serve` as a user runs it: a server in a process of its own, spoken to over HTTP."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 512
"""Tokens that configs/quickstart.yaml keeps of a request."""
BLOCK = 32
START_SECONDS = 240
STOP_SECONDS = 60

SHORT = [{"role": "user", "content": "Say something."}]


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
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the server ended with {self.process.returncode}:\n{self.log()}")
            try:
                self.get("/health")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        pytest.fail(f"the server was not healthy in {START_SECONDS} s:\n{self.log()}")

    def counters(self) -> dict[tuple[str, str, str], float]:
        """`vllm:kvplug_policy_total` by kind, policy and counter."""
        found = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("vllm:kvplug_policy_total{"):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                value = float(line.rsplit(" ", 1)[1])
                found[labels["kind"], labels["policy"], labels["counter"]] = value
        return found

    def running(self) -> float:
        lines = self.get("/metrics").splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("vllm:num_requests_running{")
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, *arguments: str) -> Server:
    """Start `kvplug serve` in its own session, so that nothing of it outlives the test."""
    port, log = free_port(), folder / "server.log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", "from kvplug.cli import app; app()", "serve", *arguments]
    command += ["--", "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    found = start(folder, str(ROOT / "configs" / "quickstart.yaml"), "--model", str(tiny))
    try:
        found.wait_until_healthy()
        yield found
    finally:
        if found.process.poll() is None:
            os.killpg(found.process.pid, signal.SIGKILL)
            found.process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)


def test_the_process_became_the_server_it_announced(server: Server) -> None:
    log = server.log()
    assert "--config" in log.splitlines()[0]
    assert f"pid={server.process.pid}" in log, "the server is a child, not the process itself"
    assert "kvplug is on: prefix_cache: lru {}; sequence: sink_window" in log


def test_a_chat_completion(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=SHORT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.model_extra.get("kv_transfer_params") is None, "nothing was freed"


def test_a_stream_says_what_the_whole_answer_says(client: Any) -> None:
    asked = {"model": "tiny", "messages": SHORT, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stream = client.chat.completions.create(**asked, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole
    assert len(pieces) > 2


def test_an_aborted_stream_leaves_a_server_that_serves(server: Server, client: Any) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=SHORT,
        max_tokens=3500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert server.running() == 1
    stream.close()
    deadline = time.monotonic() + 30
    while server.running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.running() == 0, "the aborted request runs on"
    answer = client.chat.completions.create(model="tiny", messages=SHORT, max_tokens=4)
    assert answer.choices[0].message.content is not None


def test_a_prompt_over_the_budget_says_what_it_gave_back(server: Server, client: Any) -> None:
    before = server.counters().get(("sequence", "sink_window", "freed"), 0)
    prompt = [10 + i % 250 for i in range(3 * BUDGET)]
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens == 3 * BUDGET
    said = answer.model_extra["kv_transfer_params"]["kvplug"]
    assert said["exact"] is False
    # Sink and window, the block being written, and what stands until the next step is scheduled.
    kept = 3 * BUDGET // BLOCK - said["blocks_freed"]
    assert BUDGET // BLOCK <= kept <= BUDGET // BLOCK + 3
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        freed = server.counters().get(("sequence", "sink_window", "freed"), 0) - before
        if freed >= said["blocks_freed"]:
            break
        time.sleep(0.5)
    assert freed == said["blocks_freed"]


def test_a_request_may_keep_everything(client: Any) -> None:
    prompt = [11 + i % 240 for i in range(2 * BUDGET)]
    answer = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=4,
        extra_body={"kv_transfer_params": {"kvplug": {"sequence": "off"}}},
    )
    assert answer.model_extra["kv_transfer_params"]["kvplug"] == {"exact": True, "blocks_freed": 0}


def test_sigterm_ends_it_with_the_closing_summary(server: Server) -> None:
    # The last test that talks to the server: it stops it.
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(timeout=STOP_SECONDS)
    log = server.log()
    assert code == 0, log[-3000:]
    assert re.search(r"kvplug summary after [\d,]+ scheduler steps", log), log[-3000:]
    assert re.search(r"sequence: sink_window \(approximate\): freed [1-9]", log), log[-3000:]
    assert "prefix_cache: lru (exact)" in log


def test_a_deployment_the_engine_refuses_ends_with_the_refusal(tmp_path: Path, tiny: Path) -> None:
    """Only the engine knows the model's layers; the line the user needs is in the log."""
    text = (ROOT / "configs" / "sink_window.yaml").read_text("utf-8")
    config = tmp_path / "layers.yaml"
    config.write_text(text.replace('"0-9"', '"7"'), encoding="utf-8")
    server = start(tmp_path, str(config), "--model", str(tiny))
    try:
        code = server.process.wait(timeout=START_SECONDS)
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
    assert code != 0
    assert "sink_window: layers '7' is outside the model's 0-1." in server.log()
