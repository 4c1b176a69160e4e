"""The built-in plugin: registers every policy of this package."""

from __future__ import annotations

from kvplug import hookimpl
from kvplug.registry import PolicyRegistry
from kvplug_policies.format.adaptive import Adaptive
from kvplug_policies.format.fp8 import Fp8
from kvplug_policies.format.hack import Hack
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.int8 import Int8
from kvplug_policies.format.kivi import Kivi
from kvplug_policies.format.lowrank import LowRank
from kvplug_policies.format.merge_heads import MergeHeads
from kvplug_policies.format.mixed import Mixed
from kvplug_policies.format.plain import Plain
from kvplug_policies.format.residual import Residual
from kvplug_policies.format.rotated import Rotated
from kvplug_policies.prefix_cache.arc import Arc
from kvplug_policies.prefix_cache.fifo import Fifo
from kvplug_policies.prefix_cache.foresight import Foresight
from kvplug_policies.prefix_cache.gdsf import Gdsf
from kvplug_policies.prefix_cache.lfu import Lfu
from kvplug_policies.prefix_cache.lirs import Lirs
from kvplug_policies.prefix_cache.lru import Lru
from kvplug_policies.prefix_cache.record import Record
from kvplug_policies.prefix_cache.s3fifo import S3Fifo
from kvplug_policies.prefix_cache.sieve import Sieve
from kvplug_policies.prefix_cache.slru import Slru
from kvplug_policies.prefix_cache.tinylfu import TinyLfu
from kvplug_policies.prefix_cache.tree import Tree
from kvplug_policies.reuse.mask import Mask
from kvplug_policies.reuse.position import Position
from kvplug_policies.reuse.structure import Structure
from kvplug_policies.sequence.ada_kv import AdaKV
from kvplug_policies.sequence.expected_attention import ExpectedAttention
from kvplug_policies.sequence.h2o import H2O
from kvplug_policies.sequence.keydiff import KeyDiff
from kvplug_policies.sequence.knorm import Knorm
from kvplug_policies.sequence.morph_kv import MorphKV
from kvplug_policies.sequence.paged_eviction import PagedEviction
from kvplug_policies.sequence.pyramidkv import PyramidKV
from kvplug_policies.sequence.r_kv import RKV
from kvplug_policies.sequence.sink_window import SinkWindow
from kvplug_policies.sequence.smart_window import SmartWindow
from kvplug_policies.sequence.snapkv import SnapKV
from kvplug_policies.sequence.tova import Tova

BUILTIN = (
    Arc,
    Foresight,
    Gdsf,
    Lfu,
    Lirs,
    S3Fifo,
    Sieve,
    Slru,
    TinyLfu,
    Tree,
    Fifo,
    Lru,
    Record,
    SinkWindow,
    H2O,
    KeyDiff,
    Knorm,
    SnapKV,
    Tova,
    AdaKV,
    ExpectedAttention,
    MorphKV,
    PagedEviction,
    PyramidKV,
    RKV,
    SmartWindow,
    Adaptive,
    Fp8,
    Int8,
    Int4,
    Kivi,
    Rotated,
    Hack,
    Plain,
    LowRank,
    MergeHeads,
    Residual,
    Mixed,
    Structure,
    Position,
    Mask,
)


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    for policy in BUILTIN:
        registry.add(policy)
