"""KV heads of a layer that are nearly alike share one stored head.

Grouped-query attention makes query heads share KV heads when a model is trained; this does it to a
trained model, layer by layer, where its activations allow it. `kvplug calibrate` merges KV heads of
a layer two groups at a time, the pair that loses least first, and fits how the shared head
represents each of its heads: by one number per head (``gain``: their keys are nearly parallel), or
by linear maps (``linear``: their keys lie near one subspace of a head's width; what Palu, arXiv
2407.21118, does to groups of heads before RoPE). Merges whose error is within ``max_error`` are
taken; the others keep their heads. Maps are absorbed into queries and outputs, and the means of
keys and values are taken off at no cost in bytes.

The idea of merging KV heads is that of GQA, arXiv 2305.13245, which pools heads and trains on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import (
    EngineView,
    LayerView,
    PageLayout,
    PolicyOptions,
)
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.calibration import (
    SUPPORTS,
    CalibratedOptions,
    OnDevice,
    by_kv_head,
    calibration_for,
    whole_model,
)
from kvplug_policies.coded import CodedFormat
from kvplug_policies.format.plain import plain_bits


@dataclass(frozen=True)
class Shared:
    """The KV heads of a layer that share a stored head.

    Attributes:
        group: Stored head of each KV head.
        stored: Stored heads.
        error: Largest error of the merges taken; 0 for none.
        best: Least error of any merge; infinite where a layer has one KV head.
    """

    group: tuple[int, ...]
    stored: int
    error: float
    best: float


class MergeHeads(CodedFormat):
    """Stores one head for several KV heads, where calibration allows it."""

    name = "merge_heads"
    changes = "stores one head for several KV heads of a layer that are nearly alike"
    supports = SUPPORTS
    paper = (
        "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, "
        "arXiv 2305.13245; Palu, arXiv 2407.21118 (groups of heads)"
    )

    class Options(CalibratedOptions):
        """Options of `MergeHeads`."""

        max_error: float = Field(
            0.1,
            ge=0.0,
            le=1.0,
            description="largest fraction of the energy of keys (mean square of logits) or of "
            "values (variance) that a merge may lose",
        )
        fit: Literal["linear", "gain"] = Field(
            "linear",
            description="how the shared head represents its heads: by linear maps, or by one "
            "factor per head",
        )
        bits: Literal[16, 8, 4] = Field(
            16, description="bits of an element: 16 (as computed), 8 or 4"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        if whole_model(engine) and all(s.stored == len(s.group) for s in self.shared.values()):
            index, best = min(self.shared.items(), key=lambda item: item[1].best)
            found = (
                f"the best {self.options.fit} merge loses {best.best:.3g} (layer {index})"
                if best.best < float("inf")
                else "no layer has two KV heads"
            )
            raise ValueError(
                f"merge_heads cannot merge any heads: {found}, and max_error is "
                f"{self.options.max_error}; allow more error or choose another format"
            )

    def prepare(self) -> None:
        self.calibration = calibration_for(self.options.calibration, self.engine)
        self._maps = OnDevice()
        self.shared: dict[int, Shared] = {}
        self._padded: dict[int, int] = {}

    def sharing(self, layer: LayerView) -> Shared:
        """The calibration's merges of a layer, in order, as long as they are within
        ``max_error``."""
        heads, fit = layer.num_kv_heads, self.options.fit
        if heads < 2:
            return Shared((0,) * heads, heads, 0.0, float("inf"))
        errors = self.calibration.of(layer, f"merge_{fit}.errors").tolist()
        groups = self.calibration.of(layer, f"merge_{fit}.groups").tolist()
        taken = 0
        while taken < len(errors) and errors[taken] <= self.options.max_error:
            taken += 1
        group = groups[taken - 1] if taken else list(range(heads))
        order = {g: i for i, g in enumerate(dict.fromkeys(group))}
        return Shared(
            tuple(order[g] for g in group),
            len(order),
            max(errors[:taken], default=0.0),
            min(errors),
        )

    def coding(self, layer: LayerView) -> CodedPage:
        width, heads, shared = layer.head_size, layer.num_kv_heads, self.sharing(layer)
        self.shared[layer.index] = shared
        of = self.calibration.of
        maps = {"key_mean": of(layer, "key_mean").clone()}
        maps["value_mean"] = of(layer, "value_mean").clone()
        for name in ("key_encode", "key_decode", "value_encode", "value_decode"):
            maps[name] = torch.eye(width).repeat(heads, 1, 1)
        for stored in range(shared.stored):
            members = [h for h, g in enumerate(shared.group) if g == stored]
            if len(members) > 1:
                self._fill(layer, members, maps)
            elif self.options.bits == 16:
                # A head that is not shared is stored unchanged, to the bit.
                maps["key_mean"][members] = maps["value_mean"][members] = 0
        # The query heads of a stored head follow each other, and each has equally many: the places
        # left over hold queries of zeros, whose results are dropped.
        readers = layer.num_heads // heads
        most = readers * max(shared.group.count(g) for g in range(shared.stored))
        places, filled = [], [0] * shared.stored
        for g in shared.group:
            places += [g * most + filled[g] + i for i in range(readers)]
            filled[g] += readers
        maps["group"], maps["places"] = torch.tensor(shared.group), torch.tensor(places)
        self._maps.put(layer, maps)
        self._padded[layer.index] = most * shared.stored
        if self.options.bits == 16:
            coding = Coding(width, plain_bits(layer.dtype), "plain")
        else:
            coding = Coding(width, self.options.bits, fit=2 if self.options.bits == 4 else 0)
        return CodedPage(coding, coding)

    def _fill(self, layer: LayerView, members: list[int], maps: dict[str, Tensor]) -> None:
        """Fill in the maps of heads that were merged into one."""
        of, fit = self.calibration.of, self.options.fit
        steps = len(of(layer, f"merge_{fit}.errors"))
        for step in range(steps):
            if of(layer, f"merge_{fit}.{step}.heads").tolist() != members:
                continue
            for name in ("key_encode", "key_decode", "value_encode", "value_decode"):
                found = of(layer, f"merge_{fit}.{step}.{name}").float()
                if found.dim() == 1:
                    found = found[:, None, None] * torch.eye(layer.head_size)
                maps[name][members] = found
            return
        raise ValueError(f"calibration {self.calibration.path} lacks the merge of heads {members}")

    def layout(self, layer: LayerView) -> PageLayout:
        page = super().layout(layer)
        return replace(page, heads=self.shared[layer.index].stored)

    # -- maps ----------------------------------------------------------------------------------

    def _gather(self, layer: LayerView, x: Tensor, side: str) -> Tensor:
        maps = self._maps.get(layer, x.device)
        parts = torch.einsum(
            "nhd,hde->nhe", x.float() - maps[f"{side}_mean"], maps[f"{side}_encode"]
        )
        shape = (x.shape[0], self.shared[layer.index].stored, x.shape[2])
        return parts.new_zeros(shape).index_add_(1, maps["group"], parts).to(x.dtype)

    def into(self, layer: LayerView, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._gather(layer, key, "key"), self._gather(layer, value, "value")

    def query_into(self, layer: LayerView, query: Tensor) -> Tensor:
        maps = self._maps.get(layer, query.device)
        grouped = by_kv_head(query.float(), layer.num_kv_heads)
        turned = torch.einsum("nhgd,hde->nhge", grouped, maps["key_decode"]).flatten(1, 2)
        padded = query.new_zeros((query.shape[0], self._padded[layer.index], query.shape[2]))
        padded[:, maps["places"]] = turned.to(query.dtype)
        return padded

    def shift(self, layer: LayerView, query: Tensor) -> Tensor:
        mean = self._maps.get(layer, query.device)["key_mean"]
        grouped = by_kv_head(query.float(), layer.num_kv_heads)
        return torch.einsum("nhgd,hd->nhg", grouped, mean).flatten(1)

    def _back(self, layer: LayerView, coded: Tensor, side: str) -> Tensor:
        maps = self._maps.get(layer, coded.device)
        shared = coded.float()[:, maps["group"]]
        back = torch.einsum("nhe,hde->nhd", shared, maps[f"{side}_decode"])
        return back + maps[f"{side}_mean"]

    def key_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self._back(layer, coded, "key")

    def value_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self._back(layer, coded, "value")

    def out_back(self, layer: LayerView, out: Tensor) -> Tensor:
        maps = self._maps.get(layer, out.device)
        mine = by_kv_head(out.float()[:, maps["places"]], layer.num_kv_heads)
        back = torch.einsum("nhge,hde->nhgd", mine, maps["value_decode"])
        return (back + maps["value_mean"][:, None]).flatten(1, 2)

    def lse_back(self, layer: LayerView, lse: Tensor) -> Tensor:
        return lse[:, self._maps.get(layer, lse.device)["places"]]

    def counters(self) -> dict[str, float]:
        heads = sum(len(s.group) for s in self.shared.values())
        stored = sum(s.stored for s in self.shared.values())
        return {**super().counters(), "heads": float(heads), "stored_heads": float(stored)}

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}:{self.calibration.checksum}"
