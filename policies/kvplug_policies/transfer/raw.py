"""KV as the engine stores it: nothing is computed and nothing is saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kvplug.contract import PlaneShape, TransferCodec
from kvplug_policies.planes import names, plane_dtype, take


class Raw(TransferCodec):
    """Planes as they are."""

    name = "raw"
    exact = True
    changes = "stores KV outside the pool in the bytes that it has inside"

    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        return {name: plane.contiguous() for name, plane in planes.items()}

    def decode(
        self, coded: Mapping[str, Tensor], shapes: Mapping[str, PlaneShape], start: int
    ) -> dict[str, Tensor]:
        names(coded, list(shapes))
        return {
            name: take(coded, name, plane_dtype(plane), plane.shape)
            for name, plane in shapes.items()
        }
