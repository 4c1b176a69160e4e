"""Statistics of keys, values and queries, and the fits made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvplug_policies.calibration import Calibration, Geometry, projection

if TYPE_CHECKING:
    from kvplug_lab.calibrate.attention import How

SAMPLE = 512
"""Consecutive tokens whose K and V are kept as they are."""

QUERIES = 128
"""Queries kept of the last of those tokens."""

USELESS = 0.5
"""Error above which a merge's maps are not kept."""


class _Layer:
    """Sums of one layer."""

    def __init__(self) -> None:
        self.tokens = 0
        self.geometry = Geometry(0, 0, 0)
        self.sums: dict[str, Tensor] = {}
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        self.sample: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}

    def add(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Add a window: ``[heads, n, d]`` each."""
        heads, n, width = key.shape
        self.geometry = Geometry(heads, query.shape[0], width)
        self.tokens += n
        grouped = query.float().reshape(heads, -1, width)
        self._sum("query", torch.einsum("hnd,hne->hde", grouped, grouped))
        # What many queries look at, the first token above all, must be kept best.
        weight = (1 + received(query, key, scale)) / 2
        for name, x in (("key", key.float()), ("value", value.float())):
            flat = x.transpose(0, 1).reshape(n, -1)
            weighted = flat * weight[:, None]
            self._sum(f"{name}_sum", flat.sum(0))
            self._sum(f"{name}_weighted", weighted.sum(0))
            self._sum(f"{name}_moment", weighted.T @ flat)
            low, high = x.amin(1), x.amax(1)
            self.low[name] = torch.minimum(self.low.get(name, low), low)
            self.high[name] = torch.maximum(self.high.get(name, high), high)
        kept = sum(len(part) for part in self.sample["key"])
        for name, x in (("query", query), ("key", key), ("value", value)):
            if kept < SAMPLE:
                part = x.transpose(0, 1)[: SAMPLE - kept].float()
                self.sample[name].append(part.clamp(-65504, 65504).half().cpu())

    def _sum(self, name: str, part: Tensor) -> None:
        part = part.double().cpu()
        self.sums[name] = self.sums[name] + part if name in self.sums else part


class Collector:
    """A probe that sums up what it sees and changes nothing."""

    def __init__(self) -> None:
        self.layers: dict[int, _Layer] = {}

    def see(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How | None
    ) -> tuple[Tensor, Tensor]:
        scale = how.scale if how is not None else query.shape[-1] ** -0.5
        self.layers.setdefault(layer, _Layer()).add(query, key, value, scale)
        return key, value


def received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that each token receives from all queries, mean over the heads, ``[n]``; it is 1
    in the mean."""
    n, readers = key.shape[1], query.shape[0] // key.shape[0]
    mask = torch.ones(n, n, dtype=torch.bool, device=key.device).triu(1)
    total = torch.zeros(n, device=key.device)
    for head in range(query.shape[0]):
        logits = query[head].float() @ key[head // readers].float().mT * scale
        total += logits.masked_fill_(mask, float("-inf")).softmax(-1).sum(0)
    return total / query.shape[0]


@dataclass(frozen=True)
class Source:
    """Source of a calibration, for its file.

    Attributes:
        fingerprint: Of the model.
        model: Its name.
        text_sha256: Of the text.
    """

    fingerprint: str
    model: str
    text_sha256: str


def calibration(found: Collector, source: Source, path: str = "") -> Calibration:
    """The calibration of what was collected."""
    tensors: dict[str, Tensor] = {}
    for index, layer in sorted(found.layers.items()):
        for name, tensor in _tensors(layer):
            kept = tensor if tensor.dtype in (torch.float16, torch.int64) else tensor.float()
            tensors[f"layers.{index}.{name}"] = kept.contiguous()
    return Calibration(
        path,
        source.fingerprint,
        source.model,
        source.text_sha256,
        max((layer.tokens for layer in found.layers.values()), default=0),
        {index: layer.geometry for index, layer in sorted(found.layers.items())},
        tensors,
    )


def _tensors(layer: _Layer) -> Iterator[tuple[str, Tensor]]:
    heads, readers = layer.geometry.num_kv_heads, layer.geometry.num_heads
    width, n = layer.geometry.head_size, layer.tokens
    query = layer.sums["query"] / (n * readers / heads)
    joint = {}
    for name in ("key", "value"):
        mean = layer.sums[f"{name}_sum"] / n
        # Around the plain mean, which is what is taken off.
        across = layer.sums[f"{name}_weighted"][:, None] / n * mean
        moment = layer.sums[f"{name}_moment"] / n
        joint[name] = moment - across - across.T + mean[:, None] * mean
        split = mean.view(heads, width)
        yield f"{name}_mean", split
        low, high = layer.low[name].cpu(), layer.high[name].cpu()
        yield f"{name}_range", torch.maximum(high - split, split - low)
        yield f"{name}_sample", torch.cat(layer.sample[name])
    yield "query_sample", torch.cat(layer.sample["query"])[-QUERIES:]
    yield "query_moment", query
    encode, decode, energy = projection(_blocks(joint["key"], heads), query)
    yield "key_encode", encode
    yield "key_decode", decode
    yield "key_energy", energy
    basis, _, energy = projection(_blocks(joint["value"], heads))
    yield "value_basis", basis
    yield "value_energy", energy
    if heads > 1:
        yield from merges("linear", joint["key"], joint["value"], query)
        yield from merges("gain", joint["key"], joint["value"], query)


def _blocks(joint: Tensor, heads: int) -> Tensor:
    """The blocks on the diagonal, ``[heads, d, d]``."""
    width = joint.shape[0] // heads
    return torch.stack(
        [joint[h * width : (h + 1) * width, h * width : (h + 1) * width] for h in range(heads)]
    )


# -- merging heads -------------------------------------------------------------------------------


def merges(fit: str, key: Tensor, value: Tensor, query: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Merge KV heads two groups at a time, those that lose least first.

    Args:
        fit: ``linear`` or ``gain``.
        key: Covariance of the keys of all heads together, ``[heads * d, heads * d]``.
        value: The same of values.
        query: ``[heads, d, d]`` second moments.

    Yields:
        Names and tensors of the calibration file.
    """
    heads = query.shape[0]
    groups: list[tuple[int, ...]] = [(h,) for h in range(heads)]
    known: dict[tuple[int, ...], tuple[float, dict[str, Tensor]]] = {}
    errors: list[float] = []
    states = []
    for step in range(heads - 1):
        pairs = [tuple(sorted(a + b)) for i, a in enumerate(groups) for b in groups[i + 1 :]]
        for pair in pairs:
            if pair not in known:
                known[pair] = merge(fit, pair, key, value, query)
        best = min(pairs, key=lambda pair: known[pair][0])
        error, maps = known[best]
        groups = [g for g in groups if not set(g) <= set(best)] + [best]
        # A later merge cannot be taken without the earlier ones.
        errors.append(max([error, *errors]))
        states.append(
            [next(i for i, g in enumerate(sorted(groups)) if h in g) for h in range(heads)]
        )
        if errors[-1] <= USELESS:
            yield f"merge_{fit}.{step}.heads", torch.tensor(best)
            for name, tensor in maps.items():
                yield f"merge_{fit}.{step}.{name}", tensor
    yield f"merge_{fit}.errors", torch.tensor(errors)
    yield f"merge_{fit}.groups", torch.tensor(states)


def merge(
    fit: str, heads: tuple[int, ...], key: Tensor, value: Tensor, query: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Error of one head in place of several, and the maps; arguments as for `merges`.

    Returns:
        The part of the energy lost, the larger of keys' (mean square of products with queries)
        and values' (variance), and the maps.
    """
    width = query.shape[1]
    at = torch.cat([torch.arange(h * width, (h + 1) * width) for h in heads])
    weight = torch.zeros(len(at), len(at), dtype=torch.float64)
    for i, h in enumerate(heads):
        own = slice(i * width, (i + 1) * width)
        weight[own, own] = query[h]
    eye = torch.eye(len(at), dtype=torch.float64)
    worst, maps = 0.0, {}
    for name, joint, by in (("key", key, weight), ("value", value, eye)):
        moment = joint[at][:, at]
        total = float((by * moment).sum())
        if fit == "linear":
            encode, decode, energy = projection(moment, by if name == "key" else None)
            lost = float(energy[width:].sum()) / max(float(energy.sum()), 1e-30)
            maps[f"{name}_encode"] = encode[:, :width].reshape(len(heads), width, width)
            maps[f"{name}_decode"] = decode[:, :width].reshape(len(heads), width, width)
        else:
            encode, decode = _gains(moment, by, len(heads))
            whole = torch.kron(torch.outer(decode, encode), torch.eye(width, dtype=torch.float64))
            rest = eye - whole
            lost = float((by * (rest @ moment @ rest.T)).sum()) / max(total, 1e-30)
            maps[f"{name}_encode"], maps[f"{name}_decode"] = encode, decode
        worst = max(worst, lost)
    return worst, maps


def _gains(moment: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Numbers ``a`` and ``g`` such that ``x_h ~ g_h s`` with ``s = sum_h a_h x_h``.

    ``G``, the heads' inner products (weighted by their mean weight), has ``g`` as its first
    eigenvector: the best single direction among heads.
    """
    width = moment.shape[0] // heads
    parts = moment.view(heads, width, heads, width)
    weights = weight.view(heads, width, heads, width)
    mean = torch.stack([weights[h, :, h] for h in range(heads)]).mean(0)
    products = torch.einsum("adbe,de->ab", parts, mean)
    gain = torch.linalg.eigh((products + products.T) / 2)[1][:, -1]
    gain = gain * (1.0 if float(gain.sum()) >= 0 else -1.0)
    # Of about a head's own size, so that a type of few bits holds the shared head as well.
    size = float(gain.square().mean().sqrt())
    return gain / heads / size, gain / size
