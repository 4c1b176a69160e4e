"""The base of all policies, and the views of the engine they are built for.

A policy is a plain class: class attributes declare what it is and which engine features it
supports, a nested pydantic ``Options`` model defines its options, and the methods of its kind do
the work. The host builds one object per engine (or per worker, see the kind) and calls its methods
directly.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Kind(StrEnum):
    """The kinds of policy; each is a key of the ``kvplug`` section.

    Attributes:
        PREFIX_CACHE: Which cached block that no request holds to evict.
        SEQUENCE: Which tokens of a running request to keep.
        FORMAT: How K and V are stored in pages and attended there.
        REUSE: Whether stored KV may be used in place of a computation.
        ATTENTION: How decode steps attend what a request holds.
        TIERS: Where KV is stored outside the engine's pool.
        TRANSFER: How KV is encoded on its way there.
        LIFECYCLE: What is stored there, when it moves, and when loading pays.
    """

    PREFIX_CACHE = "prefix_cache"
    SEQUENCE = "sequence"
    FORMAT = "format"
    REUSE = "reuse"
    ATTENTION = "attention"
    TIERS = "tiers"
    TRANSFER = "transfer"
    LIFECYCLE = "lifecycle"


class Feature(StrEnum):
    """Engine features that a policy supports, requires or neither."""

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
    """Base of a policy's options: unknown keys are refused, validated values are frozen.

    Give every field a unit in its description and a range (``ge``/``le``): ``kvplug policies``
    prints the description, and the refusal of a bad value names the range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a layer: how it rotates queries and keys by position.

    Attributes:
        frequencies: Radians per position of each rotated pair. The first elements of a head are
            rotated, twice as many as there are frequencies.
        interleaved: Pairs are neighbouring elements (GPT-J) instead of one of either half (NeoX).
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class LayerView:
    """View of one attention layer.

    Attributes:
        index: Global layer index in the model, counted from 0, whatever the pipeline stage.
        num_layers: Layers in the whole model.
        num_kv_heads: KV heads of the layer on this rank.
        num_heads: Query heads of the layer on this rank.
        head_size: Elements per head.
        dtype: Name of the model's KV dtype, e.g. ``"bfloat16"``.
        rope: Its rotary embedding; None if it has none or the host does not know it.
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
    """View of the engine a policy is built for.

    Attributes:
        block_size: Tokens per block.
        num_blocks: Blocks in the pool, not counting the null block; 0 if not known yet.
        max_model_len: Longest sequence, in tokens.
        max_in_flight_tokens: Tokens that can be scheduled and not yet computed and acknowledged.
        features: Engine features that are enabled.
        layers: The attention layers, in order; empty if the host does not know them yet.
        host: ``"vllm"``, ``"trace"`` or ``"transformers"``.
        host_version: Version of the host engine.
        model: Fingerprint of the model's config and weights; empty if the host does not know
            it, or it cannot be had.
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

    def may_run(self, fingerprint: str) -> bool:
        """Tell whether what was made for one model may be used on the engine.

        Args:
            fingerprint: Of that model; empty if it had none.

        Returns:
            True for the model that the engine runs. A running vLLM whose model has no fingerprint
            runs none that is known; elsewhere an unknown model may be any.
        """
        known = bool(self.model and fingerprint)
        if self.host == "vllm" and self.host_version:
            return known and self.model == fingerprint
        return not known or self.model == fingerprint


class Policy(ABC):
    """Base of all policies.

    Attributes:
        kind: Kind of the policy; set by the kind's base class.
        name: Name that a deployment writes after ``use:``; lower case, unique within the kind.
        exact: True if it leaves the engine's outputs unchanged.
        changes: What it changes, one sentence; printed by ``kvplug policies``.
        mutates_blocks: True if it writes into blocks that already hold KV.
        changes_length: True if a request's stored KV becomes shorter than its text.
        supports: Engine features it supports. With any other feature enabled, the deployment is
            refused at start.
        requires: Engine features that must be enabled for it to do anything.
        excludes: Policies it cannot be combined with: ``"kind"`` or ``"kind:name"`` to the reason.
        paper: Title and arXiv id of the method, or its origin.
        options: Validated options; a policy with options of its own annotates
            ``options: Options`` after its nested class.
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
        """No options."""

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
        """Report the policy's own counters by name, since it was built.

        The host adds its own (blocks evicted, freed, bytes); a policy need only report what the
        host cannot see. Called off the hot path. A value may go down: the summary shows it as it
        is, metrics export its maximum.
        """
        return {}


@dataclass
class PolicyReport:
    """Report of one active policy, printed at shutdown and exported as metrics.

    Attributes:
        kind: The policy's kind.
        name: The policy's name.
        exact: The policy's ``exact``.
        acted: Number of times it decided something; 0 if it never did anything.
        errors: Exceptions it raised; after the first, the host's default serves in its place.
        counters: Counters by name, the host's and the policy's own.
        own: Those that the policy counts by itself.
        retired: True if the host's default has taken over, for good or in part.
    """

    kind: str
    name: str
    exact: bool
    acted: int = 0
    errors: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    retired: bool = False
