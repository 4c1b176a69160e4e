"""Keys and values in fewer coordinates, found by calibration, and attention among those.

Keys after RoPE and values are projected per layer and KV head onto the coordinates that lose least
on real activations (Palu, arXiv 2407.21118; Eigen Attention, arXiv 2408.05646). Keys are weighted
by the queries that read them, so it is the error of their products that is least, and both are
taken less their mean, which costs no bytes: a key's mean moves all logits of a query alike. The
decoding maps never meet stored tokens: the keys' is absorbed into the query and the values' into
the output, so attention runs in the latent space.

Differences from the papers: they project before RoPE, which moves keys by position afterwards and
has to be undone block by block; here keys are projected after it, which needs more coordinates for
the same error and nothing at run time. Palu shares a projection among groups of heads; that is the
format `merge_heads`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kvplug.contract import EngineView, LayerView, PolicyOptions
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_kernels.project_latent import project_latent
from kvplug_policies.calibration import (
    SUPPORTS,
    CalibratedOptions,
    OnDevice,
    by_kv_head,
    calibration_for,
    whole_model,
)
from kvplug_policies.coded import FIT, CodedFormat
from kvplug_policies.format.plain import plain_bits

STEP = 8
"""Ranks are multiples of it, so that codes of any bits fill whole bytes."""


def smallest_rank(energy: Tensor, max_error: float) -> int:
    """The smallest multiple of 8 coordinates that loses no more than allowed in any head.

    Args:
        energy: ``[heads, d]``, descending.
        max_error: Largest part of a head's energy that may be lost.
    """
    width = energy.shape[-1]
    total = energy.double().sum(-1)
    for rank in range(STEP, width, STEP):
        left = energy[:, rank:].double().sum(-1)
        if bool((left <= max_error * total).all()):
            return rank
    return width


def spread(rank: int) -> Tensor:
    """An orthogonal map that spreads the first coordinates over all, float64 ``[rank, rank]``.

    The Kronecker product of a Hadamard matrix, as large as divides the rank, and a DCT: latent
    coordinates fall off steeply, and codes that share a scale want them alike.
    """
    power = rank & -rank
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < power:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    n = rank // power
    at = torch.arange(n, dtype=torch.float64)
    dct = torch.cos(math.pi / n * (at + 0.5) * at[:, None]) * math.sqrt(2 / n)
    dct[0] /= math.sqrt(2)
    return torch.kron(dct.T.contiguous(), hadamard / math.sqrt(power))


class LowRank(CodedFormat):
    """Stores latent coordinates of keys and values, plain or quantized, and attends them."""

    name = "lowrank"
    changes = "keeps K and V in fewer coordinates per head, chosen by calibration"
    supports = SUPPORTS
    paper = (
        "Palu: KV-Cache Compression with Low-Rank Projection, arXiv 2407.21118; Eigen Attention: "
        "Attention in Low-Rank Space for KV Cache Compression, arXiv 2408.05646"
    )

    class Options(CalibratedOptions):
        """Options of `LowRank`."""

        max_error: float = Field(
            0.003,
            ge=0.0,
            le=1.0,
            description="largest fraction of the energy of a head that may be lost (mean square of "
            "logits for keys, variance for values); sets the rank of each layer",
        )
        rank: int = Field(
            0, ge=0, le=512, description="coordinates of keys and of values; 0: chosen by max_error"
        )
        bits: Literal[16, 8, 4] = Field(
            16, description="bits of a coordinate: 16 (as computed), 8 or 4"
        )
        fit: int = Field(2, ge=0, le=8, description=f"of 4-bit codes: {FIT}")

        @field_validator("rank")
        @classmethod
        def _rank_is_a_multiple_of_8(cls, value: int) -> int:
            if value % STEP:
                raise ValueError(f"rank must be a multiple of {STEP}")
            return value

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        pages = [(self.coded(layer), layer) for layer in engine.layers]
        if (
            whole_model(engine)
            and self.options.bits == 16
            and all(p.key.width == p.value.width == layer.head_size for p, layer in pages)
        ):
            rank, max_error = self.options.rank, self.options.max_error
            why = f"rank {rank}" if rank else f"max_error {max_error}"
            raise ValueError(
                f"lowrank with {why} leaves every layer at its full {pages[0][1].head_size} "
                "coordinates: allow more error, set a smaller rank, or set bits to 8 or 4"
            )

    def prepare(self) -> None:
        self.calibration = calibration_for(self.options.calibration, self.engine)
        self._maps = OnDevice()

    def ranks(self, layer: LayerView) -> tuple[int, int]:
        """Coordinates of keys and of values of a layer."""
        if self.options.rank > layer.head_size:
            raise ValueError(f"rank {self.options.rank} is above the head size {layer.head_size}")
        if self.options.rank:
            return self.options.rank, self.options.rank
        key = smallest_rank(self.calibration.of(layer, "key_energy"), self.options.max_error)
        value = smallest_rank(self.calibration.of(layer, "value_energy"), self.options.max_error)
        return key, value

    def coding(self, layer: LayerView) -> CodedPage:
        if layer.head_size % STEP:
            raise ValueError(f"lowrank needs a head size that is a multiple of {STEP}")
        of, ranks = self.calibration.of, self.ranks(layer)
        maps = {
            "key_in": of(layer, "key_encode"),
            "key_out": of(layer, "key_decode"),
            "value_in": of(layer, "value_basis"),
            "value_out": of(layer, "value_basis"),
        }
        for name, matrix in maps.items():
            rank = ranks[0] if name.startswith("key") else ranks[1]
            kept = matrix[..., :rank].double()
            if self.options.bits < 16:
                kept = kept @ spread(rank)
            maps[name] = kept.float().contiguous()
        maps["key_mean"], maps["value_mean"] = of(layer, "key_mean"), of(layer, "value_mean")
        self._maps.put(layer, maps)
        if self.options.bits == 16:
            bits = plain_bits(layer.dtype)
            return CodedPage(Coding(ranks[0], bits, "plain"), Coding(ranks[1], bits, "plain"))
        fit = self.options.fit if self.options.bits == 4 else 0
        key, value = (Coding(rank, self.options.bits, fit=fit) for rank in ranks)
        return CodedPage(key, value)

    def into(self, layer: LayerView, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        maps = self._maps.get(layer, key.device)
        return (
            project_latent(key, maps["key_in"], maps["key_mean"]).to(key.dtype),
            project_latent(value, maps["value_in"], maps["value_mean"]).to(value.dtype),
        )

    def query_into(self, layer: LayerView, query: Tensor) -> Tensor:
        basis = self._maps.get(layer, query.device)["key_out"]
        grouped = by_kv_head(query.float(), layer.num_kv_heads)
        return torch.einsum("nhgd,hdr->nhgr", grouped, basis).flatten(1, 2).to(query.dtype)

    def shift(self, layer: LayerView, query: Tensor) -> Tensor:
        mean = self._maps.get(layer, query.device)["key_mean"]
        grouped = by_kv_head(query.float(), layer.num_kv_heads)
        return torch.einsum("nhgd,hd->nhg", grouped, mean).flatten(1)

    def key_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        maps = self._maps.get(layer, coded.device)
        return torch.einsum("nhr,hdr->nhd", coded.float(), maps["key_out"]) + maps["key_mean"]

    def value_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        maps = self._maps.get(layer, coded.device)
        return torch.einsum("nhr,hdr->nhd", coded.float(), maps["value_out"]) + maps["value_mean"]

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}:{self.calibration.checksum}"
