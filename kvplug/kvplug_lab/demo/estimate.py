"""How long the work takes on this machine, before any of it is done, and where the model lies."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from kvplug.planning.model import read_model
from kvplug.planning.weights import weights_of
from kvplug_lab.demo.questions import Work

START_SECONDS = (15.0, 50.0)
"""Seconds that the first engine takes to start, and each further one a third of them."""
STEP_SECONDS = 0.02
"""Seconds of a step outside the model's products."""
OF_PRODUCTS = (0.9, 2.5)
"""An engine's seconds to those of its products alone."""
PROBE_SECONDS = 0.4


@dataclass(frozen=True)
class Speed:
    """What this machine does with the model's products.

    Attributes:
        prompt: Tokens a second of long prompts.
        step: Seconds of a step that generates one token for each of some requests.
    """

    prompt: float
    step: float


def speed(model: Path, dtype: str, rows: int, batched: int = 512) -> tuple[Speed, Speed]:
    """Measure matrix products of the model's size, for about a second.

    Returns:
        What the machine does when it does nothing else, by processor time, and what it does now:
        on a busy one they are far apart.

    Args:
        model: Model directory.
        dtype: Type that is computed in.
        rows: Requests that generate at once.
        batched: Tokens of a step of a prompt.

    Raises:
        UnknownModel: The size of its weights is not known.
    """
    import torch

    known = read_model(str(model))
    # Files of weights hold two bytes an element, as a rule; a quantized model runs no slower.
    elements = weights_of(known).bytes / 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    wide = int(known.config.get("hidden_size") or 1024)
    inner = int(known.config.get("intermediate_size") or 4 * wide)
    weight = torch.ones(wide, inner, dtype=kind, device=device)

    def seconds(tokens: int) -> tuple[float, float]:
        """Seconds of one product of so many rows, alone and as it is: medians."""
        given = torch.ones(tokens, wide, dtype=kind, device=device)
        alone: list[float] = []
        times: list[float] = []
        end = time.perf_counter() + PROBE_SECONDS
        # The first is slower than any other.
        while len(times) < 4 or time.perf_counter() < end:
            begun, cpu = time.perf_counter(), time.process_time()
            out = given @ weight
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
            own = (time.process_time() - cpu) / torch.get_num_threads()
            alone.append(min(own or times[-1], times[-1]) if device == "cpu" else times[-1])
            del out
        return statistics.median(alone[1:]), statistics.median(times[1:])

    products = elements / (wide * inner)
    best, usual = (
        Speed(batched / (prompt * products), step * products)
        for prompt, step in zip(seconds(batched), seconds(rows), strict=True)
    )
    return best, usual


def seconds_of(
    work: Work, best: Speed, usual: Speed, engines: int, rounds: int
) -> tuple[float, float]:
    """Seconds that everything takes, a range: from each document computed once, at the speed of an
    idle machine, to every prompt in full, at the speed of now.

    Args:
        work: The questions.
        best: The machine's speed when it does nothing else.
        usual: Its speed now.
        engines: Engines, stock among them.
        rounds: Rounds of each.
    """
    once = sum(len(q.prompt) for q, b in zip(work.questions, work.before, strict=True) if b is None)
    turns = -(-len(work.questions) // work.documents)
    steps = turns * work.output_tokens
    ends = []
    for found, tokens, start, more, late in (
        (best, work.prompt_tokens + (engines - 1) * once, START_SECONDS[0], OF_PRODUCTS[0], 1),
        (usual, engines * work.prompt_tokens, START_SECONDS[1], OF_PRODUCTS[1], 2),
    ):
        decode = engines * steps * late * (found.step * more + STEP_SECONDS)
        starts = start * (1 + (engines - 1) / 3)
        ends.append(starts + rounds * (tokens / found.prompt * more + decode))
    return ends[0], ends[1]


def said(seconds: tuple[float, float]) -> str:
    """The range in words: in minutes, or in seconds where it is short."""
    low, high = seconds
    if high < 90:
        return f"{_rounded(low, 10)} to {_rounded(high, 10)} seconds"
    low, high = _rounded(low / 60, 1), _rounded(high / 60, 1)
    return f"{low} to {high} minutes" if low < high else f"about {high} minutes"


def _rounded(value: float, step: int) -> int:
    return max(step, step * round(value / step))
