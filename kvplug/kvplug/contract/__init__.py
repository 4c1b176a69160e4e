"""The contract between policies and hosts: one file a kind, and the views they receive."""

from kvplug.contract.attention import AttentionPolicy, DecodeRows, Gather
from kvplug.contract.format import (
    AttendBatch,
    FormatOptions,
    FormatPolicy,
    PageField,
    PageLayout,
    ReadBack,
    Recent,
    WriteBatch,
)
from kvplug.contract.lifecycle import Action, LifecyclePolicy, Move, Pressure, TierView
from kvplug.contract.policy import (
    ALL_FEATURES,
    EngineView,
    Feature,
    Kind,
    LayerView,
    Policy,
    PolicyOptions,
    PolicyReport,
    Rope,
)
from kvplug.contract.prefix_cache import BlockFact, PrefixCachePolicy, Released, RequestView
from kvplug.contract.reuse import (
    Candidate,
    Fingerprint,
    Placement,
    ReuseCheck,
    ReuseRequest,
    Verdict,
)
from kvplug.contract.sequence import (
    ResidentView,
    ScoringOptions,
    ScoringPolicy,
    SequencePolicy,
    Window,
    layer_range,
)
from kvplug.contract.transfer import CorruptPayload, TransferCodec

BASES: dict[Kind, type[Policy]] = {
    Kind.PREFIX_CACHE: PrefixCachePolicy,
    Kind.SEQUENCE: SequencePolicy,
    Kind.FORMAT: FormatPolicy,
    Kind.REUSE: ReuseCheck,
    Kind.ATTENTION: AttentionPolicy,
    Kind.TRANSFER: TransferCodec,
    Kind.LIFECYCLE: LifecyclePolicy,
}

__all__ = [
    "ALL_FEATURES",
    "BASES",
    "Action",
    "AttendBatch",
    "AttentionPolicy",
    "BlockFact",
    "Candidate",
    "CorruptPayload",
    "DecodeRows",
    "EngineView",
    "Feature",
    "Fingerprint",
    "FormatOptions",
    "FormatPolicy",
    "Gather",
    "Kind",
    "LayerView",
    "LifecyclePolicy",
    "Move",
    "PageField",
    "PageLayout",
    "Placement",
    "Policy",
    "PolicyOptions",
    "PolicyReport",
    "PrefixCachePolicy",
    "Pressure",
    "ReadBack",
    "Recent",
    "Released",
    "RequestView",
    "ResidentView",
    "ReuseCheck",
    "ReuseRequest",
    "Rope",
    "ScoringOptions",
    "ScoringPolicy",
    "SequencePolicy",
    "TierView",
    "TransferCodec",
    "Verdict",
    "Window",
    "WriteBatch",
    "layer_range",
]
