"""Reuse checks: may this stored KV stand for that computation?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvplug.contract.policy import Kind, LayerView, Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything a stored segment's KV depends on, as recorded when it was computed.

    Attributes:
        model: Model name and revision.
        tokenizer: Tokenizer name and revision.
        lora: Adapter name, or the empty string.
        dtype: KV dtype.
        format: `FormatPolicy.fingerprint`, or the empty string for the engine's own.
        position: Positional scheme and its parameters (RoPE base, scaling, partial dims; ALiBi).
        geometry: ``(layers, kv_heads, head_size)``.
        tenant: Cache salt.
        mask: Template under which it was computed: causal, sliding window, bidirectional spans.
        start: Position of its first token.
        length: Tokens.
        context: Hash chain of the text before it.
        tokens: Hash of its own tokens.
        created: Seconds since the epoch.
        request_id: The request that computed it.
        checksum: Of the stored bytes.
        measures: Stability measures by name (drift, sparsity, key cosine, outgoing mass).
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
    checksum: bytes
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReuseRequest:
    """Where a stored segment would be used: the same facts for the request at hand.

    Attributes:
        fingerprint: What the segment's fingerprint would be if this request computed it.
        request_id: The engine's id.
        num_local_tokens: Tokens already matched in the engine's own prefix cache.
        approximate_allowed: Whether the deployment and the request both allow approximate reuse.
    """

    fingerprint: Fingerprint
    request_id: str
    num_local_tokens: int
    approximate_allowed: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes:
        ok: Whether the segment may be used, as far as this check can tell.
        reason: Cause, a short stable phrase: refusals are counted by it.
        exact: Whether reuse would equal recomputation bit for bit in exact arithmetic.
        shift: Positions the keys must be rotated by before use.
        credibility: Probability that reuse keeps the answer, when estimated.
        cost_us: Microseconds the check took; filled in by the host.
    """

    ok: bool
    reason: str = ""
    exact: bool = True
    shift: int = 0
    credibility: float | None = None
    cost_us: float = 0.0


class ReuseCheck(Policy):
    """One check in a chain; all must agree. Checks run in the scheduler, `adapt` on the worker."""

    kind: ClassVar[Kind] = Kind.REUSE

    @abstractmethod
    def check(self, candidate: Fingerprint, request: ReuseRequest) -> Verdict:
        """Whether ``candidate`` may stand for what ``request`` would compute."""

    def adapt(
        self, layer: LayerView, verdict: Verdict, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Correct loaded KV before it is written (re-rotation, compensation).

        Args:
            layer: The layer.
            verdict: This check's verdict.
            key: ``[num_tokens, num_kv_heads, head_size]`` as stored.
            value: The same shape.

        Returns:
            Corrected key and value, same shapes; the inputs by default.
        """
        return key, value
