"""What every policy states about itself, whatever its kind.

A policy is a plain class: class attributes say what it is and what it can live with, a nested
pydantic ``Options`` model holds its knobs, and the methods of its kind do the work. The host
builds one object per engine (or per worker, see the kind) and calls its methods directly.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Kind(StrEnum):
    """The six places a policy can decide; each is a key of the ``kvplug`` section."""

    PREFIX_CACHE = "prefix_cache"
    SEQUENCE = "sequence"
    FORMAT = "format"
    REUSE = "reuse"
    TRANSFER = "transfer"
    LIFECYCLE = "lifecycle"


class Feature(StrEnum):
    """Engine features a policy states it can (or cannot) live with."""

    PREFIX_CACHING = "prefix caching"
    CHUNKED_PREFILL = "chunked prefill"
    PREEMPTION = "preemption"
    ASYNC_SCHEDULING = "async scheduling"
    SPECULATIVE_DECODING = "speculative decoding"
    DRAFT_MODEL = "speculative decoding with a draft model"
    CUDA_GRAPHS = "CUDA graphs"
    TENSOR_PARALLEL = "tensor parallel"
    PIPELINE_PARALLEL = "pipeline parallel"
    DATA_PARALLEL = "data parallel"
    CONTEXT_PARALLEL = "context parallel"
    LORA = "LoRA"
    QUANTIZED_KV_CACHE = "quantized KV cache"
    KV_SHARING = "KV sharing between layers"
    SLIDING_WINDOW_LAYERS = "sliding-window layers"
    MULTIMODAL = "multimodal inputs"
    DISAGGREGATED_PREFILL = "disaggregated prefill"


ALL_FEATURES: frozenset[Feature] = frozenset(Feature)


class PolicyOptions(BaseModel):
    """Base of a policy's knobs: unknown keys refused, values frozen once validated.

    Give every field a unit in its description and a range (``ge``/``le``): the description is
    what ``kvplug policies`` prints and the range is what a bad deployment file is told.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Rope:
    """How a layer rotates queries and keys by their position in the text.

    Attributes:
        frequencies: Radians per position of each rotated pair. The first elements of a head are
            rotated, twice as many as there are frequencies.
        interleaved: Pairs are neighbouring elements (GPT-J) instead of one of either half (NeoX).
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class LayerView:
    """One attention layer as policies see it.

    Attributes:
        index: Global layer index in the model, counted from 0, whatever the pipeline stage.
        num_layers: Layers in the whole model.
        num_kv_heads: KV heads of the layer on this rank.
        num_heads: Query heads of the layer on this rank.
        head_size: Elements per head.
        dtype: Name of the model's KV dtype, e.g. ``"bfloat16"``.
        rope: Its rotary embedding; None where there is none or the host does not know it.
    """

    index: int
    num_layers: int
    num_kv_heads: int = 0
    num_heads: int = 0
    head_size: int = 0
    dtype: str = ""
    rope: Rope | None = None


@dataclass(frozen=True)
class EngineView:
    """The engine a policy is built for.

    Attributes:
        block_size: Tokens per block.
        num_blocks: Blocks in the pool, the null block not counted; 0 where not known yet.
        max_model_len: Longest sequence, in tokens.
        max_in_flight_tokens: Tokens that can be scheduled and not settled at once.
        features: Engine features that are switched on.
        layers: The attention layers, in order; empty where the host does not know them yet.
        host: ``"vllm"``, ``"trace"`` or ``"transformers"``.
        host_version: Version of the host engine.
        model: Fingerprint of the model's config and weights; empty where the host does not know
            it.
    """

    block_size: int
    num_blocks: int = 0
    max_model_len: int = 0
    max_in_flight_tokens: int = 0
    features: frozenset[Feature] = frozenset()
    layers: tuple[LayerView, ...] = ()
    host: str = "vllm"
    host_version: str = ""
    model: str = ""


class Policy(ABC):
    """Base of all policies.

    Attributes:
        kind: Where it decides. Set by the kind's base class.
        name: What a deployment writes after ``use:``. Lower case, unique within the kind.
        exact: True when the engine's outputs are unchanged by it.
        changes: One sentence: what it changes. Printed by ``kvplug policies``.
        mutates_blocks: True when it writes into blocks that already hold KV.
        changes_length: True when a request's stored KV becomes shorter than its text.
        supports: Engine features it can live with. A feature that is on and not listed here is
            refused at start.
        requires: Engine features that must be on for it to do anything.
        excludes: Other policies it cannot live with: ``"kind"`` or ``"kind:name"`` to the reason.
        paper: Title and arXiv id, or where the method is from.
        options: Validated knobs.
        engine: The engine the object was built for.
    """

    kind: ClassVar[Kind]
    name: ClassVar[str]
    exact: ClassVar[bool]
    changes: ClassVar[str]
    mutates_blocks: ClassVar[bool] = False
    changes_length: ClassVar[bool] = False
    supports: ClassVar[frozenset[Feature]] = ALL_FEATURES
    requires: ClassVar[frozenset[Feature]] = frozenset()
    excludes: ClassVar[Mapping[str, str]] = {}
    paper: ClassVar[str] = ""
    options: PolicyOptions

    class Options(PolicyOptions):
        """No knobs."""

    def __init__(self, options: PolicyOptions, engine: EngineView):
        """Build the policy for one engine.

        Raises:
            ValueError: The options cannot work on this engine; the message says what to change
                and becomes the refusal the user reads.
        """
        if self.Options is not Policy.Options and not isinstance(options, self.Options):
            raise TypeError(
                f"{type(self).__name__} takes {self.Options.__qualname__}, "
                f"got {type(options).__qualname__}"
            )
        self.options = options
        self.engine = engine

    def counters(self) -> dict[str, float]:
        """What the policy itself counted, by name, since it was built.

        The host adds what it saw the policy do (blocks evicted, freed, bytes); a policy need only
        report what the host cannot see. Called off the hot path. A value that goes down is shown
        in the summary as it is; metrics count how far it ever came.
        """
        return {}


@dataclass
class PolicyReport:
    """What one active policy did, as printed at shutdown and exported as metrics.

    Attributes:
        kind: The policy's kind.
        name: The policy's name.
        exact: Whether it declared itself exact.
        acted: Number of times it decided something; 0 means it never did anything.
        errors: Exceptions it raised; after the first, the host's default serves in its place.
        counters: Named counts: the host's and the policy's own.
    """

    kind: str
    name: str
    exact: bool
    acted: int = 0
    errors: int = 0
    counters: dict[str, float] = field(default_factory=dict)
