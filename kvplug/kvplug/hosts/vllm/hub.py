"""Finds models on this machine that were downloaded from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def model_folder(name: str | Path, revision: str | None = None, cache: str | None = None) -> Path:
    """Where a model lies on this machine.

    Args:
        name: Its directory or file, or its name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; the hub's own default if None.
        cache: Folder of the hub's downloads; the usual one if None.

    Returns:
        The directory or file; for a name on the hub, the snapshot that was downloaded last.

    Raises:
        OSError: It is not here.
    """
    path = Path(name)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(
            str(name), revision=revision, cache_dir=cache, local_files_only=True
        )
    except (HFValidationError, OSError, ValueError):
        raise FileNotFoundError(f"{name} was not downloaded") from None
    return Path(found)
