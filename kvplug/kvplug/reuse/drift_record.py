"""Records of requests whose answers drifted after reuse, with all that a replay needs.

The guard writes one per drift, and ``kvplug reuse explain`` reads it. A record holds the request's
text and that of the segments, so it is as confidential as they are.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvplug.contract.reuse import Placement
from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular
from kvplug.reuse.guard import BreakerState, Drift

__all__ = ["BadRecord", "DriftRecord", "FamilyRecord", "PieceRecord"]

VERSION = 1
MAX_BYTES = 256 << 20
"""Largest file that is read."""

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Position = Annotated[int, Field(ge=0, lt=1 << 31)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class BadRecord(KVPlugError, ValueError):
    """A file that is not a record, or that contradicts itself."""

    exit_code = 2


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PieceRecord(_Part):
    """Consecutive tokens of a stored segment in the request's text.

    Attributes:
        segment: Id of the segment.
        offset: First token of the segment that was used.
        length: Tokens used.
        start: Position in the request of the first of them.
        shift: Positions the keys were re-rotated by.
        exact: The checks found it exact.
        confidence: Confidence of the checks, or None.
        context_ids: Tokens before the segment when it was computed.
        token_ids: Tokens of the whole segment.
        ancestry: Approximate reuses behind the segment's own computation; a replay computes it
            exactly instead.
        measures: Stability measures of its fingerprint, by name.
    """

    segment: str
    offset: Position
    length: Annotated[int, Field(ge=1, lt=1 << 31)]
    start: Position
    shift: int = 0
    exact: bool
    confidence: Annotated[float | None, Field(ge=0, le=1)] = None
    context_ids: list[Token]
    token_ids: list[Token]
    ancestry: Position = 0
    measures: dict[str, Number] = Field(default_factory=dict)

    @classmethod
    def of(
        cls,
        segment: str,
        placement: Placement,
        context_ids: Iterable[int],
        token_ids: Iterable[int],
    ) -> PieceRecord:
        """Record a placement, with the text of its segment and the text before it."""
        verdict, fingerprint = placement.verdict, placement.fingerprint
        return cls(
            segment=segment,
            offset=placement.offset,
            length=placement.length,
            start=placement.start,
            shift=verdict.shift,
            exact=verdict.exact,
            confidence=verdict.confidence,
            context_ids=[int(t) for t in context_ids],
            token_ids=[int(t) for t in token_ids],
            ancestry=fingerprint.ancestry,
            measures={k: float(v) for k, v in fingerprint.measures.items() if math.isfinite(v)},
        )

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + self.length

    @model_validator(mode="after")
    def _agrees(self) -> PieceRecord:
        if self.offset + self.length > len(self.token_ids):
            raise ValueError("offset + length exceeds the segment")
        if self.shift not in (0, self.start - self.offset - len(self.context_ids)):
            raise ValueError("shift does not match where the segment was computed")
        return self


class FamilyRecord(_Part):
    """Comparison of the answer with one family, and what its breaker did.

    Attributes:
        family: The family of segments.
        count: Exact answers in its history.
        entropy: Mean of their mean entropies, nats.
        entropy_spread: Standard deviation of those.
        logprob: Mean of their mean log-probabilities, nats.
        logprob_spread: Standard deviation of those.
        entropy_drift: Relative distance beyond the spread.
        logprob_drift: Distance beyond the spread, nats.
        over: One of the two was above its bound.
        state: The breaker after this answer.
    """

    family: str
    count: Position
    entropy: Number
    entropy_spread: Number
    logprob: Number
    logprob_spread: Number
    entropy_drift: Number
    logprob_drift: Number
    over: bool
    state: BreakerState

    @classmethod
    def of(cls, drift: Drift) -> list[FamilyRecord]:
        """Record the families of a drift, farthest first."""
        return [
            cls(
                family=f.family,
                count=f.history.count,
                entropy=f.history.entropy,
                entropy_spread=f.history.entropy_spread,
                logprob=f.history.logprob,
                logprob_spread=f.history.logprob_spread,
                entropy_drift=f.entropy,
                logprob_drift=f.logprob,
                over=f.over,
                state=f.state,
            )
            for f in drift.families
        ]


class DriftRecord(_Part):
    """One request whose answer drifted.

    Attributes:
        version: Version of this layout.
        created: Seconds since the epoch.
        model: Directory or name that the engine loaded its model from.
        fingerprint: The model's, from `kvplug.fingerprint.model_fingerprint`.
        dtype: Name of the dtype of K and V, e.g. ``bfloat16``.
        block_size: Tokens per block of the engine.
        kvplug: The deployment's section.
        request_id: The engine's id.
        prompt_ids: Tokens of the prompt.
        output_ids: Tokens of the answer, as far as they are known.
        pieces: Reused pieces, in the order of the text.
        computed: Spans ``(start, end)`` of the text that were recomputed although they lie in a
            piece.
        entropies: Entropy of each watched next-token distribution, nats; the first belongs to the
            answer's first token.
        logprobs: Log-probability of the most likely token of each, nats.
        families: Families it was compared with, farthest first.
    """

    version: Literal[1] = 1
    created: Number = Field(default_factory=time.time)
    model: str
    fingerprint: str
    dtype: str
    block_size: Annotated[int, Field(ge=1)] = 16
    kvplug: dict[str, Any]
    request_id: str
    prompt_ids: Annotated[list[Token], Field(min_length=1)]
    output_ids: list[Token] = Field(default_factory=list)
    pieces: list[PieceRecord] = Field(default_factory=list)
    computed: list[tuple[Position, Position]] = Field(default_factory=list)
    entropies: list[Number] = Field(default_factory=list)
    logprobs: list[Number] = Field(default_factory=list)
    families: list[FamilyRecord] = Field(default_factory=list)

    @model_validator(mode="after")
    def _agrees(self) -> DriftRecord:
        text = [*self.prompt_ids, *self.output_ids]
        at = 0
        for i, piece in enumerate(self.pieces):
            if piece.start < at:
                raise ValueError(f"pieces.{i} must start after the piece before it")
            at = piece.end
            if at > len(text):
                raise ValueError(f"pieces.{i} ends at {at}, beyond a text of {len(text)} tokens")
            used = piece.token_ids[piece.offset : piece.offset + piece.length]
            if used != text[piece.start : at]:
                raise ValueError(f"pieces.{i} does not match the text")
        for i, (start, end) in enumerate(self.computed):
            if not start <= end <= len(text):
                raise ValueError(f"computed.{i} is not a span of a text of {len(text)} tokens")
        if len(self.entropies) != len(self.logprobs):
            raise ValueError("entropies and logprobs differ in length")
        return self

    def write(self, folder: str | Path) -> Path:
        """Write the record into a folder, atomically.

        Args:
            folder: Created if it does not exist.

        Returns:
            The file, ``reuse-REQUEST-MILLISECONDS.json``.

        Raises:
            OSError: The file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", self.request_id)[:128]
        path = folder / f"reuse-{name}-{int(self.created * 1000)}.json"
        handle, part = tempfile.mkstemp(dir=folder, prefix=".reuse-", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def read(cls, path: str | Path) -> DriftRecord:
        """Read a record.

        Raises:
            BadRecord: The file cannot be read, is not a record of a supported version, or
                contradicts itself; the message names the file and the field.
        """
        path = Path(path)
        try:
            data = json.loads(read_regular(path, MAX_BYTES))
        except UnreadableFile as error:
            raise BadRecord(f"{path}: {error.problem}") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{path}: is not valid JSON: {error}") from error
        if not isinstance(data, Mapping) or "version" not in data:
            raise BadRecord(f"{path}: is not a record of reuse: it has no version")
        if data["version"] != VERSION:
            raise BadRecord(
                f"{path}: version: is {data['version']!r}, but this release reads {VERSION}"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first, *more = error.errors(include_url=False, include_input=False)
            where = ".".join(str(p) for p in first["loc"]) or "record"
            problem = first["msg"].removeprefix("Value error, ")
            also = f" (and {len(more)} more)" if more else ""
            raise BadRecord(f"{path}: {where}: {problem}{also}") from error
