"""``kvplug codecs`` and ``kvplug calibrate transfer`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")

from kvplug.cli import app  # noqa: E402
from kvplug.contract import PlaneShape, TransferCodec  # noqa: E402
from kvplug.errors import DeploymentError  # noqa: E402
from kvplug.hosts.transformers import Host  # noqa: E402
from kvplug_lab import models  # noqa: E402
from kvplug_lab.calibrate.statistics import Source  # noqa: E402
from kvplug_lab.calibrate.transform import SINKS, Moments, collect, fit, measured  # noqa: E402
from kvplug_lab.cli.codecs import codecs as command  # noqa: E402
from kvplug_lab.fidelity import codecs  # noqa: E402
from kvplug_lab.fidelity.decoded import Reader  # noqa: E402
from kvplug_lab.fidelity.tasks import Prompt  # noqa: E402
from kvplug_policies.transform import GROUP, load  # noqa: E402

RUN = CliRunner()
PROGRAM = typer.Typer()
PROGRAM.command()(command)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(
        tmp_path_factory.mktemp("tiny"), layers=2, heads=4, kv_heads=2, head_dim=32, dtype="float32"
    )


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randint(64, 320, (n,), generator=torch.Generator().manual_seed(seed))


class Zero(TransferCodec):
    """Forgets everything."""

    name, exact, changes = "zero", False, ""

    def encode(self, planes: Any, start: int) -> dict[str, torch.Tensor]:
        return {"nothing": torch.zeros(1)}

    def decode(
        self, coded: Any, shapes: dict[str, PlaneShape], start: int
    ) -> dict[str, torch.Tensor]:
        return {n: torch.zeros(s.shape, dtype=torch.bfloat16) for n, s in shapes.items()}


def test_a_codec_is_measured_by_what_comes_back(model: Any) -> None:
    reader = Reader(model, 96)
    engine = codecs.engine_of(reader, "bfloat16", "")
    built = {label: codecs.build(label, engine) for label in ("lossless", "int8", "cachegen")}
    built["zero"] = Zero(Zero.Options(), engine)
    ids = tokens(130, 1).tolist()
    prompts = [Prompt("perplexity", "perplexity-0", tuple(ids[:96]), (ids[96],), tuple(ids[97:]))]
    ((name, rows),) = codecs.fidelity(reader, prompts, built, 32)
    assert name == "perplexity-0"
    none, lossless, int8, cachegen, zero = rows
    assert none.ratio == 1 and none.kl == lossless.kl == 0 and lossless.agree[0] == 1
    assert lossless.exact and lossless.ratio > 1.3
    assert 1.7 < int8.ratio < 1.8 and zero.ratio > 1000
    assert 0 < int8.kl < cachegen.kl < zero.kl
    assert all(row.tokens == 33 for row in rows)


def test_an_answer_is_found_where_every_token_is_the_first_choice(model: Any) -> None:
    reader = Reader(model, 64)
    engine = codecs.engine_of(reader, "bfloat16", "")
    ids = tokens(64, 2)
    answer: list[int] = []
    for _ in range(3):  # What the model itself would say.
        text = torch.cat([ids, torch.tensor(answer, dtype=torch.int64), torch.zeros(1).long()])
        reader.first = 32
        reader.begin(text)
        answer.append(int(torch.cat(list(reader.go_on(text, None)))[-1].argmax()))
    right = Prompt("passkey_later", "a-0", tuple(ids[:63].tolist()), (int(ids[63]),), tuple(answer))
    wrong = Prompt("passkey_later", "b-0", right.context, right.then, (*answer[:2], answer[2] ^ 1))
    *_, (_, rows) = codecs.fidelity(
        reader, [right, wrong], {"zero": Zero(Zero.Options(), engine)}, 16
    )
    assert rows[0].retrieved == {"passkey_later": 1} and rows[0].asked == {"passkey_later": 2}


def test_a_chunk_starts_where_it_stands() -> None:
    starts = []

    class Seen(Zero):
        def encode(self, planes: Any, start: int) -> dict[str, torch.Tensor]:
            starts.append((start, planes["key"].shape[1]))
            return dict(planes)

        def decode(self, coded: Any, shapes: Any, start: int) -> dict[str, torch.Tensor]:
            return dict(coded)

    planes = {"key": torch.randn(2, 40, 1, 4), "value": torch.randn(2, 40, 1, 4)}
    back, size = codecs.through(Seen(Seen.Options(), None), planes, 16)  # type: ignore[arg-type]
    assert starts == [(0, 16), (16, 16), (32, 8)] and size == codecs.size_of(planes)
    assert all(torch.equal(back[name], planes[name]) for name in planes)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(DeploymentError, match="unknown transfer policy 'zip'"):
        codecs.choice("zip")
    with pytest.raises(DeploymentError, match="group"):
        codecs.choice("int4:group=1")


# -- the transform ---------------------------------------------------------------------------------


def test_components_hold_what_was_read(model: Any) -> None:
    layers = Host(model, 16).layers
    learn, measure = ([tokens(200, seed) for seed in seeds] for seeds in ((3, 4, 5), (6,)))
    found = collect(model, layers, learn, measure)
    assert isinstance(found, Moments) and found.tokens == 3 * (200 - SINKS)
    made = fit(found, 96, Source("", "tiny", ""))
    for plane in ("key", "value"):
        basis = made.tensors[f"{plane}.basis"].float()
        assert basis.shape == (128, 96)
        torch.testing.assert_close(basis.T @ basis, torch.eye(96), atol=5e-3, rtol=0)
        deviation = made.tensors[f"{plane}.deviation"]
        assert (deviation.diff() <= 0).all()
        held = torch.cat(found.held[plane]).float()
        y = (held - made.tensors[f"{plane}.mean"].reshape(-1)) * made.tensors[
            f"{plane}.weight"
        ].reshape(-1)
        left = (y - y @ basis @ basis.T).square().sum() / y.square().sum()
        assert float(left) < 0.1


def test_queries_weigh_keys_pair_by_pair(model: Any) -> None:
    found = Moments(Host(model, 16).layers)
    found.tokens = 1
    found.moment["value"] = torch.eye(128)
    found.queries = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)).double()
    weight = found.weights()["key"]
    assert torch.equal(weight[..., :16], weight[..., 16:])
    both = (found.queries[..., :16] + found.queries[..., 16:]) / 2
    torch.testing.assert_close(weight[..., :16], both.sqrt().float())


def test_finer_steps_cost_more_bits_and_less_error() -> None:
    deviation = torch.logspace(1, -1, 64)
    z = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * deviation
    parts = measured(z, deviation)
    assert parts["rate"].shape == (64 // GROUP, len(parts["steps"]))
    assert (parts["rate"].diff(dim=1) < 0.05).all()
    assert (parts["loss"][:, :-1].diff(dim=1) > -1e-4).all()
    own = z.square().mean(0).view(-1, GROUP).mean(1)
    torch.testing.assert_close(parts["loss"][:, -1], own)
    # A uniform step loses a twelfth of its square where it is fine.
    fine = parts["steps"][0].square() / 12
    torch.testing.assert_close(parts["loss"][0, 0], fine, rtol=0.2, atol=0)


# -- the commands ----------------------------------------------------------------------------------


def test_a_transform_is_made_and_used(directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = "".join(chr(97 + int(x) % 26) for x in tokens(6000, 7))
    text.write_text(" ".join(words[i : i + 5] for i in range(0, 6000, 5)), encoding="utf-8")
    file, rows = tmp_path / "transform.safetensors", tmp_path / "rows.json"
    sizes = ["--tokens", "1024", "--held-out", "256", "--window", "128", "--components", "96"]
    made = RUN.invoke(
        app,
        [
            "calibrate",
            "transfer",
            str(directory),
            "--text",
            str(text),
            "--output",
            str(file),
            *sizes,
        ],
    )
    assert made.exit_code == 0, made.output
    assert load(file).tokens == 8 * (128 - SINKS)
    asked = ["raw", "fp8", f"kvtc:transform={file}:ratio=3"]
    given = [part for label in asked for part in ("--codec", label)]
    small = ["--context", "256", "--passages", "1", "--scored", "16", "--samples", "0"]
    small += ["--rounds", "1", "--json", str(rows)]
    done = RUN.invoke(PROGRAM, ["--model", str(directory), "--text", str(text), *given, *small])
    assert done.exit_code == 0, done.output
    data = json.loads(rows.read_text(encoding="utf-8"))
    found = {row["codec"]: row for row in data["rows"]}
    assert list(found) == ["none", *asked]
    assert found["fp8"]["ratio"] == pytest.approx(64 / 34) and found["raw"]["kl"] == 0
    assert 2 < found[asked[2]]["ratio"] < 5 and found[asked[2]]["kl"] > 0
    assert all(found[label]["encode"][0] > 0 for label in asked)
    assert "first choice" in done.output


def test_what_cannot_run_is_refused_at_once() -> None:
    for wrong in (["--dtype", "float8"], ["--codec", "zip"], ["--json", "/nowhere/rows.json"]):
        done = RUN.invoke(PROGRAM, wrong)
        assert done.exit_code == 2, done.output
