"""Engines in processes of their own that share a server: what one computed another loads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from policies.tests.tier_servers import mooncake_servers, redis_server
from test_failing_policy import environment
from test_tiers_in_the_engine import ENGINE, A, C, N, Q, R, Run, requests

from kvplug.contract import EngineView, TierPlace
from kvplug_lab import models
from kvplug_lab.engine.trial import TrialRequest
from kvplug_policies.tiers.mooncake import Mooncake


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("deep"), layers=4, seed=2)


def share(run: Run, deep: Path, tiers: list[dict[str, Any]]) -> None:
    """One engine computes A and C and pushes A out of its pool; another asks for A."""
    oracle = Oracle(deep)
    first = [TrialRequest(r.prompt, N, i) for i, r in enumerate(requests()[:3])]
    section = {"tiers": tiers, "lifecycle": "loads"}
    before = run(deep, first, section, env=environment(), **ENGINE)
    assert [a.token_ids for a in before.answers] == [oracle.greedy(r.prompt, N) for r in first]
    assert before.reports[0]["counters"]["stored"] >= 6
    asked = [TrialRequest(A + R, N, 0), TrialRequest(R + C, N, 1)]
    result = run(deep, asked, section, env=environment(), **ENGINE)
    assert [a.token_ids for a in result.answers] == [oracle.greedy(r.prompt, N) for r in asked]
    assert result.answers[0].cached_tokens == 192, "loaded, not computed"
    assert (result.answers[0].kvplug or {})["loaded"] == 192
    assert result.answers[1].cached_tokens == 0, "the same tokens elsewhere are another text"


def test_two_engines_share_a_redis_server(run: Run, deep: Path) -> None:
    with redis_server() as server:
        share(run, deep, [{"redis": {"url": server.url(), "timeout": 20.0}}])


def test_two_engines_share_a_mooncake_store_of_several_nodes(run: Run, deep: Path) -> None:
    with mooncake_servers() as servers:
        stated = {
            "master": f"127.0.0.1:{servers.port}",
            "metadata": servers.metadata,
            "address": "127.0.0.1",
            "buffer": "16MiB",
            "timeout": 20.0,
        }
        # A node that outlives both engines, whose own memory goes with them.
        options = Mooncake.Options.model_validate(stated | {"segment": "64MiB"})
        node = Mooncake(options, EngineView(block_size=32))
        node.open(TierPlace("00" * 16, 0, 1))
        share(run, deep, [{"mooncake": stated | {"segment": 0}}])
        node.close()


def test_a_server_killed_and_restarted_again_and_again(run: Run, deep: Path) -> None:
    """From before the engine starts until it ends; every answer is right."""
    with redis_server() as server:
        done = threading.Event()

        def disturb() -> None:
            while not done.wait(0.7):
                server.process.kill()
                if not done.wait(0.3):
                    server.start()

        disturbing = threading.Thread(target=disturb)
        disturbing.start()
        workload = [
            TrialRequest(prompt, N, i) for i, prompt in enumerate([A + Q, C, A + R, C, A + Q] * 4)
        ]
        try:
            tiers = [{"host": {"size": "1MiB"}}, {"redis": {"url": server.url(), "timeout": 0.5}}]
            result = run(deep, workload, {"tiers": tiers}, **ENGINE)
        finally:
            done.set()
            disturbing.join()
        oracle = Oracle(deep)
        assert [a.token_ids for a in result.answers] == [
            oracle.greedy(r.prompt, N) for r in workload
        ]
        assert result.leftovers == []
