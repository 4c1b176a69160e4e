"""Reads safetensors files that somebody else may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kvplug.regular_file import UnreadableFile, open_regular

__all__ = ["MAX_TENSORS", "read_tensors"]

MAX_TENSORS = 1 << 17
"""The most tensors of a file."""


def read_tensors(
    path: str | Path, framework: Literal["pt", "np"], max_bytes: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """Read a safetensors file whole.

    Args:
        path: The file.
        framework: What its tensors become: of torch, or arrays of numpy.
        max_bytes: Size above which it is refused.

    Returns:
        Its metadata, and its tensors by name.

    Raises:
        UnreadableFile: It is no regular file, larger, damaged or of another format, or has types
            that the framework lacks.
    """
    from safetensors import SafetensorError, safe_open

    with open_regular(path, max_bytes) as file:
        try:
            # By its number, so that what is read is what was looked at.
            with safe_open(f"/proc/self/fd/{file.fileno()}", framework=framework) as found:
                metadata: dict[str, str] = dict(found.metadata() or {})
                names = list(found.keys())
                if len(names) > MAX_TENSORS:
                    raise UnreadableFile(path, f"has more than {MAX_TENSORS:,} tensors")
                tensors = {name: found.get_tensor(name) for name in names}
        except UnreadableFile:
            raise
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            cause = " ".join(str(error).split())
            raise UnreadableFile(
                path, f"is truncated or not a safetensors file ({cause})"
            ) from error
    if framework == "pt":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return metadata, tensors
