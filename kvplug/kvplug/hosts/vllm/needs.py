"""What a deployment needs of an engine's flags: refused alike before an engine starts and as it
starts.

`kvplug check` reads a file's flags, the engine its config. What only the model, its layers or the
engine's own choices can tell is refused in `kvplug.hosts.vllm.admission`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvplug.contract import Feature, Kind
from kvplug.deployment import SWITCH_OFF, Choice, Deployment
from kvplug.errors import Refusal
from kvplug.hosts.vllm.features import enabled, features_from_flags, features_of, number
from kvplug.hosts.vllm.flags import EXTENSION

RECOMPUTE = "recompute"
"""Value of ``kv_load_failure_policy`` with which KV that cannot be loaded is computed."""

SHADOW_WITH_DRAFTS = (
    "compares answers token by token, which speculative decoding does not show.",
    "remove guard.shadow, or --speculative-config.",
)
"""Problem and fix of a guard's shadow where tokens are drafted."""

LAYER_KINDS = (Kind.SEQUENCE, Kind.FORMAT, Kind.REUSE, Kind.ATTENTION, Kind.TIERS)
"""Kinds that touch attention layers or their pages."""

NOT_WITH_TIERS: dict[Feature, str] = {
    Feature.CONTEXT_PARALLEL: "a rank has every so many tokens of a block",
    Feature.DISAGGREGATED_PREFILL: "prefill and decode are engines of their own",
    Feature.DRAFT_MODEL: "what is loaded has no KV of the draft model",
    Feature.KV_SHARING: "a layer's KV would be stored for each layer that reads it",
    Feature.QUANTIZED_KV_CACHE: "the pages' scales are not stored",
    Feature.SLIDING_WINDOW_LAYERS: "layers would need other tokens of a chunk than others",
}
"""Engine features that tiers do not support, and why."""


@dataclass(frozen=True)
class Stated:
    """What an engine's config, or the flags of a file, state.

    Attributes:
        features: Features that are enabled, as far as is known.
        load_failures: What becomes of KV that cannot be loaded: ``kv_load_failure_policy``.
        extension: ``--worker-extension-cls``.
        pooling: True if the model is known to give embeddings, classes or scores.
        microbatches: True if steps are divided into microbatches.
        sleep: True if weights can be discarded and brought back.
    """

    features: frozenset[Feature]
    load_failures: str = "fail"
    extension: str = ""
    pooling: bool = False
    microbatches: bool = False
    sleep: bool = False

    @classmethod
    def of_config(cls, vllm_config: Any) -> Stated:
        """What a vLLM config states."""
        return cls(
            features_of(vllm_config),
            vllm_config.kv_transfer_config.kv_load_failure_policy,
            vllm_config.parallel_config.worker_extension_cls,
            vllm_config.model_config.runner_type == "pooling",
            bool(vllm_config.parallel_config.use_ubatching),
            bool(vllm_config.model_config.enable_sleep_mode),
        )

    @classmethod
    def of_flags(cls, flags: Mapping[str, Any], transfer: Mapping[str, Any]) -> Stated:
        """What flags state, with vLLM's defaults for those left out.

        Args:
            flags: Flags by name, with dashes.
            transfer: The connector's flag.
        """
        return cls(
            features_from_flags(flags),
            str(transfer.get("kv_load_failure_policy", "fail")),
            str(flags.get("worker-extension-cls", "")),
            flags.get("runner", "auto") == "pooling"
            or str(flags.get("convert", "auto")) not in ("auto", "none"),
            enabled(flags, "enable-dbo", False) or number(flags, "ubatch-size", 0) > 1,
            enabled(flags, "enable-sleep-mode", False),
        )


def loads_kv(deployment: Deployment) -> bool:
    """True if requests wait for KV that may turn out not to be there."""
    return any(deployment.choices.get(kind) for kind in (Kind.REUSE, Kind.TIERS))


def unmet(deployment: Deployment, stated: Stated) -> list[Refusal]:
    """Refuse what a deployment needs and its engine's flags do not give it."""
    chosen = [choice for kind in LAYER_KINDS if (choice := deployment.choice(kind)) is not None]
    return [
        Refusal(key, problem, fix, deployment.lines.get(key))
        for key, problem, fix in (
            *(_output(deployment.all()) if stated.pooling else ()),
            *(_microbatches(chosen) if stated.microbatches else ()),
            *(_sleep(chosen) if stated.sleep else ()),
            *_reuse(deployment, stated),
            *_tiers(deployment, stated),
        )
    ]


