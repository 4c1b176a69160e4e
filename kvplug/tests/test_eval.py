"""The evaluation: prompts are the same every time, the full cache is the reference, figures carry
their spread, and bad input is told in one message."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.contract import FormatPolicy, Kind, LayerView, PageLayout
from kvplug.errors import DeploymentError, KVPlugError
from kvplug.hosts.transformers import Host
from kvplug.registry import plugins
from kvplug_lab import models
from kvplug_lab.fidelity import compare, report, variants
from kvplug_lab.fidelity.peer_formats import PEERS
from kvplug_lab.fidelity.records import FULL, BadRecords, Record, Run
from kvplug_lab.fidelity.run import FormatVariant, Variant, bytes_per_token, run, run_formats, steps
from kvplug_lab.fidelity.tasks import KEYS, TASKS, BadText, Prompt, PromptSizes, Wanted, build

transformers = pytest.importorskip("transformers")

SIZES = PromptSizes(context=896, samples=2, passages=2, scored=24, generated=6, seed=3)
LINE = "the {} man went to the {} house and said nothing of the {} sea.\n"
TEXT = "".join(LINE.format(i, i * i, i % 7) for i in range(3000))


def encode(text: str) -> list[int]:
    """A token a byte, past the tiny model's special ones."""
    return [64 + byte for byte in text.encode("ascii")]


