"""The guard's shadow in a server: harm is found and ended, and nothing else is touched."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, connected, serving
from waiting import wait_for

pytest.importorskip("openai")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

KEPT = 128
"""Tokens from which on the deployment drops some."""

DEPLOYMENT = """
block-size: 32
max-model-len: 1024
max-num-batched-tokens: 256
dtype: float32
enforce-eager: true
kv-transfer-config:
  kv_connector: KVPlugConnector
  kv_connector_module_path: kvplug.hosts.vllm.connector
  kv_role: kv_both
  kv_connector_extra_config:
    kvplug:
      sequence: {use: sink_window, sink: 32, window: 64}
      guard:
        shadow: {one_in: 1, max_divergence: 0.05, tokens: 16, cooldown: 86400}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shadow")
    file = folder / "shadowed.yaml"
    file.write_text(DEPLOYMENT)
    with serving(folder, str(file), "--model", str(tiny)) as found:
        yield found


def series(server: Server, name: str) -> dict[str, float]:
    """A metric by the value of its own label."""
    found = {}
    for line in server.get("/metrics").splitlines():
        if line.startswith(f"{name}{{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            own = [v for k, v in labels.items() if k not in ("engine", "model_name")]
            found[",".join(own)] = float(line.rsplit(" ", 1)[1])
    return found


def state(server: Server) -> str:
    (one,) = [k for k, v in series(server, "kvplug_shadow_state").items() if v]
    return one


def ended(server: Server) -> float:
    return sum(series(server, "kvplug_shadow_requests_total").values())


def ask(server: Server, seed: int, tokens: int, **more: Any) -> Any:
    """One request of random tokens; returns what its answer says of itself."""
    draw = random.Random(seed)
    prompt = [draw.randrange(10, 250) for _ in range(tokens)]
    answer = connected(server).completions.create(
        model="tiny", prompt=prompt, max_tokens=12, extra_body={"ignore_eos": True}, **more
    )
    said = answer.model_extra.get("kv_transfer_params")
    return said["kvplug"] if said else None


def test_texts_within_the_budget_are_left_alone(server: Server) -> None:
    for seed in range(10):
        before = ended(server)
        assert ask(server, seed, KEPT // 2, temperature=seed % 2) is None
        wait_for(lambda: ended(server) > before, "what became of the answer")  # noqa: B023
    assert state(server) == "full"
    results = series(server, "kvplug_shadow_requests_total")
    assert results["exact"] == sum(results.values()) == 10
    assert series(server, "kvplug_shadow_computed_tokens_total")["shadows"] == 0


def test_texts_beyond_it_are_answered_again_until_requests_are_exact(server: Server) -> None:
    served = 0
    while state(server) == "full":
        before = ended(server)
        said = ask(server, 100 + served, 400, temperature=served % 2)
        assert said["exact"] is False and "guard" not in said
        wait_for(lambda: ended(server) > before, "the shadow of the answer")  # noqa: B023
        served += 1
        assert served < 40
    results = series(server, "kvplug_shadow_requests_total")
    assert results["compared"] == served
    assert state(server) == "exact"
    found = series(server, "kvplug_shadow_divergence_ratio_sum")
    assert 0.05 < sum(found.values()) / served < 1
    tokens = series(server, "kvplug_shadow_computed_tokens_total")
    assert 0 < tokens["shadows"] < tokens["requests"] + 10 * served
    (line,) = [one for one in server.log().splitlines() if "kvplug: guard: new requests" in one]
    assert f"exact, for 86400 s ({served} answers again" in line


def test_then_answers_are_exact_and_say_why(server: Server) -> None:
    assert state(server) == "exact"
    assert ask(server, 999, 400) == {"exact": True, "blocks_freed": 0, "guard": "exact"}
    stream = connected(server).completions.create(
        model="tiny", prompt=[7] * 400, max_tokens=8, stream=True, extra_body={"ignore_eos": True}
    )
    said = [c.model_extra.get("kv_transfer_params") for c in stream]
    assert [one["kvplug"]["guard"] for one in said if one] == ["exact"]
    counts = series(server, "kvplug_shadow_made_exact_total")
    assert sum(counts.values()) == 2
    off = {"ignore_eos": True, "kv_transfer_params": {"kvplug": {"sequence": "off"}}}
    answer = connected(server).completions.create(
        model="tiny", prompt=[7] * 400, max_tokens=8, extra_body=off
    )
    assert "guard" not in answer.model_extra["kv_transfer_params"]["kvplug"]
