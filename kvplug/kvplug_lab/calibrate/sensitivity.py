"""Costs of each candidate format in each layer, one layer at a time, and of all together.

K and V of a layer go through the format's own `write` and `read`, in the model's type, and what
comes back is attended in their place, by every query and for every token, its own included: no
token is spared because it is recent. That is the most a format can cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import EngineView, FormatPolicy, LayerView, WriteBatch
from kvplug_lab.calibrate.attention import How, Probe, attached


def stored(
    policy: FormatPolicy, layer: LayerView, key: Tensor, value: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """K and V as a format gives them back from its pages.

    Args:
        policy: The format.
        layer: The layer; its dtype is that of K and V in the engine.
        key: ``[kv_heads, n, head_size]``.
        value: The same shape.
        block_size: Tokens per block.

    Returns:
        The same shapes and dtypes.
    """
    n = key.shape[1]
    blocks = -(-n // block_size)
    cache = policy.layout(layer).pages(layer, blocks, block_size, key.device)
    dtype = getattr(torch, layer.dtype)
    tokens = [x.transpose(0, 1).to(dtype).contiguous() for x in (key, value)]
    slots = torch.arange(n, device=key.device)
    policy.write(layer, WriteBatch(tokens[0], tokens[1], slots), cache)
    pages = policy.read(layer, cache, torch.arange(blocks, device=key.device))
    back = [p.transpose(0, 1).flatten(1, 2)[:, :n] for p in pages]
    return back[0].to(key.dtype), back[1].to(value.dtype)


@dataclass
class Loss:
    """Costs of a format where it is used.

    Attributes:
        error: Relative error of attention outputs: the norm of the difference over that of the
            output, all heads and tokens.
        divergence: KL divergence of the next token's distribution from the full cache's, nats,
            mean over tokens; NaN where it was not measured.
        nll: Change of the mean negative log-likelihood, nats; NaN where it was not measured.
    """

    error: float = math.nan
    divergence: float = math.nan
    nll: float = math.nan


class _Swap:
    """Puts what a format gives back in the place of some layers' K and V."""

    def __init__(self, chosen: Mapping[int, FormatPolicy], engine: EngineView):
        self.chosen, self.engine = chosen, engine
        self.views = {layer.index: layer for layer in engine.layers}

    def see(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        policy = self.chosen.get(layer)
        if policy is None:
            return key, value
        return stored(policy, self.views[layer], key, value, self.engine.block_size)


class _Errors:
    """Compares the attention outputs of every candidate, on the full cache's activations."""

    def __init__(self, policies: Sequence[FormatPolicy], engine: EngineView):
        self.policies, self.engine = policies, engine
        self.views = {layer.index: layer for layer in engine.layers}
        self.sums: dict[tuple[int, int], float] = {}
        self.norms: dict[int, float] = {}

    def see(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        exact = how.attend(query, key, value).double()
        self.norms[layer] = self.norms.get(layer, 0.0) + float(exact.square().sum())
        for i, policy in enumerate(self.policies):
            view = self.views[layer]
            coded = how.attend(query, *stored(policy, view, key, value, self.engine.block_size))
            lost = float((coded.double() - exact).square().sum())
            self.sums[layer, i] = self.sums.get((layer, i), 0.0) + lost
        return key, value

    def relative(self, layer: int, candidate: int) -> float:
        return math.sqrt(self.sums[layer, candidate] / max(self.norms[layer], 1e-30))


class Meter:
    """Runs a model on held-out windows with formats in some layers.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        engine: Its layers, with the type that K and V have in the engine.
        windows: Tokens, ``[n]`` each.
    """

    def __init__(self, model: Any, engine: EngineView, windows: Sequence[Tensor]):
        self.model, self.engine, self.windows = model, engine, windows
        self._blocks = _decoder_blocks(model, len(engine.layers))

    @torch.inference_mode()
    def errors(self, policies: Sequence[FormatPolicy]) -> list[list[float]]:
        """Relative attention-output error, by layer and candidate."""
        probe = _Errors(policies, self.engine)
        with attached(self.model):
            for ids in self.windows:
                self._run(ids, probe, logits=1)
        return [
            [probe.relative(layer.index, i) for i in range(len(policies))]
            for layer in self.engine.layers
        ]

    @torch.inference_mode()
    def measure(
        self,
        choices: Sequence[Mapping[int, FormatPolicy]],
        progress: Callable[[str], None] | None = None,
    ) -> tuple[list[Loss], float]:
        """Measure the costs of choices of formats.

        Args:
            choices: The format of each layer that has one, by index.
            progress: Called once per choice and window.

        Returns:
            The loss of each choice (its error not measured), and the mean negative log-likelihood
            of the full cache, nats.
        """
        sums = [[0.0, 0.0] for _ in choices]
        base, tokens = 0.0, 0
        with attached(self.model):
            for ids in self.windows:
                with self._recorded() as outputs:
                    full = self._run(ids, _Swap({}, self.engine)).log_softmax(-1)
                likely = full[:-1].gather(1, ids[1:, None])[:, 0]
                base -= float(likely.double().sum())
                tokens += len(likely)
                weights = full.exp()
                for i, choice in enumerate(choices):
                    with self._resumed(outputs, min(choice, default=0)):
                        run = self._run(ids, _Swap(choice, self.engine)).log_softmax(-1)
                    now = run[:-1].gather(1, ids[1:, None])[:, 0]
                    sums[i][0] += float((weights * (full - run)).sum(-1)[:-1].double().sum())
                    sums[i][1] += float((likely - now).double().sum())
                    if progress is not None:
                        progress(f"layers {min(choice, default=0)}-{max(choice, default=0)}")
        found = [Loss(math.nan, kl / tokens, nll / tokens) for kl, nll in sums]
        return found, base / tokens

    def _run(self, ids: Tensor, probe: Probe, logits: int = 0) -> Tensor:
        out = self.model(
            input_ids=ids[None], use_cache=False, logits_to_keep=logits, kvplug_probe=probe
        )
        result: Tensor = out.logits[0].float()
        return result

    @contextmanager
    def _recorded(self) -> Iterator[list[Any]]:
        """Within it, what each block of the decoder puts out is kept."""
        found: list[Any] = [None] * len(self._blocks)
        handles = []
        for i, block in enumerate(self._blocks):

            def keep(module: Any, args: Any, out: Any, i: int = i) -> None:
                found[i] = out

            handles.append(block.register_forward_hook(keep))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _resumed(self, outputs: Sequence[Any], first: int) -> Iterator[None]:
        """Within it, blocks before a layer give what they gave: nothing changed for them."""
        skipped = self._blocks[:first]
        for block, out in zip(skipped, outputs, strict=False):
            block.forward = _always(out)
        try:
            yield
        finally:
            for block in skipped:
                del block.forward


def _always(value: Any) -> Callable[..., Any]:
    """A function that always returns the value."""
    return lambda *args, **kwargs: value


def _decoder_blocks(model: Any, layers: int) -> list[Any]:
    """The decoder's blocks, in order; empty where they are not one list of modules."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return list(module)
    return []


def perplexity(nll: float) -> float:
    """Of a mean negative log-likelihood, nats."""
    return math.exp(nll)
