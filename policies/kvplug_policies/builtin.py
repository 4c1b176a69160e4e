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
from kvplug_policies.lifecycle.everything import Everything
from kvplug_policies.lifecycle.ladder import Ladder
from kvplug_policies.lifecycle.watermarks import Watermarks
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
from kvplug_policies.tiers.device import DeviceMemory
from kvplug_policies.tiers.disk import Disk
from kvplug_policies.tiers.host import HostMemory
from kvplug_policies.tiers.mooncake import Mooncake
from kvplug_policies.tiers.redis import Redis
from kvplug_policies.tiers.s3 import S3
from kvplug_policies.transfer.cachegen import CacheGen
from kvplug_policies.transfer.fp8 import Fp8Codec
from kvplug_policies.transfer.int4 import Int4Codec
from kvplug_policies.transfer.int8 import Int8Codec
from kvplug_policies.transfer.kvtc import Kvtc
from kvplug_policies.transfer.lossless import Lossless
from kvplug_policies.transfer.raw import Raw

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
    DeviceMemory,
    HostMemory,
    Disk,
    Redis,
    S3,
    Mooncake,
    Raw,
    Everything,
    Ladder,
    Watermarks,
    Lossless,
    Fp8Codec,
    Int8Codec,
    Int4Codec,
    CacheGen,
    Kvtc,
)


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    for policy in BUILTIN:
        registry.add(policy)
