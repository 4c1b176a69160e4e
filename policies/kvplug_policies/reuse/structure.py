"""Checks that stored KV is complete and of the same model, text and tenant.

What must agree is what `Fingerprint` lists. Tenants are compared first, so that the causes one
tenant receives reveal nothing about another's segments.
"""

from __future__ import annotations

from pydantic import Field

from kvplug.contract import (
    Candidate,
    EngineView,
    Fingerprint,
    PolicyOptions,
    ReuseCheck,
    ReuseRequest,
    Verdict,
)

SAME: tuple[tuple[str, str], ...] = (
    ("tenant", "other tenant"),
    ("model", "other model"),
    ("tokenizer", "other tokenizer"),
    ("lora", "other LoRA adapter"),
    ("dtype", "other dtype"),
    ("format", "other format"),
    ("geometry", "other geometry"),
    ("position", "other positions"),
)
"""Fields of a fingerprint that must agree, in the order they are compared, and their causes."""


class Structure(ReuseCheck):
    """Refuses KV of another model, text or tenant, and incomplete KV.

    Exact where the text before is the same and no approximate reuse is behind the segment.
    """

    name = "structure"
    changes = (
        "refuses stored KV of another model, format, text or tenant, and segments that are damaged"
    )

    class Options(PolicyOptions):
        """Options of `Structure`."""

        max_ancestry: int = Field(
            0,
            ge=0,
            le=64,
            description="largest number of approximate reuses behind a segment's own computation",
        )
        max_age: float = Field(
            0.0, ge=0, description="oldest segment used, in seconds since it was computed; 0: any"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.max_ancestry = self.options.max_ancestry
        self.max_age = self.options.max_age

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        stored, wanted = candidate.fingerprint, request.fingerprint
        for field, cause in SAME:
            if getattr(stored, field) != getattr(wanted, field):
                return Verdict(False, cause, exact=False)
            if field == "model" and not stored.model:
                # What could not be identified equals nothing, itself included.
                return Verdict(False, "unknown model", exact=False)
        cause = self._unusable(candidate, wanted) or _misfit(stored, wanted, request.num_tokens)
        if cause:
            return Verdict(False, cause, exact=False)
        if stored.ancestry > self.max_ancestry or (
            stored.ancestry and not request.approximate_allowed
        ):
            return Verdict(False, "approximate ancestry not allowed", exact=False)
        return Verdict(True, exact=not stored.ancestry and stored.context == wanted.context)

    def _unusable(self, candidate: Candidate, wanted: Fingerprint) -> str:
        if not candidate.valid:
            return "invalidated"
        if not candidate.whole:
            return candidate.cause or "not whole"
        if self.max_age and wanted.created - candidate.fingerprint.created > self.max_age:
            return "too old"
        return ""


def _misfit(stored: Fingerprint, wanted: Fingerprint, num_tokens: int) -> str:
    if (
        wanted.length < 1
        or wanted.start < 0
        or wanted.length > stored.length
        or wanted.start + wanted.length > num_tokens
    ):
        return "does not fit"
    # A shorter run has another digest; the index that proposed it compared the ids.
    if wanted.length == stored.length and wanted.tokens != stored.tokens:
        return "other text"
    return ""
