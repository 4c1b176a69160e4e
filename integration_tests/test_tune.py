"""`kvplug tune` on a tiny model: from a file of requests to a file that passes the check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from kvplug.cli.check import read_checked
from kvplug_lab.cli.tune import tune
from kvplug_lab.engine.rounds import RoundEngine
from kvplug_lab.engine.trial import TrialRequest, TrialSpec

BLOCK = 32
ENGINE = {
    "dtype": "float32",
    "block_size": BLOCK,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 2,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 9,
}


def test_a_round_is_served_from_cold_and_watched(tiny: Path, tmp_path: Path) -> None:
    long = [[10 + (7 * i + 31 * n) % 200 for i in range(100)] for n in range(3)]
    # The third repeats the first, and waits for it as its session.
    requests = [TrialRequest(p, 6) for p in (long[0], long[1], [*long[0], 11, 12])]
    with RoundEngine(TrialSpec(str(tiny), [], ENGINE), tmp_path / "engine.log") as engine:
        engine.wait()
        nothing = engine.serve([], [], 1)
        assert (nothing.num_blocks, nothing.block_size, nothing.held_bytes) == (8, BLOCK, 0)
        rounds = [engine.serve(requests, [None, None, 0], 2) for _ in range(2)]
        forced = [[9, 8, 7], [6, 5, 4], [3, 2, 1]]
        scored = engine.serve(
            [TrialRequest(r.prompt, 3, force=t) for r, t in zip(requests, forced, strict=True)],
            [None, None, 0],
            2,
        )
    for served in rounds:
        assert [a.prompt for a in served.answers] == [100, 100, 102]
        # Three whole blocks of the first; nothing in either round for the others.
        assert [a.cached for a in served.answers] == [0, 0, 96]
        assert all(len(a.tokens) == 6 and a.ttft > 0 and a.tpot > 0 for a in served.answers)
        assert served.peak_running == 2 and served.preemptions == 0
        assert max(s.held for s in served.steps) == 8
        assert any(s.decode for s in served.steps) and not served.steps[0].decode
        assert all(s.slots >= s.empty + s.context - BLOCK for s in served.steps)
        assert served.seconds >= sum(s.seconds for s in served.steps)
    assert [a.tokens for a in rounds[0].answers] == [a.tokens for a in rounds[1].answers]
    assert [a.tokens for a in scored.answers] == forced
    assert all(len(a.logprobs) == 3 and max(a.logprobs) < 0 for a in scored.answers)


@pytest.mark.slow
def test_a_file_of_requests_becomes_a_verified_deployment(tiny: Path, tmp_path: Path) -> None:
    """The objective is how many run at once, which no busy machine changes."""
    prompts, out, figures = (tmp_path / n for n in ("requests.jsonl", "out.yaml", "figures.json"))
    bodies = [
        {"prompt": [10 + (7 * i + 31 * n) % 200 for i in range(120)], "max_tokens": 24}
        for n in range(8)
    ]
    prompts.write_text("".join(json.dumps(b) + "\n" for b in bodies), encoding="utf-8")
    app = typer.Typer()
    app.command()(tune)
    done = CliRunner().invoke(
        app,
        [
            *("--prompts", str(prompts), "--model", str(tiny), "--out", str(out)),
            *("--json", str(figures), "--objective", "users", "--max-loss", "100"),
            *("--memory", "1300KiB", "--concurrency", "8", "--rounds", "3", "--minutes", "30"),
            *("--dtype", "float32", "--engines", "2"),
        ],
    )
    assert done.exit_code == 0, done.output
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert "memory" in [b["name"] for b in found["bottlenecks"]], found["profile"]
    assert found["verified"], found["says"]
    gain = found["winner"]["gain"]["users"]
    assert gain["low"] > 1.0 and gain["n"] == 3
    assert found["winner"]["quality"]["rise"]["high"] <= 1.0
    config = read_checked(out)
    assert config.deployment.all() and config.flags["model"] == str(tiny)
    text = out.read_text(encoding="utf-8")
    assert text.startswith(f"# {found['winner']['name']}, chosen by kvplug tune for users")
    written = yaml.safe_load(text)
    assert written["kv-cache-memory-bytes"] <= 1300 * 1024
