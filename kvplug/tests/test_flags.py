"""What a vLLM config file says about the engine, read without vLLM."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvplug.contract import Feature
from kvplug.errors import DeploymentError, KVPlugError
from kvplug.hosts.vllm.distribution import vllm_distribution
from kvplug.hosts.vllm.features import READINGS, features_from_flags
from kvplug.hosts.vllm.flags import (
    ANSWER_MIDDLEWARE,
    GUARD,
    REQUEST_CHECK,
    REQUEST_CHECK_MIDDLEWARE,
    SHADOW_MIDDLEWARE,
    engine_from_flags,
    read_config,
    request_flags,
)

needs_vllm = pytest.mark.skipif(vllm_distribution() is None, reason="vLLM is not installed")

DEFAULT = frozenset(
    {
        Feature.PREEMPTION,
        Feature.PREFIX_CACHING,
        Feature.CHUNKED_PREFILL,
        Feature.ASYNC_SCHEDULING,
        Feature.CUDA_GRAPHS,
    }
)


NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


@pytest.mark.parametrize(
    ("flags", "on", "off"),
    [
        ({}, set(), set()),
        ({"enable-prefix-caching": False}, set(), {Feature.PREFIX_CACHING}),
        ({"no-enable-prefix-caching": True}, set(), {Feature.PREFIX_CACHING}),
        ({"enable-chunked-prefill": False}, set(), {Feature.CHUNKED_PREFILL}),
        ({"enforce-eager": True}, set(), {Feature.CUDA_GRAPHS}),
        ({"async-scheduling": False}, set(), {Feature.ASYNC_SCHEDULING}),
        ({"no-async-scheduling": True}, set(), {Feature.ASYNC_SCHEDULING}),
        ({"tensor-parallel-size": 1}, set(), set()),
        ({"tensor-parallel-size": 2}, {Feature.TENSOR_PARALLEL}, set()),
        (
            {"pipeline-parallel-size": 2},
            {Feature.PIPELINE_PARALLEL},
            {Feature.ASYNC_SCHEDULING},
        ),
        ({"data-parallel-size": 2}, {Feature.DATA_PARALLEL}, set()),
        ({"decode-context-parallel-size": 2}, {Feature.CONTEXT_PARALLEL}, set()),
        ({"prefill-context-parallel-size": 2}, {Feature.CONTEXT_PARALLEL}, set()),
        ({"enable-lora": True}, {Feature.LORA}, set()),
        ({"kv-cache-dtype": "fp8"}, {Feature.QUANTIZED_KV_CACHE}, set()),
        ({"kv-cache-dtype": "auto"}, set(), set()),
        (
            {"speculative-config": {"method": "eagle", "model": "x"}},
            {Feature.SPECULATIVE_DECODING, Feature.DRAFT_MODEL},
            set(),
        ),
        ({"speculative-config": NGRAM}, {Feature.SPECULATIVE_DECODING}, {Feature.ASYNC_SCHEDULING}),
        (
            {"speculative-config": {"model": "ngram"}},
            {Feature.SPECULATIVE_DECODING},
            {Feature.ASYNC_SCHEDULING},
        ),
        (
            {"spec-method": "ngram", "spec-tokens": 4},
            {Feature.SPECULATIVE_DECODING},
            {Feature.ASYNC_SCHEDULING},
        ),
        (
            {"spec-model": "x", "spec-tokens": 4},
            {Feature.SPECULATIVE_DECODING, Feature.DRAFT_MODEL},
            set(),
        ),
        (
            {"speculative-config": {"num_speculative_tokens": 4}, "spec-method": "ngram"},
            {Feature.SPECULATIVE_DECODING},
            {Feature.ASYNC_SCHEDULING},
        ),
        ({"spec-method": None, "kv-sharing-fast-prefill": False}, set(), set()),
        ({"kv-sharing-fast-prefill": True}, {Feature.KV_SHARING}, set()),
    ],
)
def test_features_that_are_on(flags: dict[str, Any], on: set[Feature], off: set[Feature]) -> None:
    assert features_from_flags(flags) == (DEFAULT | on) - off


def test_engine_a_file_describes() -> None:
    engine = engine_from_flags(
        {
            "block-size": 32,
            "num-gpu-blocks-override": 400,
            "max-model-len": 4096,
            "max-num-batched-tokens": 512,
        }
    )
    assert (engine.block_size, engine.num_blocks) == (32, 400)
    assert (engine.max_model_len, engine.max_in_flight_tokens) == (4096, 512)
    assert engine.features == DEFAULT
    assert engine_from_flags({}).block_size == 16
    assert engine_from_flags({"max-model-len": "4k"}).max_model_len == 0


TRANSFER = """\
  kv_connector: KVPlugConnector
  kv_connector_module_path: kvplug.hosts.vllm.connector
  kv_role: kv_both
  kv_connector_extra_config: {kvplug: {}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "engine.yaml"


def refused(file: Path, text: str) -> list[str]:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DeploymentError) as caught:
        read_config(file)
    return [line.removeprefix(f"{file}") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("key", ["kv-transfer-config", "kv_transfer_config"])
def test_flags_with_dashes_or_underscores(file: Path, key: str) -> None:
    file.write_text(f"block_size: 32\nmax-model-len: 64\n{key}:\n{TRANSFER}", encoding="utf-8")
    config = read_config(file)
    assert config.flags == {"block-size": 32, "max-model-len": 64}
    assert not config.standalone
    assert config.deployment.all() == []


@pytest.mark.parametrize("section", ["", "{}", "~"])
def test_an_empty_section_turns_kvplug_on_without_policies(file: Path, section: str) -> None:
    text = TRANSFER.replace("{kvplug: {}}", f"{{kvplug: {section}}}")
    file.write_text(f"kv-transfer-config:\n{text}", encoding="utf-8")
    assert read_config(file).deployment.all() == []


def test_a_section_of_its_own(file: Path) -> None:
    file.write_text("{}\n", encoding="utf-8")
    config = read_config(file)
    assert config.standalone and config.flags == {}


def test_a_config_that_does_not_turn_kvplug_on(file: Path) -> None:
    (line,) = refused(file, "max-model-len: 64\n")
    assert line.startswith(
        ": kv-transfer-config: is missing, so kvplug is not enabled. Fix: add it with "
    )


def test_a_file_that_is_no_mapping(file: Path) -> None:
    assert refused(file, "- a\n") == [": file: must be a mapping, got list. Fix: see configs/cpu."]


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("kv_connector", "OffloadingConnector", "KVPlugConnector"),
        ("kv_connector_module_path", "acme.connector", "kvplug.hosts.vllm.connector"),
        ("kv_role", "kv_producer", "kv_both"),
    ],
)
def test_another_connector_is_refused_at_its_line(
    file: Path, name: str, value: str, right: str
) -> None:
    lines = [
        f"  {name}: {value}" if line.strip().startswith(f"{name}:") else line
        for line in TRANSFER.splitlines()
    ]
    at = 2 + [line.strip().split(":")[0] for line in lines].index(name)
    assert refused(file, "kv-transfer-config:\n" + "\n".join(lines) + "\n") == [
        f":{at}: kv-transfer-config.{name}: is {value!r}, so kvplug is not enabled. "
        f"Fix: set it to {right}."
    ]


