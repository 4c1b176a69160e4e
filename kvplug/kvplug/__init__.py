"""kvplug: KV-cache policies as plugins for stock vLLM.

Importing this package changes nothing: no engine is touched, no plugin is loaded and no
environment variable is read until a deployment is loaded or an engine asks for it.
"""

import pluggy

from kvplug.errors import DeploymentError, KVPlugError
from kvplug.regular_file import UnreadableFile
from kvplug.tensor_file import read_tensors

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("kvplug")
"""Marks a function of a plugin module as an implementation of a hook in `kvplug.hookspecs`."""

__all__ = [
    "DeploymentError",
    "KVPlugError",
    "UnreadableFile",
    "__version__",
    "hookimpl",
    "read_tensors",
]
