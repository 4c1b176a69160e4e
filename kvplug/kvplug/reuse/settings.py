"""What a deployment says of reuse beside its checks: the keys next to ``reuse.use``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvplug.contract.policy import PolicyOptions

MIB = 1 << 20


class Splitting(PolicyOptions):
    """Where the segments of a text begin and end."""

    renamed: ClassVar[Mapping[str, str]] = {"least": "min_tokens", "most": "max_tokens"}

    by: Literal["paragraph", "separator", "fixed", "request"] = Field(
        default="paragraph",
        description="boundaries: after an empty line, after `separator`, every `size` tokens, or "
        "only where the request says (`kvplug: {segments: [lengths]}`, which always counts)",
    )
    separator: str = Field(
        default="", description="text whose last token ends a segment, with `by: separator`"
    )
    size: int = Field(
        default=256, ge=16, le=65536, description="tokens of a segment, with `by: fixed`"
    )
    min_tokens: int = Field(
        default=32,
        ge=16,
        le=65536,
        description="tokens a segment has at least: shorter ones join the next",
    )
    max_tokens: int = Field(
        default=4096,
        ge=16,
        le=1 << 20,
        description="tokens a segment has at most: longer ones are cut",
    )

    @model_validator(mode="after")
    def _agree(self) -> Splitting:
        if self.by == "separator" and not self.separator:
            raise ValueError("by: separator needs a separator")
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not exceed max_tokens")
        return self


class Store(PolicyOptions):
    """Where stored segments lie, and for how long."""

    memory: int = Field(
        default=1024,
        ge=1,
        description="MiB of host memory for segments, on each rank's own host share",
    )
    directory: str = Field(
        default="", description="folder that keeps them across restarts; empty for none"
    )
    disk: int = Field(default=16384, ge=1, description="MiB the folder may take")
    ttl: float = Field(default=86400.0, gt=0, description="seconds a segment is kept unused")
    session_ttl: float = Field(
        default=3600.0,
        gt=0,
        description="seconds an idle session's segments are spared from the quota",
    )
    variants: int = Field(
        default=4,
        ge=1,
        le=64,
        description="copies of one text kept, computed after different texts",
    )
    outputs: bool = Field(
        default=True, description="keep what requests generated, not only their prompts"
    )


class Recompute(PolicyOptions):
    """What is computed anew inside a reused run; needs vLLM's `--worker-extension-cls`."""

    renamed: ClassVar[Mapping[str, str]] = {"share": "fraction", "most": "max_fraction"}

    boundary: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="first tokens of each approximate segment computed anew",
    )
    fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="fraction of an approximate run's tokens computed anew: those whose keys and "
        "values deviate most after one layer (CacheBlend)",
    )
    gaps: int = Field(
        default=64,
        ge=0,
        le=65536,
        description="most tokens between two stored segments computed anew",
    )
    max_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="most of a run that may be computed anew; beyond, it ends",
    )

    @property
    def needed(self) -> bool:
        """Whether anything is to be computed inside a run."""
        return bool(self.boundary or self.fraction or self.gaps)


class Memo(PolicyOptions):
    """Reuse of attention over far pages in decode; approximate."""

    cosine: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="least cosine of a query with the one remembered, per head",
    )
    near: int = Field(
        default=256, ge=16, le=1 << 20, description="latest tokens attended afresh at every step"
    )
    every: int = Field(
        default=16, ge=1, le=4096, description="steps after which it is computed anyway"
    )


class ReuseSettings(PolicyOptions):
    """The keys beside ``reuse.use``."""

    renamed: ClassVar[Mapping[str, str]] = {"near": "prefetch"}

    approximate: bool = Field(
        default=False,
        description="allow reuse that is not exact, for requests that ask for it too "
        "(`kvplug: {reuse: approximate}`)",
    )
    segments: Splitting = Field(
        default_factory=Splitting, description="where segments begin and end"
    )
    store: Store = Field(default_factory=Store, description="where they lie, and for how long")
    recompute: Recompute = Field(
        default_factory=lambda: Recompute(gaps=0), description="what is computed anew in a run"
    )
    prefetch: bool = Field(
        default=False,
        description="keep an index of near-equal text, which brings likely segments back from the "
        "folder before they are asked for",
    )


class Breaker(PolicyOptions):
    """When reuse of a family of segments stops, and starts again."""

    renamed: ClassVar[Mapping[str, str]] = {
        "errors": "threshold",
        "per": "window",
        "rest": "cooldown",
    }

    threshold: int = Field(
        default=5, ge=1, description="drifting answers of a family that stop its reuse"
    )
    window: int = Field(
        default=1000, ge=1, description="latest reuses of the family they are counted over"
    )
    cooldown: float = Field(
        default=600.0, gt=0, description="seconds until one reuse is tried again"
    )


class GuardSettings(PolicyOptions):
    """The ``guard`` key: watches what answers look like after approximate reuse."""

    max_entropy_drift: float = Field(
        default=0.2,
        gt=0,
        description="relative distance of an answer's mean entropy from exact history",
    )
    max_logprob_drift: float = Field(
        default=0.5, gt=0, description="the same of its mean log-probability, in nats"
    )
    tokens: int = Field(
        default=32, ge=1, le=65536, description="first tokens of an answer that are watched"
    )
    history: int = Field(
        default=3,
        ge=1,
        description="exact answers a family must have before others are compared with it",
    )
    breaker: Breaker = Field(default_factory=Breaker, description="when reuse of a family stops")
    records: str = Field(
        default="", description="folder for a JSON record of each drift; empty for none"
    )