def test_a_connector_without_a_section(file: Path) -> None:
    text = TRANSFER.replace("{kvplug: {}}", "{other: 1}")
    assert refused(file, f"kv-transfer-config:\n{text}") == [
        ":5: kv-transfer-config.kv_connector_extra_config: has no kvplug section. "
        "Fix: add `kvplug: {}` or a section with policies."
    ]


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        (
            "sequence: sink_window",
            "sequence: stands beside kvplug, where nothing reads it. Fix: write it below kvplug.",
        ),
        ("KVPlug: {}", "KVPlug: is not read: the section is kvplug. Fix: write it below kvplug."),
    ],
)
def test_what_stands_beside_the_section_by_mistake_is_refused(
    file: Path, beside: str, says: str
) -> None:
    text = TRANSFER.replace("{kvplug: {}}", f"\n    kvplug: {{}}\n    {beside}\n    other: 1")
    (line,) = refused(file, f"kv-transfer-config:\n{text}")
    assert line == f":7: kv-transfer-config.kv_connector_extra_config.{says}"


def test_a_connector_config_that_is_no_mapping(file: Path) -> None:
    assert refused(file, "\nkv-transfer-config: yes please\n") == [
        ":2: kv-transfer-config: must be a mapping. Fix: see configs/cpu for examples."
    ]


DOTTED = """\
kv-transfer-config.kv_connector: KVPlugConnector
kv_transfer_config.kv_connector_module_path: kvplug.hosts.vllm.connector
kv-transfer-config.kv_role: kv_both
kv-transfer-config.kv_connector_extra_config.kvplug: {prefix_cache: fifo}
"""


@needs_vllm
def test_dotted_flags_are_one_flag(file: Path) -> None:
    file.write_text(DOTTED, encoding="utf-8")
    (choice,) = read_config(file).deployment.all()
    assert choice.policy.name == "fifo"


@needs_vllm
def test_a_vllm_that_does_not_work_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvplug.hosts.vllm import arguments

    def broken(line: list[str], command: str) -> None:
        raise OSError("libnuma.so.1: cannot open")

    monkeypatch.setattr(arguments, "parse", broken)
    file.write_text(f"kv-transfer-config:\n{TRANSFER}", encoding="utf-8")
    told = r"parser does not work here: OSError: libnuma.so.1: cannot open. Fix: run `kvplug doc"
    with pytest.raises(KVPlugError, match=told):
        read_config(file)


