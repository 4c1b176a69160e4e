"""The live page without an engine: a made-up one that publishes, a server, and a browser.

As a command it measures the page: ``python kvplug/tests/live_page.py --blocks 100000``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvplug.hosts.vllm.page import LivePage
from kvplug.observe.live import (
    BlockState,
    Breakers,
    LayerShare,
    Outcome,
    PolicyState,
    RequestSpan,
    Snapshot,
    TierState,
    Totals,
    counted,
    encode_map,
    runs,
)
from kvplug.observe.live_socket import Publisher

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)
SECONDS = 120.0
"""For anything to happen on a busy machine."""

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def made(
    step: int = 0,
    blocks: int = 4096,
    requests: int = 24,
    listed: Sequence[RequestSpan] | None = None,
    **instead: Any,
) -> Snapshot:
    """A snapshot of a made-up engine under load; the same for the same arguments but its clock.

    Args:
        step: Snapshots before it.
        blocks: Blocks of the pool.
        requests: Requests that hold most of them.
        listed: Requests to list instead of those.
        instead: Further fields to set.
    """
    random = np.random.default_rng(step)
    states = np.zeros(blocks, np.uint8)
    states[0] = BlockState.RESERVED
    at, shown = 1, []
    share = max(1, int(0.7 * blocks) // max(1, requests))
    for i in range(requests):
        size = max(1, int(share * (0.4 + 1.2 * ((i * 7919 + 13) % 100) / 100)))
        kind = (BlockState.HELD, BlockState.PARTLY_EVICTED, BlockState.APPROXIMATE)[(i % 8) // 3]
        kind = BlockState.LOADING if i % 11 == 10 else kind
        states[at : at + size] = kind
        held = np.ones(size, np.bool_)
        if kind is BlockState.PARTLY_EVICTED:
            held[size // 8 : 3 * size // 5] = False
        shown.append(
            RequestSpan(
                id=f"chatcmpl-{i:03d}-8c41d7e2",
                status="loading" if kind is BlockState.LOADING else "running",
                prompt=16 * size,
                computed=16 * size + step,
                output=40 + step,
                hit=16 * (size // 3),
                table=size,
                held=int(held.sum()),
                resident=runs(held),
                approximate_from=8 * size if kind is BlockState.APPROXIMATE else None,
                age=1.5 * i,
            )
        )
        at += size
    cached = random.random(max(0, blocks - at)) < 0.6
    states[at:] = np.where(cached, BlockState.CACHED, BlockState.EMPTY)[: blocks - min(at, blocks)]
    outcomes = [
        ("prefix cache", "hit", 52_000 + 300 * step, "tokens"),
        ("prefix cache", "computed", 31_000 + 100 * step, "tokens"),
        ("host", "hit", 1_834, "chunks"),
        ("host", "lost", 3, "chunks"),
        ("all tiers", "not found", 620, "chunks"),
        ("all tiers", "loading takes longer than computing", 57, "refusals"),
        ("all tiers", "no text", 4, "refusals"),
    ]
    fields: dict[str, Any] = dict(
        at=time.time(),
        clock=time.monotonic(),
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        kvplug="0.1.0",
        vllm="0.32.0",
        block_size=16,
        block_bytes=368_640,
        blocks=blocks,
        map=encode_map(states),
        states=tuple(counted(states)),
        requests=tuple(shown if listed is None else listed),
        policies=(
            PolicyState(
                kind="prefix_cache",
                name="foresight",
                exact=True,
                acted=8_132,
                counters={"evicted": 8132.0, "hits": 52341.0, "reordered": 911.0},
            ),
            PolicyState(
                kind="sequence",
                name="snapkv",
                exact=False,
                acted=412,
                counters={"freed": 412.0, "freed_bytes": 151879680.0},
            ),
            PolicyState(kind="tiers", name="host", exact=True, acted=1834, errors=2),
            PolicyState(kind="lifecycle", name="watermarks", exact=True),
        ),
        tiers=(
            TierState(name="host", used=5_905_580_032, capacity=8 << 30, chunks=16_020, read=9.1e9),
            TierState(name="disk", used=71 << 30, capacity=200 << 30, chunks=201_500, durable=True),
        ),
        outcomes=tuple(Outcome(level=a, cause=b, count=c, unit=d) for a, b, c, d in outcomes),
        layers=tuple(
            LayerShare(layer=i, token_bytes=768, table=3000, held=3000 - 70 * i) for i in range(30)
        ),
        breakers=Breakers(closed=5, half_open=1, open=1),
        totals=Totals(
            steps=1000 + step,
            scheduled=80_000 + 2_000 * step + int(random.integers(0, 400)),
            generated=9_000 + 130 * step + int(random.integers(0, 20)),
            finished=40 + step // 4,
            preemptions=2,
        ),
        cost=0.004,
    )
    return Snapshot(**(fields | instead))


class Engine:
    """A made-up engine that publishes.

    Attributes:
        engine_id: Its id.
        rank: Its data-parallel index.
        step: Snapshots so far.
        arguments: Of `made`, for each.
        publisher: Sends them.
    """

    def __init__(self, engine_id: str, rank: int = 0, interval: float = 1.0, **arguments: Any):
        self.engine_id, self.step, self.arguments = engine_id, 0, arguments
        self.rank = rank
        self.publisher = Publisher(engine_id, rank, self._take, interval)
        self.publisher.start()

    def _take(self) -> bytes:
        self.step += 1
        return made(self.step, **(self.arguments | {"engine": self.rank})).json_bytes()


@contextlib.contextmanager
def engine(engine_id: str, rank: int = 0, **arguments: Any) -> Iterator[Engine]:
    """An engine while the block runs."""
    found = Engine(engine_id, rank, **arguments)
    try:
        yield found
    finally:
        found.publisher.close()


class Other:
    """What the page's middleware stands before: answers 404, as vLLM does to what it lacks."""

    def __init__(self, engine_id: str | None, keys: Sequence[str] = (), engines: int = 1):
        parallel = SimpleNamespace(
            local_engines_only=False,
            data_parallel_size=engines,
            data_parallel_size_local=engines,
            data_parallel_index=0,
        )
        transfer = SimpleNamespace(engine_id=engine_id) if engine_id is not None else None
        self.state = SimpleNamespace(
            args=SimpleNamespace(api_key=list(keys)),
            vllm_config=SimpleNamespace(kv_transfer_config=transfer, parallel_config=parallel),
            server=SimpleNamespace(should_exit=False),
        )
        self.page = LivePage(self._answer)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        scope["app"] = self
        await self.page(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"Not Found"})


