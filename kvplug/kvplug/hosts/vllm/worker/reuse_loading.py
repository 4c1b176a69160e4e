"""Loading of stored runs into pages, and recomputation of what deviates in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import Placement, ReuseCheck, Verdict
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
        checks: The deployment's checks.
        layers: Pages of each layer, by layer name.
        world: Ranks that share the layers.
        compare: What the layers' new K and V are shown to, or None.
    """

    def __init__(self, recomputer: Recomputer, fraction: float):
        self.checks: Sequence[ReuseCheck] = ()
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
            report: Where loaded and recomputed tokens are counted.
        """
        blocks = torch.from_numpy(order.blocks)
        for piece in order.pieces:
            self._write(stored[piece.segment], piece, blocks, report)
        spans = list(order.spans)
        approximate = [(p.start, p.start + p.length) for p in order.pieces if not p.exact]
        if self._fraction and approximate and self._recomputer.ready:
            spans = self._with_deviating(order, blocks, spans, approximate)
        if spans:
            self._recomputer.compute(order.tokens, blocks, spans)
            report.computed += sum(b - a for a, b in spans)

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
            from vllm.distributed import tensor_model_parallel_all_reduce

            found = tensor_model_parallel_all_reduce(found)
        return with_deviating(found, begin, approximate, spans, self._fraction)

    def _write(
        self, stored: StoredSegment, piece: PieceOrder, blocks: Tensor, report: ReuseReport
    ) -> None:
        header = stored.header
        size = self._recomputer.block_size
        positions = torch.arange(piece.start, piece.start + piece.length)
        slots = blocks[positions // size] * size + positions % size
        run = slice(piece.offset, piece.offset + piece.length)
        verdict = Verdict(True, "", piece.exact, piece.shift, piece.confidence)
        placement = Placement(header.fingerprint, piece.offset, piece.length, piece.start, verdict)
        adapting = [c for c in self.checks if c.adapts(placement)]
        for index, pages in enumerate(self.layers.values()):
            own = {name: plane[index, run] for name, plane in stored.planes.items()}
            if not adapting:
                pages.put(slots, own)
                continue
            key, value = pages.decoded(slots, own)
            for check in adapting:
                key, value = check.adapt(pages.view, placement, key, value)
            pages.write(slots, key, value)
        done, corrected = report.loaded
        report.loaded = (
            done + piece.length,
            corrected + (piece.length if adapting else 0),
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
