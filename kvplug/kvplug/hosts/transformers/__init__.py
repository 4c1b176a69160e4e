"""Sequence policies and formats on Hugging Face models, for research and `kvplug eval`."""

from kvplug.hosts.transformers.cache import LayerCache, Watched
from kvplug.hosts.transformers.coded import LayerCoded
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
    "LayerCache",
    "LayerCoded",
    "Text",
    "UnsupportedModel",
    "Watched",
    "generate",
    "watched_by",
]
