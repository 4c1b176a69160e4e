"""Expected attention: what future queries will look at, estimated from the latest ones.

Devoto et al., arXiv 2510.00636, the method of NVIDIA's KVPress: queries before rotation are close
to normally distributed, so the attention that a query some hundred tokens ahead pays to a key has a
closed form. With the mean m and covariance C of a head's queries, rotated by the average rotation
of the next ``horizon`` positions, the unnormalised attention to key k is ``exp(m.k s + k.C.k s^2 /
2)``, s being the softmax scale. Normalised over the resident tokens and multiplied by the norm of
the value, it says what the layer's output would lose.

Differences from the paper, forced by paging or by serving:

* Statistics are over the latest ``queries`` queries, which the host remembers, not over all of a
  prompt. They are remembered as they were rotated and rotated back by their positions; on a layer
  whose rotation the host does not describe they stay as they are, so the average is over the
  positions observed instead of those to come.
* Decisions fall every ``interval`` generated tokens and a budget is whole blocks; the latest
  ``recent`` tokens are always kept.
* A soft cap of the logits is left out of the estimate.
"""

from __future__ import annotations

import functools

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import (
    EngineView,
    PolicyOptions,
    ResidentView,
    Rope,
    ScoringOptions,
    ScoringPolicy,
)
from kvplug_policies.scores import chunked, raised, value_norms


def rotated(values: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair of elements of a head; ``cos`` and ``sin`` have one entry per pair.

    Args:
        values: ``[..., head_size]`` float32.
        cos: ``[..., pairs]``, broadcastable to ``values``; of any length, also an average of many.
        sin: The same.
        interleaved: Which elements make a pair, see `kvplug.contract.Rope`.
    """
    pairs = cos.shape[-1]
    part, rest = values[..., : 2 * pairs], values[..., 2 * pairs :]
    if interleaved:
        first, second = part.reshape(*part.shape[:-1], pairs, 2).unbind(-1)
    else:
        first, second = part.chunk(2, -1)
    turned = first * cos - second * sin, first * sin + second * cos
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([joined, rest], -1)


class ExpectedAttention(ScoringPolicy):
    """Keeps the tokens of each KV head that queries to come are expected to attend to."""

    name = "expected_attention"
    changes = "drops the tokens that future queries are expected to attend to least, per KV head"
    paper = (
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
        "Distribution, arXiv 2510.00636"
    )

    class Options(ScoringOptions):
        """Options of `ExpectedAttention`."""

        queries: int = Field(
            256, ge=2, le=16384, description="latest queries whose statistics are used"
        )
        horizon: int = Field(512, ge=1, le=16384, description="future positions averaged over")
        covariance: bool = Field(
            True, description="use the covariance of the queries besides their mean"
        )
        epsilon: float = Field(
            0.0, ge=0, le=1, description="added to the expected attention before the value norm"
        )
        value_norm: bool = Field(
            True,
            description="multiply by the norm of the value, to score what the output loses",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.observation = self.options.queries

    def score(self, resident: ResidentView) -> Tensor:
        mean, spread = self._future(resident)
        keys = resident.keys
        rows, heads, size = mean.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        mean = mean.view(rows, kv_heads, group, size)
        logits = torch.einsum("rhgd,rhtd->rhgt", mean, keys.float()) * resident.scale
        if self.options.covariance:
            spread = spread.view(rows, kv_heads, group, size, size)

            def variance(part: slice) -> Tensor:
                some = keys[:, :, None, part].float()
                return ((some @ spread) * some).sum(-1)

            logits = logits + chunked(resident.count, 8 * rows * heads * size, variance) * (
                resident.scale**2 / 2
            )
        sink = resident.positions < self.options.sink
        # A sink draws attention whatever the query; it must not take it from those compared.
        logits = logits.masked_fill(sink[:, :, None], torch.finfo(torch.float32).min)
        expected = logits.softmax(-1).mean(2)
        if self.options.value_norm:
            expected = (expected + self.options.epsilon) * value_norms(resident)
        return raised(expected, sink)

    def _future(self, resident: ResidentView) -> tuple[Tensor, Tensor]:
        """Mean and covariance of future queries, ``[rows, heads, head_size]`` and ``[rows, heads,
        head_size, head_size]``."""
        if resident.queries is None or resident.query_positions is None:
            raise ValueError("expected_attention needs queries, which its host does not provide")
        queries, places = resident.queries.float(), resident.query_positions
        counted = (places >= self.options.sink).float()[:, :, None, None]
        rope = resident.layer.rope
        if rope is not None:
            cos, sin = _angles(rope, places.clamp(min=0))
            queries = rotated(queries, cos[:, :, None], -sin[:, :, None], rope.interleaved)
        count = counted.sum(1).clamp(min=1)
        mean = (queries * counted).sum(1) / count
        centred = (queries - mean[:, None]) * counted
        if rope is not None:
            ahead = torch.arange(self.options.horizon, device=places.device)
            cos, sin = _angles(rope, resident.num_tokens[:, None] + ahead)
            cos, sin = cos.mean(1)[:, None], sin.mean(1)[:, None]
            mean = rotated(mean, cos, sin, rope.interleaved)
            centred = rotated(centred, cos[:, None], sin[:, None], rope.interleaved)
        spread = torch.einsum("rwhi,rwhj->rhij", centred, centred) / count[..., None]
        return mean, spread


@functools.lru_cache(maxsize=64)
def _frequencies(rope: Rope, device: torch.device) -> Tensor:
    return torch.tensor(rope.frequencies, dtype=torch.float32, device=device)


def _angles(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's angle, ``[*positions.shape, pairs]`` float32."""
    angles = positions.float()[..., None] * _frequencies(rope, positions.device)
    return angles.cos(), angles.sin()