def decode(ids: Sequence[int]) -> str:
    return bytes(i - 64 for i in ids).decode("ascii")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return build(encode, TEXT, SIZES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(
        tmp_path_factory.mktemp("tiny"), heads=4, kv_heads=2, head_dim=32, dtype="float32"
    )


@pytest.fixture(scope="module")
def host(directory: Path) -> Host:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return Host(model.eval())


def variant(name: str, budget: float, **options: Any) -> Variant:
    found = plugins().registry.get(Kind.SEQUENCE, name)
    assert found is not None
    label = ":".join([name, *(f"{k}={v}" for k, v in options.items())])
    return Variant(label, budget, found, options)


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_are_the_same_for_the_same_arguments(prompts: list[Prompt]) -> None:
    assert build(encode, TEXT, SIZES) == prompts
    other = build(encode, TEXT, replace(SIZES, seed=4))
    assert all(a.context != b.context for a, b in zip(prompts, other, strict=True))
    assert [Prompt.of(json.loads(json.dumps(p.plain()))) for p in prompts] == prompts


def test_a_tasks_prompts_do_not_depend_on_the_others(prompts: list[Prompt]) -> None:
    for task in TASKS:
        assert build(encode, TEXT, SIZES, [task]) == [p for p in prompts if p.task == task]


def test_every_context_is_as_long_as_asked(prompts: list[Prompt]) -> None:
    assert {len(p.context) for p in prompts} == {SIZES.context}
    assert len({p.name for p in prompts}) == len(prompts) == 2 * len(TASKS)
    with_bos = build(encode, TEXT, SIZES, bos=[1])
    assert all(p.context[0] == 1 and len(p.context) == SIZES.context for p in with_bos)


def test_text_goes_on_where_the_context_ends(prompts: list[Prompt]) -> None:
    for prompt in (p for p in prompts if p.task == "perplexity"):
        assert decode((*prompt.context, *prompt.then, *prompt.answer)) in TEXT
        assert len(prompt.then) == 1 and len(prompt.answer) == SIZES.scored
    greedy = [p for p in prompts if p.task == "greedy"]
    assert {p.new_tokens for p in greedy} == {SIZES.generated + 1}
    assert [p.context for p in greedy] == [p.context for p in prompts if p.task == "perplexity"]


@pytest.mark.parametrize("later", [False, True])
def test_a_pass_key_is_hidden_at_its_depth(prompts: list[Prompt], later: bool) -> None:
    task = "passkey_later" if later else "passkey"
    for i, prompt in enumerate(p for p in prompts if p.task == task):
        context, then, key = decode(prompt.context), decode(prompt.then), decode(prompt.answer)
        assert len(key) == 6 and key[0] == " " and key[1:].isdigit()
        assert context.count(key) == 2
        depth = context.index(f"The pass key is{key}") / len(context)
        assert depth == pytest.approx((i + 0.5) / SIZES.samples, abs=0.12)
        question = "What is the pass key"
        assert (question in context) is not later and (question in then) is later
        assert then.endswith(" is")


def test_many_keys_are_hidden_and_another_is_asked_for_each_time(prompts: list[Prompt]) -> None:
    asked = []
    for prompt in (p for p in prompts if p.task == "multikey"):
        context, key = decode(prompt.context), decode(prompt.answer)
        facts = [line for line in context.split("\n") if line.startswith("The number of")]
        assert len([f for f in facts if f.endswith(".")]) == KEYS
        name = context.rsplit("The number of the ", 1)[1]
        assert f"The number of the {name} is{key}." in facts
        asked.append(facts.index(f"The number of the {name} is{key}."))
    assert len(set(asked)) == SIZES.samples


def test_a_text_or_context_too_short_is_refused() -> None:
    with pytest.raises(BadText, match="text is too short"):
        build(encode, TEXT[:500], SIZES)
    with pytest.raises(BadText, match="at least 256"):
        build(encode, TEXT, replace(SIZES, context=100))
    with pytest.raises(BadText, match="multikey: a context of 256 tokens leaves no room"):
        build(encode, TEXT, replace(SIZES, context=256), ["multikey"])


# -- running ---------------------------------------------------------------------------------------


def test_the_full_cache_is_the_reference(host: Host, prompts: list[Prompt]) -> None:
    records = list(run(host, prompts, []))
    assert [r.prompt for r in records] == [p.name for p in prompts_in_order(prompts)]
    for record, prompt in zip(records, prompts_in_order(prompts), strict=True):
        assert (record.variant, record.budget, record.held) == (FULL, 1.0, SIZES.context)
        if prompt.new_tokens:
            ids = torch.tensor(prompt.context)
            assert record.ids == host.generate(ids, None, prompt.new_tokens).ids[1:]
            continue
        assert record.kl == 0
        whole = torch.tensor([*prompt.context, *prompt.then, *prompt.answer])
        with torch.inference_mode():
            logs = host.model(whole[None]).logits[0].log_softmax(-1)
        first = SIZES.context + len(prompt.then)
        each = [-float(logs[at - 1, whole[at]]) for at in range(first, len(whole))]
        assert record.nll == pytest.approx(each, abs=1e-4)


def prompts_in_order(prompts: list[Prompt]) -> list[Prompt]:
    """Perplexity and greedy of one passage run together."""
    ordered: list[Prompt] = []
    for prompt in prompts:
        ordered += [p for p in prompts if p.context == prompt.context and p not in ordered]
    return ordered


def test_records_are_the_same_every_time(host: Host, prompts: list[Prompt]) -> None:
    asked = [variant("snapkv", 0.5, window=8), variant("h2o", 0.25), variant("sink_window", 0.5)]
    told: list[str] = []
    first = list(run(host, prompts[:4], asked, told.append))
    assert list(run(host, prompts[:4], asked)) == first
    assert len(told) == steps(prompts[:4], asked) == len(first) == 16


def test_a_variant_holds_its_budget(host: Host, prompts: list[Prompt]) -> None:
    names = ("snapkv", "tova", "knorm", "sink_window")
    asked = [variant(n, b) for n in names for b in (0.25, 0.5, 1.0)]
    for record in run(host, prompts[:1], asked):
        assert record.held == record.budget * SIZES.context
        assert record.kl is not None
        # A window slides on with the text; the others cut again after an interval only.
        if record.budget == 1 and record.variant != "sink_window":
            assert record.kl == 0
        elif record.variant == FULL or record.budget < 1:
            assert (record.kl == 0) is (record.variant == FULL)


def test_what_drops_everything_asked_for_is_seen(host: Host, prompts: list[Prompt]) -> None:
    one = [p for p in prompts if p.task == "greedy"][:1]
    full, kept, cut = run(host, one, [variant("knorm", 1.0), variant("knorm", 0.1)])
    assert kept.ids == full.ids and cut.ids != full.ids


def test_a_variant_that_acts_while_reading_is_read_anew(host: Host, prompts: list[Prompt]) -> None:
    asked = variant("knorm", 0.1, prefill=256, interval=64)
    _, record = run(host, prompts[:1], [asked])
    policy = asked.build(host, SIZES.context)
    text, _ = host.read(torch.tensor(prompts[0].context), policy)
    assert len(text.evictions) > 1 and record.held == text.kept


def test_a_policy_without_a_budget_is_refused(host: Host) -> None:
    with pytest.raises(KVPlugError, match="lru has no budget to set"):
        Variant("lru", 0.5, plugins().registry.get(Kind.PREFIX_CACHE, "lru")).build(host, 64)  # type: ignore[arg-type]


class Halves(FormatPolicy):
    """Elements rounded to halves, as float32."""

    name, changes = "halves", "rounds"

    def layout(self, layer: LayerView) -> PageLayout:
        return PageLayout(8 * layer.head_size, 32, 32)

    def encode(self, layer: LayerView, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return ((torch.cat([key, value], -1).float() * 2).round() / 2).view(torch.uint8)

    def decode(self, layer: LayerView, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = cells.view(torch.float32).split(layer.head_size, -1)
        return key, value


class Whole(Halves):
    """Elements as they are."""

    name, changes = "whole", "nothing"

    def encode(self, layer: LayerView, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([key, value], -1).float().view(torch.uint8)


FORMATS = [
    FormatVariant("whole", Whole),
    FormatVariant("whole:exact_chunk=false", Whole, {"exact_chunk": False}),
    FormatVariant("halves", Halves),
]


def test_a_format_that_loses_nothing_is_the_full_cache(host: Host, prompts: list[Prompt]) -> None:
    small = Host(host.model, chunk=512)
    told: list[str] = []
    found = list(run_formats(small, prompts, FORMATS, told.append))
    assert len(found) == len(told) == steps(prompts, FORMATS) == 4 * len(prompts)
    by = {(r.variant, r.prompt): r for r in found}
    assert len(by) == len(found)
    for record in run(host, prompts, []):
        full = by[FULL, record.prompt]
        assert (full.budget, full.held, full.bytes) == (1.0, SIZES.context, 2 * 2 * 2 * 32 * 2)
        assert full.ids == record.ids
        assert full.nll == pytest.approx(record.nll, abs=1e-3)
        for label in ("whole", "whole:exact_chunk=false"):
            same = by[label, record.prompt]
            assert same.ids == record.ids and same.held == SIZES.context
            assert same.nll == pytest.approx(record.nll, abs=1e-3)
            assert same.budget == 2.0 and same.bytes == 2 * full.bytes
            assert same.kl is None or same.kl < 1e-4
        rounded = by["halves", record.prompt]
        assert rounded.kl is None or rounded.kl > 1e-3


def test_what_follows_is_scored_from_the_codes_in_pieces(host: Host, prompts: list[Prompt]) -> None:
    """Small pieces see more of the codes; a passage fed at once sees none of its own."""
    one = [p for p in prompts if p.task == "perplexity"][:1]
    by_piece = {}
    for piece in (1, 8, 64):
        (_, record) = run_formats(host, one, FORMATS[2:], piece=piece)
        by_piece[piece] = record
    text = host.read(torch.tensor(one[0].context), host.policy(Halves))[0]
    fed = torch.tensor([*one[0].then, *one[0].answer[:-1]])
    parts = [host.feed(text, token[None])[0] for token in fed]
    logs = torch.stack(parts).float().log_softmax(-1)
    wanted = torch.tensor(one[0].answer)
    nll = [-x for x in logs.gather(-1, wanted[:, None])[:, 0].tolist()]
    assert by_piece[1].nll == pytest.approx(nll, abs=1e-3)
    assert by_piece[1].nll != pytest.approx(by_piece[64].nll, abs=1e-3)
    assert by_piece[8].nll[:7] != pytest.approx(by_piece[1].nll[:7], abs=1e-4)


def test_bytes_are_of_all_heads_and_layers_and_vllms_for_its_own(host: Host) -> None:
    layers = tuple(LayerView(i, 30, 3, 9, 64, "bfloat16") for i in range(30))
    assert bytes_per_token(None, layers) == 30 * 3 * 256
    big = replace(host.engine, layers=layers)
    made = {p.name: p(p.Options.model_validate({}), big) for p in PEERS}
    assert bytes_per_token(made["vllm_int4"], layers) == 30 * 3 * 72
    assert bytes_per_token(made["turboquant_4bit_nc"], layers) == 3 * (26 * 70 + 4 * 256)
    whole = Whole(Whole.Options.model_validate({}), big)
    assert bytes_per_token(whole, layers) == 30 * 3 * 512


# -- records and figures ---------------------------------------------------------------------------


def record(variant: str, prompt: str, task: str, budget: float = 0.5, **what: Any) -> Record:
    return Record(variant, 1.0 if variant == FULL else budget, task, prompt, 10.0, **what)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    kept = Run({"seed": 1}, [record(FULL, "a", "greedy", ids=[1, 2])])
    kept.save(tmp_path / "r.json", [{"metric": "x"}])
    assert Run.load(tmp_path / "r.json") == kept


@pytest.mark.parametrize(
    "content", ["", "{}", '{"format": "other"}', '{"format": "kvplug eval 1", "about": {}}', "[1]"]
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(BadRecords, match=r"bad\.json"):
        Run.load(path)
    with pytest.raises(BadRecords, match="cannot be read"):
        Run.load(tmp_path / "absent.json")


def test_metrics_are_what_they_say() -> None:
    records = [
        record(FULL, "p", "perplexity", nll=[1.0, 2.0], top=[5, 6], right=[True, True], kl=0.0),
        record("x", "p", "perplexity", nll=[2.0, 4.0], top=[5, 7], right=[True, False], kl=0.5),
        record(FULL, "g", "greedy", ids=[1, 2, 3, 4]),
        record("x", "g", "greedy", ids=[1, 9, 3, 4]),
        record(FULL, "k", "passkey", nll=[0.1, 0.1], right=[True, True]),
        record("x", "k", "passkey", nll=[0.1, 3.1], right=[True, False]),
    ]
    found = {(r.variant, r.metric): r.value for r in report.summarise(records)}
    assert found["x", "nll"] == 3.0 and found["x", "added"] == 1.5
    assert found["x", "kl"] == 0.5 and found["x", "top1"] == 0.5
    assert found["x", "prefix"] == 0.25 and found["x", "agreement"] == 0.75
    assert found["x", "passkey"] == 0.0 and found["x", "passkey_nll"] == pytest.approx(1.6)
    assert found[FULL, "prefix"] == found[FULL, "passkey"] == found[FULL, "top1"] == 1.0
    with pytest.raises(ValueError, match="no record of the full cache for q"):
        report.summarise([record("x", "q", "greedy", ids=[1])])


def test_intervals_are_wide_where_samples_are_few() -> None:
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert report.wilson([1.0] * 81 + [0.0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = report.wilson([0.0] * 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)
    low, high = report.bootstrap([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4
    assert report.bootstrap([2.0, 2.0]) == (2.0, 2.0)
    # A skewed sample pulls BCa's interval to its long side, a percentile interval's ends less.
    low, high = report.bootstrap([0.0] * 9 + [10.0])
    assert low == 0 and high > 3
    # Large samples are resampled apart, where what lies between them is no spread.
    assert report.bootstrap([1.0] * 8, [5.0] * 8) == (3.0, 3.0)
    low, high = report.bootstrap([1.0, 1.2] * 4, [5.0, 5.2] * 4)
    assert 3 <= low < 3.1 < high <= 3.2
    # Small ones together, each task with the same weight.
    low, high = report.bootstrap([1.0, 1.2], [5.0, 5.2])
    assert low < 2.2 and high > 4
    low, high = report.bootstrap([0.0] * 6, [6.0, 6.0])
    assert 0 <= low < 3 < high <= 12
    assert report.paired([1.0]) == (-math.inf, math.inf)


def test_few_answers_that_agree_are_no_certainty() -> None:
    assert report.interval([1.0, 1.0]) == report.wilson([1.0, 1.0])
    assert report.interval([1.0, 0.5]) == report.bootstrap([1.0, 0.5])
    assert report.interval([0.0, 0.0], [0.0]) == report.wilson([0.0] * 3)
    low, high = report.paired([0.0, 0.0, 0.0])
    assert low == -high and 0.3 < high < 1
    # Two of two lost may be chance; ten of ten are not.
    low, high = report.paired([-1.0, -1.0])
    assert low == -1 and high > 0
    assert report.paired([-1.0] * 10)[1] < -0.5


def test_p_values_are_exact_and_corrected_over_all_rows() -> None:
    # Five of five pairs: 2 / 2**5; Wilcoxon's least of five is the same.
    assert report.p_value([1.0] * 5 + [0.0]) == pytest.approx(0.0625)
    assert report.p_value([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(0.0625)
    assert report.p_value([1.0, -1.0]) == report.p_value([0.0, 0.0]) == 1
    # Holm (1979): the least times three, the next times two, none below the one before.
    assert report.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert report.holm([0.9, 0.5]) == [1.0, 1.0] and report.holm([]) == []


def test_rows_say_how_they_differ_from_the_full_cache() -> None:
    def of(variant: str, scores: dict[str, list[float]]) -> list[Record]:
        return [
            record(variant, f"{task}-{i}", task, group="ruler", score=one)
            for task, each in scores.items()
            for i, one in enumerate(each)
        ]

    ones = [1.0, 0.9, 1.0, 0.9, 1.0, 0.9]
    full = of(FULL, {"vt": ones, "cwe": [0.5, 0.4]})
    lost = of("lost", {"vt": [one - 0.8 for one in ones], "cwe": [0.0, 0.0]})
    same = of("same", {"vt": [*ones[:5], 0.8], "cwe": [0.5, 0.5]})
    rows = {(r.variant, r.metric): r for r in report.summarise([*full, *lost, *same])}
    assert rows[FULL, "vt"].difference is None and rows[FULL, "vt"].verdict == ""
    assert rows["lost", "vt"].difference == pytest.approx(-0.8)
    assert rows["lost", "vt"].verdict == rows["lost", "ruler"].verdict == "worse"
    assert rows["same", "vt"].verdict == rows["same", "ruler"].verdict == "within noise"
    # The mean of the tasks' means, however many prompts each has.
    assert rows[FULL, "ruler"].value == pytest.approx((0.95 + 0.45) / 2)
    assert rows[FULL, "ruler"].prompts == 8
    # Six rows are tested; Wilcoxon's least p of six prompts is 1/32.
    assert rows["lost", "vt"].p == pytest.approx(min(1.0, 6 / 32), abs=0.05)
    assert rows["same", "vt"].p == 1
    assert all(r.p is not None for (v, _), r in rows.items() if v != FULL)


def test_a_perplexity_differs_and_a_divergence_is_a_difference_already() -> None:
    def of(variant: str, added: float) -> list[Record]:
        what: dict[str, Any] = {"top": [1], "right": [True], "kl": added}
        return [
            record(variant, f"p{i}", "perplexity", nll=[1.0 + i + added * (1 + i / 9)], **what)
            for i in range(6)
        ]

    rows = {(r.variant, r.metric): r for r in report.summarise([*of(FULL, 0), *of("x", 0.2)])}
    # Passages differ by whole nats, and the pairs by 0.2: paired, that is no noise.
    nll, full = rows["x", "nll"], rows[FULL, "nll"]
    assert nll.low < full.high and nll.verdict == "worse"
    assert nll.difference == pytest.approx(rows["x", "added"].value)
    assert rows["x", "kl"].difference is None and rows["x", "kl"].verdict == ""
    assert json.loads(json.dumps(nll.plain()))["verdict"] == "worse"


def metric(name: str) -> report.Metric:
    (found,) = (m for m in report.METRICS if m.name == name)
    return found


def test_a_difference_is_noise_until_the_prompts_agree_on_it() -> None:
    ten = [f"p{i}" for i in range(10)]
    hits, misses = dict.fromkeys(ten, 1.0), dict.fromkeys(ten, 0.0)
    assert report.compare(hits, misses, metric("passkey"), 0.5).verdict == "better"
    assert report.compare(misses, hits, metric("passkey"), 0.5).verdict == "worse"
    assert report.compare(hits, hits, metric("passkey"), 0.5).verdict == "within noise"
    one_off = hits | {"p0": 0.0}
    assert report.compare(one_off, hits, metric("passkey"), 0.5).verdict == "within noise"
    lower, higher = {"a": 1.0, "b": 1.1, "c": 1.2}, {"a": 1.5, "b": 1.7, "c": 1.9}
    assert report.compare(lower, higher, metric("nll"), 0.5).verdict == "better"
    assert report.compare(higher, lower, metric("nll"), 0.5).verdict == "worse"
    mixed = {"a": 1.0, "b": 2.0}
    assert report.compare(mixed, {"a": 1.2, "b": 1.8}, metric("nll"), 0.5).verdict == "within noise"
    # Differences -1, 0 and 1: mean 0, standard error 1/sqrt(3); t of 2 degrees is 4.30265.
    some, none = {"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 2.0, "b": 2.0, "c": 2.0}
    found = report.compare(some, none, metric("nll"), 0.5)
    assert (found.low, found.high) == pytest.approx((-4.30265 / 3**0.5, 4.30265 / 3**0.5))
    rounded = {name: value + 1e-6 for name, value in lower.items()}
    assert report.compare(lower, rounded, metric("nll"), 0.5).verdict == "within noise"
    assert report.compare({"a": 1.0}, {"a": 9.0}, metric("nll"), 0.5).verdict == "within noise"
    with pytest.raises(ValueError, match="no prompt in common"):
        report.compare({"a": 1.0}, {"b": 1.0}, metric("nll"), 0.5)


def test_two_runs_are_compared_pair_by_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, variant: str, nll: float) -> Path:
        records = []
        for prompt in ("a", "b"):
            same: dict[str, Any] = {"top": [1], "right": [True]}
            records.append(record(FULL, prompt, "perplexity", nll=[1.0], kl=0.0, **same))
            records.append(record(variant, prompt, "perplexity", nll=[nll], kl=0.1, **same))
        Run({}, records).save(tmp_path / name)
        return tmp_path / name

    ours, theirs = write("o.json", "snapkv", 1.2), write("t.json", "SnapKVPress", 1.1)
    assert compare.main([str(ours), str(theirs), "--json", str(tmp_path / "d.json")]) == 0
    printed = capsys.readouterr().out
    assert "| ours / theirs | kept | added ↓ | divergence ↓ |" in printed
    assert "| snapkv / SnapKVPress | 50% | 0.200 / 0.100 **worse** | 0.100 / 0.100 |" in printed
    (first, *_) = json.loads((tmp_path / "d.json").read_text())
    assert first["ours_variant"] == "snapkv" and first["verdict"] == "worse"
    assert compare.main([str(ours), str(theirs), "--pairs", "tova => TOVAPress"]) == 2
    assert "no pair" in capsys.readouterr().err
    assert compare.main([str(ours), str(tmp_path / "absent.json")]) == 2


def test_formats_are_compared_by_the_ratio_of_their_divergences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(variant: str, budget: float, size: int, kls: Sequence[float]) -> list[Record]:
        same: dict[str, Any] = {"nll": [1.0], "top": [1], "right": [True], "bytes": size}
        names = [f"p{i}" for i in range(len(kls))]
        return [
            record(variant, n, "perplexity", budget, kl=k, **same)
            for n, k in zip(names, kls, strict=True)
        ]

    easy, hard = [0.010, 0.011, 0.0105, 0.5], [0.021, 0.0215, 0.0205, 1.02]
    rows = [*of(FULL, 1.0, 512, [0.0] * 4), *of("a", 0.25, 128, easy), *of("b", 0.3, 154, hard)]
    Run({}, rows).save(tmp_path / "r.json")
    path = str(tmp_path / "r.json")
    command = [path, path, "--pairs", "a => b; b => a; a => c", "--json", str(tmp_path / "d.json")]
    assert compare.main(command) == 0
    printed = capsys.readouterr().out
    assert "| a / b | 128 / 154 | 0.50 (" in printed and "**better** |" in printed
    assert "| b / a | 154 / 128 | 2.01 (" in printed and "**worse** |" in printed
    first, second = json.loads((tmp_path / "d.json").read_text())
    assert first["low"] < first["ratio"] < first["high"] < 1 < second["low"]
    assert first["ratio"] == pytest.approx(1 / second["ratio"])
    # The means alone are within noise: one passage is fifty times as hard.
    (kl,) = (d for d in first["differences"] if d["metric"] == "kl")
    assert kl["verdict"] == "within noise"
    assert compare.main([path, path, "--pairs", "a => c"]) == 2
    assert "no pair" in capsys.readouterr().err
    with pytest.raises(ValueError, match="positive"):
        report.ratio({"p": 0.0}, {"p": 1.0})
    with pytest.raises(ValueError, match="no prompt in common"):
        report.ratio({"p": 1.0}, {"q": 1.0})


# -- the command -----------------------------------------------------------------------------------


def test_policies_are_read_with_their_options() -> None:
    chosen = variants.policies(["snapkv:window=8:pooling=mean,tova"])
    assert list(chosen) == ["snapkv:window=8:pooling=mean", "tova"]
    made = variants.variants(chosen, [0.25, 0.5], once=False)
    assert [(v.label, v.budget) for v in made[:2]] == [
        ("snapkv:window=8:pooling=mean", 0.25),
        ("snapkv:window=8:pooling=mean", 0.5),
    ]
    assert made[0].options == {"window": 8, "pooling": "mean"}
    assert variants.variants(chosen, [0.5], once=True)[1].options == {"interval": variants.NEVER}
    assert {"snapkv", "sink_window", "h2o"} <= set(variants.policies(None))
    with pytest.raises(DeploymentError, match=r"sets a budget.*--budget"):
        variants.policies(["snapkv:budget=3"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "snapvk"], "did you mean snapkv"),
        (["--policy", "snapkv:window=x"], "window"),
        (["--policy", "snapkv:window"], "is not an option"),
        (["--policy", "absent.yaml"], "absent.yaml"),
        (["--budget", "0"], "above 0 and at most 1"),
        (["--budget", "0.5,many"], "above 0 and at most 1"),
        (["--task", "passkeys"], "use any of own, ruler, perplexity"),
        (["--task", "qa_1"], "qa_1 needs --qa FILE"),
        (["--task", "ruler", "--context", "400"], "at least 512"),
        (["--task", "ruler", "--qa", "absent.json"], "absent.json"),
        (["--tasks-file", "absent.jsonl"], "absent.jsonl"),
        (["--tasks-file", "text.txt"], "text.txt, line 1: not JSON"),
        (["--ask", "never"], "use later or with"),
        (["--save-lm-eval", "out"], "add --task ruler"),
        (["--text", "absent.txt"], "cannot read absent.txt"),
        (["--model", "./absent"], "not a model directory"),
        (["--json", "absent/x.json"], "its folder must exist"),
        (["--plot", "x.gif"], "must end in .png"),
        (["--context", "20"], "at least 256"),
        (["--dtype", "int8"], "use one of float32"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str],
    says: str,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    base = ["--model", str(directory), "--text", "text.txt", "--policy", "tova"]
    done = CliRunner().invoke(app, ["eval", *base, *arguments])
    assert done.exit_code == 2, done.output
    assert says in done.output and "Traceback" not in done.output


def test_formats_are_read_with_their_options(tmp_path: Path) -> None:
    section = tmp_path / "section.yaml"
    section.write_text("format: {use: turboquant_3bit_nc, boundary: 0}\n")
    bare = tmp_path / "bare.yaml"
    bare.write_text("use: bf16\n")
    found = variants.formats([f"vllm_int4,turboquant_4bit_nc:reread=0,@{section}", f"@{bare}"])
    assert [v.label for v in found] == [
        "vllm_int4", "turboquant_4bit_nc:reread=0", f"@{section}", f"@{bare}"
    ]  # fmt: skip
    assert [v.policy.name for v in found] == [
        "vllm_int4", "turboquant_4bit_nc", "turboquant_3bit_nc", "bf16"
    ]  # fmt: skip
    assert [v.options for v in found] == [{}, {"reread": 0}, {"boundary": 0}, {}]
    assert [v.label for v in variants.formats(["peers"])] == [p.name for p in PEERS]
    everything = {v.label for v in variants.formats(["all"])}
    assert {"int4", "int8"} <= everything <= set(plugins().registry.names(Kind.FORMAT))
    # They are there for comparison only.
    assert not {p.name for p in PEERS} & set(plugins().registry.names(Kind.FORMAT))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "vllm_int3"], "did you mean vllm_int"),
        (["--format", "turboquant_4bit_nc:boundary=-1"], "boundary"),
        (["--format", "vllm_int4:group=3"], "has no option 'group'"),
        (["--format", "vllm_int4:group"], "is not an option"),
        (["--format", "snapkv"], "'snapkv' is a sequence policy"),
        (["--format", "@absent.yaml"], "absent.yaml"),
        (["--format", "@empty.yaml"], "must map kinds"),
        (["--format", "@other.yaml"], "is not set"),
        (["--format", "vllm_int4", "--policy", "tova"], "cannot be measured together"),
        (["--format", "kivi", "--block-size", "16"], "--block-size 32"),
        (["--format", "turboquant_4bit_nc", "--model", "narrow"], "48 a head"),
    ],
)
def test_a_bad_format_is_one_message_and_exit_code_2(
    arguments: list[str],
    says: str,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "other.yaml").write_text("sequence: tova\n")
    if "narrow" in arguments:
        models.tiny_llama(tmp_path / "narrow", heads=2, kv_heads=1, head_dim=48, dtype="float32")
    base = ["--model", str(directory), "--text", "text.txt", "--samples", "1", "--passages", "1"]
    done = CliRunner().invoke(app, ["eval", *base, *arguments])
    assert done.exit_code == 2, done.output
    assert says in " ".join(done.output.split()) and "Traceback" not in done.output


def test_the_command_measures_formats(directory: Path, tmp_path: Path) -> None:
    text, rows, plot = tmp_path / "text.txt", tmp_path / "rows.json", tmp_path / "plot.svg"
    text.write_text(TEXT)
    sizes = ["--context=512", "--samples=1", "--passages=2", "--scored=8", "--generated=4"]
    asked = ["--format", "bf16,vllm_int4,int4", "--task", "perplexity,greedy,passkey"]
    where = ["--model", str(directory), "--text", str(text), "--chunk=256", "--piece=4"]
    outputs = ["--json", str(rows), "--plot", str(plot)]
    done = CliRunner().invoke(app, ["eval", *where, *sizes, *asked, *outputs])
    assert done.exit_code == 0, done.output
    for word in ("full cache", "vllm_int4", "bytes/token", "1/3.20", "3 formats"):
        assert word in done.output
    written = json.loads(rows.read_text())
    assert written["about"]["chunk"] == 256 and written["about"]["block_size"] == 32
    summary = {(r["variant"], r["metric"]): r for r in written["summary"]}
    row = summary["vllm_int4", "kl"]
    # Two layers, two heads of 32: 2 * (16 + 4) bytes each, of 2 * 2 * 32.
    assert row["bytes"] == 2 * 2 * 40 and row["budget"] == 0.3125 and row["value"] > 0
    assert summary["bf16", "kl"]["value"] < 1e-3
    assert {r.bytes for r in Run.load(rows).records} >= {2 * 2 * 40, 2 * 2 * 128}
    assert "bfloat16 bytes" in plot.read_text() or "<svg" in plot.read_text()[:2000]


def test_the_command_measures_and_writes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text, rows, plot = tmp_path / "text.txt", tmp_path / "rows.json", tmp_path / "plot.svg"
    text.write_text(TEXT)
    monkeypatch.setenv("KVPLUG_TEXTS", str(text))
    sizes = ["--context=512", "--samples=1", "--passages=1", "--scored=8", "--generated=4"]
    asked = ["--policy", "snapkv,tova", "--budget", "0.5,0.25", "--task", "perplexity,greedy"]
    outputs = ["--json", str(rows), "--plot", str(plot)]
    command = ["eval", "--model", str(directory), *sizes, *asked, *outputs]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    for word in ("full cache", "snapkv", "tova", "128", "256", "log-perplexity"):
        assert word in done.output
    written = json.loads(rows.read_text())
    assert written["about"]["context"] == 512 and len(written["records"]) == 5 * 2
    summary = {(r["variant"], r["budget"], r["metric"]): r for r in written["summary"]}
    row = summary["tova", 0.25, "nll"]
    assert row["held"] == 128 and row["low"] <= row["value"] <= row["high"]
    assert math.isfinite(row["value"])
    assert "<svg" in plot.read_text()[:2000]


def test_prompts_can_be_given_to_another_program(directory: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "prompts.json"
    text.write_text(TEXT)
    command = ["eval", "--model", str(directory), "--text", str(text), "--save-prompts", str(out)]
    done = CliRunner().invoke(app, [*command, "--samples", "1", "--passages", "1"])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    prompts = [Prompt.of(plain) for plain in written["prompts"]]
    assert [p.task for p in prompts] == list(TASKS)
    assert written["sizes"]["context"] == 1024


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ruler_is_measured_in_half_precision(dtype: str, directory: Path, tmp_path: Path) -> None:
    text, rows = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text(TEXT)
    asked = ["--task", "fwe", "--samples", "1", "--context", "768", "--budget", "0.5"]
    where = ["--model", str(directory), "--text", str(text), "--device", "cpu", "--dtype", dtype]
    policies = ["--policy", "snapkv,h2o,sink_window,expected_attention"]
    done = CliRunner().invoke(
        app, ["eval", *where, *asked, *policies, "--no-chat", "--json", str(rows)]
    )
    assert done.exit_code == 0, done.output
    found = Run.load(rows)
    assert found.about["dtype"] == dtype and found.about["chat"] is False
    assert len(found.records) == 5
    assert {r.score for r in found.records} == {0.0}
    assert all(len(r.ids) <= 50 and r.answer for r in found.records)
    full, *cut = found.records
    assert full.held > 500 and all(r.held <= full.held / 2 + 16 for r in cut)


def test_longbench_is_measured_under_formats(directory: Path, tmp_path: Path) -> None:
    path, rows = tmp_path / "tasks.jsonl", tmp_path / "rows.json"
    line = {"dataset": "lcc", "input": "", "context": "x = 1\n" * 400, "answers": ["y = 2"]}
    path.write_text("\n".join(json.dumps(line) for _ in range(2)))
    command = ["eval", "--model", str(directory), "--tasks-file", str(path), "--context", "300"]
    done = CliRunner().invoke(
        app, [*command, "--format", "bf16,int4", "--chunk", "128", "--json", str(rows)]
    )
    assert done.exit_code == 0, done.output
    assert "longbench, 1 task" in done.output and "lcc" in done.output
    records = Run.load(rows).records
    assert [r.prompt for r in records[::3]] == ["lcc-0", "lcc-1"]
    # 300 tokens: all but the one that was kept to be fed after the cut.
    assert {r.held for r in records} == {299}
    by = {(r.variant, r.prompt): r.ids for r in records}
    assert by[FULL, "lcc-0"] == by["bf16", "lcc-0"] and len(by[FULL, "lcc-0"]) == 64


class Letters:
    """Reads tokens as letters; the token 9 ends an answer."""

    ends = (9,)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def test_an_answer_ends_where_its_score_is_settled(host: Host, prompts: list[Prompt]) -> None:
    greedy = next(p for p in prompts if p.task == "greedy")
    then = (7, 8)
    ids = torch.tensor([*greedy.context, *then])
    whole = host.generate(ids, None, 12).ids
    assert 9 not in whole
    letters = Letters()

    def answer(right: str, score: str = "match_all", new_tokens: int = 12) -> Record:
        wanted = Wanted("ruler", (right,), score)
        prompt = Prompt("vt", "vt-0", greedy.context, then, new_tokens=new_tokens, wanted=wanted)
        (record,) = run(host, [prompt], [], reader=letters)  # type: ignore[arg-type]
        return record

    missing = answer("no such text")
    assert missing.ids == whole and missing.score == 0 and missing.group == "ruler"
    assert answer("no such text", new_tokens=5).ids == whole[:5]
    found = answer(letters.decode(whole[2:4]))
    first = letters.decode(whole).index(letters.decode(whole[2:4]))
    assert found.score == 1 and list(found.ids) == whole[: first + 2]
    # Of other scores more text can take away.
    assert answer(letters.decode(whole[:3]), "qa_f1").ids == whole
    letters.ends = (whole[4],)  # type: ignore[assignment]
    assert list(answer("no such text").ids) == whole[: whole.index(whole[4])]
    with pytest.raises(ValueError, match="give a reader"):
        wanted = Wanted("ruler", ("x",), "match_all")
        prompt = Prompt("vt", "vt-0", greedy.context, then, new_tokens=5, wanted=wanted)
        list(run(host, [prompt], []))


# -- the real model --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_model_retrieves_and_policies_differ() -> None:
    from kvplug_lab import texts

    path = models.smollm2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def real(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    sizes = PromptSizes(context=512, samples=3, passages=1, scored=64, generated=8)
    made = build(real, texts.shakespeare(), sizes, ["passkey", "perplexity"])
    asked = [variant("tova", 0.5), variant("snapkv", 1.0), variant("sink_window", 0.25)]
    found = {
        (r.variant, r.metric): r.value
        for r in report.summarise(list(run(Host(model), made, asked)))
    }
    assert found[FULL, "passkey"] == found["snapkv", "passkey"] == 1.0
    assert found["snapkv", "kl"] == 0 and found["snapkv", "nll"] == found[FULL, "nll"]
    # A key outside sink and window cannot be had; a scorer that sees the question finds it.
    assert found["sink_window", "passkey"] < 1.0
    assert found["tova", "passkey_nll"] < found["sink_window", "passkey_nll"]
