"""`kvplug serve` as a user runs it."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import SECONDS, Server, connected, ended, serving, start
from waiting import wait_for

pytest.importorskip("openai")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 512
"""Tokens that configs/cpu/quickstart.yaml keeps of a request."""
BLOCK = 32

SHORT = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Server]:
    config = str(ROOT / "configs/cpu" / "quickstart.yaml")
    with serving(tmp_path_factory.mktemp("serve"), config, "--model", str(tiny)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return connected(server)


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
        return server.metric("kvplug_freed_blocks_total", policy="sink_window")

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


def test_an_answer_says_the_same_streamed_and_at_a_stop_string(client: Any) -> None:
    prompt = [12 + i % 230 for i in range(3 * BUDGET)]
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked)
    said = whole.model_extra["kv_transfer_params"]
    assert said["kvplug"]["exact"] is False

    def last_chunk(**more: Any) -> Any:
        chunks = list(client.completions.create(**asked, stream=True, **more))
        (last,) = [c for c in chunks if c.choices and c.choices[0].finish_reason]
        assert not any((c.model_extra or {}).get("kv_transfer_params") for c in chunks[:-1])
        return last

    assert last_chunk().model_extra["kv_transfer_params"] == said
    text = whole.choices[0].text
    stop = {"stop": [text[2:4]]}
    for answer in (last_chunk(**stop), client.completions.create(**asked, **stop)):
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model_extra["kv_transfer_params"]["kvplug"]["exact"] is False
    short = {**asked, "prompt": prompt[:20]}
    (chunk,) = [c for c in client.completions.create(**short, stream=True) if _ends(c)]
    assert (chunk.model_extra or {}).get("kv_transfer_params") is None, "nothing was freed"


def _ends(chunk: Any) -> bool:
    return bool(chunk.choices and chunk.choices[0].finish_reason)


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
    text = (ROOT / "configs/cpu" / "sink_window.yaml").read_text("utf-8")
    config = tmp_path / "layers.yaml"
    config.write_text(text.replace('"0-9"', '"7"'), encoding="utf-8")
    with ended(start(tmp_path, str(config), "--model", str(tiny))) as server:
        code = server.process.wait(timeout=SECONDS)
    assert code != 0
    assert "sink_window: layers '7' is outside the model's 0-1." in server.log()
