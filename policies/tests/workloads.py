"""Made-up workloads of different structure, to hold a policy against what it was not built on.

``python policies/tests/workloads.py FOLDER`` writes them as traces for ``kvplug simulate``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kvplug.hosts.trace import traces

Piece = tuple[object, int]
Request = tuple[float, int, list[Piece], int]
"""Arrival in seconds, session, pieces of text (name, tokens), tokens generated."""


def trace(name: str, requests: list[Request], block_size: int, sessions: bool) -> traces.Trace:
    """Cut requests into full blocks; equal blocks after equal prefixes are one block."""
    requests = sorted(requests, key=lambda request: request[0])
    number: dict[object, int] = {}
    ids: list[int] = []
    ends = [0]
    for _, _, pieces, _ in requests:
        ids += _blocks(pieces, block_size, number)
        ends.append(len(ids))
    return traces.Trace(
        name=name,
        off=np.array(ends, dtype=np.int64),
        ids=np.array(ids, dtype=np.int64),
        arrival=np.array([at for at, _, _, _ in requests]),
        prompt_tokens=np.array([sum(n for _, n in text) for _, _, text, _ in requests]),
        output_tokens=np.array([output for _, _, _, output in requests]),
        session=np.array([session if sessions else 0 for _, session, _, _ in requests]),
        block_size=block_size,
        num_distinct=len(number),
    )


def _blocks(pieces: list[Piece], block_size: int, number: dict[object, int]) -> Iterator[int]:
    before, inside, left = -1, [], block_size
    for name, tokens in pieces:
        start = 0
        while tokens - start >= left:
            start += left
            inside.append((name, start))
            before = number.setdefault((before, tuple(inside)), len(number))
            yield before
            inside, left = [], block_size
        if start < tokens:
            inside.append((name, tokens))
            left -= tokens - start


def chats(
    seed: int, n: int, rate: float, think: float, stay: float, since: float = 0.0
) -> list[Request]:
    """Conversations under one of four system prompts, with log-normal think times in seconds."""
    rng = np.random.default_rng(seed)
    found: list[Request] = []
    for chat in range(n):
        since += rng.exponential(1 / rate)
        at, pace, keen = since, np.exp(rng.normal(0, 0.5)), rng.beta(6 * stay, 6 * (1 - stay))
        system = int(rng.integers(4))
        text: list[Piece] = [((seed, "system", system), 400 + 150 * system)]
        for turn in range(40):
            asked = 5 + int((300 if turn == 0 else 60) * np.exp(rng.normal(0, 1)))
            generated = 2 + int(200 * np.exp(rng.normal(0, 0.8)))
            text.append(((seed, chat, turn, "user"), asked))
            found.append((at, 1000 * seed + chat + 1, list(text), generated))
            text.append(((seed, chat, turn, "model"), generated))
            if rng.random() > keen:
                break
            at += 0.02 * generated + think * pace * np.exp(rng.normal(0, 0.9))
    return found


def agents(seed: int, n: int, rate: float, since: float = 0.0) -> list[Request]:
    """Tool loops of about ten short steps; one step in four waits for a person."""
    rng = np.random.default_rng(seed)
    found: list[Request] = []
    for agent in range(n):
        since += rng.exponential(1 / rate)
        at, system = since, int(rng.integers(3))
        text: list[Piece] = [((seed, "tools", system), 2000 + 700 * system)]
        text.append(((seed, agent, "task"), int(rng.lognormal(5, 0.6))))
        for step in range(int(rng.geometric(0.1))):
            tool = rng.random() < 0.75
            generated = int(rng.integers(25, 60)) if tool else int(rng.lognormal(5, 0.5))
            found.append((at, 1000 * seed + agent + 1, list(text), generated))
            text.append(((seed, agent, step, "model"), generated))
            text.append(((seed, agent, step, "result"), 5 + int(120 * np.exp(rng.normal(0, 1)))))
            pause = 2 * np.exp(rng.normal(0, 0.6)) if tool else 25 * np.exp(rng.normal(0, 0.8))
            at += 0.02 * generated + pause
    return found


def documents(
    seed: int, n: int, rate: float, count: int, skew: float, each: int = 1, since: float = 0.0
) -> list[Request]:
    """Questions about documents drawn with Zipf's ``skew``, ``each`` to a question; one turn."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, count + 1) ** skew
    tokens = rng.lognormal(7, 0.7, count).astype(int) + 200
    found: list[Request] = []
    for question in range(n):
        since += rng.exponential(1 / rate)
        chosen = rng.choice(count, each, replace=False, p=odds / odds.sum())
        text: list[Piece] = [((seed, "system"), 300)]
        text += [((seed, "document", int(d)), int(tokens[d])) for d in chosen]
        text.append(((seed, question, "question"), int(rng.integers(10, 80))))
        found.append((since, 0, text, int(rng.lognormal(4.5, 0.6))))
    return found


def scan(seed: int, n: int, rate: float) -> list[Request]:
    """Long texts that share a short system prompt and never come again."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate, n)).tolist()
    return [
        (
            at[i],
            0,
            [((seed, "system"), 200), ((seed, i), int(rng.lognormal(7.5, 0.6)))],
            int(rng.lognormal(5, 0.5)),
        )
        for i in range(n)
    ]


def _make(
    requests: Callable[[float], list[Request]], block_size: int, sessions: bool
) -> Callable[[str, float], traces.Trace]:
    return lambda name, size: trace(name, requests(size), block_size, sessions)


def _n(count: int, size: float) -> int:
    return max(1, round(count * size))


WORKLOADS: dict[str, Callable[[str, float], traces.Trace]] = {
    "chats": _make(lambda s: chats(1, _n(700, s), 0.8, 90, 0.6), 32, True),
    "chats_unnamed": _make(lambda s: chats(2, _n(1200, s), 1, 45, 0.65), 128, False),
    "documents": _make(lambda s: documents(3, _n(3000, s), 3, 1500, 0.9), 32, False),
    "document_pairs": _make(lambda s: documents(4, _n(3000, s), 3, 600, 0.5, 2), 64, False),
    "documents_even": _make(lambda s: documents(5, _n(4000, s), 4, 900, 0), 64, False),
    "agents": _make(lambda s: agents(6, _n(200, s), 0.35), 32, True),
    "chats_and_scan": _make(
        lambda s: chats(7, _n(600, s), 0.7, 60, 0.6) + scan(8, _n(1200, s), 1.2), 64, False
    ),
    "mixture": _make(
        lambda s: (
            agents(9, _n(100, s), 0.15)
            + chats(10, _n(500, s), 0.8, 60, 0.6)
            + documents(11, _n(800, s), 0.8, 400, 1)
            + scan(12, _n(700, s), 0.7)
        ),
        32,
        True,
    ),
    "phases": _make(
        lambda s: (
            chats(13, _n(400, s), 0.8, 30, 0.65)
            + agents(14, _n(100, s), 0.25, since=600 * s)
            + documents(15, _n(1500, s), 2, 500, 0.8, since=1200 * s)
        ),
        32,
        True,
    ),
}
"""By name: makes the workload, its number of requests scaled by a factor."""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for label, make in WORKLOADS.items():
        traces.write(folder / f"{label}.npz", make(label, 1.0))
