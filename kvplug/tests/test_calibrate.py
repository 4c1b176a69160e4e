"""Calibrating: what is collected is what attention sees, and assignments are the best there are."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.contract import EngineView, FormatPolicy
from kvplug.errors import DeploymentError, KVPlugError
from kvplug.fingerprint import model_fingerprint
from kvplug.parser import load_deployment
from kvplug_lab import models
from kvplug_lab.calibrate.candidates import Candidate, candidates, mixed, section
from kvplug_lab.calibrate.solve import assign
from kvplug_policies.calibration import load

transformers = pytest.importorskip("transformers")

from kvplug.hosts.transformers import Host  # noqa: E402
from kvplug_lab.calibrate.attention import How, attached  # noqa: E402
from kvplug_lab.calibrate.collect import collect  # noqa: E402
from kvplug_lab.calibrate.run import search_assignments, windows  # noqa: E402
from kvplug_lab.calibrate.sensitivity import Meter, stored  # noqa: E402
from kvplug_lab.calibrate.statistics import Collector, Source, calibration, received  # noqa: E402

RUN = CliRunner()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(
        tmp_path_factory.mktemp("tiny"), layers=3, heads=4, kv_heads=2, head_dim=32, dtype="float32"
    )


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(model: Any) -> EngineView:
    return Host(model, 16).engine


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, 320, (n,), generator=torch.Generator().manual_seed(seed))


# -- the model's fingerprint -----------------------------------------------------------------------


def test_a_fingerprint_tells_models_apart(directory: Path, tmp_path: Path) -> None:
    found = model_fingerprint(directory)
    assert len(found) == 32
    assert found == model_fingerprint(str(directory))
    copy = tmp_path / "elsewhere"
    shutil.copytree(directory, copy)
    assert model_fingerprint(copy) == found
    other = models.tiny_llama(
        tmp_path / "other", layers=3, heads=4, kv_heads=2, head_dim=32, dtype="float32", seed=1
    )
    assert model_fingerprint(other) != found
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert model_fingerprint(copy) == found
    (copy / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    assert model_fingerprint(copy) != found


def test_a_fine_tune_of_one_matrix_is_another_model(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        copy = tmp_path / name
        shutil.copytree(directory, copy)
        weights = load_file(copy / "model.safetensors")
        weights[name] = weights[name] * 1.01
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        assert model_fingerprint(copy) != model_fingerprint(directory)


@pytest.mark.parametrize(
    "damage", ["absent", "no config", "no weights", "bad config", "shard absent", "no file"]
)
def test_what_is_no_model_has_no_fingerprint(directory: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    if damage == "absent":
        copy = tmp_path / "org/name"
    elif damage == "no config":
        (copy / "config.json").unlink()
    elif damage == "no weights":
        (copy / "model.safetensors").unlink()
    elif damage == "bad config":
        (copy / "config.json").write_text("{")
    elif damage == "shard absent":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (copy / "model.safetensors").unlink()
        os.mkfifo(copy / "model.safetensors")
    assert model_fingerprint(copy) == ""


# -- the solver ------------------------------------------------------------------------------------


def cheapest(
    sizes: list[list[int]], costs: list[list[float]], budget: int
) -> tuple[float, int] | None:
    best = None
    for pick in itertools.product(*(range(len(row)) for row in sizes)):
        size = sum(row[c] for row, c in zip(sizes, pick, strict=True))
        cost = sum(row[c] for row, c in zip(costs, pick, strict=True))
        if size <= budget and (best is None or (cost, size) < best):
            best = (cost, size)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_an_assignment_is_the_best_there_is(seed: int) -> None:
    draw = random.Random(seed)
    layers, kinds = draw.randint(1, 6), draw.randint(1, 4)
    sizes = [[4 * draw.randint(1, 12) for _ in range(kinds)] for _ in range(layers)]
    # Whole costs add up exactly; negative ones are what noise makes of perplexities.
    costs = [[float(draw.randint(-3, 20)) for _ in range(kinds)] for _ in range(layers)]
    for budget in (30, 60, 90, 150, 1000):
        best = cheapest(sizes, costs, budget)
        if best is None:
            with pytest.raises(KVPlugError, match="bytes per token are too few"):
                assign(sizes, costs, budget)
            continue
        found = assign(sizes, costs, budget)
        size = sum(row[c] for row, c in zip(sizes, found, strict=True))
        assert size <= budget
        assert sum(row[c] for row, c in zip(costs, found, strict=True)) == best[0]


def test_a_cost_that_is_no_number_is_refused() -> None:
    with pytest.raises(KVPlugError, match="not finite"):
        assign([[4, 8]], [[float("nan"), 1.0]], 100)


# -- candidates and sections -----------------------------------------------------------------------


def test_candidates_are_read_with_their_options() -> None:
    found = candidates("int8,residual:format=kivi:options.bits=2, lowrank:max_error=0.1", "c.st")
    assert [c.section for c in found] == [
        {"use": "int8"},
        {"use": "residual", "format": "kivi", "options": {"bits": 2}, "calibration": "c.st"},
        {"use": "lowrank", "max_error": 0.1, "calibration": "c.st"},
    ]


@pytest.mark.parametrize("text", ["int9", "int8:bits=", "int8:group", "kivi:bits=5", "int8:=3"])
def test_a_candidate_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(DeploymentError):
        candidates(text, "c.st")
    with pytest.raises(KVPlugError):
        candidates(",", "c.st")


def test_the_section_is_a_deployment_that_gives_back_the_choice(engine: EngineView) -> None:
    known = candidates("int4,int8,plain", "c.st")
    picks = [0, 1, 1]
    text = section([known[c] for c in picks], ["why"])
    assert text.startswith("# why\nformat:\n")
    (choice,) = load_deployment(yaml.safe_load(text)).all()
    policy: Any = choice.build(engine)
    names = [policy.format_of(layer).name for layer in engine.layers]
    assert names == ["int4", "int8", "int8"]
    ranges = mixed([known[c] for c in (0, 0, 2, 1, 1, 1, 0)])
    assert ranges["default"] == {"use": "int4"}
    assert ranges["layers"] == {"2": {"use": "plain"}, "3-5": {"use": "int8"}}


# -- collecting ------------------------------------------------------------------------------------


def test_what_is_collected_are_the_keys_after_rope(model: Any, engine: EngineView) -> None:
    from kvplug.hosts.transformers import Watched

    ids = [tokens(40), tokens(40, 1)]
    found = collect(model, ids)
    host = Host(model, 16)
    keys = []
    for part in ids:
        text, _ = host.read(part, watched=Watched())
        keys.append([layer.keys[0] for layer in text.layers])
    for index in range(3):
        exact = torch.cat([k[index] for k in keys], 1)
        layer = found.layers[index]
        assert layer.tokens == 80
        mean = layer.sums["key_sum"].view(2, 32) / 80
        torch.testing.assert_close(mean.float(), exact.mean(1), atol=1e-5, rtol=1e-4)
        for name in ("key", "value"):
            assert layer.sums[f"{name}_moment"].shape == (64, 64)


def test_tokens_weigh_what_they_receive() -> None:
    source = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(h, 30, 8, generator=source) for h in (4, 2, 2))
    logits = query @ key.repeat_interleave(2, 0).mT * 0.4
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1).sum(1).mean(0)
    torch.testing.assert_close(received(query, key, 0.4), weights)
    assert float(weights.mean()) == pytest.approx(1)
    collector = Collector()
    collector.see(0, query, key, value, How(0.4))
    both = (1 + weights) / 2
    found = calibration(collector, Source("", "m", "0"))
    centred = value[0] - value[0].mean(0)
    covariance = (centred.T * both) @ centred / 30
    energy = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(found.of(0, "value_energy")[0], energy, atol=1e-5, rtol=1e-4)


def test_collecting_changes_no_output(model: Any) -> None:
    ids = tokens(60)
    with torch.inference_mode():
        plain = model(ids[None]).logits
        with attached(model):
            seen = model(ids[None], use_cache=False, kvplug_probe=collect(model, [ids])).logits
    torch.testing.assert_close(seen, plain, atol=1e-4, rtol=1e-4)


def test_windows_and_soft_caps_are_attended_as_models_do() -> None:
    source = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(h, 30, 8, generator=source) for h in (4, 2, 2))
    logits = query @ key.repeat_interleave(2, 0).mT * 0.3
    at = torch.arange(30)
    for window, cap in ((0, 0.0), (7, 0.0), (0, 2.0), (7, 2.0)):
        seen = at <= at[:, None]
        if window:
            seen &= at > at[:, None] - window
        capped = cap * torch.tanh(logits / cap) if cap else logits
        weights = capped.masked_fill(~seen, float("-inf")).softmax(-1)
        wanted = weights @ value.repeat_interleave(2, 0)
        torch.testing.assert_close(How(0.3, cap, window).attend(query, key, value), wanted)


def test_a_model_that_hides_its_attention_is_refused(model: Any) -> None:
    with attached(model), pytest.raises(KVPlugError, match="does not pass kwargs on"):
        model(tokens(5)[None])


def test_windows_are_apart_and_a_short_text_is_refused() -> None:
    learn, held = windows(range(1000), [7], 300, 100, 50)
    assert [len(w) for w in learn + held] == [50] * 8
    assert all(int(w[0]) == 7 for w in learn + held)
    seen = [int(t) for w in learn + held for t in w[1:]]
    assert len(seen) == len(set(seen))
    assert max(int(w[-1]) for w in learn) < 800 <= min(int(w[1]) for w in held)
    with pytest.raises(KVPlugError, match="too few for 900 to learn from"):
        windows(range(1000), [7], 900, 100, 50)
    with pytest.raises(KVPlugError, match="too short"):
        windows(range(1000), [7], 300, 100, 2)


# -- measuring -------------------------------------------------------------------------------------


def built(engine: EngineView, text: str) -> FormatPolicy:
    (found,) = candidates(text, "c.st")
    return found.build(engine)


def test_what_is_measured_is_what_the_format_stores(engine: EngineView) -> None:
    policy, layer = built(engine, "int4"), engine.layers[0]
    key, value = torch.randn(2, 2, 37, 32, generator=torch.Generator().manual_seed(0))
    back = stored(policy, layer, key, value, 16)
    assert back[0].shape == key.shape
    error = float((back[0] - key).norm() / key.norm())
    assert 0.02 < error < 0.2
    exact = stored(built(engine, "plain"), layer, key, value, 16)
    assert torch.equal(exact[0], key)
    assert torch.equal(exact[1], value)
    assert policy.layout(layer).token_bytes(layer) == 2 * policy.layout(layer).bytes_per_token_head


def test_a_layer_measured_alone_is_what_the_whole_model_says(
    model: Any, engine: EngineView
) -> None:
    """Resuming behind the blocks that did not change gives the same as running them."""
    meter = Meter(model, engine, [tokens(50), tokens(50, 1)])
    assert len(meter._blocks) == 3
    int4, plain = built(engine, "int4"), built(engine, "plain")
    choices: list[Any] = [{2: int4}, {1: int4}, {0: plain, 2: int4}, {}]
    found, nll = meter.measure(choices)
    meter._blocks = []
    slow, again = meter.measure(choices)
    assert nll == again
    for one, two in zip(found, slow, strict=True):
        assert one.divergence == pytest.approx(two.divergence, abs=1e-9)
        assert one.nll == pytest.approx(two.nll, abs=1e-9)
    assert found[0].divergence == pytest.approx(found[2].divergence, abs=1e-9)
    assert abs(found[3].divergence) < 1e-9
    assert found[0].divergence > 0
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_fewer_bits_are_a_larger_error(model: Any, engine: EngineView) -> None:
    meter = Meter(model, engine, [tokens(64)])
    policies = [built(engine, t) for t in ("plain", "int8", "int4", "kivi:bits=2:group=16")]
    for row in meter.errors(policies):
        assert row == sorted(row)
        assert row[0] < 1e-6


@pytest.mark.parametrize("by", ["divergence", "error"])
def test_a_plan_fits_its_budget_and_says_what_it_measured(
    model: Any, engine: EngineView, by: str
) -> None:
    known = candidates("plain,int8,int4", "c.st")
    held = [tokens(48)]
    sizes = [c.build(engine).layout(engine.layers[0]).token_bytes(engine.layers[0]) for c in known]
    budget = sizes[0] + 2 * sizes[2]
    found = search_assignments(model, engine, held, known, budget, by)
    assert found.choices[0].bytes_per_token <= budget
    assert [c.label for c in found.choices[1:]] == ["int8", "int4"]
    assert found.uniform is not None
    assert found.uniform.label == "int8"
    assert found.choices[1].bytes_per_token == 3 * sizes[1]
    whole = Candidate("mixed", mixed([known[c] for c in found.chosen])).build(engine)
    (loss,), nll = Meter(model, engine, held).measure(
        [{layer.index: whole for layer in engine.layers}]
    )
    assert found.choices[0].measured.divergence == loss.divergence
    assert found.nll == nll
    with pytest.raises(KVPlugError, match="too few"):
        search_assignments(model, engine, held, known, 3 * sizes[2] - 4, by)


def test_a_candidate_the_model_cannot_have_is_named(model: Any, engine: EngineView) -> None:
    with pytest.raises(KVPlugError, match=r"--candidates kivi:group=64: .*groups of 64"):
        search_assignments(
            model, engine, [tokens(48)], candidates("kivi:group=64", "c.st"), 10**6, "error"
        )


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    draw = random.Random(0)
    words = ["sea", "ship", "sails", "to", "the", "island", "and", "back", "again", "slowly"]
    file.write_text(" ".join(draw.choice(words) for _ in range(700)))
    return file


def run(*arguments: Any) -> Any:
    return RUN.invoke(app, ["calibrate", *map(str, arguments)])


def test_the_command_writes_a_calibration_and_a_section(
    directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file, yml, js = tmp_path / "c.safetensors", tmp_path / "s.yaml", tmp_path / "f.json"
    done = run(
        directory, "--text", text, "--output", file, "--tokens", 512, "--window", 128,
        "--held-out", 128, "--bytes-per-token", 700, "--section", yml, "--json", js,
        "--candidates", "plain,int8,int4,lowrank:rank=16:bits=8",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = load(file)
    assert found.fingerprint == model_fingerprint(directory)
    assert found.tokens == 512
    (choice,) = load_deployment(yml).all()
    figures = json.loads(js.read_text("utf-8"))
    policy: Any = choice.build(
        replace(
            Host(
                transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
                32,
            ).engine,
            model=found.fingerprint,
        )
    )
    names = [policy.format_of(layer).name for layer in policy.engine.layers]
    labels = [figures["candidates"][c].split(":")[0] for c in figures["chosen"]]
    assert names == labels
    assert figures["choices"][0]["bytes_per_token"] <= 700
    assert "chosen by layer" in done.output
    assert "best of these" in done.output


def test_a_calibration_alone_is_quick_and_the_same_each_time(
    directory: Path, text: Path, tmp_path: Path
) -> None:
    sums = []
    for name in ("a", "b"):
        file = tmp_path / f"{name}.safetensors"
        done = run(directory, "--text", text, "--output", file, "--tokens", 256, "--window", 128)
        assert done.exit_code == 0, done.output
        sums.append(load(file).checksum)
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output", "{tmp}/no/c.safetensors"], "its folder must exist"),
        (["--by", "luck"], "--by 'luck': use one of divergence, perplexity, error"),
        (["--text", "{tmp}/none.txt"], "none.txt: cannot be read: No such file"),
        (["--tokens", "100000", "--window", "128"], "too few for 100000 to learn from"),
        (["--bytes-per-token", "10", "--window", "128", "--tokens", "128"], "are too few"),
        (["--bytes-per-token", "900", "--candidates", "int5"], "unknown format policy 'int5'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    directory: Path, text: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    given = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    given = ["--text", str(text), "--output", str(tmp_path / "c.safetensors"), *given]
    done = run(directory, "--held-out", 128, *given)
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "has no config.json" in " ".join(done.output.split())


def test_statistics_of_one_kv_head_have_no_merges(tmp_path: Path) -> None:
    made = models.tiny_llama(tmp_path, heads=2, kv_heads=1, head_dim=32, dtype="float32", layers=1)
    alone = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    found = calibration(collect(alone, [tokens(64)]), Source("", "m", "0"))
    assert not any("merge" in name for name in found.tensors)
    assert found.geometry[0].num_kv_heads == 1
