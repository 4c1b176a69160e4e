"""Sequence policies on Hugging Face models, for research and for `kvplug eval`."""

from kvplug.hosts.transformers.held import LayerHeld, Watched
from kvplug.hosts.transformers.host import (
    Generated,
    Host,
    Text,
    UnsupportedModel,
    generate,
    watched_by,
)

__all__ = [
    "Generated",
    "Host",
    "LayerHeld",
    "Text",
    "UnsupportedModel",
    "Watched",
    "generate",
    "watched_by",
]
