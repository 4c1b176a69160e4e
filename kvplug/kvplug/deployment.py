"""A deployment: the policies it runs, and what keeps them from running on an engine.

The ``kvplug`` section is in vLLM's own ``--config`` file under
``kv-transfer-config: kv_connector_extra_config: kvplug:``, inline in ``--kv-transfer-config``, or
in a separate file whose path is given there instead. It maps each kind to a policy::

    prefix_cache: lru                                  # short for {use: lru}
    sequence: {use: sink_window, sink: 64, window: 448}
    reuse: {use: [structure, {position: {max_shift: 4096}}], approximate: true}
    tiers: [{host: {size: 8GiB}}, {disk: {path: /var/kvplug, size: 200GiB, transfer: lossless}}]
    transfer: raw                                      # codec of tiers that do not name one
    lifecycle: watermarks

The keys next to ``reuse.use``, and ``guard``, configure where segments are stored and what may be
done with them (`kvplug.reuse.settings`); ``observe`` what is recorded (`kvplug.observe.settings`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kvplug.containment import STARTING, Contained, PolicyFailure
from kvplug.contract import EngineView, Feature, Kind, Policy, PolicyOptions
from kvplug.errors import DeploymentError, Refusal, change_options
from kvplug.observe.settings import ObserveSettings
from kvplug.reuse.settings import GuardSettings, ReuseSettings

ALWAYS = ("structure", "position")
"""Checks that every chain needs: without them, KV of other text or another model could match."""

OnBadRequest = Literal["report", "refuse"]
ON_BAD_REQUEST_VALUES = get_args(OnBadRequest)

SWITCH_OFF: dict[Feature, str] = {
    Feature.PREFIX_CACHING: "--no-enable-prefix-caching",
    Feature.CHUNKED_PREFILL: "--no-enable-chunked-prefill",
    Feature.ASYNC_SCHEDULING: "--no-async-scheduling",
    Feature.SPECULATIVE_DECODING: "remove --speculative-config",
    Feature.DRAFT_MODEL: 'use --speculative-config \'{"method": "ngram", ...}\'',
    Feature.CUDA_GRAPHS: "--enforce-eager",
    Feature.TENSOR_PARALLEL: "--tensor-parallel-size 1",
    Feature.PIPELINE_PARALLEL: "--pipeline-parallel-size 1",
    Feature.DATA_PARALLEL: "--data-parallel-size 1",
    Feature.CONTEXT_PARALLEL: (
        "--decode-context-parallel-size 1 and --prefill-context-parallel-size 1"
    ),
    Feature.LORA: "remove --enable-lora",
    Feature.QUANTIZED_KV_CACHE: "--kv-cache-dtype auto",
    Feature.DISAGGREGATED_PREFILL: "kv_role: kv_both",
}
OF_THE_MODEL = frozenset({Feature.KV_SHARING, Feature.SLIDING_WINDOW_LAYERS, Feature.MULTIMODAL})
"""Features that a model has, whatever the flags."""
LAYER_KINDS = (Kind.SEQUENCE, Kind.FORMAT, Kind.REUSE, Kind.ATTENTION, Kind.TIERS)
"""Kinds that read or change what attention layers keep."""
LATENT = "multi-head latent attention (MLA)"
"""What a model has whose layers keep latents instead of keys and values."""
SWITCH_ON: dict[Feature, str] = {
    Feature.PREFIX_CACHING: "--enable-prefix-caching",
    Feature.CHUNKED_PREFILL: "--enable-chunked-prefill",
}


@dataclass(frozen=True)
class Choice:
    """One chosen policy: its class, validated options and the key it was written under."""

    policy: type[Policy]
    options: PolicyOptions
    key: str

    def build(self, engine: EngineView) -> Policy:
        """Build the policy object for an engine.

        Raises:
            PolicyFailure: The policy raised, took too long, or is not built as the contract says.
        """
        name = f"{self.policy.kind!s} policy {self.policy.name!r}"
        built: Policy = Contained(self, STARTING, name).run(self._build, engine)
        return built

    def _build(self, engine: EngineView) -> Policy:
        own = copy.deepcopy(engine)
        policy = self.policy(self.options, own)
        if type(policy) is not self.policy:
            raise TypeError(f"building it returned {type(policy).__qualname__}")
        built = getattr(policy, "options", None), getattr(policy, "engine", None)
        if not isinstance(built[0], PolicyOptions) or built[1] is not own:
            raise TypeError("its __init__ does not call super().__init__(options, engine)")
        return policy


@dataclass(frozen=True)
class TierChoice:
    """One tier of a deployment.

    Attributes:
        name: Its name: that of its policy, numbered from the second one on.
        tier: The tier.
        codec: Codec of what is stored there.
        order: Prefix-cache policy whose order chunks leave in.
    """

    name: str
    tier: Choice
    codec: Choice
    order: Choice


@dataclass(frozen=True)
class Deployment:
    """A parsed section: every policy exists, every option is valid.

    Attributes:
        source: File (or ``inline``) the section came from, for messages.
        choices: The chosen policies, in order, by kind. Kinds not chosen are absent.
        lines: 1-based line of each key path below the section, where the source has lines.
        section: The section as plain data.
        tiers: The tiers, fastest first.
        reuse: The keys next to ``reuse.use``; defaults where there are none.
        guard: The ``guard`` key, or None.
        observe: The ``observe`` key; defaults where there is none.
        on_bad_request: ``refuse`` where a request whose options are invalid is answered with an
            error, ``report`` where the invalid ones are ignored and named in its answer.
    """

    source: str
    choices: Mapping[Kind, tuple[Choice, ...]]
    lines: Mapping[str, int] = field(default_factory=dict)
    section: Mapping[str, Any] = field(default_factory=dict)
    tiers: tuple[TierChoice, ...] = ()
    reuse: ReuseSettings = field(default_factory=ReuseSettings)
    guard: GuardSettings | None = None
    observe: ObserveSettings = field(default_factory=ObserveSettings)
    on_bad_request: OnBadRequest = "report"

    def choice(self, kind: Kind) -> Choice | None:
        """The policy chosen for a kind that takes one, or None."""
        chosen = self.choices.get(kind, ())
        return chosen[0] if chosen else None

    def all(self) -> list[Choice]:
        """Every chosen policy."""
        return [choice for chosen in self.choices.values() for choice in chosen]

    def incompatible(
        self, engine: EngineView, *, runs: frozenset[Kind], host: str
    ) -> list[Refusal]:
        """Find what keeps this deployment from running on an engine, from what its policies state.

        Args:
            engine: The engine, with the features that are enabled.
            runs: Kinds the host can run.
            host: The host's name, for messages.

        Returns:
            Refusals, empty when it can run.
        """
        found: list[Refusal] = []

        def refuse(key: str, problem: str, fix: str) -> None:
            found.append(Refusal(key, problem, fix, self.lines.get(key)))

        checks = self.choices.get(Kind.REUSE, ())
        names = [c.policy.name for c in checks]
        if checks and Kind.REUSE in runs and tuple(names[: len(ALWAYS)]) != ALWAYS:
            whole = ", ".join([*ALWAYS, *(n for n in names if n not in ALWAYS)])
            refuse(
                checks[0].key,
                f"the chain of checks must begin with {' and '.join(ALWAYS)}, got "
                f"{', '.join(names)}.",
                f"write `use: [{whole}]`.",
            )
        for choice in self.all():
            policy, kind, name = choice.policy, choice.policy.kind, choice.policy.name
            if kind not in runs:
                refuse(
                    choice.key,
                    f"the {host} host does not run {kind} policies in this release.",
                    f"remove {kind!s}; the host runs {', '.join(sorted(runs))}.",
                )
                continue
            for feature in sorted(engine.features - policy.supports):
                how = SWITCH_OFF.get(feature)
                refuse(
                    choice.key,
                    f"{name} cannot run on a model with {feature}."
                    if feature in OF_THE_MODEL
                    else f"{name} does not support {feature}, which {_is(feature)} enabled.",
                    (f"disable {_it(feature)} ({how}) or " if how else "")
                    + f"choose another {kind} policy.",
                )
            for feature in sorted(policy.requires - engine.features):
                how = SWITCH_ON.get(feature)
                refuse(
                    choice.key,
                    f"{name} has no effect without {feature}, which {_is(feature)} disabled.",
                    (f"enable {_it(feature)} ({how}) or " if how else "") + f"remove {kind!s}.",
                )
            for other in self.all():
                reason = policy.excludes.get(str(other.policy.kind)) or policy.excludes.get(
                    f"{other.policy.kind}:{other.policy.name}"
                )
                if reason and other is not choice:
                    refuse(
                        choice.key,
                        f"{name} does not support {other.policy.kind} policy "
                        f"{other.policy.name}: {reason}.",
                        f"remove one of {choice.key} and {other.key}.",
                    )
        if not found:
            for choice in self.all():
                try:
                    choice.build(engine)
                except PolicyFailure as failure:
                    found.append(self.refusal(choice, failure.problem))
        return found

    def beyond(self, what: str) -> list[Refusal]:
        """Refuse the policies of `LAYER_KINDS` on a model whose layers none of them can work on.

        Args:
            what: What the model has, e.g. `LATENT`.
        """
        chosen = [choice for kind in LAYER_KINDS if (choice := self.choice(kind)) is not None]
        return [
            Refusal(
                choice.key,
                f"{choice.policy.name} cannot run on a model with {what}.",
                f"remove the {choice.policy.kind!s} section for this model.",
                self.lines.get(choice.key),
            )
            for choice in chosen
        ]

    def refusal(self, choice: Choice, problem: str) -> Refusal:
        """Refuse a policy for a problem that its options may solve.

        Args:
            choice: The policy.
            problem: What is wrong, a sentence without its full stop.
        """
        key = choice.key.removesuffix(".use")
        fix = change_options(problem, choice.policy.Options.model_fields)
        return Refusal(key, f"{choice.policy.name}: {problem}.", fix, self.lines.get(key))

    def require_compatible(self, engine: EngineView, *, runs: frozenset[Kind], host: str) -> None:
        """Raise DeploymentError unless `incompatible` finds nothing."""
        if refusals := self.incompatible(engine, runs=runs, host=host):
            raise DeploymentError(self.source, refusals)


def _is(feature: Feature) -> str:
    return "are" if feature is Feature.CUDA_GRAPHS else "is"


def _it(feature: Feature) -> str:
    return "them" if feature is Feature.CUDA_GRAPHS else "it"
