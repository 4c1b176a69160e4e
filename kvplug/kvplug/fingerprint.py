"""Tells one model from another by its config and samples of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_ARCHITECTURE = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "text_config",
)
"""Entries of config.json that define what a model computes."""

_SAMPLES, _SAMPLE = 256, 256
"""Samples of the weights that a fingerprint reads, and the bytes of each."""


def model_fingerprint(path: str | Path) -> str:
    """Fingerprint a model, distinct from other models and from its fine-tunes, in milliseconds.

    A hash over the architecture in `config.json` and, for each weight file, its size, the
    safetensors header and some bytes from the middle of up to 256 evenly chosen tensors. The
    directory and the files' times do not matter.

    Args:
        path: The model's directory.

    Returns:
        32 hexadecimal digits; empty if the path is not a local directory with a `config.json` and
        readable weights.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        stated = {name: config[name] for name in _ARCHITECTURE if name in config}
        found = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        if not weights:
            return ""
        share = max(_SAMPLES // len(weights), 4)
        for file in weights:
            _sample_weights(file, share, found)
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    return found.hexdigest()[:32]


def _sample_weights(file: Path, samples: int, into: Any) -> None:
    """Hash a weight file's size, header and sampled bytes."""
    size = file.stat().st_size
    into.update(str(size).encode())
    with file.open("rb") as stream:
        places, start = [size * (2 * i + 1) // (2 * samples) for i in range(samples)], 0
        if file.suffix == ".safetensors":
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, size))
            into.update(header)
            start = 8 + length
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            middles = sorted(sum(t["data_offsets"]) // 2 for t in tensors.values())
            step = max(len(middles) / samples, 1.0)
            places = [middles[int(i * step)] for i in range(min(samples, len(middles)))]
        for place in places:
            stream.seek(start + max(place - _SAMPLE // 2, 0))
            into.update(stream.read(_SAMPLE))