def test_without_vllm_what_its_parser_would_tell_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvplug.hosts.vllm.flags.vllm_distribution", lambda: None)
    told = refused(
        file,
        "block-size: '32'\nenable_prefix_caching: false\nmodel: a\nmo_del: a\n"
        "max-model-len: 4k\nmax_model_len: 4\n"
        f"kv-transfer-conf:\n{TRANSFER}",
    )
    assert told == [
        ":1: block-size: must be a number, got '32'. Fix: write it without quotes.",
        ":2: enable_prefix_caching: is false, which vLLM may not hear in this spelling. "
        "Fix: write enable-prefix-caching.",
        ":6: max_model_len: sets max-model-len, which the file sets already. "
        "Fix: keep one of them.",
        ":7: kv-transfer-conf: is read by vLLM's own parser only, which is not installed. "
        "Fix: write kv-transfer-config as a nested mapping, or install vLLM.",
    ]
    file.write_text(f"block-size: 32\nkv-transfer-config:\n{TRANSFER}", encoding="utf-8")
    config = read_config(file)
    assert config.flags == {"block-size": 32}
    assert config.remarks == (
        "vLLM is not installed here: its flags were read without its parser.",
    )


def test_reading_flags_imports_no_engine() -> None:

    code = "import sys, kvplug.hosts.vllm.flags; print({'torch', 'vllm'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_structured_flags_may_be_json_text(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        'speculative-config: \'{"method": "ngram", "num_speculative_tokens": 3}\'\n'
        'kv-transfer-config: \'{"kv_connector": "KVPlugConnector", "kv_connector_module_path": '
        '"kvplug.hosts.vllm.connector", "kv_role": "kv_both", "kv_connector_extra_config": '
        '{"kvplug": {"prefix_cache": "lru"}}}\'\n'
    )
    config = read_config(file)
    assert [c.policy.name for c in config.deployment.all()] == ["lru"]
    assert Feature.SPECULATIVE_DECODING in features_from_flags(config.flags)


def test_broken_json_text_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("block-size: 32\nkv-transfer-config: '{\"kv_connector\": '\n")
    with pytest.raises(DeploymentError, match=r"x\.yaml:2: kv-transfer-config: is not valid JSON"):
        read_config(file)


def test_a_section_with_nothing_but_settings_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "section.yaml"
    path.write_text("on_bad_request: refuse\n")
    config = read_config(path)
    assert config.standalone and config.deployment.on_bad_request == "refuse"


def test_a_policy_adds_the_flag_that_lets_streamed_answers_speak(tmp_path: Path) -> None:
    path = tmp_path / "section.yaml"
    path.write_text("prefix_cache: lru\n")
    config = read_config(path)
    assert request_flags(config) == ["--middleware", ANSWER_MIDDLEWARE]
    flags = {"middleware": ["a.B", ANSWER_MIDDLEWARE]}
    assert request_flags(dataclasses.replace(config, flags=flags)) == []


def test_a_shadow_adds_the_flags_that_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "section.yaml"
    path.write_text("sequence: sink_window\nguard: {shadow: {}}\non_bad_request: refuse\n")
    config = read_config(path)
    assert request_flags(config) == [
        *("--logits-processors", REQUEST_CHECK, GUARD),
        *("--middleware", REQUEST_CHECK_MIDDLEWARE),
        *("--middleware", ANSWER_MIDDLEWARE),
        *("--middleware", SHADOW_MIDDLEWARE),
    ]
    flags = {
        "logits-processors": [GUARD, REQUEST_CHECK],
        "middleware": [SHADOW_MIDDLEWARE, ANSWER_MIDDLEWARE, REQUEST_CHECK_MIDDLEWARE],
    }
    assert request_flags(dataclasses.replace(config, flags=flags)) == []


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        (
            {},
            ["--logits-processors", REQUEST_CHECK, "--middleware", REQUEST_CHECK_MIDDLEWARE],
        ),
        (
            {"logits-processors": GUARD, "middleware": ["a.B"]},
            ["--logits-processors", GUARD, REQUEST_CHECK, "--middleware", REQUEST_CHECK_MIDDLEWARE],
        ),
        (
            {"logits-processors": [REQUEST_CHECK], "middleware": REQUEST_CHECK_MIDDLEWARE},
            [],
        ),
    ],
)
def test_refusing_adds_the_flags_that_a_file_leaves_out(
    tmp_path: Path, flags: dict[str, Any], added: list[str]
) -> None:
    path = tmp_path / "section.yaml"
    path.write_text("on_bad_request: refuse\n")
    config = read_config(path)
    assert request_flags(dataclasses.replace(config, flags=flags)) == added
    path.write_text("on_bad_request: report\n")
    assert request_flags(dataclasses.replace(read_config(path), flags=flags)) == []


def test_every_feature_has_one_row() -> None:
    assert sorted(row.feature for row in READINGS) == sorted(Feature)
