"""The kinds of a deployment on a worker, and the order in which their layer steps are composed.

A kind is added by one file with its `KindWorker`, and one entry in each list here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvplug.contract import Kind, ScoringPolicy
from kvplug.deployment import Deployment
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.worker.attention import AttentionWorker, Served
from kvplug.hosts.vllm.worker.format import FormatRows, FormatTokens, FormatWorker
from kvplug.hosts.vllm.worker.in_force import InForce
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.reuse import ReuseWorker, WatchedRows
from kvplug.hosts.vllm.worker.sequence import Phases, ScoringWorker, SecondRunner
from kvplug.hosts.vllm.worker.state import WorkerState, worker_state
from kvplug.hosts.vllm.worker.steps import MetadataStep
from kvplug.hosts.vllm.worker.tiers import TiersWorker
from kvplug.hosts.vllm.worker.window import Compaction, WindowWorker

Make = Callable[[Deployment, Any, WorkerState], KindWorker | None]
"""``make(deployment, vllm_config, state)``: a kind, or None where the deployment has none."""


def _sequence(deployment: Deployment, config: Any, state: WorkerState) -> KindWorker | None:
    policy = engine.sequence_policy(deployment, config)
    if policy is None:
        return None
    origin = _origin(deployment, Kind.SEQUENCE)
    if isinstance(policy, ScoringPolicy):
        second = SecondRunner(config, state.rows) if config.use_v2_model_runner else None
        return _built(deployment, Kind.SEQUENCE, ScoringWorker, policy, origin, second)
    return _built(deployment, Kind.SEQUENCE, WindowWorker, policy, origin, state.rows)


def _reuse(deployment: Deployment, config: Any, state: WorkerState) -> KindWorker | None:
    if deployment.choice(Kind.REUSE) is None:
        return None
    return ReuseWorker(deployment, config, state, _origin(deployment, Kind.REUSE))


def _tiers(deployment: Deployment, config: Any, state: WorkerState) -> KindWorker | None:
    if not deployment.tiers:
        return None
    return TiersWorker(deployment, config, _origin(deployment, Kind.TIERS))


def _attention(deployment: Deployment, config: Any, state: WorkerState) -> KindWorker | None:
    policy = engine.attention_policy(deployment, config)
    if policy is None:
        return None
    return AttentionWorker(policy, _origin(deployment, Kind.ATTENTION), state.rows)


def _format(deployment: Deployment, config: Any, state: WorkerState) -> KindWorker | None:
    policy = engine.format_policy(deployment, config)
    if policy is None:
        return None
    second = bool(config.use_v2_model_runner)
    most = int(config.scheduler_config.max_num_seqs) if second else None
    origin = _origin(deployment, Kind.FORMAT)
    return _built(deployment, Kind.FORMAT, FormatWorker, policy, origin, state.rows, most)


def _built(
    deployment: Deployment, kind: Kind, make: Callable[..., KindWorker], *arguments: Any
) -> KindWorker:
    """Make a kind that asks its policy about layers."""
    choice = deployment.choice(kind)
    assert choice is not None
    return engine.at_start(deployment, choice, make, *arguments)


def _origin(deployment: Deployment, kind: Kind) -> Origin:
    choice = deployment.choice(kind)
    assert choice is not None
    return deployment.source, choice.key


KINDS: tuple[Make, ...] = (
    # Attends a step in parts, so whatever is below sees one part at a time.
    _sequence,
    # Only watches queries, keys and values, as the model computed them.
    _reuse,
    # Has no step in a layer.
    _tiers,
    # Takes some rows away from the attention below, and reads pages in whatever bytes.
    _attention,
    # Replaces the backend's own pages and attention, so nothing of ours is below it.
    _format,
)
"""Kinds from the outermost attention step to the one next to the backend. Their KV-cache specs are
made in the reverse order: a format sets the bytes of a page, and the others build on that."""

METADATA_STEPS: tuple[type[MetadataStep], ...] = (
    # Counts queries in the step's own rows.
    WatchedRows,
    # Finds rows by slot, and builds the others apart, as if they were the whole step.
    Served,
    # Counts tokens in the step's own rows too, before the rows are split.
    FormatTokens,
    # Each shortens rows or splits them; a deployment has one of them.
    Compaction,
    Phases,
    InForce,
    # Notes the rows as the backend gets them, after they were split.
    FormatRows,
)
"""Steps of metadata builders from the head of the chain to the one next to the backend."""


def worker_kinds(deployment: Deployment, vllm_config: Any) -> tuple[KindWorker, ...]:
    """Return a deployment's kinds on this worker, made once per engine, in the order of `KINDS`."""
    state = worker_state(vllm_config)
    if state.kinds is None:
        made = (make(deployment, vllm_config, state) for make in KINDS)
        state.kinds = tuple(kind for kind in made if kind is not None)
    return state.kinds
