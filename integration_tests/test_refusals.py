"""Deployments that cannot run: the engine does not start, and one sentence says what to change."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, MambaConfig
from trial_server import TrialServer

from kvplug.contract import EngineView, Feature, Kind
from kvplug.deployment import LAYER_KINDS
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm import admission, compat
from kvplug.hosts.vllm.admission import SECTION
from kvplug.hosts.vllm.flags import EXTENSION, GUARD, RUNS
from kvplug.hosts.vllm.needs import RECOMPUTE, Stated, unmet
from kvplug.parser import load_deployment
from kvplug_lab.engine.trial import TrialFailed, TrialRequest, TrialSpec, connector_flags

PLUGINS = Path(__file__).parent / "plugins"
WINDOW = {"sequence": {"use": "sink_window", "sink": 32, "window": 64}}
ENGINE = {"dtype": "float32", "max_model_len": 512}


@dataclass
class Case:
    """A deployment, and for each thing wrong with it a key and what problem and fix must say."""

    section: Any
    refusals: list[tuple[str, str, str]]
    model: str = "tiny"
    engine: dict[str, Any] = field(default_factory=dict)


CASES = {
    "unknown policy": Case(
        {"prefix_cache": "lrru"},
        [(f"{SECTION}.prefix_cache", "unknown prefix_cache policy 'lrru'.", "did you mean lru")],
    ),
    "bad options": Case(
        {
            "prefix_cache": {"use": "lru", "size": 3},
            "sequence": {"use": "sink_window", "window": 0},
        },
        [
            (f"{SECTION}.prefix_cache.size", "lru has no option 'size'.", "remove it."),
            (
                f"{SECTION}.sequence.window",
                "must be greater than or equal to 1, got 0.",
                "latest tokens kept",
            ),
        ],
    ),
    "prefix_cache without prefix caching": Case(
        {"prefix_cache": "lru"},
        [
            (
                f"{SECTION}.prefix_cache",
                "lru has no effect without prefix caching, which is disabled.",
                "enable it (--enable-prefix-caching) or remove prefix_cache.",
            )
        ],
        engine={"enable_prefix_caching": False},
    ),
    "ALiBi": Case(
        WINDOW,
        [
            (
                "kvplug.sequence",
                "sink_window does not support models with ALiBi",
                "remove the sequence section for this model.",
            )
        ],
        model="bloom",
    ),
    "Mamba": Case(
        WINDOW,
        [
            (
                f"{SECTION}.sequence",
                "sink_window cannot run on a model with no attention layers (Mamba).",
                "remove the sequence section for this model.",
            )
        ],
        model="mamba",
    ),
    "a policy that neither gives a window nor scores": Case(
        {"sequence": "decides"},
        [
            (
                f"{SECTION}.sequence",
                "decides gives no window, and is no ScoringPolicy.",
                "return a Window for every layer, or derive it from ScoringPolicy.",
            )
        ],
    ),
    "a format whose tokens share scales, under a policy that moves them": Case(
        {"format": "kivi", "sequence": {"use": "snapkv", "budget": 128}},
        [
            (
                f"{SECTION}.format",
                "kivi does not support sequence policy snapkv, which moves single tokens of single "
                "heads: its tokens share scales.",
                "choose another format, or a positional sequence policy such as sink_window.",
            )
        ],
    ),
    "a group of tokens that does not divide a block": Case(
        {"format": {"use": "kivi", "group": 64}},
        [(f"{SECTION}.format", "--block-size", "change group.")],
    ),
    "layers that the model does not have": Case(
        {"sequence": {"use": "sink_window", "sink": 32, "window": 64, "layers": {"7": 96}}},
        [
            (
                f"{SECTION}.sequence",
                "sink_window: layers '7' is outside the model's 0-1.",
                "change layers.",
            )
        ],
    ),
    "a head size that bits do not fill": Case(
        {"format": {"use": "int4", "group": 24}},
        [
            (
                f"{SECTION}.format",
                "groups of 24 channels do not divide a head of 64; choose 0 (the whole head), 8, ",
                "change group.",
            )
        ],
    ),
    "a format with fp8 pages": Case(
        {"format": "int4"},
        [
            (
                f"{SECTION}.format",
                "int4 does not support quantized KV cache, which is enabled.",
                "disable it (--kv-cache-dtype auto) or choose another format policy.",
            )
        ],
        engine={"kv_cache_dtype": "fp8"},
    ),
    "a format whose calibration is not there": Case(
        {"format": {"use": "lowrank", "calibration": "/nowhere/calibration.safetensors"}},
        [
            (
                f"{SECTION}.format",
                "/nowhere/calibration.safetensors",
                "change calibration.",
            )
        ],
    ),
    "kv_producer": Case(
        None,
        [
            (
                f"{SECTION}.sequence.use",
                "sink_window does not support disaggregated prefill, which is enabled.",
                "disable it (kv_role: kv_both) or choose another sequence policy.",
            )
        ],
        engine={"kv_transfer_config": connector_flags(WINDOW) | {"kv_role": "kv_producer"}},
    ),
    "no section": Case(
        None,
        [(SECTION, "is missing.", "add `kvplug: {}` or a section with policies.")],
        engine={"kv_transfer_config": connector_flags(None) | {"kv_connector_extra_config": {}}},
    ),
    "a section's part beside it": Case(
        None,
        [
            (
                f"{SECTION.rpartition('.')[0]}.sequence",
                "stands beside kvplug, where nothing reads it.",
                "write it below kvplug.",
            )
        ],
        engine={
            "kv_transfer_config": connector_flags(None)
            | {"kv_connector_extra_config": {"kvplug": {}, "sequence": "sink_window"}}
        },
    ),
}


@dataclass
class Refused:
    """How an engine's start ended."""

    error: TrialFailed
    log: str
    phases: list[str]


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    configs = {
        "bloom": BloomConfig(vocab_size=320, hidden_size=256, n_layer=2, n_head=4),
        "mamba": MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2),
    }

    def directory(name: str) -> Path:
        if name == "tiny":
            return tiny
        made = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(configs[name]).save_pretrained(made)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(made)
        return made

    return directory


