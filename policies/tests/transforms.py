"""A transform for tests, fitted to the chunks that the laws of codecs are checked with."""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kvplug.testing.transfer import HEADS, LAYERS, SIZE, chunk, engine
from kvplug_policies.transform import GROUP, Transform, rotate

STEPS = 16


def fitted(model: str = "") -> Transform:
    """Principal components of 512 tokens, with the rates and losses of Gaussian ones."""
    rope = engine().layers[0].rope
    assert rope is not None
    tensors: dict[str, Tensor] = {}
    for plane, x in chunk(512, torch.float32).items():
        parts = [x]
        if plane == "key":  # At the positions of the laws.
            parts = [rotate(x, at, rope.frequencies, False, back=True) for at in (0, 1008)]
        flat = torch.cat([p.transpose(0, 1).reshape(512, -1) for p in parts]).double()
        mean = flat.mean(0)
        # Channels differ by orders of magnitude, and the laws' error is a part of each.
        weight = 1 / (flat - mean).square().mean(0).sqrt()
        y = (flat - mean) * weight
        energy, basis = torch.linalg.eigh(y.T @ y / len(y))
        deviation = energy.flip(0).clamp_min(1e-6).sqrt()
        steps = 0.01 * 2 ** (torch.arange(STEPS, dtype=torch.float64) / 2)
        ratio = deviation[:, None] / steps
        rate = (ratio.log2() + 2.05).clamp_min(0.1)
        loss = torch.minimum(steps**2 / 12, deviation[:, None] ** 2)
        loss = torch.cat([loss, deviation[:, None] ** 2], 1)
        found = {
            "mean": mean.view(LAYERS, HEADS, SIZE),
            "weight": weight.view(LAYERS, HEADS, SIZE),
            "deviation": deviation,
            "steps": steps,
            "rate": rate.unflatten(0, (-1, GROUP)).mean(1),
            "loss": loss.unflatten(0, (-1, GROUP)).mean(1),
        }
        tensors |= {f"{plane}.{name}": part.float().contiguous() for name, part in found.items()}
        tensors[f"{plane}.basis"] = basis.flip(1).half().contiguous()
    return Transform(
        "", model, "a model", "", 512, tuple(rope.frequencies), rope.interleaved, tensors
    )


@functools.cache
def transform_file() -> str:
    """A file with the transform, for as long as the tests run."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "transform.safetensors"
    fitted().save(path)
    return str(path)
