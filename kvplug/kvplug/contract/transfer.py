"""Transfer codecs: the form of KV on its way out of the engine's pool, and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvplug.contract.policy import Kind, Policy

if TYPE_CHECKING:
    from torch import Tensor


class CorruptPayload(ValueError):
    """Raised for bytes that cannot be what they say they are. Treated as a miss."""


@dataclass(frozen=True, slots=True)
class PlaneShape:
    """Type and shape of one tensor of a chunk.

    Attributes:
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"`` or ``"uint8"``.
        shape: ``(layers, tokens, kv_heads, head_size)``, or ``(layers, tokens, heads, bytes)`` for
            tokens as a format stores them.
    """

    dtype: str
    shape: tuple[int, ...]


class TransferCodec(Policy):
    """Encodes chunks: runs of consecutive tokens of one text, with their KV in all layers.

    The host packs what `encode` returns into the wire format (`kvplug.tiers.wire`) with the name,
    version and fingerprint of the codec, the planes' shapes and checksums; it hands `decode` only
    what passed all its checks and was written under the same three. One object per worker; several
    threads may call it at once, so a call keeps nothing in the object.

    Attributes:
        version: Of the coded form. What another version wrote is a miss.
    """

    kind: ClassVar[Kind] = Kind.TRANSFER
    version: ClassVar[int] = 1

    @abstractmethod
    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        """Encode one chunk.

        Args:
            planes: ``key`` and ``value``, each ``[layers, tokens, kv_heads, head_size]`` in the
                model's type with keys rotated for their positions; or ``cells``, uint8
                ``[layers, tokens, heads, bytes]``, where a format stores the pages. Read only.
            start: Position of the chunk's first token in its text.

        Returns:
            Tensors by name, contiguous, on the same device or in host memory. They may share memory
            with the planes.
        """

    @abstractmethod
    def decode(
        self, coded: Mapping[str, Tensor], shapes: Mapping[str, PlaneShape], start: int
    ) -> dict[str, Tensor]:
        """Decode one chunk; the inverse of `encode`.

        Args:
            coded: Tensors that an `encode` returned, in host memory; read only. Their names, types
                and shapes are as damaged or hostile bytes left them.
            shapes: The planes to return.
            start: Position of the chunk's first token.

        Raises:
            CorruptPayload: They do not describe such planes.
        """

    def fingerprint(self) -> str:
        """What coded bytes depend on beside the planes, e.g. a digest of a calibration."""
        return ""
