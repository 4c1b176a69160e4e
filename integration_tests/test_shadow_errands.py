"""Shadows are sent by the server that an order reaches; no engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvplug.hosts.vllm import metrics, shadow
from kvplug.hosts.vllm.connector import KVPlugConnector
from kvplug.hosts.vllm.metrics import PolicyStats
from kvplug.hosts.vllm.shadow import Errands, ShadowMiddleware
from kvplug.hosts.vllm.shadow_orders import ASK, NUMBER, SHADOW, STOP

ORDER = {
    ASK: "0123456789abcdef",
    "prompt": np.array([5, 6, 7], dtype=np.int32).tobytes(),
    "tokens": 4,
    "salt": "mine",
}


class Client:
    """An engine client that answers when it is told to."""

    def __init__(self, error: Exception | None = None):
        self.asked: list[Any] = []
        self.stopped: list[str] = []
        self.error = error
        self.go = asyncio.Event()

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **more: Any
    ) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, request_id, more))
        if self.error is not None:
            raise self.error
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.stopped.append(request_id)
            raise
        yield None


@pytest.fixture(autouse=True)
def errands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Errands]:
    made = Errands()
    monkeypatch.setattr(shadow, "ERRANDS", made)
    monkeypatch.setattr(metrics, "ERRANDS", made)
    yield made


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_shadow_is_sent_as_ordered_and_behind_all_others(errands: Errands) -> None:
    async def run() -> Client:
        errands.client = client = Client()
        errands.put(ORDER, engine=2, engines=4)
        await _settle()
        client.go.set()
        await _settle()
        return client

    client = asyncio.run(run())
    ((prompt, params, request_id, more),) = client.asked
    assert prompt == {"type": "token", "prompt_token_ids": [5, 6, 7], "cache_salt": "mine"}
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (4, 0, True)
    assert params.extra_args == {"kv_transfer_params": {NUMBER: ORDER[ASK]}}
    assert more == {"priority": shadow.PRIORITY, "data_parallel_rank": 2}
    assert ORDER[ASK] not in request_id, "ids are shown in logs and traces, the number is secret"
    assert not errands._running


def test_a_shadow_is_stopped(errands: Errands) -> None:
    async def run() -> Client:
        errands.client = client = Client()
        errands.put(ORDER, 0, 1)
        await _settle()
        errands.put({STOP: "another"}, 0, 1)
        await _settle()
        assert client.stopped == []
        errands.put({STOP: ORDER[ASK]}, 0, 1)
        await _settle()
        return client

    client = asyncio.run(run())
    assert len(client.stopped) == 1
    assert client.asked[0][3]["data_parallel_rank"] is None, "one engine has no rank"
    assert not errands._running


def test_a_failure_is_logged_once_and_ends_nothing(errands: Errands) -> None:
    async def run() -> None:
        errands.client = Client(ValueError("no"))
        for _ in range(3):
            errands.put(ORDER, 0, 1)
            await _settle()

    said: list[str] = []
    shadow.logger.error = lambda text, *a: said.append(text)  # type: ignore[method-assign]
    try:
        asyncio.run(run())
    finally:
        del shadow.logger.error
    assert said == ["kvplug: a shadow could not be sent: %r"]


def test_without_a_server_nothing_is_sent(errands: Errands) -> None:
    errands.put(ORDER, 0, 1)
    assert not errands._running


@pytest.mark.parametrize("kind", ["lifespan", "http", "websocket"])
def test_the_middleware_finds_the_client_and_passes_everything_on(
    errands: Errands, kind: str
) -> None:
    seen = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    server = SimpleNamespace(state=SimpleNamespace(engine_client="client"))
    scope = {"type": kind, "app": server}
    asyncio.run(ShadowMiddleware(app)(scope, "receive", "send"))  # type: ignore[arg-type]
    assert seen == [(scope, "receive", "send")]
    assert errands.client == "client"


def test_an_order_passes_the_statistics_and_is_no_count(errands: Errands) -> None:
    stats = PolicyStats(data={"counters": {"a": 1.0}, SHADOW: {STOP: "old"}})
    stats.aggregate(PolicyStats(data={"counters": {"a": 2.0}, SHADOW: ORDER}))
    assert stats.data[SHADOW] == ORDER
    assert stats.reduce() == {"a": 3.0}
    logged = KVPlugConnector.build_kv_connector_stats(stats.data)
    assert SHADOW not in logged.data
