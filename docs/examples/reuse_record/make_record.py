"""Writes a record like the guard's without an engine, for `kvplug reuse explain` to explain.

    python docs/examples/reuse_record/make_record.py FOLDER

Two passages are stored, each computed alone, and used after an introduction and one after the other
before a question. Exact answers to other questions are the history the guard compares with.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from kvplug.hosts.transformers import Host
from kvplug.reuse.drift_record import DriftRecord, FamilyRecord, PieceRecord
from kvplug.reuse.guard import Guard
from kvplug.reuse.settings import GuardSettings
from kvplug_lab import models, texts
from kvplug_lab.reuse.explain import adapting_checks, explain, stored_pieces
from kvplug_lab.reuse.partial_forward import greedy

SECTION = {
    "reuse": {"use": ["structure", "position", "mask"], "approximate": True},
    "guard": {"max_entropy_drift": 0.2, "history": 3},
}
INTRODUCTION = "Read the scenes and answer the question.\n\n"
PASSAGE, ANSWER = 512, 32
ASKED = ("Who speaks first?", "Where are they?", "Who is afraid, and why?", "What has been seen?")


class Example:
    """A model, two passages and a guard."""

    def __init__(self) -> None:
        self.directory = models.smollm2()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.directory)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.bfloat16
        )
        self.model = loaded.eval()
        self.host = Host(self.model)
        self.guard = Guard(GuardSettings.model_validate(SECTION["guard"]))
        self.introduction = self.ids(INTRODUCTION)
        words = self.ids(texts.shakespeare()[:20000])
        self.passages = [words[i * PASSAGE : (i + 1) * PASSAGE] for i in (1, 2)]

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    def answer(self, number: int, reuse: bool) -> DriftRecord:
        """Answer a question, with the passages from storage or computed, and let the guard see."""
        before, at = self.introduction, len(self.introduction)
        pieces = [
            PieceRecord(
                segment=f"passage {i}",
                offset=0,
                length=PASSAGE,
                start=at + i * PASSAGE,
                shift=at + i * PASSAGE,
                exact=False,
                context_ids=[],
                token_ids=passage,
            )
            for i, passage in enumerate(self.passages)
        ]
        question = self.ids(f"\n\nQuestion: {ASKED[number]}\nAnswer:")
        record = DriftRecord(
            model=str(self.directory),
            fingerprint=models.model_fingerprint(self.directory),
            dtype="bfloat16",
            kvplug=SECTION,
            request_id=f"question-{number}",
            prompt_ids=[*before, *self.passages[0], *self.passages[1], *question],
            pieces=pieces if reuse else [],
        )
        checks, layers = adapting_checks(record, self.host.engine), self.host.layers
        stored = stored_pieces(self.model, record, checks, layers)
        output = greedy(self.model, record.prompt_ids, stored, n=ANSWER)
        record = record.model_copy(update={"output_ids": output})
        told = explain(self.model, record, checks, layers)
        heard = [(o.entropy_reused, o.logprob_reused) for o in told.outputs]
        entropies, logprobs = ([pair[i] for pair in heard] for i in (0, 1))
        self.guard.started(record.request_id, ["the passages"], reuse)
        self.guard.observe(record.request_id, entropies, logprobs)
        drift = self.guard.finished(record.request_id)
        families = FamilyRecord.of(drift) if drift is not None else []
        watched = {"entropies": entropies, "logprobs": logprobs, "families": families}
        return record.model_copy(update=watched)


if __name__ == "__main__":
    example = Example()
    for history in range(len(ASKED) - 1):
        example.answer(history, reuse=False)
    print(example.answer(len(ASKED) - 1, reuse=True).write(Path(sys.argv[1])))