@pytest.fixture(scope="module")
def start(
    model: Callable[[str], Path], trials: TrialServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Refused]:
    """Start the engine of a case."""

    def refused(name: str) -> Refused:
        case = CASES[name]
        spec = TrialSpec(
            str(model(case.model)),
            [TrialRequest([10, 11, 12], 2)],
            ENGINE | case.engine,
            case.section,
        )
        log = tmp_path_factory.mktemp("refused") / "engine.log"
        phases: list[str] = []
        path = os.pathsep.join(filter(None, [str(PLUGINS), os.environ.get("PYTHONPATH")]))
        with pytest.raises(TrialFailed) as caught:
            trials.run(spec, log=log, env={"PYTHONPATH": path}, phases=phases)
        return Refused(caught.value, log.read_text(encoding="utf-8", errors="replace"), phases)

    return refused


def sentences(text: str) -> list[str]:
    """The refusals in a log, each once however often a traceback repeats it."""
    found = [line[line.index("inline: ") :] for line in text.splitlines() if " Fix: " in line]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_refused_in_one_sentence(start: Callable[[str], Refused], name: str) -> None:
    refused = start(name)
    assert "ended with code 1" in str(refused.error)
    assert refused.phases == ["starting"], "a request was served"
    found = sentences(refused.log)
    expected = CASES[name].refusals
    assert len(found) == len(expected), found
    for sentence, (key, problem, fix) in zip(found, expected, strict=True):
        what, _, how = sentence.partition(" Fix: ")
        source, named, _ = what.split(": ", 2)
        assert source == "inline"
        assert named.endswith((key, f"{key}.use"))
        assert problem in what
        assert fix in how
        assert how.endswith(".")
    assert sentences(str(refused.error)) == found, "whoever ran the trial reads it too"