Said = tuple[str, str, str]
"""Key, problem and fix."""


def _output(chosen: Iterable[Choice]) -> Iterator[Said]:
    """Policies that are not exact where outputs cannot say so."""
    for choice in chosen:
        if not choice.policy.exact:
            yield (
                choice.key,
                f"{choice.policy.name} is not exact, and an embedding, class or score has no "
                "field that could say so.",
                f"remove the {choice.policy.kind!s} section for a pooling model, or choose an "
                "exact policy.",
            )


def _microbatches(chosen: Sequence[Choice]) -> Iterator[Said]:
    for choice in chosen:
        yield (
            choice.key,
            f"{choice.policy.name} needs a step's metadata in one piece, and microbatches build "
            "it in two.",
            "remove --enable-dbo and --ubatch-size.",
        )


def _sleep(chosen: Sequence[Choice]) -> Iterator[Said]:
    for choice in chosen:
        in_host_memory = choice.policy.kind in (Kind.REUSE, Kind.TIERS)
        if in_host_memory and not getattr(choice.policy, "on_device", False):
            continue
        yield (
            choice.key,
            f"{choice.policy.name} keeps tables on the device beside the model's weights, which "
            "sleep discards and wake-up does not bring back.",
            f"remove --enable-sleep-mode, or the {choice.policy.kind!s} section.",
        )


def _reuse(deployment: Deployment, stated: Stated) -> Iterator[Said]:
    choice = deployment.choice(Kind.REUSE)
    if choice is None:
        return
    key = choice.key.split(".use")[0]
    if stated.load_failures != RECOMPUTE:
        yield key, "a segment that cannot be loaded would fail its request.", _RECOMPUTE_FIX
    if not deployment.reuse.recompute.needed:
        return
    if stated.extension != EXTENSION:
        yield (
            f"{key}.recompute",
            "recomputing inside a run needs access to the model.",
            f"set --worker-extension-cls {EXTENSION}, or recompute: {{gaps: 0}}.",
        )
    if Feature.LORA in stated.features:
        yield f"{key}.recompute", "does not support LoRA.", "remove the recompute section."


def _tiers(deployment: Deployment, stated: Stated) -> Iterator[Said]:
    choice = deployment.choice(Kind.TIERS)
    if choice is None:
        return
    key = choice.key.split(".use")[0]
    if stated.load_failures != RECOMPUTE:
        yield key, "a chunk that cannot be loaded would fail its request.", _RECOMPUTE_FIX
    for feature in sorted(stated.features & NOT_WITH_TIERS.keys()):
        how = SWITCH_OFF.get(feature)
        yield (
            key,
            f"tiers do not support {feature}: {NOT_WITH_TIERS[feature]}.",
            f"set {how}, or remove {key}." if how else f"remove {key} for this model.",
        )
    if Feature.PREFIX_CACHING not in stated.features:
        yield (
            key,
            "tiers store what the prefix cache holds, which is off.",
            f"set --enable-prefix-caching, or remove {key}.",
        )
    yield from _beside_tiers(deployment, key)


def _beside_tiers(deployment: Deployment, key: str) -> Iterator[Said]:
    """Kinds that tiers do not go with, whatever the engine."""
    if (other := deployment.choice(Kind.REUSE)) is not None:
        yield (
            key,
            "does not support reuse: both would load the tokens after the engine's own hit, and "
            "reuse keeps its segments in a store of its own.",
            f"remove one of {key} and {other.key.split('.use')[0]}.",
        )
    inexact = [one for one in deployment.tiers if not one.codec.policy.exact]
    for kind in (Kind.SEQUENCE, Kind.ATTENTION):
        other = deployment.choice(kind)
        if inexact and other is not None:
            yield (
                inexact[0].codec.key,
                f"{inexact[0].codec.policy.name} changes KV, and what it gives back does not go "
                f"with {kind} policy {other.policy.name}.",
                f"choose an exact codec for tier {inexact[0].name}, or remove {kind!s}.",
            )


_RECOMPUTE_FIX = f"set kv_load_failure_policy: {RECOMPUTE} in kv-transfer-config."
