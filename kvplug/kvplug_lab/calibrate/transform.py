"""The bases of ``kvplug calibrate transfer``, which the codec `kvtc` stores KV in.

A token of all layers and KV heads is one vector of keys, rotated back to position 0, and one of
values. Before principal components are taken, channels are weighed so that equal errors do equal
harm, as far as second moments tell:

* a key by the root of the mean square of the queries that multiply it, pair by pair of the rotary
  embedding. The weighted error of a head, summed over its elements, is then the head's size times
  the variance of its logits, which attention turns into as large a part of its output;
* a value by one over the root of the mean variance of its layer's, so that errors are parts of
  what a layer passes on.

So errors of keys and values are in one unit, and share one budget of bits. The first tokens of each
window are left out: their KV is like no other's, and the codec stores it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import LayerView, Rope
from kvplug_lab.calibrate.attention import How, attached
from kvplug_lab.calibrate.statistics import Source
from kvplug_policies.transfer.kvtc import band_of, largest, quantize
from kvplug_policies.transform import GROUP, PLANES, Transform, rotate

SINKS = 4
"""First tokens of a window that are left out."""

STEPS = 14
"""Steps that are measured: each is the root of two times the one before."""

LEAST_STEP = 0.7
"""Of the smallest component kept, in its deviations."""


class Moments:
    """Sums over tokens of all layers; a probe that changes nothing.

    Args:
        layers: The model's layers, all with as many KV heads of one size.
    """

    def __init__(self, layers: Sequence[LayerView]):
        first = layers[0]
        self.shape = (len(layers), first.num_kv_heads, first.head_size)
        self.rope = first.rope or Rope(())
        n = self.shape[0] * self.shape[1] * self.shape[2]
        self.tokens = 0
        self.moment = {plane: torch.zeros(n, n) for plane in PLANES}
        self.total = {plane: torch.zeros(n, dtype=torch.float64) for plane in PLANES}
        self.queries = torch.zeros(self.shape, dtype=torch.float64)
        self.held: dict[str, list[Tensor]] = {plane: [] for plane in PLANES}
        self._window: dict[str, dict[int, Tensor]] = {plane: {} for plane in PLANES}

    def see(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        _, heads, size = self.shape
        self._window["key"][layer], self._window["value"][layer] = key, value
        each = query.float().square().mean(1).view(heads, -1, size).mean(1)
        self.queries[layer] += each.double() * query.shape[1]
        return key, value

    def end_window(self, held_out: bool) -> None:
        """Add the window that was read to the sums, or keep it to measure on."""
        for plane in PLANES:
            seen = self._window[plane]
            x = torch.stack([seen[i].transpose(0, 1).float() for i in sorted(seen)])
            if plane == "key":
                x = rotate(x, 0, self.rope.frequencies, self.rope.interleaved, back=True)
            flat = x[:, SINKS:].transpose(0, 1).reshape(x.shape[1] - SINKS, -1)
            if held_out:
                self.held[plane].append(flat.half())
            else:
                self.moment[plane] += flat.T @ flat
                self.total[plane] += flat.double().sum(0)
            seen.clear()
        self.tokens += 0 if held_out else len(flat)

    def weights(self) -> dict[str, Tensor]:
        """What channels of keys and of values are multiplied by, ``[layers, heads, size]``."""
        pairs, energy = len(self.rope.frequencies), self.queries.clone()
        if self.rope.interleaved:
            both = (energy[..., 0 : 2 * pairs : 2] + energy[..., 1 : 2 * pairs : 2]) / 2
            energy[..., : 2 * pairs] = both.repeat_interleave(2, -1)
        elif pairs:
            both = (energy[..., :pairs] + energy[..., pairs : 2 * pairs]) / 2
            energy[..., : 2 * pairs] = torch.cat([both, both], -1)
        mean = self.total["value"] / self.tokens
        square = self.moment["value"].diagonal().double() / self.tokens
        spread = (square - mean.square()).view(self.shape).mean((1, 2), keepdim=True)
        key = energy.sqrt().clamp_min(1e-4).float()
        value = spread.clamp_min(1e-12).rsqrt().expand(self.shape).float()
        return {"key": key, "value": value}


@torch.inference_mode()
def collect(
    model: Any,
    layers: Sequence[LayerView],
    learn: Sequence[Tensor],
    measure: Sequence[Tensor],
    progress: Callable[[str], None] | None = None,
) -> Moments:
    """Run a causal language model over windows of a text.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        layers: Its layers.
        learn: Tokens to fit to, ``[n]`` each; each is read without the others.
        measure: Tokens to measure rates and losses on.
        progress: Called once per window.
    """
    found = Moments(layers)
    seen = 0
    with attached(model):
        for at, ids in enumerate([*learn, *measure]):
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1, kvplug_probe=found)
            found.end_window(at >= len(learn))
            seen += len(ids)
            if progress is not None:
                progress(f"window {at + 1} of {len(learn) + len(measure)}")
    found.queries /= seen
    return found


def fit(found: Moments, components: int, source: Source, path: str = "") -> Transform:
    """The transform of what was collected.

    Args:
        found: The sums, with tokens to measure on.
        components: Most components kept of each plane.
        source: What the model and the text were.
        path: Of the file, for messages.
    """
    tensors: dict[str, Tensor] = {}
    for plane, weight in found.weights().items():
        flat = weight.reshape(-1)
        mean = (found.total[plane] / found.tokens).float()
        spread = found.moment[plane] / found.tokens - mean[:, None] * mean
        energy, basis = torch.linalg.eigh(spread * flat[:, None] * flat)
        kept = min(components, len(energy)) // GROUP * GROUP
        energy, basis = energy.flip(0)[:kept], basis.flip(1)[:, :kept]
        held = torch.cat(found.held[plane]).float()
        parts = measured((held - mean) * flat @ basis, energy.clamp_min(0).sqrt())
        parts |= {"mean": mean.view(found.shape), "weight": weight, "basis": basis.half()}
        tensors |= {f"{plane}.{name}": part.contiguous() for name, part in parts.items()}
    return Transform(
        path,
        source.fingerprint,
        source.model,
        source.text_sha256,
        found.tokens,
        tuple(found.rope.frequencies),
        found.rope.interleaved,
        tensors,
    )


def measured(z: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """Rates and losses of components at every step, as `Transform` holds them.

    A code takes the bits that it has in the distribution of its band, since a band shares its
    Huffman codes.

    Args:
        z: Components ``[tokens, r]``.
        deviation: Of each component where the basis was fitted, ``[r]``.
    """
    positive = deviation[deviation > 0]
    least = LEAST_STEP * float(positive[-1] if len(positive) else 1.0)
    steps = torch.tensor([least * 2 ** (i / 2) for i in range(STEPS)])
    rates, losses = [], []
    for step in steps:
        band = band_of((deviation / step).double().numpy())
        most = torch.from_numpy(largest(band)).float()
        codes = quantize(z, step.expand(len(deviation)), most)
        bits = torch.zeros(len(deviation))
        for one in sorted(set(band.tolist())):
            where = torch.from_numpy(band == one)
            here = codes[:, where].long()
            here -= here.min()
            counts = torch.bincount(here.reshape(-1)).float()
            bits[where] = -(counts / counts.sum()).clamp_min(1e-9).log2()[here].mean(0)
        rates.append(bits.view(-1, GROUP).mean(1))
        losses.append((z - codes * step).square().mean(0).view(-1, GROUP).mean(1))
    losses.append(z.square().mean(0).view(-1, GROUP).mean(1))
    return {
        "deviation": deviation,
        "steps": steps,
        "rate": torch.stack(rates, 1),
        "loss": torch.stack(losses, 1),
    }
