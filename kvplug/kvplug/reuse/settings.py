"""Settings of reuse: the keys next to ``reuse.use``, and ``guard``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kvplug.contract.policy import PolicyOptions

MIB = 1 << 20


class Splitting(PolicyOptions):
    """Boundaries of the segments of a text."""

    renamed: ClassVar[Mapping[str, str]] = {"least": "min_tokens", "most": "max_tokens"}

    by: Literal["paragraph", "separator", "fixed", "request"] = Field(
        default="paragraph",
        description="boundaries: after an empty line, after `separator`, every `size` tokens, or "
        "only those of the request (`kvplug: {segments: [lengths]}`, which always apply)",
    )
    separator: str = Field(default="", description="text that ends a segment, with `by: separator`")
    size: int = Field(
        default=256, ge=16, le=65536, description="tokens per segment, with `by: fixed`"
    )
    min_tokens: int = Field(
        default=32,
        ge=16,
        le=65536,
        description="least tokens of a segment; a shorter one is merged with the next",
    )
    max_tokens: int = Field(
        default=4096,
        ge=16,
        le=1 << 20,
        description="most tokens of a segment; a longer one is split",
    )

    @model_validator(mode="after")
    def _agree(self) -> Splitting:
        if self.by == "separator" and not self.separator:
            raise ValueError("by: separator requires separator")
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not exceed max_tokens")
        return self


class Store(PolicyOptions):
    """Storage of segments."""

    memory: int = Field(
        default=1024,
        ge=1,
        description="MiB of host memory for segments and their text, of all processes together",
    )
    directory: str = Field(
        default="", description="folder that keeps segments across restarts; empty for none"
    )
    disk: int = Field(
        default=16384,
        ge=1,
        description="MiB of files in the folder, of all ranks together, headers included",
    )
    tenant_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="largest fraction of `memory` and of `disk` that one tenant takes; under it, "
        "no tenant loses what is within an even share to another",
    )
    ttl: float = Field(default=86400.0, gt=0, description="seconds that an unused segment is kept")
    session_ttl: float = Field(
        default=3600.0,
        gt=0,
        description="seconds that an unused session's segments are evicted last",
    )
    variants: int = Field(
        default=4,
        ge=1,
        le=64,
        description="copies of one text, computed after different texts, that are kept",
    )
    outputs: bool = Field(default=True, description="store generated tokens too, not only prompts")


class Recompute(PolicyOptions):
    """Tokens recomputed inside a reused run; needs vLLM's `--worker-extension-cls`."""

    renamed: ClassVar[Mapping[str, str]] = {"share": "fraction", "most": "max_fraction"}

    boundary: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="first tokens of each approximate segment to recompute",
    )
    fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="fraction of an approximate run's tokens to recompute: those whose keys and "
        "values deviate most after one layer (CacheBlend)",
    )
    gaps: int = Field(
        default=64,
        ge=0,
        le=65536,
        description="most tokens to recompute between two stored segments",
    )
    max_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="largest fraction of a run that may be recomputed; the run ends before more",
    )

    @property
    def needed(self) -> bool:
        """True if anything is to be recomputed inside a run."""
        return bool(self.boundary or self.fraction or self.gaps)


class ReuseSettings(PolicyOptions):
    """The keys beside ``reuse.use``."""

    renamed: ClassVar[Mapping[str, str]] = {
        "near": "prefetch",
        "memo": "the kind attention: {use: memo}",
    }

    approximate: bool = Field(
        default=False,
        description="allow approximate reuse for requests that ask for it "
        "(`kvplug: {reuse: approximate}`)",
    )
    segments: Splitting = Field(default_factory=Splitting, description="boundaries of segments")
    store: Store = Field(
        default_factory=Store, description="where segments are stored, and for how long"
    )
    recompute: Recompute = Field(
        default_factory=lambda: Recompute(gaps=0), description="what is recomputed in a run"
    )
    prefetch: bool = Field(
        default=False,
        description="keep an index of near-equal text, which brings likely segments back from the "
        "folder before they are asked for",
    )


class Breaker(PolicyOptions):
    """When approximate reuse of a family of segments stops, and starts again."""

    renamed: ClassVar[Mapping[str, str]] = {
        "errors": "threshold",
        "per": "window",
        "rest": "cooldown",
    }

    threshold: int = Field(
        default=5, ge=1, description="drifting answers of a family after which its reuse stops"
    )
    window: int = Field(
        default=1000, ge=1, description="latest answers of the family in which they are counted"
    )
    cooldown: float = Field(
        default=600.0, gt=0, description="seconds until one reuse is tried as a trial"
    )


class ShadowSettings(PolicyOptions):
    """Approximate answers that are answered again exactly, and what follows from it."""

    one_in: int = Field(
        default=100,
        ge=1,
        le=1_000_000,
        description="of so many approximate answers, one, drawn at random, is answered again",
    )
    max_divergence: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="largest mean divergence of approximate answers from exact ones, a "
        "probability (0 to 1)",
    )
    alpha: float = Field(
        default=0.01,
        gt=0,
        lt=0.5,
        description="probability of going back to exact although the mean is within the bound",
    )
    beta: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="probability that a trial lets all be approximated again although the mean "
        "is not within the bound",
    )
    tokens: int = Field(
        default=64, ge=2, le=1024, description="first tokens of an answer that are compared"
    )
    cooldown: float = Field(
        default=600.0,
        gt=0,
        description="seconds in which nothing is approximated, before a trial; doubled, to at most "
        "16 times, for each trial that fails",
    )
    trial: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="share of the requests that are approximated in a trial, each answered again",
    )
    idle: bool = Field(
        default=True,
        description="answer again only while no request is waiting or running, and stop when one "
        "comes; false for beside others, one at a time",
    )


class GuardSettings(PolicyOptions):
    """The ``guard`` key: compares answers after approximate reuse with exact ones."""

    max_entropy_drift: float = Field(
        default=0.2,
        gt=0,
        description="largest relative distance of an answer's mean entropy from exact answers'",
    )
    max_logprob_drift: float = Field(
        default=0.5, gt=0, description="largest distance of its mean log-probability, in nats"
    )
    tokens: int = Field(
        default=32, ge=1, le=65536, description="first tokens of an answer that are compared"
    )
    history: int = Field(
        default=3,
        ge=1,
        description="exact answers that a family needs before others are compared with it",
    )
    breaker: Breaker = Field(
        default_factory=Breaker, description="when approximate reuse of a family stops"
    )
    records: str = Field(
        default="", description="folder for a JSON record of each drift; empty for none"
    )
    shadow: ShadowSettings | None = Field(
        default=None,
        description="approximate answers that are answered again exactly; null for none",
    )
