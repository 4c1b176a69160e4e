"""Tiers that an engine cannot have are refused by name before it starts, with what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from kvplug.errors import DeploymentError
from kvplug.hosts.vllm.admission import deployment_of
from kvplug.hosts.vllm.identity import chunk_identity
from kvplug.hosts.vllm.view import engine_view

HOST: dict[str, Any] = {"tiers": [{"host": {"size": "1MiB"}}]}


def config(
    model: Path,
    section: dict[str, Any],
    policy: str = "recompute",
    role: str = "kv_both",
    **more: Any,
) -> Any:
    return EngineArgs(
        model=str(model),
        max_model_len=512,
        block_size=16,
        enforce_eager=True,
        dtype="float32",
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVPlugConnector",
            kv_connector_module_path="kvplug.hosts.vllm.connector",
            kv_role=role,
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"kvplug": section},
        ),
        **more,
    ).create_engine_config()


def test_tiers_are_admitted(tiny: Path) -> None:
    (tier,) = deployment_of(config(tiny, HOST)).tiers
    assert (tier.name, tier.codec.policy.name) == ("host", "raw")


@pytest.mark.parametrize(
    ("section", "more", "problem", "fix"),
    [
        (HOST, {"policy": "fail"}, "would fail its request", "kv_load_failure_policy: recompute"),
        (HOST, {"enable_prefix_caching": False}, "which is off", "--enable-prefix-caching"),
        (HOST, {"role": "kv_producer"}, "engines of their own", "kv_role: kv_both"),
        (
            HOST | {"reuse": {"use": ["structure", "position"]}},
            {},
            "does not support reuse",
            "remove one of",
        ),
        (
            {
                "tiers": [{"host": {"size": "1MiB", "transfer": "int8"}}],
                "sequence": {"use": "sink_window", "sink": 16, "window": 64},
            },
            {},
            "int8 changes KV",
            "exact codec for tier host",
        ),
        (HOST | {"format": "adaptive"}, {}, "in its own way", "choose another format"),
    ],
)
def test_what_cannot_work_is_refused(
    tiny: Path, section: dict[str, Any], more: dict[str, Any], problem: str, fix: str
) -> None:
    with pytest.raises(DeploymentError) as refused:
        deployment_of(config(tiny, section, **more))
    (one,) = [r for r in refused.value.refusals if problem in r.problem]
    assert fix in one.fix


def test_an_identity_is_that_of_the_computation_and_the_ranks(tiny: Path) -> None:
    def identity(**more: Any) -> str:
        own = config(tiny, HOST, **more)
        return chunk_identity(own, engine_view(own), None)

    assert identity() == identity(max_num_seqs=3, policy="fail")
    assert identity() != identity(tensor_parallel_size=2)


def test_a_model_that_cannot_be_told_from_others_has_an_identity_of_its_own(tiny: Path) -> None:
    own = config(tiny, HOST, load_format="dummy")
    other = config(tiny, HOST, load_format="dummy")
    found = [chunk_identity(one, engine_view(one), None) for one in (own, own, other)]
    assert found[0] == found[1] != found[2], "the same in all processes of one engine"
