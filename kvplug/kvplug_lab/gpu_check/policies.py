"""Every built-in policy in an engine with CUDA graphs, vLLM's own backend and bfloat16.

Graphs and async scheduling are off where a policy declares that it does not support them; rows
say what ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvplug.contract import Kind
from kvplug.registry import plugins
from kvplug_lab.gpu_check.cases import BUDGET, Case, serve_cases, small_pool, workload
from kvplug_lab.gpu_check.engines import Machine
from kvplug_lab.gpu_check.exact import problem_of, wanted
from kvplug_lab.gpu_check.parts import Report

SCORING: dict[str, dict[str, Any]] = {
    "knorm": {},
    "keydiff": {},
    "paged_eviction": {},
    "tova": {},
    "snapkv": {"window": 16},
    "pyramidkv": {"groups": 2},
    "morph_kv": {"window": 16},
    "r_kv": {},
    "expected_attention": {"queries": 64},
    "h2o": {"recent_part": 0.25},
    "ada_kv": {"of": "snapkv"},
    "smart_window": {},
}
"""Scoring policies and options of their own; the budget is `BUDGET` for all."""

FORMATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp8": {},
    "int8": {},
    "int4": {},
    "kivi": {"bits": 2, "group": 16},
    "rotated": {"bits": 4},
    "hack": {"bits": 4, "group": 32},
    "mixed": {"default": {"use": "kivi", "bits": 4, "group": 16}, "layers": {"0": "int8"}},
    "adaptive": {"levels": [{"use": "rotated", "bits": 3}, "int8"]},
}
"""Formats that need no calibration, and their options."""

CALIBRATED = ("lowrank", "merge_heads", "residual")
"""Formats fitted to a model: nothing here calibrates, so they are not served."""

QUEUES: tuple[str, ...] = ("fifo", "lfu", "slru", "arc", "s3fifo", "sieve", "lirs", "tinylfu")
QUEUES += ("gdsf", "tree", "foresight", "lru")
"""Prefix-cache policies, each served beside a scoring policy: no device is involved in them."""

CHAIN = ("structure", "position", "mask")
"""Reuse checks that need no calibration, served as one chain."""
RECORDED = ("record",)
"""Prefix-cache policies that are another one and a file: not served."""


MEMO = "memo"
"""Attention policy, served where its package is installed."""


def policy_cases(machine: Machine, names: Sequence[str] = ()) -> list[Case]:
    """A case per policy; those of the prefix cache go with the scoring policies.

    Args:
        machine: Where they run.
        names: Beginnings of the names of wanted cases; every case if empty.
    """
    own: dict[str, Any] = {"dtype": "bfloat16", "max_num_batched_tokens": 256}
    block = machine.block_size
    found = []

    def case(
        name: str,
        section: Mapping[str, Any],
        kinds: Sequence[str],
        counters: Sequence[str] = (),
        asked: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        def check(result: Mapping[str, Any]) -> str:
            problem = problem_of(result, kinds)
            counted: dict[str, float] = {}
            for report in result["reports"]:
                for counter, value in report["counters"].items():
                    counted[counter] = counted.get(counter, 0) + value
            zero = [counter for counter in counters if not counted.get(counter)]
            return problem or (f"counters are 0: {', '.join(zero)}" if zero else "")

        if wanted(name, names):
            arguments = own | without(section) | engine
            requests = [r | ({"kvplug": asked} if asked else {}) for r in workload(times=2)]
            found.append(Case(name, section, requests, check, arguments))

    window = {"use": "sink_window", "sink": 32, "window": 96}
    case("sink_window", {"sequence": window}, ["sequence"])
    for (name, options), queue in zip(SCORING.items(), QUEUES, strict=True):
        budget = {"budget": BUDGET, "interval": 32, "sink": 4}
        if "recent_part" not in options and "window" not in options:
            budget["recent"] = 16
        case(
            f"{name}, {queue}",
            {"sequence": {"use": name, **budget, **options}, "prefix_cache": {"use": queue}},
            ["sequence"],
            ["evictions"],
            **small_pool(machine, groups=2),
        )
    for name, options in FORMATS.items():
        own_options = dict(options)
        if "group" in own_options and name == "kivi":
            own_options["group"] = block
        case(name, {"format": {"use": name, **own_options}}, ["format"])
    for name, stored in (("snapkv", "int4"), ("keydiff", "int8")):
        section = {
            "sequence": {"use": name, "budget": BUDGET, "interval": 32},
            "format": {"use": stored},
        }
        case(f"{name} with {stored}", section, ["sequence", "format"], ["evictions"])
    reuse = {"use": list(CHAIN), "segments": {"by": "fixed"}}
    case("reuse", {"reuse": reuse}, ["reuse"], ["loaded"], enable_prefix_caching=False)
    if plugins().registry.get(Kind.ATTENTION, MEMO) is not None:
        memo = {"use": MEMO, "cosine": 0.5, "near": 64, "every": 8}
        approximate = {"attention": "approximate"}
        case(MEMO, {"attention": memo}, ["attention"], ["far_rows"], approximate)
    return found


def without(section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that turn off what policies of a section do not support."""
    from kvplug.contract import Feature
    from kvplug.parser import load_deployment

    policies = [choice.policy for choice in load_deployment(section).all()]
    found: dict[str, Any] = {}
    if any(Feature.CUDA_GRAPHS not in policy.supports for policy in policies):
        found["enforce_eager"] = True
    if any(Feature.ASYNC_SCHEDULING not in policy.supports for policy in policies):
        found["async_scheduling"] = False
    return found


def run_policies(
    machine: Machine,
    model: Path,
    names: Sequence[str],
    side_by_side: int,
    report: Report,
    deadline: float,
) -> None:
    """Serve under every policy: all requests finish, the policy acts, and nothing fails.

    Args:
        machine: Where the engines run.
        model: The tiny model.
        names: Beginnings of the names of wanted cases; every case if empty.
        side_by_side: Engines that live at the same time.
        report: Gets a row per case.
        deadline: Of the part.
    """
    cases = policy_cases(machine, names)
    serve_cases("policies", machine, model, cases, side_by_side, report, deadline)
