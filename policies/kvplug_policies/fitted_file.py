"""Files of what was fitted to a model: safetensors whose metadata say of what, and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvplug import KVPlugError, UnreadableFile, read_tensors

MAX_BYTES = 8 << 30
"""Largest file that is read."""


class BadCalibration(KVPlugError, ValueError):
    """A file that is no calibration, or none of the model that is served."""

    exit_code = 2


@dataclass(frozen=True)
class FittedFile:
    """One kind of such files.

    Attributes:
        noun: What one is called in messages.
        unlike: What is said of a file of another kind.
        magic: The metadata's ``format``.
        version: The metadata's ``version``.
        required: Names of all metadata beside the checksum.
        command: The command that writes one.
    """

    noun: str
    unlike: str
    magic: str
    version: int
    required: tuple[str, ...]
    command: str

    @property
    def again(self) -> str:
        """The fix of most problems."""
        return f"run `{self.command}` again"

    def write(
        self, path: str | Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> str:
        """Write a file; returns its checksum.

        Args:
            path: The file.
            metadata: All `required` ones but ``format`` and ``version``.
            tensors: Its tensors by name.
        """
        from safetensors.torch import save_file

        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        known = {"format": self.magic, "version": str(self.version), **metadata}
        checksum = _checksum(known, stored)
        save_file(stored, path, metadata={**known, "checksum": checksum})
        # safetensors makes a file only its owner can read; a server may be somebody else.
        mask = os.umask(0)
        os.umask(mask)
        Path(path).chmod(0o666 & ~mask)
        return checksum

    def state(self, path: str | Path) -> tuple[str, int, int]:
        """Path, bytes and time of change of a file, by which what was read of it may be kept.

        Raises:
            BadCalibration: It is not there.
        """
        try:
            stat = Path(path).stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadCalibration(
                f"{self.noun} {path} cannot be read ({reason}); create it with "
                f"`{self.command} --output {path}`"
            ) from None
        return str(path), stat.st_size, stat.st_mtime_ns

    def read(self, path: str) -> tuple[dict[str, str], dict[str, Tensor], str]:
        """Read a file and verify its format, version and checksum.

        Returns:
            Its metadata, its tensors and its checksum.

        Raises:
            BadCalibration: It is of another kind or version, truncated or edited.
        """
        try:
            metadata, tensors = read_tensors(path, "pt", MAX_BYTES)
        except UnreadableFile as error:
            raise BadCalibration(f"{self.noun} {path} {error.problem}; {self.again}") from None
        if metadata.get("format") != self.magic:
            raise BadCalibration(f"{path} {self.unlike}")
        if metadata.get("version") != str(self.version):
            raise BadCalibration(
                f"{self.noun} {path} has version {metadata.get('version')!r}, this release reads "
                f"{self.version}; {self.again}"
            )
        checksum = metadata.pop("checksum", "")
        absent = [name for name in self.required if name not in metadata]
        if absent or checksum != _checksum(metadata, tensors):
            raise BadCalibration(
                f"{self.noun} {path} was edited or damaged (its checksum does not match); "
                f"{self.again}"
            )
        return metadata, tensors, checksum


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