class TestLayersNoWindowFits:
    """The models that take long to build, as far as `_layer_refusals` looks at them."""

    def refusals(self, drafts: bool = False, second: bool = False, **model: bool) -> list[Refusal]:
        names = ("use_mla", "is_attention_free", "is_hybrid", "is_encoder_decoder")
        flags = dict.fromkeys(names, False)
        config = SimpleNamespace(
            model_config=SimpleNamespace(**flags | model),
            speculative_config=SimpleNamespace() if drafts else None,
            use_v2_model_runner=second,
        )
        return admission._layer_refusals(load_deployment(WINDOW, key=SECTION), config)

    @pytest.mark.parametrize(
        ("flag", "what"),
        [
            ("use_mla", "multi-head latent attention (MLA)"),
            ("is_attention_free", "no attention layers (Mamba)"),
            ("is_hybrid", "state-space layers beside attention (hybrid)"),
            ("is_encoder_decoder", "an encoder and a decoder"),
        ],
    )
    def test_each_is_named(self, flag: str, what: str) -> None:
        (refusal,) = self.refusals(**{flag: True})
        assert refusal.key == f"{SECTION}.sequence.use"
        assert what in refusal.problem
        assert refusal.fix == "remove the sequence section for this model."

    def test_kinds_of_layers_are_those_with_refusals(self) -> None:
        assert tuple(admission.REFUSALS) == LAYER_KINDS

    def test_all_of_them_at_once(self) -> None:
        assert len(self.refusals(use_mla=True, is_hybrid=True)) == 2

    @pytest.mark.parametrize("early", [False, True])
    @pytest.mark.parametrize("drafts", [False, True])
    @pytest.mark.parametrize("second", [False, True])
    def test_drafts_after_the_report_too(
        self, monkeypatch: pytest.MonkeyPatch, early: bool, drafts: bool, second: bool
    ) -> None:
        monkeypatch.setattr(compat, "reports_before_end", lambda: early)
        monkeypatch.setitem(admission.REFUSALS, Kind.SEQUENCE, lambda *_: [])
        found = self.refusals(drafts=drafts, second=second)
        assert len(found) == (early and drafts and second)
        for refusal in found:
            assert "before the step's drafts are made" in refusal.problem
            assert "VLLM_USE_V2_MODEL_RUNNER=0" in refusal.fix

    def test_a_deployment_without_a_sequence_policy_is_not_asked(self) -> None:
        deployment = load_deployment({"prefix_cache": "lru"})
        assert admission._layer_refusals(deployment, SimpleNamespace()) == []


@pytest.mark.parametrize(
    ("section", "kinds"),
    [
        ({"prefix_cache": "lru"}, []),
        ({"format": "int8", "prefix_cache": "lru"}, ["format"]),
        (WINDOW, ["sequence"]),
        ({"reuse": {"use": ["structure", "position"]}}, ["reuse", "reuse"]),
    ],
)
def test_an_embedding_cannot_say_that_it_is_approximate(
    section: dict[str, Any], kinds: list[str]
) -> None:
    deployment = load_deployment(section, key=SECTION)
    stated = Stated(frozenset({Feature.PREFIX_CACHING}), RECOMPUTE)
    found = unmet(deployment, replace(stated, pooling=True))
    assert [r.key.removeprefix(f"{SECTION}.").split(".")[0] for r in found] == kinds
    assert all("no field that could say so" in r.problem for r in found)
    assert unmet(deployment, stated) == []


@pytest.mark.parametrize(
    ("flag", "problem", "fix"),
    [
        ("microbatches", "microbatches build it in two", "remove --enable-dbo and --ubatch-size."),
        ("sleep", "sleep discards", "remove --enable-sleep-mode, or the sequence section."),
    ],
)
def test_steps_in_parts_and_sleep_do_not_go_with_tables_on_the_device(
    flag: str, problem: str, fix: str
) -> None:
    stated = replace(Stated(frozenset()), **{flag: True})
    (refusal,) = unmet(load_deployment(WINDOW, key=SECTION), stated)
    assert problem in refusal.problem and refusal.fix == fix
    assert unmet(load_deployment({"prefix_cache": "lru"}, key=SECTION), stated) == []


def test_a_refusal_survives_the_way_between_processes() -> None:
    error = DeploymentError(
        "deploy.yaml",
        [Refusal("kvplug.sequence", "is wrong.", "change it.", 7), Refusal("b", "c.", "d.")],
    )
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is DeploymentError
    assert (
        str(back)
        == str(error)
        == ("deploy.yaml:7: kvplug.sequence: is wrong. Fix: change it.\ndeploy.yaml: b: c. Fix: d.")
    )
    assert back.refusals == error.refusals
    assert back.source == "deploy.yaml"


