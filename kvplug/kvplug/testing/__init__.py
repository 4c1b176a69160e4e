"""Tests that every policy of a kind must pass, and what they need: views, pools, an engine.

A test class names a policy, and inherits the laws of its kind as tests::

    from kvplug.testing import PrefixCacheLaws

    class TestMru(PrefixCacheLaws):
        policy = Mru
        options = {"protect": 2}

The policies that come with kvplug are tested by the same classes. Nothing is imported before it is
used: `kvplug.testing` itself loads neither torch nor pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvplug.testing.attention import AttentionLaws, decode_rows
    from kvplug.testing.format import FormatLaws, Shape, vectors
    from kvplug.testing.laws import BrokenLaw, PolicyLaws, each, law
    from kvplug.testing.lifecycle import LifecycleLaws, pressure
    from kvplug.testing.prefix_cache import Blocks, PrefixCacheLaws, released
    from kvplug.testing.reuse import ReuseLaws, candidate, placement, reuse_request
    from kvplug.testing.sequence import ScoringLaws, WindowLaws, random_residents, residents
    from kvplug.testing.tiers import TierLaws
    from kvplug.testing.transfer import CodecLaws, cells, chunk

_WHERE = {
    "AttentionLaws": "attention",
    "Blocks": "prefix_cache",
    "BrokenLaw": "laws",
    "CodecLaws": "transfer",
    "FormatLaws": "format",
    "LifecycleLaws": "lifecycle",
    "PolicyLaws": "laws",
    "PrefixCacheLaws": "prefix_cache",
    "ReuseLaws": "reuse",
    "ScoringLaws": "sequence",
    "Shape": "format",
    "TierLaws": "tiers",
    "WindowLaws": "sequence",
    "candidate": "reuse",
    "cells": "transfer",
    "chunk": "transfer",
    "decode_rows": "attention",
    "each": "laws",
    "law": "laws",
    "placement": "reuse",
    "pressure": "lifecycle",
    "random_residents": "sequence",
    "released": "prefix_cache",
    "residents": "sequence",
    "reuse_request": "reuse",
    "vectors": "format",
}

__all__ = [
    "AttentionLaws",
    "Blocks",
    "BrokenLaw",
    "CodecLaws",
    "FormatLaws",
    "LifecycleLaws",
    "PolicyLaws",
    "PrefixCacheLaws",
    "ReuseLaws",
    "ScoringLaws",
    "Shape",
    "TierLaws",
    "WindowLaws",
    "candidate",
    "cells",
    "chunk",
    "decode_rows",
    "each",
    "law",
    "placement",
    "pressure",
    "random_residents",
    "released",
    "residents",
    "reuse_request",
    "vectors",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
