"""Finds every tensor that kvplug's objects of this process hold."""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch

EXTENDING = ("Impl", "Builder")
"""Names of kvplug's classes whose other attributes are those of vLLM's that they extend."""


def held_storages(pages: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage that one of kvplug's objects holds, by its address.

    Args:
        pages: Tensors that are not counted, with all views of them.
    """
    gc.collect()
    known = {tensor.untyped_storage().data_ptr() for tensor in pages}
    found: dict[int, int] = {}
    for root in gc.get_objects():
        if _ours(root):
            for tensor in _tensors(root):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def _ours(thing: Any) -> bool:
    module = getattr(type(thing), "__module__", None)
    return isinstance(module, str) and module.startswith(("kvplug.", "kvplug_policies"))


def _tensors(root: Any) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    left = [*_attributes(root)]
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, Mapping):
            left += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset, deque, WeakSet)):
            left += list(thing)
        elif isinstance(thing, functools.partial):
            left += [thing.func, *thing.args]


def _attributes(thing: Any) -> list[Any]:
    own = dict(getattr(thing, "__dict__", {}))
    for cls in type(thing).__mro__:
        for name in getattr(cls, "__slots__", ()):
            if hasattr(thing, name):
                own[name] = getattr(thing, name)
    if type(thing).__name__ in EXTENDING:
        return [value for name, value in own.items() if name.startswith("_kvplug")]
    return list(own.values())