class TestReuse:
    """What reuse needs of the engine, one sentence each."""

    CHAIN = ("structure", "position")

    def refusals(self, section: dict[str, Any], **flags: Any) -> list[Refusal]:
        deployment = load_deployment(section, key=SECTION)
        features = frozenset({Feature.LORA} if flags.get("lora") else ())
        stated = Stated(features, flags.get("policy", RECOMPUTE), flags.get("extension", ""))
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                logits_processors=flags.get("processors"), uses_mrope=flags.get("mrope")
            ),
            speculative_config=flags.get("speculative"),
            use_v2_model_runner=flags.get("second_runner", False),
        )
        return [
            *unmet(deployment, stated),
            *admission._guard_refusals(deployment, config),
            *admission._reuse_refusals(deployment, config),
        ]

    def section(self, **keys: Any) -> dict[str, Any]:
        return {"reuse": {"use": list(self.CHAIN)} | keys}

    def test_nothing_more_is_needed_for_exact_reuse(self) -> None:
        assert self.refusals(self.section()) == []

    def test_a_failed_load_must_be_computed(self) -> None:
        (found,) = self.refusals(self.section(), policy="fail")
        assert found.key == f"{SECTION}.reuse"
        assert found.fix == "set kv_load_failure_policy: recompute in kv-transfer-config."

    def test_computing_inside_a_run_needs_the_model(self) -> None:
        (found,) = self.refusals(self.section(recompute={"boundary": 8}))
        assert found.key == f"{SECTION}.reuse.recompute"
        assert EXTENSION in found.fix
        assert self.refusals(self.section(recompute={"boundary": 8}), extension=EXTENSION) == []
        assert self.refusals(self.section(recompute={"gaps": 0})) == []

    @pytest.mark.parametrize("flag", ["lora", "mrope"])
    def test_computing_inside_a_run_is_refused_where_it_cannot_work(self, flag: str) -> None:
        section = self.section(recompute={"fraction": 0.2})
        (found,) = self.refusals(section, extension=EXTENSION, **{flag: True})
        assert found.fix == "remove the recompute section."

    def test_the_guard_needs_its_logits_processor(self) -> None:
        (found,) = self.refusals(self.section() | {"guard": {}})
        assert found.key == f"{SECTION}.guard"
        assert GUARD in found.fix

    def test_a_shadow_needs_every_token_of_a_step(self) -> None:
        section = self.section(approximate=True) | {"guard": {"shadow": {}}}
        on = {"processors": [GUARD], "speculative": object()}
        (found,) = self.refusals(section, **on, second_runner=True)
        assert found.key == f"{SECTION}.guard.shadow"
        assert "speculative decoding" in found.problem
        (found,) = self.refusals(section, **on)
        assert found.key == f"{SECTION}.guard"
        assert self.refusals(section, processors=[GUARD]) == []

    def test_a_chain_without_its_first_checks_is_refused(self) -> None:
        deployment = load_deployment({"reuse": {"use": ["mask", "structure"]}})
        view = EngineView(block_size=16)
        (found,) = deployment.incompatible(view, runs=RUNS, host="vllm")
        assert found.problem.startswith(
            "the chain of checks must begin with structure and position"
        )
        assert found.fix == "write `use: [structure, position, mask]`."

    def test_reuse_and_a_sequence_policy_exclude_each_other(self) -> None:
        deployment = load_deployment(self.section() | WINDOW)
        view = EngineView(block_size=16, max_model_len=512)
        found = deployment.incompatible(view, runs=RUNS, host="vllm")
        assert found and all("does not support sequence policy" in r.problem for r in found)


@pytest.mark.parametrize(
    ("recent", "assignments", "why"),
    [(0, 1, None), (32, 1, "keeps recent tokens"), (0, 2, "stores each request in its own way")],
)
def test_an_attention_policy_reads_pages_that_are_alike(
    monkeypatch: pytest.MonkeyPatch, recent: int, assignments: int, why: str | None
) -> None:
    stored = SimpleNamespace(
        name="a format",
        engine=SimpleNamespace(layers=(0,)),
        recent=lambda layer: recent,
        assignments=lambda: range(assignments),
    )
    monkeypatch.setattr(admission, "format_policy", lambda *args: stored)
    choice = SimpleNamespace(key="kvplug.attention.use", policy=SimpleNamespace(name="a memory"))
    deployment: Any = SimpleNamespace(choice=lambda kind: choice)
    found = admission._attention_refusals(deployment, SimpleNamespace(use_v2_model_runner=True))
    assert [refusal.key for refusal in found] == ["kvplug.attention"] * (why is not None)
    assert all(why is not None and why in refusal.problem for refusal in found)
