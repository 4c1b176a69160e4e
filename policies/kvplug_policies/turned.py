"""Base of the formats that rotate vectors before they are coded."""

from __future__ import annotations

from torch import Tensor

from kvplug.contract import LayerView
from kvplug_policies.coded import CodedFormat
from kvplug_policies.rotation import Rotation, hadamard_matrix


class TurnedFormat(CodedFormat):
    """K, V and queries are rotated, and sums of values turned back, unless `rotation` is None.

    A rotation leaves the products of queries with keys as they are and spreads what a few channels
    hold over all of them.
    """

    rotation: str | None = "hadamard"

    def prepare(self) -> None:
        self._rotation = Rotation()

    def check_width(self, width: int) -> None:
        """Raise ValueError unless vectors of this width can be rotated, where they are."""
        if self.rotation is None:
            return
        fix = "; set rotate: false" if "rotate" in type(self.options).model_fields else ""
        if width < 16:
            raise ValueError(
                f"head size {width} is too small to rotate; it must be at least 16{fix}"
            )
        try:
            hadamard_matrix(width)
        except ValueError as error:
            raise ValueError(f"{error}{fix}") from None

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """Vectors ``[..., width]`` rotated, or back, float32; as they are without a rotation."""
        return x if self.rotation is None else self._rotation.turn(x, back)

    def into(self, layer: LayerView, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(key), self.turn(value)

    def query_into(self, layer: LayerView, query: Tensor) -> Tensor:
        return self.turn(query).to(query.dtype)

    def key_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self.turn(coded, back=True)

    def value_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self.turn(coded, back=True)

    def out_back(self, layer: LayerView, out: Tensor) -> Tensor:
        return self.turn(out, back=True)
