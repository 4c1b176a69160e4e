"""`kvplug calibrate reuse`: what it measures, what it fits, and the file and figures it gives."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from kvplug.cli import app
from kvplug.errors import KVPlugError
from kvplug.reuse.deviation import deviation, most_deviating, spans
from kvplug.reuse.measures import RunningScale, measures
from kvplug_lab.models import tiny_llama
from kvplug_lab.reuse.partial_forward import Piece, capture
from kvplug_reuse_learned.calibration import FEATURES, ReuseCalibration, load
from kvplug_reuse_learned.documents import Document, ExperimentSizes, documents
from kvplug_reuse_learned.effects import effects
from kvplug_reuse_learned.experiment import Compared, Experiment, StoredKV, compare, digest
from kvplug_reuse_learned.fit_correction import Explained, Residuals, built, correcting
from kvplug_reuse_learned.fit_estimator import Bounds, auc, choose, fit, report, scale
from kvplug_reuse_learned.learn import LearnSettings, learn
from kvplug_reuse_learned.placements import SOURCES, stored_elsewhere, trials

SMALL = ExperimentSizes(
    prompts=4, held_out=2, documents=2, least=30, most=60, placements=2, follow=8
)


def words(n: int, seed: int = 0) -> str:
    """Paragraphs of letters, with an empty line after each."""
    random = np.random.default_rng(seed)
    parts = [
        "".join(chr(97 + c) for c in random.integers(0, 26, random.integers(10, 25)))
        for _ in range(n)
    ]
    return "\n\n".join(parts) + "\n"


def encode(text: str) -> list[int]:
    return [64 + b for b in text.encode()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(
        tmp_path_factory.mktemp("tiny") / "model",
        heads=4, kv_heads=2, head_dim=32, layers=3, dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def experiment(model: Any) -> Experiment:
    return Experiment(model, encode("Read.\n\n"))


@pytest.fixture(scope="module")
def found() -> list[Document]:
    return documents(words(200), encode, 8, SMALL)


# -- text ------------------------------------------------------------------------------------------


def test_documents_are_cut_at_empty_lines_and_never_share_text() -> None:
    text = words(200)
    made = documents(text, encode, 8, SMALL)
    assert len(made) == 8
    at = 0
    for document in made:
        string = bytes(t - 64 for t in document.tokens).decode()
        after = bytes(t - 64 for t in document.after).decode()
        assert 30 <= len(document.tokens) <= 60 and len(document.after) == 8
        assert string.endswith("\n\n")
        found = text.index(string + after, at)
        assert found == 0 or text[found - 2 : found] == "\n\n"
        at = found + len(string) + len(after)
    assert at > len(text) // 2, "they come from all of the text"
    with pytest.raises(KVPlugError, match=r"only \d+ passages of 30 to 60 tokens"):
        documents(text, encode, 100, SMALL)


# -- placements ------------------------------------------------------------------------------------


def test_kv_computed_elsewhere_is_what_a_plain_forward_gives(
    experiment: Experiment, model: Any
) -> None:
    context, tokens = encode("some context"), encode("and a document")
    stored = experiment.compute(context, tokens)
    key, value = capture(model, context, tokens)
    for layer in range(2):
        torch.testing.assert_close(stored.key[layer], key[layer])
        torch.testing.assert_close(stored.value[layer], value[layer])
    assert stored.start == 12 and stored.stats.shape == (3, 2, 5)
    assert torch.isfinite(stored.stats).all()
    outgoing = experiment.compute((), tokens).stats[..., 4]
    assert torch.equal(outgoing, torch.zeros(3, 2)), "nothing stands before it"


def test_each_source_is_what_it_says(experiment: Experiment, found: list[Document]) -> None:
    prompt = experiment.prompt(found[:2])
    start = prompt.runs[1][0]
    others = found[2:5]
    made = {s: stored_elsewhere(experiment, prompt, 1, s, others) for s in SOURCES}
    known = {s: m for s, m in made.items() if m is not None}
    assert set(known) == set(SOURCES)
    prefix = tuple(experiment.prefix)
    assert known["prefix"].context == prefix
    assert known["documents"].context == prefix + others[0].tokens + others[1].tokens
    assert known["alone"].context == ()
    assert known["same place"].start == start
    assert known["same place"].context != prompt.tokens[:start]
    late = known["shifted"].context
    assert late[-len(found[0].tokens) :] == found[0].tokens and len(late) > start
    again = known["reused before"]
    assert (again.context, again.ancestry) == (prompt.tokens[:start], 1)
    assert torch.isnan(again.stats[..., 4]).all()
    truth = prompt.true_piece(*prompt.runs[1])
    assert not torch.allclose(again.key[2], truth.key[2], atol=1e-3)
    assert torch.allclose(again.key[1], truth.key[1], atol=1e-4)
    # The first document after the prefix is where it belongs.
    assert stored_elsewhere(experiment, prompt, 0, "prefix", others) is None
    assert stored_elsewhere(experiment, prompt, 0, "reused before", others) is None


def test_true_kv_keeps_every_distribution(experiment: Experiment, found: list[Document]) -> None:
    prompt = experiment.prompt(found[:2])
    follow = found[1].after
    whole = experiment.logits(prompt.tokens, [], follow)
    loaded = experiment.logits(prompt.tokens, [prompt.true_piece(0, len(prompt.tokens))], follow)
    outcome = compare(whole, loaded, follow)
    assert outcome.divergence == pytest.approx(0, abs=1e-6) and outcome.agreement == 1
    assert outcome.nll == pytest.approx(outcome.nll_recomputed, abs=1e-5)


def test_divergence_agreement_and_likelihood_by_hand() -> None:
    true = torch.tensor([[0.5, 0.5, 1e-9], [0.1, 0.8, 0.1]]).log()
    other = torch.tensor([[0.9, 0.1, 1e-9], [0.25, 0.5, 0.25]]).log()
    outcome = compare(true, other, [2, 1])
    first = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    second = 0.2 * math.log(0.1 / 0.25) + 0.8 * math.log(0.8 / 0.5)
    assert outcome.divergence == pytest.approx((first + second) / 2, rel=1e-5)
    assert outcome.agreement == 1.0
    # The token after the first position is the second of what follows.
    assert outcome.nll == pytest.approx(-math.log(0.1), rel=1e-5)
    assert outcome.nll_recomputed == pytest.approx(-math.log(0.5), rel=1e-5)
    assert Bounds(0.9, 0.05).kept(Compared(0.05, 0.9, 0, 0))
    assert not Bounds(0.9, 0.05).kept(Compared(0.051, 1.0, 0, 0))
    assert not Bounds(0.9, 0.05).kept(Compared(0.0, 0.89, 0, 0))


def test_trials_are_the_same_each_time_and_never_exact(
    experiment: Experiment, found: list[Document]
) -> None:
    pairs: list[tuple[int, int]] = []

    def watch(stored: StoredKV, placed: Piece, true: Piece) -> None:
        pairs.append((stored.start, placed.start))

    first = trials(Experiment(experiment.model, experiment.prefix), found, SMALL, watch)
    second = trials(Experiment(experiment.model, experiment.prefix), found, SMALL)
    assert first == second
    assert len(pairs) == len(first) == 8 * SMALL.placements
    assert {t.prompt for t in first} == set(range(4))
    for trial, (then, now) in zip(first, pairs, strict=True):
        stored, asked = trial.candidate.fingerprint, trial.request.fingerprint
        assert (stored.start, asked.start) == (then, now)
        same = stored.start == asked.start and stored.context == asked.context
        assert not same or stored.ancestry > 0
        assert stored.tokens == asked.tokens
        assert ("outgoing" in stored.measures) == (trial.source != "reused before")


# -- measures and deviation ------------------------------------------------------------------------


def test_measures_are_relative_to_what_was_seen() -> None:
    running = RunningScale(half_life=1.0)
    stats = torch.tensor([2.0, 3.0, 0.5, 0.25, 0.125]).expand(2, 2, 5).clone()
    assert measures(stats, running) == {"sparsity": 0.5, "key_cosine": 0.25, "outgoing": 0.125}
    running.add(stats)
    other = stats.clone()
    other[0, :, 0] *= 2
    other[..., 4] = math.nan
    assert measures(other, running) == {
        "k_drift": 0.5, "v_drift": 0.0, "sparsity": 0.5, "key_cosine": 0.25
    }  # fmt: skip
    broken = stats.clone()
    broken[0, 0, 0] = math.inf
    running.add(broken)
    assert measures(stats, running)["k_drift"] == 0.0
    running.add(stats * 4)
    mean = running.mean
    assert mean is not None and mean[0, 0, 0] == pytest.approx((2 * 0.5 + 8) / 1.5)


def test_the_most_deviating_tokens() -> None:
    key = torch.ones(6, 2, 4)
    value = torch.ones(6, 2, 4)
    stale_key, stale_value = key.clone(), value.clone()
    stale_key[4] += 1
    stale_value[1] += 2
    stale_value[2] += 0.1
    found = deviation(stale_key, stale_value, key, value)
    assert found.tolist() == pytest.approx([0, 4, 0.01, 0, 1, 0])
    assert most_deviating(found, 2).tolist() == [1, 4]
    assert most_deviating(found, 4).tolist() == [0, 1, 2, 4], "ties go to the earlier"
    assert most_deviating(found, 0).tolist() == []
    found[5] = math.nan
    assert most_deviating(found, 1).tolist() == [5]
    assert spans([1, 2, 3, 7, 9, 10]) == [(1, 4), (7, 8), (9, 11)]
    assert spans([]) == []


# -- what is fitted --------------------------------------------------------------------------------


def placements(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of which one decides, by a known chance."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, len(FEATURES)))
    x[:, FEATURES.index("shifted")] = 1.0
    chance = 1 / (1 + np.exp(-2 * x[:, 0]))
    return x, (random.random(n) < chance).astype(np.float64)


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_an_estimator_finds_what_decides(kind: str) -> None:
    x, y = placements(400)
    made = fit(kind, x, y)
    other, truth = placements(400, seed=1)
    judged = report(made, other, truth, float(y.mean()))
    assert judged.auc > 0.8 and judged.brier < 0.19 < judged.brier_base
    assert max(judged.importance, key=lambda name: judged.importance[name]) == FEATURES[0]
    assert [count for *_, count in judged.bins] == [80] * 5
    predicted = [p for p, *_ in judged.bins]
    observed = [o for _, o, _ in judged.bins]
    assert predicted == sorted(predicted)
    assert max(abs(p - o) for p, o in zip(predicted, observed, strict=True)) < 0.2


def test_one_outcome_alone_gives_numbers_too() -> None:
    x, _ = placements(20)
    for kind in ("logistic", "mlp"):
        for outcome in (0.0, 1.0):
            made = fit(kind, x, np.full(20, outcome))
            p = made.probability(x)
            assert np.isfinite(p).all() and (abs(p - outcome) < 0.2).all()
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([1.0, 1.0])))
    assert auc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.0, 1.0, 0.0, 1.0])) == 0.875


def test_features_nobody_measured_do_not_spoil_the_scale() -> None:
    x, _ = placements(10)
    x[:, 3] = math.nan
    x[0, 4] = math.nan
    mean, spread, least, largest = scale(x)
    assert (mean[3], spread[3], least[3], largest[3]) == (0, 1, 0, 0)
    assert mean[4] == pytest.approx(x[1:, 4].mean(), rel=1e-5)
    assert (least <= mean).all() and (mean <= largest).all() and (spread > 0).all()


def test_the_kind_is_chosen_by_groups_left_out() -> None:
    random = np.random.default_rng(2)
    x, _ = placements(300)
    y = ((x[:, 0] * x[:, 1] > 0) ^ (random.random(300) < 0.05)).astype(np.float64)
    kind, losses = choose(x, y, [i // 3 for i in range(300)])
    assert kind == "mlp" and losses["mlp"] < 0.6 < 0.68 < losses["logistic"]
    x, y = placements(60)
    assert choose(x, y, [i // 3 for i in range(60)])[0] in losses


def test_a_correction_learns_a_linear_residual(experiment: Experiment, tmp_path: Path) -> None:
    """Pieces whose true KV is a low-rank linear function of the stale one are put right."""
    source = torch.Generator().manual_seed(0)
    width = 2 * 2 * 32
    encoder = torch.randn(width, 3, generator=source) / width**0.5
    decoder = torch.randn(3, width, generator=source)
    table = experiment.frequencies

    def pair(n: int, at: int) -> tuple[StoredKV, Piece, Piece]:
        from kvplug_lab.reuse.partial_forward import rotated

        place = torch.arange(at, at + n)
        keys, values, true_keys, true_values = [], [], [], []
        for _ in range(3):
            stale = torch.randn(n, width, generator=source)
            true = stale + stale @ encoder @ decoder + 0.5
            for into, part in ((keys, stale), (true_keys, true)):
                into.append(rotated(part[:, : width // 2].view(n, 2, 32), place, table))
            values.append(stale[:, width // 2 :].view(n, 2, 32))
            true_values.append(true[:, width // 2 :].view(n, 2, 32))
        stored = StoredKV(at + 5, (1,) * (at + 5), keys, values, torch.ones(3, 2, 5))
        return stored, Piece(at, keys, values), Piece(at, true_keys, true_values)

    residuals = Residuals(experiment)
    for i in range(20):
        residuals(*pair(40, 10 * i + 1))
    count = len(FEATURES)
    ones = np.ones(count, dtype=np.float32)
    made = ReuseCalibration(
        "", "", "tiny", "", "logistic", residuals.geometry, {}, {},
        {
            "features": np.stack([0 * ones, ones, 0 * ones, ones]),
            "credibility_mean": np.zeros(1, dtype=np.float32),
            "logistic.weight": ones, "logistic.bias": ones[:1],
            **residuals.solve(8, 1e-6),
        },
    )  # fmt: skip
    path = tmp_path / "reuse.safetensors"
    made.save(path)
    shares = {}
    for rank in (1, 2, 3, 8):
        seen = Explained(correcting(built(str(path), rank, keys=True), experiment))
        for i in range(3):
            seen(*pair(30, 17 * i))
        shares[rank] = min(seen.by_layer)
    assert 0.3 < shares[1] < shares[2] < shares[3]
    assert shares[3] > 0.97 and shares[8] > 0.97


# -- the whole of it -------------------------------------------------------------------------------


def test_learning_writes_a_file_that_says_what_was_measured(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "reuse.safetensors"
    lines: list[str] = []
    settings = LearnSettings(sizes=SMALL, rank=4, effects=True, bounds=Bounds(0.5, 10.0))
    learned = learn(
        model, encode, words(300), encode("Read.\n\n"), path, settings, "f" * 64, "tiny",
        lines.append,
    )  # fmt: skip
    found = load(path)
    assert found.fingerprint == "f" * 64 and found.rank == 4
    assert found.bounds == {"agreement": 0.5, "divergence": 10.0}
    assert found.report["placements"] == len(learned.held_out) == 8
    assert len(lines) == 4 + 2 + 2
    assert len(learned.explained) == 3
    for name, tensor in learned.calibration.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor.astype(np.float32))
    by_label = {row.label: row for row in learned.effects}
    assert len(by_label) == 3 + 3 + 1 + 3 + 9 + 5 + 2
    assert by_label["recompute"].divergence == 0 and by_label["recompute"].agreement == 1
    stale = by_label["shared prefix"]
    assert stale.divergence > 0.001 and stale.recomputed == 0
    assert (
        by_label["shared prefix + boundary 32"].recomputed
        > by_label["shared prefix + boundary 8"].recomputed
    )
    sizes = {
        by_label[f"shared prefix + 30% {how}"].recomputed for how in ("at random", "most deviating")
    }
    assert len(sizes) == 1 and 0.25 < sizes.pop() < 0.35
    # Documents that end where the boundary does are computed whole: nothing stale is left.
    assert by_label["own sink + boundary 32"].divergence < by_label["own sink"].divergence
    assert math.isfinite(by_label["shared prefix + compensate"].divergence)


def test_recomputing_everything_is_recompute(experiment: Experiment, found: list[Document]) -> None:
    short = [dataclasses.replace(d, tokens=d.tokens[:30]) for d in found[:4]]
    rows = {row.label: row for row in effects(experiment, short, SMALL)}
    assert rows["own sink + boundary 32"].recomputed == 1
    assert rows["own sink + boundary 32"].divergence == pytest.approx(0, abs=1e-5)
    assert rows["own sink + boundary 32"].agreement == 1
    assert rows["own sink"].divergence > 1e-3
    assert "shared prefix + compensate" not in rows


def test_what_cannot_be_learned_is_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "reuse.safetensors"
    for text, prefix, settings, said in (
        (words(20), "a", LearnSettings(sizes=SMALL), "passages"),
        (words(300), "", LearnSettings(sizes=SMALL), "--prefix"),
        (words(300), "a", LearnSettings(sizes=SMALL, kind="tree"), "--kind 'tree'"),
        (words(300), "a", LearnSettings(sizes=dataclasses.replace(SMALL, least=70)), "--least 70"),
    ):
        with pytest.raises(KVPlugError, match=said):
            learn(model, encode, text, encode(prefix), path, settings)
        assert not path.exists()


def test_digests_are_of_little_endian_ids() -> None:
    import hashlib

    assert digest([1, 256]) == hashlib.blake2b(b"\1\0\0\0\0\1\0\0", digest_size=16).digest()
    assert digest([]) == hashlib.blake2b(b"", digest_size=16).digest()


# -- the command -----------------------------------------------------------------------------------

ARGUMENTS = [
    "--prompts", "4", "--held-out", "2", "--documents", "2", "--least", "30", "--most", "60",
    "--follow", "8", "--rank", "4", "--divergence", "10", "--agreement", "0.5",
]  # fmt: skip


def run(*arguments: object) -> Any:
    wide = CliRunner(env={"COLUMNS": "200"})
    return wide.invoke(app, ["calibrate", "reuse", *map(str, arguments)])


def test_the_command_writes_the_file_and_prints_its_figures(
    directory: Path, tmp_path: Path
) -> None:
    text, output, figures = (tmp_path / n for n in ("text.txt", "reuse.safetensors", "all.json"))
    text.write_text(words(300), encoding="utf-8")
    done = run(
        directory, "--text", text, "--out", output, "--json", figures, "--effects",
        "--kind", "logistic", *ARGUMENTS,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for said in ("AUC", "Brier", "reliability", "outgoing", "shared prefix + boundary 16"):
        assert said in done.output
    assert load(output).kind == "logistic"
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert len(written["training"]) == 16 and len(written["held_out"]) == 8
    assert written["effects"][0]["label"] == "recompute"


def test_the_command_says_what_is_wrong(directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(words(20), encoding="utf-8")
    for arguments, said in (
        ((tmp_path / "none",), "not a model directory"),
        ((directory, "--out", tmp_path / "a" / "b"), "--output"),
        ((directory, "--text", text, *ARGUMENTS), "passages"),
        ((directory, "--text", tmp_path / "none.txt"), "cannot read"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert said in done.output
        assert len(done.output.strip().splitlines()) == 1


def test_calibrating_formats_needs_no_name(directory: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["calibrate", "--help"])
    assert done.exit_code == 0 and "bytes-per-token" in done.output
    for first in ([], ["formats"]):
        named = CliRunner().invoke(app, ["calibrate", *first, str(tmp_path / "none")])
        assert named.exit_code == 2 and "not a model directory" in named.output
