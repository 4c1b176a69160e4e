"""Placements of stored KV on real text, and what each does to the tokens that follow.

A prompt is a short shared prefix, some documents cut from the text at its empty lines, and what
follows the last of them in the text. A document's KV is computed elsewhere: after the prefix
alone, after other documents, alone at position 0, after another text of the same length, after a
text of which part is gone now, or after the same text some of which was itself reused. It is put
where the document stands in the prompt, and the model's distributions over the tokens that follow
are compared with those of the whole prompt computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvplug.contract.reuse import Candidate, ReuseRequest
from kvplug_lab.reuse.partial_forward import Piece
from kvplug_reuse_learned.documents import Document, ExperimentSizes
from kvplug_reuse_learned.experiment import Compared, Experiment, Prompt, StoredKV, compare

PREFIX = "Read the passages below with care. Then go on with the text.\n\n"
"""Default beginning of every prompt."""


SOURCES = ("prefix", "documents", "alone", "same place", "shifted", "reused before")
"""Contexts in which the KV of a placement was computed."""


Progress = Callable[[str], None]


@dataclass(frozen=True)
class PlacementTrial:
    """One placement and its outcome.

    Attributes:
        source: One of `SOURCES`.
        prompt: Number of the prompt.
        candidate: What was stored.
        request: Where it went.
        outcome: Reuse against recompute.
    """

    source: str
    prompt: int
    candidate: Candidate
    request: ReuseRequest
    outcome: Compared


def stored_elsewhere(
    experiment: Experiment, prompt: Prompt, index: int, source: str, others: Sequence[Document]
) -> StoredKV | None:
    """Compute a document's KV in another context.

    Args:
        experiment: The model.
        prompt: The prompt it goes into.
        index: Which of its documents.
        source: One of `SOURCES`.
        others: Documents of other prompts, for texts to put before it.

    Returns:
        None where the source makes no sense for this document, or is the prompt itself.
    """
    tokens, start = prompt.documents[index].tokens, prompt.runs[index][0]
    foreign = [t for document in others for t in document.tokens]
    context: tuple[int, ...]
    if source == "prefix":
        context = experiment.prefix
    elif source == "documents":
        context = experiment.prefix + tuple(t for d in others[:2] for t in d.tokens)
    elif source == "alone":
        context = ()
    elif source == "same place":
        body = start - len(experiment.prefix)
        context = experiment.prefix + tuple(foreign[:body])
        if len(context) < start:
            return None
    elif source == "shifted":
        # Stored late in a long text, used where the oldest document is gone.
        context = (
            experiment.prefix + others[0].tokens + prompt.tokens[len(experiment.prefix) : start]
        )
    elif source == "reused before":
        if index == 0:
            return None
        pieces = []
        for i in range(index):
            # After the prefix the first document would be where it belongs, and exact.
            then = experiment.prefix if i else ()
            pieces.append(
                experiment.place(
                    experiment.compute(then, prompt.documents[i].tokens), prompt.runs[i][0]
                )
            )
        return experiment.compute_over(prompt.tokens[:start], pieces, tokens, len(pieces))
    else:
        raise ValueError(source)
    if context == prompt.tokens[:start]:
        return None
    return experiment.compute(context, tokens)


Pairs = Callable[[StoredKV, Piece, Piece], None]
"""Called with stored KV, and with placed and true KV of the same tokens."""


def trials(
    experiment: Experiment,
    found: Sequence[Document],
    sizes: ExperimentSizes,
    pairs: Pairs | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> list[PlacementTrial]:
    """Place documents of prompts and compare reuse with recompute.

    Each placement is measured separately: what precedes the document is true, and what
    follows it in the text is computed.

    Args:
        experiment: The model.
        found: Documents, `ExperimentSizes.documents` for each prompt.
        sizes: Sizes of the experiment.
        pairs: Called with every placement.
        progress: Called once per prompt.
        first: Number of the first prompt.
    """
    chance = random.Random(f"{sizes.seed}:{first}")
    pool = list(found)
    chance.shuffle(pool)
    results: list[PlacementTrial] = []
    groups = [pool[i : i + sizes.documents] for i in range(0, len(pool), sizes.documents)]
    for number, group in enumerate(groups):
        prompt = experiment.prompt(group)
        strangers = [d for d in pool if d not in group]
        for index, document in enumerate(group):
            start, end = prompt.runs[index]
            follow = document.after[: chance.choice((sizes.follow // 2, sizes.follow))]
            text = prompt.tokens[:end]
            before = prompt.true_piece(0, start)
            true_piece = prompt.true_piece(start, end)
            true = experiment.logits(text, [before, true_piece], follow)
            order = chance.sample(SOURCES, len(SOURCES))
            done = 0
            for source in order:
                if done == sizes.placements:
                    break
                others = chance.sample(strangers, min(3, len(strangers)))
                stored = stored_elsewhere(experiment, prompt, index, source, others)
                if stored is None:
                    continue
                done += 1
                piece = experiment.place(stored, start)
                if pairs is not None:
                    pairs(stored, piece, true_piece)
                outcome = compare(true, experiment.logits(text, [before, piece], follow), follow)
                here = StoredKV(start, text[:start], [], [], stored.stats)
                asked = experiment.fingerprint(
                    StoredKV(start, here.context, stored.key, stored.value, stored.stats),
                    document.tokens,
                )
                candidate = Candidate(experiment.fingerprint(stored, document.tokens))
                request = ReuseRequest(asked, "", 0, len(text) + len(follow), True)
                results.append(PlacementTrial(source, first + number, candidate, request, outcome))
        if progress is not None:
            progress(f"prompt {first + number + 1}: {len(results)} placements")
    return results
