"""Computes a recorded request again, with the stored KV it used and without, and compares the two.

The segments are computed after the texts they were computed after, put where the record says and
corrected by the deployment's own checks; what the record says was recomputed is. So the text
with reuse and the one without differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import EngineView, Kind, LayerView
from kvplug.contract.reuse import Fingerprint, Placement, ReuseCheck, Verdict
from kvplug.errors import KVPlugError
from kvplug.parser import load_deployment
from kvplug.reuse.drift_record import DriftRecord, PieceRecord
from kvplug_lab.reuse.partial_forward import Piece, capture, forward_reused

__all__ = ["Explanation", "OutputToken", "Parted", "adapting_checks", "explain", "stored_pieces"]


@dataclass(frozen=True)
class Parted:
    """Distance of a run's KV from computed KV.

    Attributes:
        name: The segment's id, or a description of a computed run.
        start: Position of its first token.
        end: Position after its last.
        exact: Whether the checks found it exact; None for computed tokens.
        shift: Positions its keys were rotated by.
        confidence: What the checks estimated, or None.
        computed: Tokens of it that were recomputed.
        key: Relative error of the keys per layer: Frobenius norm of the difference over that of
            the right ones.
        value: The same of the values.
    """

    name: str
    start: int
    end: int
    exact: bool | None
    shift: int
    confidence: float | None
    computed: int
    key: tuple[float, ...]
    value: tuple[float, ...]


@dataclass(frozen=True)
class OutputToken:
    """One next-token distribution of the answer, after the recorded tokens before it.

    Attributes:
        index: Counted from the answer's first token.
        recorded: The token of the record, or None after its last.
        exact: Greedy choice when all is computed.
        reused: Greedy choice with reuse.
        kl: Kullback-Leibler divergence of the one with reuse from the computed one, nats.
        entropy_exact: Entropy when all is computed, nats.
        entropy_reused: Entropy with reuse, nats.
        entropy_recorded: The engine's, as recorded, or None.
        logprob_exact: Log-probability of the likeliest token when all is computed, nats.
        logprob_reused: The same with reuse.
        logprob_recorded: The engine's, as recorded, or None.
    """

    index: int
    recorded: int | None
    exact: int
    reused: int
    kl: float
    entropy_exact: float
    entropy_reused: float
    entropy_recorded: float | None
    logprob_exact: float
    logprob_reused: float
    logprob_recorded: float | None


@dataclass(frozen=True)
class Explanation:
    """Explanation of a record.

    Attributes:
        request_id: The engine's id.
        prompt_tokens: Tokens of the prompt.
        loaded_tokens: Those of them that were loaded and not recomputed.
        runs: The pieces in the order of the text, and last what was computed of the prompt from
            the first piece on, if anything.
        outputs: One per recorded output token; of a record without any, the next token's.
        parts_at: Index of the first output token at which the two diverge, or None.
        follows: Whether every recorded token is the choice with reuse: then the answer was greedy,
            and the recomputation is what the engine did.
        entropy_off: Mean distance of the recorded entropies from those with reuse, nats; None
            without any.
        notes: What the recomputation omits, a sentence each.
    """

    request_id: str
    prompt_tokens: int
    loaded_tokens: int
    runs: tuple[Parted, ...]
    outputs: tuple[OutputToken, ...]
    parts_at: int | None
    follows: bool
    entropy_off: float | None
    notes: tuple[str, ...]


def adapting_checks(record: DriftRecord, engine: EngineView) -> list[ReuseCheck]:
    """The checks of a record's deployment that correct KV, built for a model.

    Raises:
        DeploymentError: The section in the record is invalid.
        KVPlugError: A check cannot be built, such as one whose file is not there.
    """
    deployment = load_deployment(record.kvplug, source=f"record of {record.request_id}")
    found = []
    for choice in deployment.choices.get(Kind.REUSE, ()):
        if not issubclass(choice.policy, ReuseCheck):
            continue
        if choice.policy.adapts is ReuseCheck.adapts:
            continue
        try:
            check = choice.build(engine)
        except Exception as error:
            raise KVPlugError(f"{choice.key}: {choice.policy.name}: {error}") from error
        assert isinstance(check, ReuseCheck)
        found.append(check)
    return found


@torch.inference_mode()
def explain(
    model: Any, record: DriftRecord, checks: Sequence[ReuseCheck], layers: Sequence[LayerView]
) -> Explanation:
    """Compute a record's text both ways.

    Args:
        model: The Hugging Face ``...ForCausalLM`` that the record is about.
        record: The record.
        checks: Those that correct KV, in the order of the chain.
        layers: The model's attention layers, in order.

    Raises:
        KVPlugError: The model cannot be replayed, or has other layers than the record's KV.
    """
    prompt, output = len(record.prompt_ids), len(record.output_ids)
    # The last token of the answer predicts nothing that is recorded.
    text = [*record.prompt_ids, *record.output_ids[: max(0, output - 1)]]
    keep = list(range(prompt - 1, len(text)))
    vocab = int(model.get_input_embeddings().num_embeddings)
    known = [text, record.output_ids, *(p.token_ids + p.context_ids for p in record.pieces)]
    if any(ids and max(ids) >= vocab for ids in known):
        raise KVPlugError(f"the record has token ids beyond the model's vocabulary of {vocab}")

    pieces = stored_pieces(model, record, checks, layers)
    right = forward_reused(model, text, keep=keep)
    reused = forward_reused(model, text, pieces, record.computed, keep=keep)

    loaded = torch.zeros(prompt, dtype=torch.bool)
    for piece in record.pieces:
        loaded[piece.start : piece.end] = True
    for start, end in record.computed:
        loaded[start:end] = False
    runs = [_parted(p, loaded, right, reused) for p in record.pieces]
    if record.pieces:
        first = record.pieces[0].start
        rest = first + (~loaded[first:]).nonzero()[:, 0]
        runs.append(_errors("computed", rest, right, reused, len(rest)))

    outputs = _outputs(record, right.logits, reused.logits)
    off = [
        abs(o.entropy_recorded - o.entropy_reused)
        for o in outputs
        if o.entropy_recorded is not None
    ]
    return Explanation(
        record.request_id,
        prompt,
        int(loaded.sum()),
        tuple(runs),
        outputs,
        next((o.index for o in outputs if o.exact != o.reused), None),
        bool(output) and all(o.recorded == o.reused for o in outputs),
        sum(off) / len(off) if off else None,
        tuple(_notes(record)),
    )


def _notes(record: DriftRecord) -> list[str]:
    notes = []
    if any(p.ancestry for p in record.pieces):
        notes.append(
            "A segment was itself computed on approximate reuse; here it is computed exactly, so "
            "the engine was farther off than is shown."
        )
    if "format" in record.kvplug:
        notes.append(
            f"The engine stored K and V in a format; here they are {record.dtype}, and the "
            "format's rounding is left out on both sides."
        )
    reuse = record.kvplug.get("reuse")
    beside = reuse if isinstance(reuse, dict) else {}
    recompute = beside.get("recompute")
    if isinstance(recompute, dict) and recompute.get("fraction"):
        notes.append(
            "The worker recomputed the most deviating tokens as well (recompute.fraction); "
            "which ones is not in the record, so the engine was nearer than is shown."
        )
    if "attention" in record.kvplug:
        notes.append("An attention policy answered decode steps; here they attend in full.")
    return notes


def stored_pieces(
    model: Any, record: DriftRecord, checks: Sequence[ReuseCheck], layers: Sequence[LayerView]
) -> list[Piece]:
    """Each piece's KV as the worker would have written it.

    Raises:
        KVPlugError: The model has other layers, or a check cannot correct a piece.
    """
    made: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[list[Tensor], list[Tensor]]] = {}
    found = []
    for piece in record.pieces:
        source = tuple(piece.context_ids), tuple(piece.token_ids)
        if source not in made:
            made[source] = capture(model, piece.context_ids, piece.token_ids)
        run = slice(piece.offset, piece.offset + piece.length)
        keys, values = ([t[run] for t in plane] for plane in made[source])
        if len(keys) != len(layers):
            raise KVPlugError(f"the model has KV of {len(keys)} layers, not {len(layers)}")
        for i, layer in enumerate(layers):
            placement = _placement(record, piece, layer)
            for check in checks:
                if check.adapts(placement):
                    try:
                        keys[i], values[i] = check.adapt(layer, placement, keys[i], values[i])
                    except Exception as error:
                        raise KVPlugError(
                            f"{check.name} cannot correct {piece.segment}: {error}"
                        ) from error
        found.append(Piece(piece.start, keys, values))
    return found


def _placement(record: DriftRecord, piece: PieceRecord, layer: LayerView) -> Placement:
    scheme = "unknown"
    if layer.rope is not None:
        # What a digest would name is the model's own table, whose fingerprint was compared.
        scheme = f"rope/{'gptj' if layer.rope.interleaved else 'neox'}/{record.fingerprint}"
    fingerprint = Fingerprint(
        model=record.fingerprint,
        tokenizer="",
        lora="",
        dtype=record.dtype,
        format="",
        position=scheme,
        geometry=(layer.num_layers, layer.num_kv_heads, layer.head_size),
        tenant="",
        mask="causal",
        start=len(piece.context_ids),
        length=len(piece.token_ids),
        context=b"",
        tokens=b"",
        created=record.created,
        request_id="",
        ancestry=piece.ancestry,
        measures=piece.measures,
    )
    verdict = Verdict(True, exact=piece.exact, shift=piece.shift, confidence=piece.confidence)
    return Placement(fingerprint, piece.offset, piece.length, piece.start, verdict)


def _parted(piece: PieceRecord, loaded: Tensor, right: Any, reused: Any) -> Parted:
    where = torch.arange(piece.start, piece.end)
    computed = piece.length - int(loaded[piece.start : piece.end].sum())
    return _errors(piece.segment, where, right, reused, computed, piece)


def _errors(
    name: str,
    where: Tensor,
    right: Any,
    reused: Any,
    computed: int,
    piece: PieceRecord | None = None,
) -> Parted:
    def relative(found: list[Tensor], true: list[Tensor]) -> tuple[float, ...]:
        errors = []
        for one, other in zip(found, true, strict=True):
            there = where.to(one.device)
            a, b = one[there].double(), other[there].double()
            norm = float(b.norm())
            errors.append(float((a - b).norm()) / norm if norm else 0.0)
        return tuple(errors)

    return Parted(
        name,
        int(where[0]),
        int(where[-1]) + 1,
        piece.exact if piece is not None else None,
        piece.shift if piece is not None else 0,
        piece.confidence if piece is not None else None,
        computed,
        relative(reused.keys, right.keys),
        relative(reused.values, right.values),
    )


def _outputs(record: DriftRecord, right: Tensor, reused: Tensor) -> tuple[OutputToken, ...]:
    found = []
    for i, (exact_row, reused_row) in enumerate(zip(right, reused, strict=True)):
        p, q = (torch.log_softmax(row.double(), -1) for row in (exact_row, reused_row))
        recorded = i < len(record.entropies)
        found.append(
            OutputToken(
                i,
                record.output_ids[i] if i < len(record.output_ids) else None,
                int(exact_row.argmax()),
                int(reused_row.argmax()),
                max(0.0, float((p.exp() * (p - q)).nan_to_num().sum())),
                float(torch.special.entr(p.exp()).sum()),
                float(torch.special.entr(q.exp()).sum()),
                record.entropies[i] if recorded else None,
                float(p.max()),
                float(q.max()),
                record.logprobs[i] if recorded else None,
            )
        )
    return tuple(found)
