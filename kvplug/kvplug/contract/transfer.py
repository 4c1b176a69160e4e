"""Transfer codecs: the bytes of KV on their way out of the accelerator's memory, and back."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from kvplug.contract.policy import Kind, Policy

if TYPE_CHECKING:
    from torch import Tensor


class CorruptPayload(ValueError):
    """Raised for a payload with a bad magic, version, length or checksum. Treated as a miss."""


class TransferCodec(Policy):
    """Encodes KV for a tier or a wire. The payload is self-describing and checked on the way in.

    A payload starts with a magic, a version, shape, dtype, length and a checksum, so that bytes
    from an older release, a truncated file or another model are refused by name, never guessed.
    """

    kind: ClassVar[Kind] = Kind.TRANSFER

    @abstractmethod
    def encode(self, pages: Tensor) -> bytes:
        """Encode ``[num_blocks, ...]`` pages of one layer into a self-describing payload."""

    @abstractmethod
    def decode(self, payload: bytes, out: Tensor) -> None:
        """Decode into ``out``.

        Raises:
            CorruptPayload: The payload fails a check or does not describe a tensor like ``out``.
        """
