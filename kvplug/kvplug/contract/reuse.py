"""Reuse checks: decide whether stored KV may be used in place of a computation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvplug.contract.policy import ALL_FEATURES, Feature, Kind, LayerView, Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything a stored segment's KV depends on, as recorded when it was computed.

    Attributes:
        model: Digest of all that KV depends on beside the request: weights, the config as it
            runs, quantization, types, the engine's version. What is empty equals nothing.
        tokenizer: Digest of the tokenizer's files, or its name and revision.
        lora: Digest of the adapter's files, or the empty string without one.
        dtype: Name of the KV dtype.
        format: `FormatPolicy.fingerprint`, or the empty string for the engine's own.
        position: Positional scheme: ``rope/neox/DIGEST`` or ``rope/gptj/DIGEST`` (the digest is of
            the model's own table of frequencies), ``rope-by-length`` where the table depends on
            the length of the text, ``alibi``, ``learned``, ``none`` or ``unknown``.
        geometry: ``(layers, kv_heads, head_size)``, whatever the rank.
        tenant: Digest of the request's cache salt, or the empty string.
        mask: Template under which it was computed: ``causal``, ``window:N``, or ``causal`` with
            bidirectional spans ``causal+bidirectional:A-B,C-D`` counted from the segment's start.
        start: Position of its first token.
        length: Tokens.
        context: 16-byte BLAKE2b of the token ids before it (int32, little endian); of nothing for
            a segment at position 0.
        tokens: 16-byte BLAKE2b of its own token ids.
        created: Seconds since the epoch.
        request_id: The request that computed it.
        ancestry: Approximate reuses behind its computation; 0 when everything was exact.
        measures: Stability measures by name, over the whole model: ``k_drift`` and ``v_drift``
            (relative distance of the RMS of K and V from the model's running statistics),
            ``sparsity`` (Hoyer sparsity of value norms over tokens, mean over heads; 0 to 1),
            ``key_cosine`` (mean cosine of neighbouring keys), ``outgoing`` (share of attention mass
            that its last queries put on what came before it; absent if not measured).
    """

    model: str
    tokenizer: str
    lora: str
    dtype: str
    format: str
    position: str
    geometry: tuple[int, int, int]
    tenant: str
    mask: str
    start: int
    length: int
    context: bytes
    tokens: bytes
    created: float
    request_id: str
    ancestry: int = 0
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A stored segment proposed for use.

    Attributes:
        fingerprint: What its KV depends on.
        whole: True if all its bytes were there, with the right checksum, when last read.
        cause: Cause if it is not whole, a short stable phrase; else empty.
        valid: False once it was invalidated.
    """

    fingerprint: Fingerprint
    whole: bool = True
    cause: str = ""
    valid: bool = True


@dataclass(frozen=True, slots=True)
class ReuseRequest:
    """The place where a stored segment would be used, with the same facts for that request.

    Attributes:
        fingerprint: The segment's fingerprint as this request would compute it: its ``start`` is
            the position the segment's first token would have.
        request_id: The engine's id.
        num_local_tokens: Tokens already matched in the engine's own prefix cache.
        num_tokens: Tokens of the request.
        approximate_allowed: True if the deployment and the request both allow approximate reuse.
    """

    fingerprint: Fingerprint
    request_id: str
    num_local_tokens: int
    num_tokens: int
    approximate_allowed: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a check.

    Attributes:
        ok: True if this check allows the segment to be used.
        reason: Cause, a short stable phrase: refusals are counted by it.
        exact: True if reuse equals recomputation in exact arithmetic.
        shift: Positions by which the keys must be re-rotated before use.
        confidence: Probability that reuse keeps the answer, when estimated.
        cost_us: Microseconds the check took; filled in by the host.
    """

    ok: bool
    reason: str = ""
    exact: bool = True
    shift: int = 0
    confidence: float | None = None
    cost_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """A run of a stored segment's tokens on its way into a request.

    Attributes:
        fingerprint: The segment's.
        offset: First token of the segment that is used.
        length: Tokens used.
        start: Position in the request of the first of them.
        verdict: Result of the whole chain: exact if every check is, ``shift`` and
            ``confidence`` from the checks that set them.
    """

    fingerprint: Fingerprint
    offset: int
    length: int
    start: int
    verdict: Verdict


class ReuseCheck(Policy):
    """One check in a chain; all must agree. Checks run in the scheduler, `adapt` on the worker.

    A check that only adapts (a correction) returns ``Verdict(True)`` from `check`.
    """

    kind: ClassVar[Kind] = Kind.REUSE
    exact: ClassVar[bool] = False
    supports: ClassVar[frozenset[Feature]] = ALL_FEATURES - {
        Feature.QUANTIZED_KV_CACHE,
        Feature.CONTEXT_PARALLEL,
        Feature.PIPELINE_PARALLEL,
        Feature.DISAGGREGATED_PREFILL,
        Feature.KV_SHARING,
        Feature.SLIDING_WINDOW_LAYERS,
        Feature.DRAFT_MODEL,
        Feature.MULTIMODAL,
    }
    excludes: ClassVar[Mapping[str, str]] = {
        "sequence": "a stored segment must hold every token of its text, and a sequence policy "
        "drops some"
    }

    @abstractmethod
    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        """Decide whether ``candidate`` may be used in place of what ``request`` would compute."""

    def adapts(self, placement: Placement) -> bool:
        """Return True if `adapt` changes anything for this placement.

        Then K and V are decoded and corrected before they are written; else their stored bytes
        are copied.
        """
        return False

    def adapt(
        self, layer: LayerView, placement: Placement, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Correct loaded KV before it is written (re-rotation, a learned correction).

        Called for exact and approximate placements alike where `adapts` is True, in the order of
        the chain, on the result of the check before it.

        Args:
            layer: The layer.
            placement: The run that is placed.
            key: ``[num_tokens, num_kv_heads, head_size]``, in the model's dtype.
            value: The same shape.

        Returns:
            Corrected key and value, same shapes and dtype; the inputs by default.
        """
        return key, value
