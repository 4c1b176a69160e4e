"""`kvplug serve` under clients that leave, a kill while it writes, and a disk that fills up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import SECONDS, Server, serving
from waiting import wait_for

from kvplug.hosts.vllm.flags import EXTENSION
from kvplug_lab.engine.trial import connector_flags
from kvplug_lab.models import tiny_llama

httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(3000)]

REQUESTS = 2_000
AT_ONCE = 24
WRONG = [{"sequnce": "off"}, {"segments": [1 << 40]}, {"reuse": 3}, {"session_id": "x" * 999}]
"""Options that no request may have."""
GROWTH = 8 << 20
"""Bytes that a server's processes may grow by from the second to the fourth quarter of the load.
Thrice what was seen; 1,000 requests that each left their tokens behind would be more."""

FLAGS: dict[str, Any] = {
    "block-size": 32,
    "max-model-len": 1024,
    "max-num-batched-tokens": 256,
    "num-gpu-blocks-override": 96,
    "max-num-seqs": 16,
    "dtype": "float32",
    "enforce-eager": True,
}
WINDOWED = {
    "prefix_cache": "s3fifo",
    "sequence": {"use": "sink_window", "sink": 64, "window": 128},
}


def reusing(folder: Path, **store: int) -> dict[str, Any]:
    return {
        "reuse": {
            "use": ["structure", "position", "mask"],
            "approximate": True,
            "segments": {"by": "request", "min_tokens": 16},
            "store": {"directory": str(folder), **store},
            "recompute": {"gaps": 64},
        }
    }


def config(folder: Path, section: dict[str, Any]) -> Path:
    flags = dict(FLAGS)
    if "reuse" in section:
        flags["worker-extension-cls"] = EXTENSION
    file = folder / "deployment.yaml"
    data = flags | {"kv-transfer-config": connector_flags(section)}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def prompt(choose: random.Random, n: int) -> list[int]:
    return [choose.randrange(10, 300) for _ in range(n)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=2)


# -- a load ----------------------------------------------------------------------------------------


class Load:
    """Requests of every sort, from a seed: some clients stay, some leave, some ask for too much.

    Args:
        server: The server.
        seed: Seed of the requests.
    """

    def __init__(self, server: Server, seed: int):
        self._choose = random.Random(seed)
        self._url = f"{server.url}/v1/completions"
        self._documents = [prompt(self._choose, 40 + 9 * i) for i in range(12)]
        self.ends: Counter[str] = Counter()

    def run(self, count: int) -> None:
        """Send requests, at most `AT_ONCE` at a time."""
        asyncio.run(self._run([self._body() for _ in range(count)]))

    def _body(self) -> tuple[dict[str, Any], str]:
        choose = self._choose
        parts = choose.sample(self._documents, choose.randint(1, 4))
        text = [t for part in parts for t in part] + prompt(choose, choose.randint(1, 20))
        asked: dict[str, Any] = {"segments": [len(p) for p in parts]}
        if choose.random() < 0.4:
            asked["reuse"] = choose.choice(["approximate", "off"])
        if choose.random() < 0.2:
            asked["sequence"] = "off"
        if choose.random() < 0.2:
            asked["session_id"] = f"chat-{choose.randrange(10_000)}"
        if choose.random() < 0.1:
            asked = choose.choice(
                [
                    {"sequnce": "off"},
                    {"segments": [1 << 40]},
                    {"reuse": 3},
                    {"session_id": "x" * 999},
                ]
            )
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": text[:900],
            "max_tokens": choose.choice([1, 4, 16, 40]),
            "temperature": choose.choice([0, 0, 1]),
            "ignore_eos": True,
            "stream": choose.random() < 0.6,
            "kv_transfer_params": {"kvplug": asked},
        }
        if choose.random() < 0.2:
            body["cache_salt"] = f"tenant {choose.randrange(5)}"
        if choose.random() < 0.1:
            body |= {"n": 2, "temperature": 1}
        if choose.random() < 0.05:
            body["prompt_logprobs"] = 1
        if choose.random() < 0.05:
            body["logprobs"] = 2
        if choose.random() < 0.1:
            body["stop"] = ["a", "e"]
        if choose.random() < 0.03:
            body["prompt"] = prompt(choose, 2_000)
        body["stream"] &= "prompt_logprobs" not in body
        return body, choose.choice(["stays"] * 5 + ["leaves", "leaves", "aborts"])

    async def _run(self, bodies: list[tuple[dict[str, Any], str]]) -> None:
        limit = asyncio.Semaphore(AT_ONCE)
        timeout = httpx.Timeout(SECONDS)
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=4)
        async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:

            async def one(body: dict[str, Any], how: str) -> None:
                async with limit:
                    self.ends[await self._send(client, body, how)] += 1

            await asyncio.gather(*(one(*b) for b in bodies))

    async def _send(self, client: Any, body: dict[str, Any], how: str) -> str:
        if how == "aborts":
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(self._choose.choice([0.001, 0.02, 0.1])):
                    await client.post(self._url, json=body)
            return how
        async with client.stream("POST", self._url, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return str(answer.status_code)
            lines = 0
            async for _ in answer.aiter_lines():
                lines += 1
                if how == "leaves" and lines > 2:
                    return how
        return "stays"


def resident(server: Server) -> int:
    """Bytes in memory of the server and all its processes."""
    root = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in (root, *root.children(recursive=True)))


def idle(server: Server) -> bool:
    return not server.running() and not server.metric("vllm:num_requests_waiting")


@pytest.mark.parametrize("deployment", ["windowed", "reusing"])
def test_clients_that_leave_leave_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deployment: str
) -> None:
    # oneDNN keeps a kernel for every shape of a batch, 1,024 of them, on stock vLLM as well.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    section = WINDOWED
    if deployment == "reusing":
        section = reusing(tmp_path / "segments", memory=8, disk=16)
    with serving(tmp_path, str(config(tmp_path, section)), "--model", str(model)) as server:
        load = Load(server, seed=len(deployment))
        sizes = []
        for _ in range(4):
            load.run(REQUESTS // 4)
            wait_for(lambda: idle(server), "an idle server", SECONDS)
            sizes.append(resident(server))
        assert sum(load.ends.values()) == REQUESTS
        assert load.ends["leaves"] > REQUESTS / 10 < load.ends["stays"], load.ends
        assert load.ends["aborts"] > REQUESTS / 20
        assert set(load.ends) <= {"leaves", "stays", "aborts", "400"}, load.ends
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        assert sizes[3] - sizes[1] < GROWTH, sizes
        assert server.metric("kvplug_policy_fallbacks_total") == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=SECONDS) == 0
    # Once its engine is gone, vLLM may report that before it ends the task that would hear of it.
    log, stopped, _ = server.log().partition("[shutdown] MPClient: complete")
    assert stopped and "Traceback" not in log
    assert "kvplug summary after" in log


# -- a kill while segments are written -------------------------------------------------------------


def ask(server: Server, tokens: list[int], n: int = 8, **kvplug: Any) -> dict[str, Any]:
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={
            "model": "tiny",
            "prompt": tokens,
            "max_tokens": n,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "kv_transfer_params": {"kvplug": kvplug},
        },
        timeout=SECONDS,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def token_ids(answer: dict[str, Any]) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


def torn(folder: Path) -> None:
    """What a crash of the file system could leave of a file, and what one of the process does."""
    whole = sorted(folder.glob("*.kvseg"))[0]
    name = whole.name
    (folder / f".{name}.0badcafe.tmp").write_bytes(whole.read_bytes()[:100])
    whole.write_bytes(whole.read_bytes()[:-50])


@contextlib.contextmanager
def killed(server: Server) -> Iterator[None]:
    """Kill all of a server's processes at the end of the block."""
    yield
    children = psutil.Process(server.process.pid).children(recursive=True)
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children)