@contextlib.contextmanager
def serving(app: Other) -> Iterator[str]:
    """URL of a server of the app while the block runs."""
    import uvicorn
    import uvloop

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        app.state.server = server
        # Signals are the main thread's.
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        # On the loop of vLLM's own server.
        thread = threading.Thread(
            target=lambda: uvloop.run(server.serve(sockets=[listening])), daemon=True
        )
        thread.start()
        try:
            until = time.monotonic() + SECONDS
            while not server.started:
                assert time.monotonic() < until, "the server did not start"
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive(), "an open page kept the server from ending"


def needs_browser() -> None:
    """Skip the test where there is no browser; in CI, fail it."""
    missing = [path for path in (CHROMIUM, DRIVER) if shutil.which(path) is None]
    if not missing:
        return
    reason = f"{' and '.join(missing)} not installed: apt-get install chromium-driver"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """A headless Chromium while the block runs."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="kvplug-chromium-") as folder:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            resize(driver, width, height)
            scheme(driver, dark)
            yield driver
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """Give the page a viewport; a window is never narrower than about 500 px."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def scheme(driver: Any, dark: bool) -> None:
    """Prefer dark or light colours."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_for(what: Any, name: str) -> Any:
    """Value of a call once it is true."""
    until = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < until, f"{name}: not after {SECONDS:g} s"
        time.sleep(0.05)
    return found


def refreshes(driver: Any) -> list[float]:
    """Milliseconds of each refresh so far, as the page measured them."""
    script = "return performance.getEntriesByName('kvplug-refresh').map((e) => e.duration)"
    found: list[float] = driver.execute_script(script)
    return found


def thread_seconds(driver: Any) -> float:
    """Seconds that the page's main thread has computed."""
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    (found,) = [one["value"] for one in metrics if one["name"] == "TaskDuration"]
    return float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the live page in headless Chromium.")
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--refreshes", type=int, default=40)
    parser.add_argument("--pictures", type=Path, help="folder to write screenshots to")
    given = parser.parse_args()
    name = f"measured-{os.getpid()}"
    load = {"blocks": given.blocks, "requests": given.requests}
    with (
        engine(name, interval=0.25, **load) as publishing,
        serving(Other(name)) as url,
        browser() as driver,
    ):
        # The thread's own time: in it, waiting for a processor that others use does not count.
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        driver.get(f"{url}/kvplug")
        wait_for(lambda: len(refreshes(driver)) > 1, "a refresh")
        before, busy = len(refreshes(driver)), thread_seconds(driver)
        wait_for(lambda: len(refreshes(driver)) > given.refreshes, "refreshes")
        busy = thread_seconds(driver) - busy
        made_since = len(refreshes(driver)) - before
        times = sorted(refreshes(driver)[1:])
        result = {
            "blocks": given.blocks,
            "requests": given.requests,
            "refreshes": len(times),
            "thread_ms": round(1e3 * busy / made_since, 1),
            "min_ms": round(times[0], 1),
            "p50_ms": round(statistics.median(times), 1),
            "p99_ms": round(times[min(len(times) - 1, int(0.99 * len(times)))], 1),
            "snapshot_bytes": len(publishing._take()),
            "browser": driver.capabilities["browserVersion"],
        }
        print(json.dumps(result, indent=2))
        if given.pictures is not None:
            given.pictures.mkdir(parents=True, exist_ok=True)
            for width, height in ((1280, 1180), (400, 2600)):
                for dark in (False, True):
                    resize(driver, width, height)
                    scheme(driver, dark)
                    time.sleep(1.5)
                    shade = "dark" if dark else "light"
                    driver.save_screenshot(str(given.pictures / f"live-{width}-{shade}.png"))


if __name__ == "__main__":
    main()
