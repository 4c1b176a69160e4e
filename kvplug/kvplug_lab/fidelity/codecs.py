"""What transfer codecs save, how fast they are, and what they cost in answers.

A prompt is read exactly and the KV of all of it goes through a codec, chunk by chunk, as it would
through a tier; what follows is computed exactly on what came back. Keys and values are rounded to
bfloat16 first, without a codec too; all else is in the type that the model was loaded in.

* bytes: coded over given, of all chunks of all prompts, without the header of the wire format.
* plain text: added log-likelihood, first choices that stayed, divergence, over the tokens scored.
* retrieval: answers whose every token was the first choice, which is what greedy decoding needs.
* speed: bytes given per second that one thread computes, whatever else the machine does. Codecs
  take turns, chunk by chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvplug.contract import EngineView, Kind, PlaneShape, TransferCodec
from kvplug.deployment import Choice
from kvplug.parser import load_deployment
from kvplug_lab.fidelity.decoded import Reader
from kvplug_lab.fidelity.report import bootstrap
from kvplug_lab.fidelity.tasks import Prompt
from kvplug_lab.policy_text import policy_section
from kvplug_lab.spread import Spread

TASKS = ("perplexity", "passkey_later", "multikey_later")
"""Those of `kvplug_lab.fidelity.tasks` whose question comes after the prompt."""

TIER = [{"host": {"size": "1MiB"}}]
"""A section that names a codec must have a tier."""

Planes = dict[str, Tensor]


def choice(label: str) -> Choice:
    """The codec that ``NAME[:OPTION=VALUE...]`` means.

    Raises:
        DeploymentError: There is no such codec or option.
    """
    own = policy_section(label, "--codec", "int4:group=64")
    section = {str(Kind.TRANSFER): own, str(Kind.TIERS): TIER}
    found = load_deployment(section, source="--codec", key="").choice(Kind.TRANSFER)
    assert found is not None
    return found


def build(label: str, engine: EngineView) -> TransferCodec:
    """`choice`, for an engine."""
    made = choice(label).build(engine)
    assert isinstance(made, TransferCodec)
    return made


@dataclass
class Row:
    """What was measured of a codec.

    Attributes:
        codec: Its name and options, as asked for.
        exact: Whether it says that KV comes back to the bit.
        ratio: Bytes given over bytes coded.
        encode: GB given per second, and quartiles.
        decode: The same of decoding.
        tokens: Tokens of plain text scored.
        perplexity: Added perplexity, a part of the exact one's, and its 95 % interval.
        agree: Part of first choices that stayed, and its interval.
        kl: Mean divergence from the exact distributions, nats.
        retrieved: Answers found of each retrieval task.
        asked: Questions of each.
    """

    codec: str
    exact: bool
    ratio: float
    encode: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    decode: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    tokens: int = 0
    perplexity: tuple[float, float, float] = (0.0, 0.0, 0.0)
    agree: tuple[float, float, float] = (1.0, 1.0, 1.0)
    kl: float = 0.0
    retrieved: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)


def shapes_of(planes: Mapping[str, Tensor]) -> dict[str, PlaneShape]:
    """What a codec is told of the planes it must return."""
    return {
        name: PlaneShape(str(plane.dtype).removeprefix("torch."), tuple(plane.shape))
        for name, plane in planes.items()
    }


def size_of(planes: Mapping[str, Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(plane.nbytes for plane in planes.values())


def through(codec: TransferCodec, planes: Planes, chunk: int) -> tuple[Planes, int]:
    """A prompt's planes through a codec, chunk by chunk.

    Args:
        codec: The codec.
        planes: ``[layers, tokens, kv_heads, head_size]`` each.
        chunk: Tokens of a chunk; the last has what is left.

    Returns:
        What came back, and the bytes that it took.
    """
    size, parts = 0, []
    for start, piece in chunks(planes, chunk):
        coded = codec.encode(piece, start)
        size += size_of(coded)
        parts.append(codec.decode(coded, shapes_of(piece), start))
    return {name: torch.cat([part[name] for part in parts], 1) for name in planes}, size


def chunks(planes: Planes, chunk: int) -> list[tuple[int, Planes]]:
    """Chunks of a prompt, each with the position of its first token."""
    tokens = next(iter(planes.values())).shape[1]
    return [
        (at, {name: plane[:, at : at + chunk].contiguous() for name, plane in planes.items()})
        for at in range(0, tokens, chunk)
    ]


@dataclass
class _Scores:
    """What one codec did to the prompts so far."""

    given: int = 0
    coded: int = 0
    nll: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    tokens: int = 0
    retrieved: dict[str, int] = field(default_factory=dict)


def fidelity(
    reader: Reader,
    prompts: Sequence[Prompt],
    codecs: Mapping[str, TransferCodec],
    chunk: int,
) -> Iterator[tuple[str, list[Row]]]:
    """Bytes and answers of some codecs, prompt by prompt.

    Args:
        reader: The model.
        prompts: Prompts of `TASKS`.
        codecs: The codecs by label.
        chunk: Tokens of a chunk.

    Yields:
        After every prompt its name, and the rows of all so far, without speeds: one for the full
        cache, and one for each codec.
    """
    scores = {label: _Scores() for label in ("none", *codecs)}
    asked: dict[str, int] = {}
    for prompt in prompts:
        ids = torch.tensor([*prompt.context, *prompt.then, *prompt.answer])
        reader.first = len(prompt.context)
        reader.begin(ids)
        given = reader.planes()
        asked[prompt.task] = asked.get(prompt.task, 0) + 1
        answer = len(prompt.answer)
        wanted = ids[-answer:, None]
        exact = _last(reader, ids, answer)
        for label, one in scores.items():
            logs = exact
            one.given += size_of(given)
            if label != "none":
                back, size = through(codecs[label], given, chunk)
                one.coded += size
                if not all(_same(back[name], plane) for name, plane in given.items()):
                    reader.replace(back)
                    logs = _last(reader, ids, answer)
            if prompt.task == "perplexity":
                one.tokens += answer
                right = exact.gather(-1, wanted) - logs.gather(-1, wanted)
                one.nll.append(float(right.mean()))
                one.agree.append(float((logs.argmax(-1) == exact.argmax(-1)).float().mean()))
                one.kl.append(float((exact.exp() * (exact - logs)).sum(-1).mean()))
            else:
                found = bool((logs.argmax(-1) == wanted[:, 0]).all())
                one.retrieved[prompt.task] = one.retrieved.get(prompt.task, 0) + found
        yield (
            prompt.name,
            [
                _row(label, one, dict(asked), label == "none" or codecs[label].exact)
                for label, one in scores.items()
            ],
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two planes are equal to the bit."""
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def _last(reader: Reader, ids: Tensor, n: int) -> Tensor:
    """Log-probabilities of the last ``n`` tokens, ``[n, vocabulary]``."""
    return torch.cat(list(reader.go_on(ids, None)))[-n:]