def test_killed_while_it_writes_it_serves_nothing_wrong(
    model: Path, tmp_path: Path, right: Callable[[list[int]], list[int]]
) -> None:
    """Twice: the second engine finds what two kills left behind."""
    folder = tmp_path / "segments"
    file = str(config(tmp_path, reusing(folder)))
    choose = random.Random(3)
    texts = [prompt(choose, 360) for _ in range(24)]
    for _ in range(2):
        with serving(tmp_path, file, "--model", str(model)) as server, killed(server):
            before = len(list(folder.glob("*.kvseg")))

            async def leave(server: Server = server, before: int = before) -> None:
                """Segments come faster than the disk takes them; none of the answers matters."""
                async with httpx.AsyncClient(timeout=SECONDS) as client:
                    asked = [
                        client.post(
                            f"{server.url}/v1/completions",
                            json={
                                "model": "tiny",
                                "prompt": text,
                                "max_tokens": 1,
                                "kv_transfer_params": {"kvplug": {"segments": [40] * 9}},
                            },
                        )
                        for text in texts
                    ]
                    waiting = asyncio.ensure_future(asyncio.gather(*asked, return_exceptions=True))
                    while len(list(folder.glob("*.kvseg"))) < before + 5 and not waiting.done():
                        await asyncio.sleep(0.005)
                    waiting.cancel()

            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(leave())
        choose.shuffle(texts)
    files = list(folder.glob("*.kvseg"))
    assert len(files) >= 10
    torn(folder)
    with serving(tmp_path, file, "--model", str(model)) as server:
        assert not list(folder.glob(".*.tmp"))
        reused = 0
        for text in texts:
            answer = ask(server, text, segments=[40] * 9)
            assert token_ids(answer) == right(text)
            said = (answer.get("kv_transfer_params") or {}).get("kvplug") or {}
            assert said.get("exact", True)
            reused += said.get("reused", 0)
        assert reused >= 5 * 40
        assert server.metric("kvplug_reuse_refused_total", cause="truncated") == 1


@pytest.fixture(scope="module")
def right(model: Path) -> Callable[[list[int]], list[int]]:
    """What plain transformers answers."""
    from oracle import Oracle

    oracle = Oracle(model)
    return lambda text: oracle.greedy(text, 8)


# -- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "segments"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("only root mounts a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_costs_files_and_no_answer(
    model: Path, tmp_path: Path, small_disk: Path, right: Callable[[list[int]], list[int]]
) -> None:
    file = str(config(tmp_path, reusing(small_disk)))
    choose = random.Random(5)
    texts = [prompt(choose, 360) for _ in range(8)]
    with serving(tmp_path, file, "--model", str(model)) as server:
        for text in texts:
            ask(server, text, 1, segments=[40] * 9)
        full, cause = "kvplug_segment_errors_total", "no_space_left_on_device"
        wait_for(lambda: server.metric(full, cause=cause) > 0, "a write that fails, in the metrics")
        again = [ask(server, text, segments=[40] * 9) for text in reversed(texts)]
        assert [token_ids(a) for a in again] == [right(text) for text in reversed(texts)]
        assert not list(small_disk.glob(".*.tmp"))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=SECONDS) == 0
    log = server.log()
    assert log.count("a segment could not be written and stays in memory only") == 1
    assert "failed no space left on device" in log
