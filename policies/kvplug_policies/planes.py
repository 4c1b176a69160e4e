"""Base of the codecs that code plane by plane, and checks of coded tensors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvplug.contract import CorruptPayload, PlaneShape, TransferCodec

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "uint8": torch.uint8,
}
"""Types that a plane may have."""


def plane_dtype(plane: PlaneShape) -> torch.dtype:
    """Type of a plane. Raises CorruptPayload for one that no plane has."""
    found = DTYPES.get(plane.dtype)
    if found is None:
        raise CorruptPayload(f"a plane of type {plane.dtype!r}")
    return found


def plane_bytes(plane: PlaneShape) -> int:
    """Bytes of a plane as the engine stores it."""
    return plane_dtype(plane).itemsize * math.prod(plane.shape)


def names(coded: Mapping[str, Tensor], expected: Sequence[str]) -> None:
    """Raise CorruptPayload unless the tensors are these."""
    if sorted(coded) != sorted(expected):
        raise CorruptPayload(f"tensors {sorted(coded)} instead of {sorted(expected)}")


def take(
    coded: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    """Return a coded tensor.

    Args:
        coded: Tensors by name.
        name: The one that is asked for.
        dtype: Type that it must have.
        shape: Shape that it must have; -1 for any size.

    Raises:
        CorruptPayload: It is missing, or of another type or shape.
    """
    found = coded.get(name)
    if found is None:
        raise CorruptPayload(f"no tensor {name!r}")
    right = len(shape) == found.ndim and all(
        asked in (-1, size) for asked, size in zip(shape, found.shape, strict=True)
    )
    if found.dtype != dtype or not right:
        raise CorruptPayload(
            f"{name!r} is {found.dtype} {list(found.shape)} instead of {dtype} {list(shape)}"
        )
    return found


class PlaneCodec(TransferCodec):
    """A codec of single planes, which leaves a plane as it is where coding it saves nothing.

    A coded plane becomes tensors named for it and for the part: ``key.codes``, ``key.scale``. A
    plane that stays as it is keeps its name.
    """

    @abstractmethod
    def cut(self, name: str, plane: Tensor, start: int) -> dict[str, Tensor]:
        """Code a plane.

        Args:
            name: ``key``, ``value`` or ``cells``.
            plane: ``[layers, tokens, heads, size]`` in host memory, contiguous.
            start: Position of its first token.

        Returns:
            Its parts by name; none if it should stay as it is.
        """

    @abstractmethod
    def join(self, name: str, parts: Mapping[str, Tensor], plane: PlaneShape, start: int) -> Tensor:
        """Decode a plane, of 4 dimensions. Raises CorruptPayload if the parts are none of it."""

    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        coded: dict[str, Tensor] = {}
        for name, plane in planes.items():
            plane = plane.detach().cpu().contiguous()
            parts = self.cut(name, plane, start) if plane.numel() else {}
            if parts and sum(part.nbytes for part in parts.values()) < plane.nbytes:
                coded |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            else:
                coded[name] = plane
        return coded

    def decode(
        self, coded: Mapping[str, Tensor], shapes: Mapping[str, PlaneShape], start: int
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        left = dict(coded)
        for name, plane in shapes.items():
            if name in left:
                found[name] = take(left, name, plane_dtype(plane), plane.shape)
                del left[name]
                continue
            if len(plane.shape) != 4:
                raise CorruptPayload(f"a coded plane of {len(plane.shape)} dimensions")
            parts = {
                part.removeprefix(f"{name}."): left.pop(part)
                for part in list(left)
                if part.startswith(f"{name}.")
            }
            found[name] = self.join(name, parts, plane, start)
        names(left, ())
        return found
