"""The live page on a real server: guarded, right while requests run and at rest, and no obstacle to
the server's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import EAGER, SECONDS, Server, serving
from waiting import wait_for

from kvplug.hosts.vllm.flags import LIVE_PAGE
from kvplug.observe.live import BlockState, LiveState, Snapshot, decode_map

KEY = "the-servers-key"
BEARER = {"authorization": f"Bearer {KEY}"}
DEPLOYMENT = """
prefix_cache: foresight
sequence: {use: sink_window, sink: 16, window: 64}
observe: {page: true}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "deployment.yaml").write_text(DEPLOYMENT)
    file = str(folder / "deployment.yaml")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_API_KEY", KEY)
        with serving(folder, file, "--model", str(tiny), flags=EAGER) as found:
            yield found


def state(server: Server) -> Snapshot:
    answer = httpx.get(f"{server.url}/kvplug/state", headers=BEARER, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    found = LiveState.parse(answer.content)
    assert found.problem == ""
    (engine,) = found.engines
    return engine


def until(server: Server, wanted: Callable[[Snapshot], bool], name: str) -> Snapshot:
    kept: list[Snapshot] = []

    def is_so() -> bool:
        kept[:] = [state(server)]
        return wanted(kept[0])

    wait_for(is_so, name, SECONDS)
    return kept[0]


class Asking(threading.Thread):
    """A request under way, whose tokens are read as they come."""

    def __init__(self, server: Server, prompt: str, tokens: int):
        super().__init__(daemon=True)
        self.server, self.prompt, self.tokens = server, prompt, tokens
        self.stop = threading.Event()
        self.start()

    def run(self) -> None:
        body = {"model": "tiny", "prompt": self.prompt, "max_tokens": self.tokens, "stream": True}
        with httpx.stream(
            "POST",
            f"{self.server.url}/v1/completions",
            json=body | {"temperature": 0, "ignore_eos": True},
            headers=BEARER,
            timeout=SECONDS,
        ) as answer:
            assert answer.status_code == 200
            for _ in answer.iter_lines():
                if self.stop.is_set():
                    return


@pytest.mark.engine
def test_the_page_is_on_the_server_and_its_data_behind_the_key(server: Server) -> None:
    assert f"--middleware {LIVE_PAGE}" in server.log()
    assert "<title>kvplug</title>" in server.get("/kvplug")
    for path in ("/kvplug/state", "/kvplug/events"):
        assert httpx.get(f"{server.url}{path}", timeout=SECONDS).status_code == 401
        wrong = httpx.get(f"{server.url}{path}", headers={"authorization": "Bearer x"}, timeout=60)
        assert wrong.status_code == 401


@pytest.mark.engine
def test_a_running_request_is_shown_with_what_it_gave_back(server: Server) -> None:
    asking = Asking(server, "one two three " * 80, 1500)
    try:
        found = until(
            server,
            lambda one: any(r.status == "running" and r.held < r.table for r in one.requests),
            "a request that gave blocks back",
        )
    finally:
        asking.stop.set()
        asking.join(SECONDS)
    (request,) = found.requests
    assert request.id.startswith("cmpl-") and request.prompt > 200
    # A sink and a window, with what is evicted between them.
    sink = -(-16 // found.block_size)
    assert len(request.resident) == 2 and request.resident[0] == (0, sink)
    assert request.held == sum(end - first for first, end in request.resident)
    assert found.states[BlockState.PARTLY_EVICTED] == request.held
    states = decode_map(found.map, found.blocks)
    assert states[0] == BlockState.RESERVED and len(states) == found.blocks
    names = {(policy.kind, policy.name): policy.exact for policy in found.policies}
    assert names == {("prefix_cache", "foresight"): True, ("sequence", "sink_window"): False}
    for layer in found.layers:
        assert (layer.table, layer.held) == (request.table, request.held)
        assert layer.token_bytes > 0


@pytest.mark.engine
def test_an_engine_at_rest_shows_what_it_did(server: Server) -> None:
    body = {"model": "tiny", "prompt": "four five six " * 20, "max_tokens": 4, "temperature": 0}
    before = until(server, lambda one: not one.requests, "rest")
    for _ in range(2):
        answer = httpx.post(
            f"{server.url}/v1/completions", json=body, headers=BEARER, timeout=SECONDS
        )
        assert answer.status_code == 200, answer.text
    after = until(
        server, lambda one: one.totals.finished == before.totals.finished + 2, "both ended"
    )
    assert not after.requests and after.totals.generated == before.totals.generated + 8
    assert after.states[BlockState.CACHED] > 0
    held = (BlockState.HELD, BlockState.PARTLY_EVICTED, BlockState.LOADING)
    assert sum(after.states[one] for one in held) == 0

    def hits(snapshot: Snapshot) -> int:
        found = [o for o in snapshot.outcomes if (o.level, o.cause) == ("prefix cache", "hit")]
        return sum(one.count for one in found)

    # All but the last block of the second prompt, up to what is exact.
    assert hits(after) > hits(before)
    # An idle engine is sampled as well.
    later = until(server, lambda one: one.clock > after.clock, "a later snapshot")
    assert later.totals == after.totals and later.policies == after.policies


@pytest.mark.engine
def test_top_shows_the_server(server: Server) -> None:
    command = [sys.executable, "-c", "from kvplug.cli import app; app()", "top", server.url]
    found = subprocess.run(
        command,
        env=os.environ | {"VLLM_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "sink_window" in found.stdout and "blocks" in found.stdout


@pytest.mark.engine
def test_a_browser_shows_the_server(server: Server) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "kvplug/tests"))
    try:
        from live_page import browser, needs_browser, refreshes
    finally:
        sys.path.pop(0)
    needs_browser()
    with browser() as driver:
        driver.get(f"{server.url}/kvplug")
        driver.execute_script("sessionStorage.setItem('kvplug-key', arguments[0])", KEY)
        driver.refresh()
        wait_for(lambda: len(refreshes(driver)) > 1, "refreshes", SECONDS)
        assert "sink_window" in driver.page_source
        errors = [e for e in driver.get_log("browser") if "status of 401" not in e["message"]]
        assert errors == []


@pytest.mark.engine
def test_an_open_page_does_not_keep_the_server_from_ending(server: Server) -> None:
    # The last test of the file: the server is ended.
    url = f"{server.url}/kvplug/events"
    with httpx.stream("GET", url, headers=BEARER, timeout=SECONDS) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(SECONDS)
    assert "kvplug summary after" in server.log()


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "engines"),
    [("api-server-count: 2", 1), ("data-parallel-size: 2\napi-server-count: 1", 2)],
    ids=["two servers", "two engines"],
)
def test_every_process_layout_shows_every_engine(
    flags: str, engines: int, tmp_path: Path, tiny: Path
) -> None:
    section: dict[str, Any] = {"prefix_cache": "lru", "observe": {"page": True}}
    transfer = {
        "kv_connector": "KVPlugConnector",
        "kv_connector_module_path": "kvplug.hosts.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"kvplug": section},
    }
    text = f"{flags}\nkv-transfer-config: {json.dumps(transfer)}\n"
    (tmp_path / "server.yaml").write_text(text)
    file = str(tmp_path / "server.yaml")
    with serving(tmp_path, file, "--model", str(tiny), flags=EAGER) as server:
        # Each connection is its own, so that either server process gets some of them.
        for _ in range(12):
            answer = httpx.get(f"{server.url}/kvplug/state", timeout=SECONDS)
            assert answer.status_code == 200, answer.text
            found = LiveState.parse(answer.content)
            assert [one.engine for one in found.engines] == list(range(engines))
            assert found.expected == engines
