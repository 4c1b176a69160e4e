"""Fingerprints, candidates and requests for the tests of reuse checks."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from kvplug.contract import EngineView
from kvplug.contract.reuse import Candidate, Fingerprint, ReuseCheck, ReuseRequest, Verdict

TEXT = np.arange(1000, 1096, dtype=np.int32)
BEFORE = np.arange(64, dtype=np.int32)


def digest(tokens: Any) -> bytes:
    return blake2b(np.asarray(tokens, dtype="<i4").tobytes(), digest_size=16).digest()


STORED = Fingerprint(
    model="m",
    tokenizer="t",
    lora="",
    dtype="bfloat16",
    format="",
    position="rope/neox/0a",
    geometry=(4, 2, 16),
    tenant="",
    mask="causal",
    start=64,
    length=96,
    context=digest(BEFORE),
    tokens=digest(TEXT),
    created=1000.0,
    request_id="r0",
)


def candidate(**changes: Any) -> Candidate:
    """The stored segment, with fields of it or of its fingerprint changed."""
    own = {k: changes.pop(k) for k in ("whole", "cause", "valid") if k in changes}
    return Candidate(replace(STORED, **changes), **own)


def request(*, num_tokens: int = 512, approximate: bool = True, **changes: Any) -> ReuseRequest:
    """A request that would compute what is stored, but for ``changes``."""
    changes = {"request_id": "r1", "created": 1060.0} | changes
    wanted = replace(STORED, **changes)
    return ReuseRequest(wanted, "r1", 0, num_tokens, approximate)


def build(policy: type[ReuseCheck], *, layers: Any = (), **options: Any) -> ReuseCheck:
    return policy(policy.Options.model_validate(options), EngineView(16, layers=tuple(layers)))


def refusal(verdict: Verdict) -> str:
    """The cause of a refusal; fails if there was none."""
    assert not verdict.ok and not verdict.exact
    return verdict.reason
