"""Laws of reuse checks, and segments, requests and placements to check them with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import Any, ClassVar

import torch

from kvplug.contract import Candidate, Fingerprint, Placement, ReuseCheck, ReuseRequest, Verdict
from kvplug.testing.laws import LAYERS, PolicyLaws, law


def _digest(first: int, count: int) -> bytes:
    words = b"".join(i.to_bytes(4, "little") for i in range(first, first + count))
    return blake2b(words, digest_size=16).digest()


STORED = Fingerprint(
    model="m",
    tokenizer="t",
    lora="",
    dtype="float32",
    format="",
    position="rope/neox/0a",
    geometry=(len(LAYERS), LAYERS[0].num_kv_heads, LAYERS[0].head_size),
    tenant="",
    mask="causal",
    start=64,
    length=96,
    context=_digest(0, 64),
    tokens=_digest(1000, 96),
    created=1000.0,
    request_id="r0",
)
"""A segment of 96 tokens that was computed behind 64 others."""

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"start": 65},
    {"start": 0, "context": _digest(0, 0)},
    {"context": _digest(7, 64)},
    {"tokens": _digest(7, 96)},
    {"tenant": "another"},
    {"model": ""},
    {"lora": "a"},
    {"dtype": "bfloat16"},
    {"format": "int8"},
    {"position": "learned"},
    {"position": "unknown"},
    {"mask": "causal+bidirectional:0-8"},
)
"""In what a request may differ from what is stored."""


def candidate(**changes: Any) -> Candidate:
    """A stored segment, with fields of it or of its fingerprint changed."""
    own = {k: changes.pop(k) for k in ("whole", "cause", "valid") if k in changes}
    return Candidate(replace(STORED, **changes), **own)


def reuse_request(
    *, approximate: bool = True, num_tokens: int = 512, **changes: Any
) -> ReuseRequest:
    """A request that would compute what is stored, but for ``changes`` of its fingerprint."""
    given: dict[str, Any] = {"request_id": "r1", "created": 1060.0, **changes}
    wanted = replace(STORED, **given)
    return ReuseRequest(wanted, "r1", 0, num_tokens, approximate)


def placement(verdict: Verdict | None = None, *, length: int = 96, shift: int = 0) -> Placement:
    """A run of the stored segment on its way into a request.

    Args:
        verdict: Result of the chain; by default one for the shift.
        length: Tokens used.
        shift: Positions that they move by.
    """
    verdict = verdict or Verdict(True, exact=not shift, shift=shift)
    return Placement(STORED, 0, length, STORED.start + shift, verdict)


def _cases() -> Iterator[tuple[str, Candidate, ReuseRequest]]:
    for changes in CHANGES:
        said = ", ".join(changes) or "nothing"
        yield f"a request that differs in {said}", candidate(), reuse_request(**changes)
    exact = reuse_request(approximate=False)
    yield "a request that allows exact reuse alone", candidate(), exact
    yield "a segment that is not whole", candidate(whole=False, cause="torn"), reuse_request()
    yield "a segment that was invalidated", candidate(valid=False), reuse_request()
    measures = {"k_drift": 0.1, "v_drift": 0.1, "sparsity": 0.5, "key_cosine": 0.2, "outgoing": 0.3}
    yield "a segment with measures", candidate(measures=measures), reuse_request(start=70)
    deep = candidate(ancestry=3)
    yield "a segment with three approximate reuses behind it", deep, reuse_request(start=70)


class ReuseLaws(PolicyLaws):
    """Laws of every reuse check."""

    policy: ClassVar[type[ReuseCheck]]

    @law("ReuseCheck.check", "Decide whether ``candidate`` may be used")
    def test_every_answer_is_a_verdict(self) -> None:
        policy = self.build()
        for what, stored, request in _cases():
            verdict = policy.check(stored, request)
            assert isinstance(verdict, Verdict), f"{what}: {verdict!r}"
            sure = verdict.confidence
            assert sure is None or (math.isfinite(sure) and 0 <= sure <= 1), f"{what}: {verdict}"

    @law("Verdict", "Cause, a short stable phrase: refusals are counted by it.")
    def test_a_refusal_has_a_cause(self) -> None:
        policy = self.build()
        for what, stored, request in _cases():
            verdict = policy.check(stored, request)
            if verdict.ok:
                continue
            cause = verdict.reason
            good = 0 < len(cause) <= 64 and ":" not in cause and "\n" not in cause
            assert good, f"{what}: refused with the cause {cause!r}"

    @law("ReuseCheck.check", "in place of what ``request`` would compute")
    def test_the_same_question_has_the_same_answer(self) -> None:
        one, other = self.build(), self.build()
        for what, stored, request in _cases():
            answers = [c.check(stored, request) for c in (one, one, other)]
            assert answers[0] == answers[1] == answers[2], f"{what}: {answers}"

    @law("Verdict", "True if reuse equals recomputation in exact arithmetic.")
    def test_what_moves_is_not_exact(self) -> None:
        policy = self.build()
        for what, stored, request in _cases():
            verdict = policy.check(stored, request)
            shifted = verdict.ok and verdict.shift
            assert not (shifted and verdict.exact), f"{what}: {verdict}"

    @law("ReuseCheck.adapt", "Corrected key and value, same shapes and dtype")
    def test_what_is_adapted_keeps_its_shape(self) -> None:
        policy = self.build()
        for length, shift in ((1, 0), (1, 3), (96, -64), (96, 5)):
            placed = placement(length=length, shift=shift)
            assert isinstance(policy.adapts(placed), bool), f"adapts of a shift of {shift}"
            for dtype in (torch.float32, torch.bfloat16):
                layer = replace(LAYERS[1], dtype=str(dtype).removeprefix("torch."))
                shape = (length, layer.num_kv_heads, layer.head_size)
                random = torch.Generator().manual_seed(length)
                key, value = (torch.randn(shape, generator=random).to(dtype) for _ in "kv")
                before = key.clone(), value.clone()
                found = policy.adapt(layer, placed, key, value)
                said = f"{length} tokens of {dtype} moved by {shift}"
                for name, got in zip(("key", "value"), found, strict=True):
                    alike = got.shape == key.shape and got.dtype == dtype
                    assert alike, f"{said}: {name} of {list(got.shape)} {got.dtype}"
                    assert bool(got.isfinite().all()), f"{said}: {name} is not finite"
                kept = torch.equal(key, before[0]) and torch.equal(value, before[1])
                assert kept, f"{said}: it writes into what it is given"

    @law("ReuseCheck.adapts", "Return True if `adapt` changes anything for this placement.")
    def test_what_it_does_not_adapt_stays(self) -> None:
        policy, layer = self.build(), LAYERS[1]
        for shift in (0, 5):
            placed = placement(length=16, shift=shift)
            if policy.adapts(placed):
                continue
            shape = (16, layer.num_kv_heads, layer.head_size)
            key, value = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
            found = policy.adapt(layer, placed, key, value)
            same = torch.equal(found[0], key) and torch.equal(found[1], value)
            assert same, f"adapts is False for a shift of {shift}, and adapt changes K or V"