def _row(label: str, one: _Scores, asked: dict[str, int], exact: bool) -> Row:
    row = Row(label, exact, one.given / one.coded if one.coded else 1.0)
    row.tokens, row.retrieved, row.asked = one.tokens, dict(one.retrieved), asked
    if one.nll:
        low, high = bootstrap(one.nll)
        mean = sum(one.nll) / len(one.nll)
        row.perplexity = (math.expm1(mean), math.expm1(low), math.expm1(high))
        row.agree = (sum(one.agree) / len(one.agree), *bootstrap(one.agree))
        row.kl = sum(one.kl) / len(one.kl)
    return row


def speeds(
    codecs: Mapping[str, TransferCodec], planes: Planes, chunk: int, rounds: int
) -> dict[str, tuple[Spread, Spread]]:
    """Bytes given per second of encoding and of decoding, by codec; torch must use one thread.

    Args:
        codecs: The codecs by label, which take turns.
        planes: A prompt.
        chunk: Tokens of a chunk.
        rounds: Times that every codec takes every chunk.
    """
    found: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in codecs}
    pieces = [(at, one) for at, one in chunks(planes, chunk) if at]
    for turn in range(rounds + 1):
        for start, piece in pieces:
            shapes, given = shapes_of(piece), size_of(piece)
            for label, codec in codecs.items():
                begun = time.thread_time()
                coded = codec.encode(piece, start)
                between = time.thread_time()
                codec.decode(coded, shapes, start)
                done = time.thread_time()
                if turn:  # The first is for caches and what is made on first use.
                    found[label][0].append(given / (between - begun))
                    found[label][1].append(given / (done - between))
    return {label: (Spread.of(e), Spread.of(d)) for label, (e, d) in found.items()}


def with_speeds(rows: Sequence[Row], found: Mapping[str, tuple[Spread, Spread]]) -> None:
    """Put speeds into rows, in GB/s."""
    for row in rows:
        if row.codec in found:
            row.encode, row.decode = (_gigabytes(one) for one in found[row.codec])


def _gigabytes(one: Spread) -> tuple[float, float, float]:
    low, middle, high = (round(x / 1e9, 4) for x in (one.low, one.median, one.high))
    return middle, low, high


def engine_of(reader: Reader, dtype: str, model: str) -> EngineView:
    """The engine that a codec is built for.

    Args:
        reader: The model.
        dtype: Type of its KV.
        model: Its fingerprint.
    """
    host = reader.host
    layers = tuple(replace(layer, dtype=dtype) for layer in host.layers)
    return replace(host.engine, layers=layers, model=model)
