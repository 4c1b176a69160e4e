"""`kvplug serve` as a user runs it: a server in a process of its own, spoken to over HTTP."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 512
"""Tokens that configs/quickstart.yaml keeps of a request."""
BLOCK = 32
SECONDS = 600
"""For anything to happen on a busy machine."""

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
        with urllib.request.urlopen(f"{self.url}{path}", timeout=SECONDS) as answer:
            return str(answer.read().decode())

    def is_healthy(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the server ended with {self.process.returncode}:\n{self.log()}")
        self.get("/health")
        return True

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = self.get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

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
        return self.metric("vllm:num_requests_running")


def free_port() -> int:
    """A free port below the range that the kernel takes ephemeral ports from."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    found = start(folder, str(ROOT / "configs" / "quickstart.yaml"), "--model", str(tiny))
    try:
        wait_for(found.is_healthy, "a healthy server", SECONDS)
        yield found
    finally:
        if found.process.poll() is None:
            os.killpg(found.process.pid, signal.SIGKILL)
            found.process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=SECONDS, max_retries=0
    )


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
    asked, generated = 3500, "vllm:generation_tokens_total"
    before = server.metric(generated)
    stream = client.chat.completions.create(
        model="tiny",
        messages=SHORT,
        max_tokens=asked,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    wait_for(lambda: server.running() == 1, "a running request")
    stream.close()
    wait_for(lambda: server.running() == 0, "the end of the aborted request")
    assert server.metric(generated) - before < asked, "the aborted request ran to its end"
    answer = client.chat.completions.create(model="tiny", messages=SHORT, max_tokens=4)
    assert answer.choices[0].message.content is not None


def test_a_prompt_over_the_budget_says_what_it_gave_back(server: Server, client: Any) -> None:
    def freed() -> float:
        return server.counters().get(("sequence", "sink_window", "freed"), 0)

    before = freed()
    prompt = [10 + i % 250 for i in range(3 * BUDGET)]
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens == 3 * BUDGET
    reported = answer.model_extra["kv_transfer_params"]["kvplug"]
    assert reported["exact"] is False
    # Sink and window, the block being written, and what stands until the next step is scheduled.
    kept = 3 * BUDGET // BLOCK - reported["blocks_freed"]
    assert BUDGET // BLOCK <= kept <= BUDGET // BLOCK + 3
    wait_for(lambda: freed() - before >= reported["blocks_freed"], "freed blocks in the metrics")
    assert freed() - before == reported["blocks_freed"]


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
    code = server.process.wait(timeout=SECONDS)
    log = server.log()
    assert code == 0, log[-3000:]
    assert re.search(r"kvplug summary after [\d,]+ scheduler steps", log), log[-3000:]
    assert re.search(r"sequence: sink_window \(approximate\): freed [1-9]", log), log[-3000:]
    assert "prefix_cache: lru (exact)" in log


@pytest.mark.slow  # test_refusals starts engines alone with everything that they refuse
def test_a_deployment_the_engine_refuses_ends_with_the_refusal(tmp_path: Path, tiny: Path) -> None:
    """Only the engine knows the model's layers; the line the user needs is in the log."""
    text = (ROOT / "configs" / "sink_window.yaml").read_text("utf-8")
    config = tmp_path / "layers.yaml"
    config.write_text(text.replace('"0-9"', '"7"'), encoding="utf-8")
    server = start(tmp_path, str(config), "--model", str(tiny))
    try:
        code = server.process.wait(timeout=SECONDS)
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
    assert code != 0
    assert "sink_window: layers '7' is outside the model's 0-1." in server.log()
