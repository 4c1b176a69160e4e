"""`kvplug check` refuses what an engine with the same flags refuses at its start, in its words.

Configs are made by vLLM from the same file; no engine starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvplug.cli.check import read_checked
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.admission import deployment_of
from kvplug.hosts.vllm.connector_flag import CONNECTOR, MODULE
from kvplug.hosts.vllm.flags import EXTENSION, GUARD

Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[str]]

TIERS: dict[str, Any] = {"tiers": [{"host": {"size": "1MiB"}}]}
REUSE: dict[str, Any] = {"reuse": {"use": ["structure", "position"]}}
WINDOW: dict[str, Any] = {"sequence": {"use": "sink_window", "sink": 32, "window": 64}}
RECOMPUTE = {"kv_load_failure_policy": "recompute"}

CASES: dict[str, Case] = {
    # Section, flags, the connector's flag, keys that are refused.
    "tiers": (TIERS, {}, RECOMPUTE, set()),
    "tiers that fail requests": (TIERS, {}, {}, {"tiers[0].host"}),
    "tiers told to fail": (TIERS, {}, {"kv_load_failure_policy": "fail"}, {"tiers[0].host"}),
    "no prefix cache": (TIERS, {"enable-prefix-caching": False}, RECOMPUTE, {"tiers[0].host"}),
    "quantized": (TIERS, {"kv-cache-dtype": "fp8"}, RECOMPUTE, {"tiers[0].host"}),
    "both": (TIERS | REUSE, {}, RECOMPUTE, {"tiers[0].host"}),
    "inexact beside a window": (
        {"tiers": [{"host": {"size": "1MiB", "transfer": "int8"}}]} | WINDOW,
        {},
        RECOMPUTE,
        {"tiers[0].host.transfer"},
    ),
    "reuse": (REUSE, {}, RECOMPUTE, set()),
    "reuse that fails requests": (REUSE, {}, {}, {"reuse"}),
    "recompute": (
        {"reuse": REUSE["reuse"] | {"recompute": {"boundary": 8}}},
        {"worker-extension-cls": EXTENSION},
        RECOMPUTE,
        set(),
    ),
    "recompute without the model": (
        {"reuse": REUSE["reuse"] | {"recompute": {"boundary": 8}}},
        {},
        RECOMPUTE,
        {"reuse.recompute"},
    ),
    "recompute with adapters": (
        {"reuse": REUSE["reuse"] | {"recompute": {"boundary": 8}}},
        {"worker-extension-cls": EXTENSION, "enable-lora": True},
        RECOMPUTE,
        {"reuse.recompute"},
    ),
    "guard": (REUSE | {"guard": {}}, {"logits-processors": [GUARD]}, RECOMPUTE, set()),
    "guard that sees nothing": (REUSE | {"guard": {}}, {}, RECOMPUTE, {"guard"}),
    "embeddings": (WINDOW, {"runner": "pooling"}, {}, {"sequence.use"}),
    "embeddings by conversion": (WINDOW, {"convert": "embed"}, {}, {"sequence.use"}),
    "exact embeddings": ({"prefix_cache": "lru"}, {"runner": "pooling"}, {}, set()),
    "sleep": (WINDOW, {"enable-sleep-mode": True}, {}, {"sequence.use"}),
    "sleep beside host memory": (TIERS, {"enable-sleep-mode": True}, RECOMPUTE, set()),
    "drafts by name": (
        TIERS,
        {"speculative-config": {"model": "ngram", "num_speculative_tokens": 2}},
        RECOMPUTE,
        set(),
    ),
    "drafts in flags of their own": (
        TIERS,
        {"spec-method": "ngram_gpu", "spec-tokens": 2},
        RECOMPUTE,
        {"tiers[0].host"},
    ),
    "a prefill that shares KV": (WINDOW, {"kv-sharing-fast-prefill": True}, {}, {"sequence.use"}),
    "microbatches": (WINDOW, {"enable-dbo": True}, {}, {"sequence.use"}),
    "microbatches by number": (WINDOW, {"ubatch-size": 2}, {}, {"sequence.use"}),
}


def alike(refusal: Refusal) -> tuple[str, str, str]:
    """A refusal, whose key and fix spell the connector's flag with underscores or dashes."""
    return short(refusal.key), refusal.problem, refusal.fix.replace("kv_transfer_", "kv-transfer-")


def short(key: str) -> str:
    """A key below the section, however it is spelt above."""
    return key.split("kvplug.")[-1]


@pytest.mark.parametrize("name", CASES)
def test_check_refuses_what_the_engine_does(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    section, flags, transfer, keys = CASES[name]
    written = {
        "model": str(tiny),
        "block-size": 32,
        "max-model-len": 512,
        "enforce-eager": True,
        "dtype": "float32",
        **flags,
        "kv-transfer-config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_both",
            **transfer,
            "kv_connector_extra_config": {"kvplug": section},
        },
    }
    file = tmp_path / "deployment.yaml"
    # vLLM does not hear a `false` in a file.
    named = {f"no-{k}" if v is False else k: v is False or v for k, v in written.items()}
    file.write_text(yaml.safe_dump(named), encoding="utf-8")

    def refused_by(read: Any) -> list[Refusal]:
        try:
            read()
        except DeploymentError as error:
            return list(error.refusals)
        return []

    checked = refused_by(lambda: read_checked(file))
    assert {short(one.key) for one in checked} == keys

    # A CPU has no all-to-all that microbatches overlap with, and no memory to put to sleep; what
    # the admission sees of such an engine is its config.
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = parser.parse_args(["--config", str(file)])
    for apart in ("enable_sleep_mode", "enable_dbo", "ubatch_size"):
        setattr(options, apart, parser.get_default(apart))
    config = EngineArgs.from_cli_args(options).create_engine_config()
    config.model_config.enable_sleep_mode = bool(flags.get("enable-sleep-mode"))
    config.parallel_config.enable_dbo = bool(flags.get("enable-dbo"))
    config.parallel_config.ubatch_size = flags.get("ubatch-size", 0)
    started = refused_by(lambda: deployment_of(config))
    assert list(map(alike, started)) == list(map(alike, checked))


@pytest.mark.parametrize(
    ("section", "flags", "key", "fix"),
    [
        (
            {"tiers": [{"disk": {"path": "/kv", "size": "1GiB"}}]},
            {"load-format": "dummy"},
            "tiers[0].disk",
            "or remove the tier.",
        ),
        (
            {"reuse": REUSE["reuse"] | {"store": {"directory": "/kv"}}},
            {"load-format": "dummy"},
            "reuse.store.directory",
            "or remove the directory.",
        ),
        (TIERS, {"load-format": "dummy"}, None, ""),
    ],
)
def test_check_refuses_to_keep_kv_of_weights_that_nothing_tells_apart(
    tmp_path: Path, section: dict[str, Any], flags: dict[str, Any], key: str | None, fix: str
) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "block-size": 32,
                **flags,
                "kv-transfer-config": {
                    "kv_connector": CONNECTOR,
                    "kv_connector_module_path": MODULE,
                    "kv_role": "kv_both",
                    **RECOMPUTE,
                    "kv_connector_extra_config": {"kvplug": section},
                },
            }
        ),
        encoding="utf-8",
    )
    if key is None:
        assert read_checked(file).flags["load-format"] == "dummy"
        return
    with pytest.raises(DeploymentError) as refused:
        read_checked(file)
    (one,) = refused.value.refusals
    assert short(one.key) == key and one.line
    assert one.fix.endswith(fix)
