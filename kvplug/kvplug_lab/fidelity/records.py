"""Records of an evaluation: one per variant and prompt, in JSON types.

Another program that ran the same prompts writes the same records, and the two are compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular

FORMAT = "kvplug eval 1"

MAX_BYTES = 1 << 30
"""Largest file that is read."""

FULL = "full cache"
"""Label of the variant that evicts nothing."""


class BadRecords(KVPlugError, ValueError):
    """A file does not hold valid records; the message names it and the problem."""


@dataclass(frozen=True)
class Record:
    """Result of one variant on one prompt.

    Attributes:
        variant: The policy with its options, or `FULL`.
        budget: Requested share of the context to keep, or the share of bfloat16's bytes under a
            format; 1.0 for the full cache.
        task: The prompt's task.
        prompt: The prompt's name.
        held: Tokens kept per KV head just after the eviction, mean over the pruned layers.
        nll: Negative log-likelihood of each scored token, in nats.
        top: The likeliest token at each of those places.
        right: Whether each of those is the token scored.
        kl: Mean divergence of the full cache's next-token distribution from the variant's, in
            nats; None where not measured.
        ids: Tokens generated, from the first that the eviction could change.
        bytes: Bytes of K and V per token, all heads and all full-attention layers together; None
            where tokens are evicted and not encoded.
        group: Tasks that the score is averaged with, e.g. ``ruler``; empty without a score.
        score: Score of the answer, 0 to 1; None where tokens were scored or compared.
        answer: The answer's text.
    """

    variant: str
    budget: float
    task: str
    prompt: str
    held: float
    nll: Sequence[float] = field(default_factory=list)
    top: Sequence[int] = field(default_factory=list)
    right: Sequence[bool] = field(default_factory=list)
    kl: float | None = None
    ids: Sequence[int] = field(default_factory=list)
    bytes: int | None = None
    group: str = ""
    score: float | None = None
    answer: str = ""


@dataclass
class Run:
    """Records and what they are of.

    Attributes:
        about: Model, text, sizes, versions: whatever says how to get the same again.
        records: The records.
    """

    about: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def save(self, path: Path, summary: Iterable[Mapping[str, Any]] = ()) -> None:
        """Write JSON."""
        data = {
            "format": FORMAT,
            "about": self.about,
            "summary": list(summary),
            "records": [asdict(record) for record in self.records],
        }
        path.write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote.

        Raises:
            BadRecords: The file cannot be read or is of another format.
        """
        try:
            data = json.loads(read_regular(path, MAX_BYTES))
            if data["format"] != FORMAT:
                raise BadRecords(f"{path} is of format {data['format']!r}, not {FORMAT!r}")
            return cls(dict(data["about"]), [Record(**record) for record in data["records"]])
        except UnreadableFile as error:
            raise BadRecords(f"{path} {error.problem}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, BadRecords):
                raise
            cause = f"{type(error).__name__}: {error}"
            raise BadRecords(f"{path} is not a file of `kvplug eval --json` ({cause})") from error
