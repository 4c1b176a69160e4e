"""Loading of stored runs into pages, and recomputation of what deviates in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvplug.containment import ContainedPolicy
from kvplug.contract import LayerView, Placement, ReuseCheck, Verdict
from kvplug.errors import KVPlugError
from kvplug.hosts.policy_tensors import plain_tensor
from kvplug.hosts.vllm.messages import LoadOrder, PieceOrder, ReuseReport
from kvplug.hosts.vllm.worker.recompute import Recomputer, StopForward, with_deviating
from kvplug.hosts.vllm.worker.segments import LayerPages
from kvplug.reuse.deviation import deviation
from kvplug.reuse.memory import StoredSegment

CompareLayer = Callable[[Any, Tensor, Tensor], None]
"""``compare(layer, key, value)``: shown the K and V that each layer writes."""


class RunLoader:
    """Writes stored runs into pages.

    Args:
        recomputer: Runs the model on spans of a request.
        fraction: Fraction of approximate tokens to recompute.

    Attributes:
        checks: The deployment's checks, contained.
        layers: Pages of each layer, by layer name.
        world: Ranks that share the layers.
        compare: What the layers' new K and V are shown to, or None.
    """

    def __init__(self, recomputer: Recomputer, fraction: float):
        self.checks: Sequence[ContainedPolicy] = ()
        self.layers: Mapping[str, LayerPages] = {}
        self.world = 1
        self.compare: CompareLayer | None = None
        self._recomputer = recomputer
        self._fraction = fraction

    def load(
        self, order: LoadOrder, stored: Mapping[str, StoredSegment], report: ReuseReport
    ) -> None:
        """Load the run of one request.

        Args:
            order: The run.
            stored: Segments of the run, by id.
            report: Where loaded and recomputed tokens are counted, and the time of what is done
                to them.

        Raises:
            KVPlugError: Another rank could not load its part.
        """
        blocks = torch.from_numpy(order.blocks)
        spans = list(order.spans)
        approximate = [(p.start, p.start + p.length) for p in order.pieces if not p.exact]
        deviating = bool(self._fraction and approximate and self._recomputer.ready)
        problem: Exception | None = None
        adapting = 0.0
        try:
            for piece in order.pieces:
                adapting += self._write(stored[piece.segment], piece, blocks, report)
        except Exception as error:
            problem = error
        # A forward that not all ranks begin never ends.
        if (deviating or spans) and self.world > 1 and not _all_ranks(problem is None):
            problem = problem or KVPlugError("another rank could not load the run")
        if problem is not None:
            raise problem
        began = perf_counter()
        if deviating:
            spans = self._with_deviating(order, blocks, spans, approximate)
        if spans:
            self._recomputer.compute(order.tokens, blocks, spans)
            report.computed += sum(b - a for a, b in spans)
            adapting += perf_counter() - began
        if adapting:
            report.adapted[order.number] = adapting

    def _with_deviating(
        self,
        order: LoadOrder,
        blocks: Tensor,
        spans: list[tuple[int, int]],
        approximate: list[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """Add the tokens of approximate pieces whose K and V in layer 1 deviate most."""
        second = list(self.layers)[min(1, len(self.layers) - 1)]
        pages = self.layers[second]
        # Layer 1 sees what layer 0 made of everything before, so what is missing is computed too.
        begin = min([approximate[0][0], *(a for a, _ in spans)])
        end = approximate[-1][1]
        before = pages.read(blocks, begin, end)
        found = torch.zeros(end - begin)
        # A forward takes so many tokens; the first layer's K and V of one are there for the next.
        for batch in self._recomputer.batches([(begin, end)]):
            part = slice(batch[0][0] - begin, batch[-1][1] - begin)
            self.compare = _comparison(second, [t[part] for t in before], found[part])
            try:
                self._recomputer.forward(order.tokens, blocks, batch)
            except StopForward:
                pass
            finally:
                self.compare = None
        if self.world > 1:
            torch.distributed.all_reduce(found, group=_host_group())
        return with_deviating(found, begin, approximate, spans, self._fraction)

    def _write(
        self, stored: StoredSegment, piece: PieceOrder, blocks: Tensor, report: ReuseReport
    ) -> float:
        """Write a piece into pages; returns host seconds where it is corrected on the way."""
        began = perf_counter()
        header = stored.header
        size = self._recomputer.block_size
        positions = torch.arange(piece.start, piece.start + piece.length)
        slots = blocks[positions // size] * size + positions % size
        run = slice(piece.offset, piece.offset + piece.length)
        verdict = Verdict(True, "", piece.exact, piece.shift, piece.confidence)
        placement = Placement(header.fingerprint, piece.offset, piece.length, piece.start, verdict)
        adapting = [c for c in self.checks if c.run(_adapts, c.target, placement)]
        for index, pages in enumerate(self.layers.values()):
            own = {name: plane[index, run] for name, plane in stored.planes.items()}
            if not adapting:
                pages.put(slots, own)
                continue
            key, value = pages.decoded(slots, own)
            for check in adapting:
                key, value = check.run(_adapted, check.target, pages.view, placement, key, value)
            pages.write(slots, key, value)
        done, corrected = report.loaded
        report.loaded = (
            done + piece.length,
            corrected + (piece.length if adapting else 0),
        )
        return perf_counter() - began if adapting else 0.0


def _host_group() -> Any:
    """Group of the ranks that share the layers, for tensors in host memory."""
    from vllm.distributed import get_tp_group

    return get_tp_group().cpu_group


def _all_ranks(loaded: bool) -> bool:
    """True if every rank has loaded its part."""
    every = torch.tensor([int(loaded)])
    torch.distributed.all_reduce(every, op=torch.distributed.ReduceOp.MIN, group=_host_group())
    return bool(every.item())


def _adapts(check: ReuseCheck, placement: Placement) -> bool:
    return bool(check.adapts(placement))


def _adapted(
    check: ReuseCheck, view: LayerView, placement: Placement, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """What a check makes of K and V, in their own shape and dtype."""
    shapes = key.shape, value.shape
    given: Any = check.adapt(view, placement, key.clone(), value.clone())
    own_key, own_value = given
    return (
        plain_tensor("adapt", own_key, shapes[0], key),
        plain_tensor("adapt", own_value, shapes[1], value),
    )


def _comparison(name: str, stored: Sequence[Tensor], into: Tensor) -> CompareLayer:
    """Make a comparison that writes how far stored K and V of one layer deviate from recomputed
    ones, and ends the forward there."""

    def compare(layer: Any, key: Tensor, value: Tensor) -> None:
        if layer.layer_name == name:
            n = len(into)
            into.copy_(deviation(stored[0], stored[1], key[:n], value[:n]))
            raise StopForward

    return compare
