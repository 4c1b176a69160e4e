"""All metrics of kvplug, each once: what ``/metrics`` shows, and what its reference page is made
of.

To add one:

1. Define it here, in the part of its own, with `metric`. The name says the base unit; labels have
   closed sets of values. One that is there only with a setting says so (`Only`).
2. In the scheduler, give what knows it a method ``samples()`` that yields `Metric.of` of totals
   since the start (counters), of values now (gauges) and of `Distribution` (histograms). A kind
   has one already (`KindScheduler.samples`); anything else goes into `SchedulerHalf.measured`, a
   list. It is asked in the scheduler's thread, twice a second at most and once no request is
   under way; what fails is logged once, and not asked again.
3. In the API server, `kvplug.hosts.vllm.metrics.Exposition` makes the series of any metric.

Nothing else: increments, merging and transport, series at 0, the reference page and the checks of
names come from what is written here. A label's value that is not in its set is counted as
``other`` where the set has that, and left out where not.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from kvplug.contract import Kind
from kvplug.observe import causes
from kvplug.observe.causes import word
from kvplug.observe.latency import BASELINE, CLASSES, NOW, PERCENTILES
from kvplug.observe.metric import (
    MICROSECONDS,
    Metric,
    Only,
    Type,
    Values,
)
from kvplug.observe.misses import Again, MissCause
from kvplug.observe.misses import Source as BlockSource
from kvplug.request_options import Cause as OptionCause
from kvplug.shadow.states import ShadowResult, ShadowState

__all__ = ["Hook", "catalogue", "metric"]

_METRICS: dict[str, Metric] = {}

BY_POLICY: Mapping[str, tuple[str, ...] | Values] = {
    "kind": Values.KIND,
    "policy": Values.POLICY,
}


def metric(
    name: str,
    type: Type,
    help: str,
    labels: Mapping[str, tuple[str, ...] | Values] | None = None,
    *,
    group: str,
    kinds: tuple[Kind, ...] = (),
    only: Only | None = None,
    buckets: tuple[float, ...] = (),
    formula: str = "",
    seeded: bool = True,
) -> Metric:
    """Define a metric and put it into the catalogue.

    Raises:
        ValueError: There is one of that name.
    """
    if name in _METRICS:
        raise ValueError(f"there is a metric {name} already")
    made = Metric(
        name, type, help, dict(labels or {}), kinds, only, buckets, formula, seeded, group
    )
    _METRICS[name] = made
    return made


def catalogue() -> Mapping[str, Metric]:
    """All metrics by name, in the order of the reference."""
    return _METRICS


def words(of: type[StrEnum]) -> tuple[str, ...]:
    """The values of an enumeration as values of a label."""
    return tuple(word(value) for value in of)


# -- what runs -------------------------------------------------------------------------------------

RUNS = "What runs"

BUILD_INFO = metric(
    "kvplug_build_info",
    Type.GAUGE,
    "Versions of kvplug and vLLM; always 1.",
    {"version": Values.OPEN, "vllm": Values.OPEN},
    group=RUNS,
)
POLICY_INFO = metric(
    "kvplug_policy_info",
    Type.GAUGE,
    "A policy of the deployment, and whether what it does is exact; 1 for what it says it is.",
    {**BY_POLICY, "exact": ("true", "false")},
    group=RUNS,
)
ACTS = metric(
    "kvplug_policy_acts_total",
    Type.COUNTER,
    "Decisions of a policy: blocks evicted or given back, tokens written, checks, rows attended, "
    "chunks stored or used.",
    BY_POLICY,
    group=RUNS,
)
FALLBACKS = metric(
    "kvplug_policy_fallbacks_total",
    Type.COUNTER,
    "Failures of a policy after which the host did what it does without it.",
    BY_POLICY,
    group=RUNS,
)
RETIRED = metric(
    "kvplug_policy_retired",
    Type.GAUGE,
    "1 once a policy failed and the host's default took over for good or in part, else 0.",
    BY_POLICY,
    group=RUNS,
)
REPORTED = metric(
    "kvplug_policy_reported",
    Type.GAUGE,
    "What a policy counts by itself, under names and in units of its own; a value may go down.",
    {**BY_POLICY, "name": Values.OPEN},
    group=RUNS,
)
OPTIONS_REFUSED = metric(
    "kvplug_request_options_refused_total",
    Type.COUNTER,
    "Options of requests that were refused, by cause.",
    {"cause": words(OptionCause)},
    group=RUNS,
)


class Hook(StrEnum):
    """vLLM's calls of kvplug's connector in the scheduler."""

    NEW_REQUEST = "new_request"
    MATCHED = "matched"
    ALLOCATED = "allocated"
    STEP = "step"
    REPORT = "report"
    FINISHED = "finished"
    STATS = "stats"


STEPS = metric("kvplug_steps_total", Type.COUNTER, "Scheduler steps.", group=RUNS)
HOOK_SECONDS = metric(
    "kvplug_hook_seconds",
    Type.HISTOGRAM,
    "Time that one call of kvplug's connector takes in the scheduler.",
    {"hook": words(Hook)},
    group=RUNS,
    buckets=MICROSECONDS,
    formula="`rate(kvplug_hook_seconds_sum) / rate(kvplug_steps_total)`, summed over `hook`, is "
    "what kvplug takes of a step.",
)

# -- the pool --------------------------------------------------------------------------------------

POOL = "The pool"


class Source(StrEnum):
    """Where tokens of a prompt come from that are not computed."""

    PREFIX = "prefix"
    SEGMENT = "segment"
    TIER = "tier"


POOL_BLOCKS = metric(
    "kvplug_pool_blocks",
    Type.GAUGE,
    "Blocks of the pool: held by requests, free with cached KV in them, or free and empty.",
    {"state": ("held", "cached", "empty")},
    group=POOL,
    formula="`cached` is counted by looking through the pool, 4,096 blocks at a time, twice a "
    "second at most; `empty` is what is free and not `cached`.",
)
FRAGMENTATION = metric(
    "kvplug_pool_fragmentation_ratio",
    Type.GAUGE,
    "Share of free blocks that hold cached KV, and share of running requests' last blocks that no "
    "token fills.",
    {"of": ("free", "held")},
    group=POOL,
    formula="`free`: cached / (cached + empty). `held`: with *e* the tokens of each request in the "
    "latest step and *b* the tokens of a block, the sum of ⌈*e*/*b*⌉·*b* - *e*, divided by *b* "
    "times the blocks held.",
)
COMPRESSION = metric(
    "kvplug_compression_ratio",
    Type.GAUGE,
    "Bytes of KV without the policy, divided by bytes with it.",
    BY_POLICY,
    kinds=(Kind.SEQUENCE, Kind.FORMAT, Kind.TRANSFER),
    group=POOL,
    formula="A sequence policy: (blocks held + blocks that running requests have given back) / "
    "blocks held. A format: bytes of a token in the model's own type / in the format. A codec: "
    "chunks stored times their bytes in the pool / bytes stored.",
)
LOOKUP_TOKENS = metric(
    "kvplug_lookup_tokens_total",
    Type.COUNTER,
    "Tokens of prompts that were looked up, once for each request.",
    group=POOL,
)
HIT_TOKENS = metric(
    "kvplug_hit_tokens_total",
    Type.COUNTER,
    "Tokens of prompts that were not to be computed: found in the prefix cache, in stored "
    "segments or in tiers.",
    {"source": words(Source)},
    group=POOL,
    formula="`rate(kvplug_hit_tokens_total) / ignoring(source) group_left "
    "rate(kvplug_lookup_tokens_total)` is the hit rate. Counted as the request is let in; what "
    "cannot be loaded after that is computed, and counted as a failed load.",
)
SAVED_FLOPS = metric(
    "kvplug_saved_flops_total",
    Type.COUNTER,
    "Floating-point operations that prompts would have taken for the tokens they found.",
    {"source": words(Source)},
    group=POOL,
    formula="For *n* tokens from position *s*: 2·*W*·*n* + 4·*A*·(*s*·*n* + *n*(*n*+1)/2), with "
    "*W* the weights of all layers that a token is multiplied with (attention, and the MLP or "
    "the experts chosen) and *A* the sum over layers of query heads times head size. 0 where the "
    "model's config does not name its sizes. Embedding and output head are not counted.",
)
SAVED_READS = metric(
    "kvplug_saved_read_bytes_total",
    Type.COUNTER,
    "Bytes of KV that steps did not read from memory.",
    BY_POLICY,
    kinds=(Kind.SEQUENCE, Kind.FORMAT),
    group=POOL,
    formula="A sequence policy: at each step, the bytes of the blocks that requests under way have "
    "given back. A format: at each step, tokens that its requests had before it, times the bytes "
    "of a token in the model's own type less those in the format. Each as if it were alone, and "
    "as if every layer read all tokens.",
)
EVICTED_BLOCKS = metric(
    "kvplug_evicted_blocks_total",
    Type.COUNTER,
    "Cached blocks evicted as the policy chose.",
    {"policy": Values.POLICY},
    kinds=(Kind.PREFIX_CACHE,),
    group=POOL,
)
EVICTED_BYTES = metric(
    "kvplug_evicted_bytes_total",
    Type.COUNTER,
    "Bytes of KV in the cached blocks evicted, all layers.",
    {"policy": Values.POLICY},
    kinds=(Kind.PREFIX_CACHE,),
    group=POOL,
)
REORDERED_BLOCKS = metric(
    "kvplug_reordered_blocks_total",
    Type.COUNTER,
    "Blocks evicted that stock vLLM would have kept at that moment.",
    {"policy": Values.POLICY},
    kinds=(Kind.PREFIX_CACHE,),
    group=POOL,
)
HIT_BLOCKS = metric(
    "kvplug_hit_blocks_total",
    Type.COUNTER,
    "Cached blocks that requests matched, as the policy was told.",
    {"policy": Values.POLICY},
    kinds=(Kind.PREFIX_CACHE,),
    group=POOL,
)

# -- sequence policies -----------------------------------------------------------------------------

SEQUENCE = "Running requests that give blocks back"
OF_SEQUENCE = {"policy": Values.POLICY}

FREED_BLOCKS = metric(
    "kvplug_freed_blocks_total",
    Type.COUNTER,
    "Blocks that running requests gave back.",
    OF_SEQUENCE,
    kinds=(Kind.SEQUENCE,),
    group=SEQUENCE,
)
FREED_BYTES = metric(
    "kvplug_freed_bytes_total",
    Type.COUNTER,
    "Bytes of KV in the blocks that running requests gave back, all layers.",
    OF_SEQUENCE,
    kinds=(Kind.SEQUENCE,),
    group=SEQUENCE,
)
SEQUENCE_REQUESTS = metric(
    "kvplug_sequence_requests_total",
    Type.COUNTER,
    "Requests that gave back a block, that asked to keep every token and do, and that asked and "
    "could not.",
    {**OF_SEQUENCE, "result": ("shortened", "exempt", "exempt_refused")},
    kinds=(Kind.SEQUENCE,),
    group=SEQUENCE,
)
SEQUENCE_ROWS = metric(
    "kvplug_sequence_rows_total",
    Type.COUNTER,
    "Attention rows that workers compacted, and rows that splitting prefill chunks added.",
    {**OF_SEQUENCE, "what": ("compacted", "split")},
    kinds=(Kind.SEQUENCE,),
    group=SEQUENCE,
)
SCORED_EVICTIONS = metric(
    "kvplug_scored_evictions_total",
    Type.COUNTER,
    "Evictions of tokens by a policy's scores, and decisions of a layer by position because the "
    "policy had failed.",
    {**OF_SEQUENCE, "by": ("score", "position")},
    kinds=(Kind.SEQUENCE,),
    group=SEQUENCE,
)
RECALLED_TOKENS = metric(
    "kvplug_recalled_tokens_total",
    Type.COUNTER,
    "Evicted tokens that came back from host memory, for each layer and KV head.",
    OF_SEQUENCE,
    kinds=(Kind.SEQUENCE,),
    group=SEQUENCE,
)
RECALL_SECONDS = metric(
    "kvplug_recall_seconds_total",
    Type.COUNTER,
    "Time that workers spent on decisions with evicted tokens kept in host memory.",
    OF_SEQUENCE,
    kinds=(Kind.SEQUENCE,),
    group=SEQUENCE,
)

# -- formats and attention -------------------------------------------------------------------------

STORED = "Formats and approximate attention"

FORMAT_TOKENS = metric(
    "kvplug_format_written_tokens_total",
    Type.COUNTER,
    "Tokens written in a format, once for each layer.",
    {"policy": Values.POLICY},
    kinds=(Kind.FORMAT,),
    group=STORED,
)
TOKEN_BYTES = metric(
    "kvplug_token_bytes",
    Type.GAUGE,
    "Bytes of a token's KV in all layers of a rank, in the format and in the model's own type.",
    {"policy": Values.POLICY, "stored": ("format", "stock")},
    kinds=(Kind.FORMAT,),
    group=STORED,
)
ATTENTION_REQUESTS = metric(
    "kvplug_attention_requests_total",
    Type.COUNTER,
    "Requests that asked for approximate attention and have it.",
    {"policy": Values.POLICY},
    kinds=(Kind.ATTENTION,),
    group=STORED,
)
ATTENTION_ROWS = metric(
    "kvplug_attention_rows_total",
    Type.COUNTER,
    "Decode rows that the policy attended, once for each layer.",
    {"policy": Values.POLICY},
    kinds=(Kind.ATTENTION,),
    group=STORED,
)

# -- reuse -----------------------------------------------------------------------------------------

REUSE = "Reuse"
OF_REUSE = (Kind.REUSE,)
GUARDED = Only("`guard`", lambda deployment: deployment.guard is not None)

SEGMENTS_STORED = metric(
    "kvplug_segments_stored_total",
    Type.COUNTER,
    "Segments that workers stored.",
    kinds=OF_REUSE,
    group=REUSE,
)
SEGMENTS = metric(
    "kvplug_segments",
    Type.GAUGE,
    "Segments in the store, by where they are.",
    {"state": ("saving", "memory", "disk")},
    kinds=OF_REUSE,
    group=REUSE,
)
SEGMENT_BYTES = metric(
    "kvplug_segment_bytes",
    Type.GAUGE,
    "Bytes of stored segments.",
    {"medium": ("memory", "disk")},
    kinds=OF_REUSE,
    group=REUSE,
)
SEGMENT_EVENTS = metric(
    "kvplug_segment_events_total",
    Type.COUNTER,
    "What happened to segments of the store.",
    {
        "event": (
            *("saved", "known", "replaced", "full_variants", "no_room", "written", "fetched"),
            *("prefetched", "dropped", "deleted", "expired", "invalidated", "reset", "stale"),
        )
    },
    kinds=OF_REUSE,
    group=REUSE,
)
SEGMENT_ERRORS = metric(
    "kvplug_segment_errors_total",
    Type.COUNTER,
    "Segments that could not be written or read, by cause.",
    {"cause": causes.OF_SEGMENTS},
    kinds=OF_REUSE,
    group=REUSE,
)
REUSE_REQUESTS = metric(
    "kvplug_reuse_requests_total",
    Type.COUNTER,
    "Requests that took stored tokens, by whether that was exact.",
    {"exact": ("true", "false")},
    kinds=OF_REUSE,
    group=REUSE,
)
REUSE_TOKENS = metric(
    "kvplug_reuse_tokens_total",
    Type.COUNTER,
    "Stored tokens that requests took: exact ones, others, those re-rotated to another position, "
    "those that workers loaded, those a check corrected, and tokens computed again among them.",
    {"what": ("exact", "approximate", "shifted", "loaded", "corrected", "recomputed")},
    kinds=OF_REUSE,
    group=REUSE,
    formula="`exact` and `approximate` are all that was taken; the others are counted beside them.",
)
REUSE_CHECKS = metric(
    "kvplug_reuse_checks_total",
    Type.COUNTER,
    "Stored segments that a check judged.",
    {"policy": Values.POLICY, "verdict": ("allowed", "refused")},
    kinds=OF_REUSE,
    group=REUSE,
)
REUSE_REFUSED = metric(
    "kvplug_reuse_refused_total",
    Type.COUNTER,
    "Stored segments, and requests, that reuse did not serve, by cause.",
    {"cause": causes.OF_REUSE},
    kinds=OF_REUSE,
    group=REUSE,
)
PLAN_SECONDS = metric(
    "kvplug_reuse_plan_seconds",
    Type.HISTOGRAM,
    "Time to find what a request can take of stored segments, checks included.",
    kinds=OF_REUSE,
    group=REUSE,
    buckets=MICROSECONDS,
)
CHECK_SECONDS = metric(
    "kvplug_check_seconds",
    Type.HISTOGRAM,
    "Time that a check of the chain took for one stored segment.",
    {"stage": Values.POLICY},
    kinds=OF_REUSE,
    group=REUSE,
    buckets=MICROSECONDS,
)
GUARD_ANSWERS = metric(
    "kvplug_guard_answers_total",
    Type.COUNTER,
    "Answers that the guard watched: exact ones it learned from, approximate ones compared with "
    "them or not, those that drifted, and requests it could not watch.",
    {"result": ("exact", "compared", "uncompared", "drifted", "unwatched")},
    kinds=OF_REUSE,
    only=GUARDED,
    group=REUSE,
)
BREAKERS = metric(
    "kvplug_guard_breakers",
    Type.GAUGE,
    "Families of requests, by the state of their circuit breaker.",
    {"state": ("closed", "open", "half_open")},
    kinds=OF_REUSE,
    only=GUARDED,
    group=REUSE,
)
BREAKER_CHANGES = metric(
    "kvplug_guard_breaker_changes_total",
    Type.COUNTER,
    "Times that a breaker opened, closed, or let a trial through.",
    {"change": ("opened", "closed", "trial")},
    kinds=OF_REUSE,
    only=GUARDED,
    group=REUSE,
)

# -- tiers -----------------------------------------------------------------------------------------

TIERS = "Tiers"
OF_TIERS = (Kind.TIERS,)
TIER = {"tier": Values.TIER}

TIER_DOWN = metric(
    "kvplug_tier_down",
    Type.GAUGE,
    "1 while a tier is left alone after failures, else 0.",
    TIER,
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_BYTES = metric(
    "kvplug_tier_bytes", Type.GAUGE, "Bytes in use in a tier.", TIER, kinds=OF_TIERS, group=TIERS
)
TIER_CAPACITY = metric(
    "kvplug_tier_capacity_bytes",
    Type.GAUGE,
    "Bytes that a tier may hold; 0 for no limit here.",
    TIER,
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_CHUNKS = metric(
    "kvplug_tier_chunks", Type.GAUGE, "Chunks in a tier.", TIER, kinds=OF_TIERS, group=TIERS
)
TIER_STORED = metric(
    "kvplug_tier_stored_chunks_total",
    Type.COUNTER,
    "Chunks stored in a tier, moves into it included.",
    TIER,
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_STORED_BYTES = metric(
    "kvplug_tier_stored_bytes_total",
    Type.COUNTER,
    "Bytes stored in a tier, as its codec wrote them.",
    TIER,
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_LOADED = metric(
    "kvplug_tier_loaded_chunks_total",
    Type.COUNTER,
    "Chunks that requests loaded from a tier.",
    TIER,
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_LOADED_BYTES = metric(
    "kvplug_tier_loaded_bytes_total",
    Type.COUNTER,
    "Bytes that requests loaded from a tier.",
    TIER,
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_MOVED = metric(
    "kvplug_tier_moved_chunks_total",
    Type.COUNTER,
    "Chunks of a tier that arrived in another one.",
    {**TIER, "action": ("demote", "copy", "promote")},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_MOVED_BYTES = metric(
    "kvplug_tier_moved_bytes_total",
    Type.COUNTER,
    "Bytes, in the tier they came from, of chunks that arrived in another one.",
    {**TIER, "action": ("demote", "copy", "promote")},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_GONE = metric(
    "kvplug_tier_gone_chunks_total",
    Type.COUNTER,
    "Chunks that a tier holds no longer: displaced by others, dropped by the lifecycle policy, "
    "lost, or not stored.",
    {**TIER, "why": ("displaced", "dropped", "lost", "failed")},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_ERRORS = metric(
    "kvplug_tier_errors_total",
    Type.COUNTER,
    "Failures of a tier, and chunks that could not be stored or are gone, by cause.",
    {**TIER, "cause": causes.OF_TIERS},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_QUEUED = metric(
    "kvplug_tier_queued_bytes",
    Type.GAUGE,
    "Bytes that wait to be read from a tier or written to it.",
    {**TIER, "direction": ("read", "write")},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_BANDWIDTH = metric(
    "kvplug_tier_bandwidth_bytes_per_second",
    Type.GAUGE,
    "What a tier's line was measured to carry lately.",
    {**TIER, "direction": ("read", "write")},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_LOOKUPS = metric(
    "kvplug_tier_lookup_chunks_total",
    Type.COUNTER,
    "Chunks that requests asked tiers for after what the pool held.",
    {"result": ("found", "missed")},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_RETURNED = metric(
    "kvplug_tier_returned_chunks_total",
    Type.COUNTER,
    "Chunks asked for again after all tiers had given them up or turned them away.",
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_REFUSED = metric(
    "kvplug_tier_refused_total",
    Type.COUNTER,
    "Requests that took no part in tiers, and loads that failed, by cause.",
    {"cause": causes.OF_TIERS},
    kinds=OF_TIERS,
    group=TIERS,
)
TIER_LOADS = metric(
    "kvplug_tier_loads_total",
    Type.COUNTER,
    "Runs of chunks that requests loaded, and that could not be loaded and were computed.",
    {"result": ("loaded", "failed")},
    kinds=OF_TIERS,
    group=TIERS,
)
LIFECYCLE_DECLINED = metric(
    "kvplug_lifecycle_declined_chunks_total",
    Type.COUNTER,
    "Chunks that left the pool and were stored nowhere.",
    kinds=OF_TIERS,
    group=TIERS,
)
LIFECYCLE_COMPUTED = metric(
    "kvplug_lifecycle_computed_tokens_total",
    Type.COUNTER,
    "Tokens that tiers held and the lifecycle policy had computed all the same.",
    kinds=OF_TIERS,
    group=TIERS,
)
LOADING = metric(
    "kvplug_loading_requests",
    Type.GAUGE,
    "Requests that wait for KV on its way into the pool.",
    {"kind": Values.KIND},
    kinds=(Kind.REUSE, Kind.TIERS),
    group=TIERS,
)
WAITS = metric(
    "kvplug_waits_total",
    Type.COUNTER,
    "Times that a request was asked to wait for an answer about stored KV.",
    {"kind": Values.KIND},
    kinds=(Kind.REUSE, Kind.TIERS),
    group=TIERS,
)

# -- why prompts missed ----------------------------------------------------------------------------

MISSES = "Why prompts missed"
OBSERVED = Only("there unless `observe: {misses: false}`", lambda of: of.observe.misses)

PROMPT_BLOCKS = metric(
    "kvplug_prompt_blocks_total",
    Type.COUNTER,
    "Full blocks of prompts when their requests were first admitted, by where they came from.",
    {"result": words(BlockSource)},
    only=OBSERVED,
    group=MISSES,
    formula="`missed` is the sum of `kvplug_prompt_missed_blocks_total` over `cause`.",
)
PROMPT_MISSED_BLOCKS = metric(
    "kvplug_prompt_missed_blocks_total",
    Type.COUNTER,
    "Full blocks of prompts that had to be computed, by why.",
    {"cause": words(MissCause)},
    only=OBSERVED,
    group=MISSES,
)
RECOMPUTED_BLOCKS = metric(
    "kvplug_recomputed_blocks_total",
    Type.COUNTER,
    "Full blocks computed again by requests that had been admitted before: after a preemption, or "
    "a load that failed.",
    {"cause": words(Again)},
    only=OBSERVED,
    group=MISSES,
)
THRASHED_BLOCKS = metric(
    "kvplug_thrashed_blocks_total",
    Type.COUNTER,
    "Blocks computed again after fewer evictions than the pool has blocks.",
    only=OBSERVED,
    group=MISSES,
)
PREFIX_EVICTIONS = metric(
    "kvplug_prefix_evictions_total",
    Type.COUNTER,
    "Cached blocks that lost their content, whatever the order.",
    only=OBSERVED,
    group=MISSES,
)
EVENTS_LOST = metric(
    "kvplug_events_lost_total",
    Type.COUNTER,
    "Events that could not be written to the event log.",
    only=Only("there with `observe: {events: ...}`", lambda of: of.observe.events is not None),
    group=MISSES,
)

# -- latency, energy and drift ---------------------------------------------------------------------

LATENCY = "Latency, energy and drift"

_LATENCY_LABELS = {
    "percentile": tuple(str(one) for one in PERCENTILES),
    "window": (NOW, BASELINE),
    "prompt": CLASSES,
}
TTFT_SECONDS = metric(
    "kvplug_ttft_seconds",
    Type.GAUGE,
    "Percentile of the time from a request's arrival to its first token, by the length of its "
    "prompt; 0 where a window has nothing.",
    _LATENCY_LABELS,
    group=LATENCY,
    formula="`now` is the last `observe.latency_window` seconds in which requests ran, `baseline` "
    "the first `observe.baseline_requests` requests, once they are that many.",
)
TPOT_SECONDS = metric(
    "kvplug_tpot_seconds",
    Type.GAUGE,
    "Percentile of the time per output token after the first, by the length of the prompt; 0 where "
    "a window has nothing.",
    _LATENCY_LABELS,
    group=LATENCY,
)
LATENCY_REQUESTS = metric(
    "kvplug_latency_requests",
    Type.GAUGE,
    "First tokens that the percentiles of a window are of.",
    {"window": (NOW, BASELINE), "prompt": CLASSES},
    group=LATENCY,
)
ENERGY_JOULES = metric(
    "kvplug_energy_joules_total",
    Type.COUNTER,
    "Energy that the engine's GPUs on this machine have used since it started, whole boards; there "
    "where NVML counts it.",
    group=LATENCY,
    seeded=False,
    formula="`rate(kvplug_energy_joules_total[5m]) / on (engine, model_name) "
    "rate(vllm:generation_tokens_total[5m])` is what a generated token takes.",
)
WITH_GUARD = Only("with `guard`", lambda deployment: deployment.guard is not None)
DRIFT_ENTROPY = metric(
    "kvplug_drift_entropy_ratio",
    Type.HISTOGRAM,
    "Distance of a compared answer's mean entropy from the exact answers over the same text, as a "
    "ratio of theirs; the farthest of its texts.",
    kinds=(Kind.REUSE,),
    only=WITH_GUARD,
    group=LATENCY,
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
    formula="`max(0, |x - mean| - 2 s) / max(mean, 0.05)`, with mean and standard deviation of the "
    "exact answers.",
)
DRIFT_LOGPROB = metric(
    "kvplug_drift_logprob_nats",
    Type.HISTOGRAM,
    "The same distance of its mean log-probability of the likeliest token, in nats.",
    kinds=(Kind.REUSE,),
    only=WITH_GUARD,
    group=LATENCY,
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)

# -- the shadow ------------------------------------------------------------------------------------

SHADOW = "Answers given again exactly"

_SHADOWED = Only(
    "`guard.shadow`",
    lambda deployment: getattr(deployment.guard, "shadow", None) is not None,
)
SHADOW_STATE = metric(
    "kvplug_shadow_state",
    Type.GAUGE,
    "1 for how much the guard lets be approximated now, 0 for the other states.",
    {"state": words(ShadowState)},
    only=_SHADOWED,
    group=SHADOW,
)
SHADOW_REQUESTS = metric(
    "kvplug_shadow_requests_total",
    Type.COUNTER,
    "Answers that were watched, by what became of them.",
    {"result": words(ShadowResult)},
    only=_SHADOWED,
    group=SHADOW,
)
SHADOW_DIVERGENCE = metric(
    "kvplug_shadow_divergence_ratio",
    Type.HISTOGRAM,
    "Divergence of an approximate answer from the exact one: the mean total variation distance of "
    "their next-token distributions.",
    only=_SHADOWED,
    group=SHADOW,
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
)
SHADOW_BOUND = metric(
    "kvplug_shadow_bound_ratio",
    Type.GAUGE,
    "Largest mean divergence that the guard accepts: `max_divergence`.",
    only=_SHADOWED,
    group=SHADOW,
)
SHADOW_EVIDENCE = metric(
    "kvplug_shadow_evidence_ratio",
    Type.GAUGE,
    "Evidence that the mean divergence is above the bound, as a share of what makes requests "
    "exact; 1 while they are.",
    only=_SHADOWED,
    group=SHADOW,
)
SHADOW_MADE_EXACT = metric(
    "kvplug_shadow_made_exact_total",
    Type.COUNTER,
    "Requests that would have been approximated and that the guard made exact.",
    only=_SHADOWED,
    group=SHADOW,
)
SHADOW_TOKENS = metric(
    "kvplug_shadow_computed_tokens_total",
    Type.COUNTER,
    "Tokens computed for the guard's shadows, and for all other requests.",
    {"of": ("shadows", "requests")},
    only=_SHADOWED,
    group=SHADOW,
    formula='`kvplug_shadow_computed_tokens_total{of="shadows"} / ignoring(of) '
    'kvplug_shadow_computed_tokens_total{of="requests"}` is the extra work.',
)

# -- the page --------------------------------------------------------------------------------------
