"""What `kvplug top` and the page `/kvplug` show of an engine: one snapshot of it.

A snapshot crosses from the engine's process to the API server's and from there to whoever watches.
Each of them reads it with `Snapshot.parse`, which takes nothing on trust: sizes, types and numbers
are checked, and the pool's map is inflated no further than it may be long.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from kvplug.errors import KVPlugError
from kvplug.plain_text import one_line

__all__ = [
    "MAX_BLOCKS",
    "MAX_BYTES",
    "MAX_REQUESTS",
    "VERSION",
    "BlockState",
    "Breakers",
    "Facts",
    "LayerShare",
    "LiveState",
    "Outcome",
    "PolicyState",
    "Rates",
    "RequestSpan",
    "Snapshot",
    "TierState",
    "Totals",
    "UnreadableSnapshot",
    "counted",
    "decode_map",
    "encode_map",
    "outcomes",
    "plain",
    "runs",
    "state_bytes",
]

VERSION = 1
"""Of the snapshot's form; another one is refused."""

MAX_BYTES = 8 << 20
"""Longest snapshot as JSON."""

MAX_BLOCKS = 1 << 22
"""Blocks that a map shows; of a larger pool the first."""

MAX_REQUESTS = 256
"""Requests that a snapshot lists; the others are counted."""

MAX_RUNS = 64
"""Resident spans of one request that are told apart; the last one takes in the rest."""

TEXT = 160
"""Longest name, in characters."""


class BlockState(IntEnum):
    """State of a block of the pool.

    Attributes:
        EMPTY: Free, without content.
        CACHED: Free, with content that the prefix cache may still give out.
        HELD: Held by a request that holds all of its text.
        PARTLY_EVICTED: Held by a request that has given blocks back.
        APPROXIMATE: Held by a request, from the first token on whose KV is approximate.
        LOADING: Held by a request that waits for stored KV to arrive in it.
        RESERVED: Never given out: the null block.
    """

    EMPTY = 0
    CACHED = 1
    HELD = 2
    PARTLY_EVICTED = 3
    APPROXIMATE = 4
    LOADING = 5
    RESERVED = 6

    @property
    def label(self) -> str:
        """The state in words."""
        return _LABELS[self]


_LABELS = {
    BlockState.EMPTY: "free, empty",
    BlockState.CACHED: "free, cached",
    BlockState.HELD: "held",
    BlockState.PARTLY_EVICTED: "held, partly evicted",
    BlockState.APPROXIMATE: "held, approximate",
    BlockState.LOADING: "loading",
    BlockState.RESERVED: "reserved",
}

Text = Annotated[str, StringConstraints(max_length=TEXT)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RequestSpan(_Part):
    """A request under way.

    Attributes:
        id: Its id, as a client may have chosen it.
        status: ``running``, ``waiting``, ``loading`` or ``preempted``.
        prompt: Tokens of its prompt.
        computed: Tokens whose KV is computed or loaded.
        output: Tokens generated.
        hit: Tokens of its prompt that the prefix cache had.
        loaded: Tokens of its prompt that segments or tiers had.
        table: Blocks that its text takes so far, in the first KV-cache group.
        held: Those of them that it holds.
        resident: Runs of blocks of the table that it holds, as ``(first, after the last)``.
        approximate_from: First token whose KV is approximate, or None.
        preempted: Times it was preempted.
        age: Seconds since it arrived.
    """

    id: Text
    status: Text
    prompt: Count
    computed: Count
    output: Count
    hit: Count = 0
    loaded: Count = 0
    table: Count = 0
    held: Count = 0
    resident: Annotated[tuple[tuple[Count, Count], ...], Field(max_length=MAX_RUNS)] = ()
    approximate_from: Count | None = None
    preempted: Count = 0
    age: Amount = 0.0


class PolicyState(_Part):
    """A policy of the deployment.

    Attributes:
        kind: Its kind.
        name: Its name.
        exact: Whether its answers are those of the stock engine.
        acted: Decisions it made.
        errors: Times it failed.
        counters: Its counters.
    """

    kind: Text
    name: Text
    exact: bool
    acted: Count = 0
    errors: Count = 0
    counters: Annotated[dict[Text, Amount], Field(max_length=256)] = Field(default_factory=dict)


class TierState(_Part):
    """A tier.

    Attributes:
        name: Its name.
        used: Bytes in use.
        capacity: Bytes it may hold; 0 for no limit here.
        chunks: Chunks it holds.
        exact: False if its codec changes KV.
        shared: True if other engines see it.
        durable: True if it outlives the process.
        down: True if it failed lately and is left alone for a while.
        read: Bytes a second measured towards the accelerator; 0 before the first.
        write: The same away from it.
    """

    name: Text
    used: Count = 0
    capacity: Count = 0
    chunks: Count = 0
    exact: bool = True
    shared: bool = False
    durable: bool = False
    down: bool = False
    read: Amount = 0.0
    write: Amount = 0.0


class Outcome(_Part):
    """How often something looked for was found, or why not.

    Attributes:
        level: Where it was looked for: ``prefix cache``, ``segments``, a tier, or the guard's
            shadow with its state.
        cause: ``hit``, or why it was not used.
        count: How often, in the unit.
        unit: ``tokens``, ``missed blocks``, ``chunks``, ``refusals``, ``failures`` or ``answers``.
    """

    level: Text
    cause: Text
    count: Count
    unit: Text


class LayerShare(_Part):
    """What running requests hold in one layer of the model.

    Attributes:
        layer: Its index.
        token_bytes: Bytes that a token takes in it.
        table: Blocks that the requests' text takes.
        held: Those of them that are held.
    """

    layer: Count
    token_bytes: Count
    table: Count = 0
    held: Count = 0


class Breakers(_Part):
    """Families of segments by the state of their breaker."""

    closed: Count = 0
    half_open: Count = 0
    open: Count = 0


class Totals(_Part):
    """What the engine did since it started.

    Attributes:
        steps: Scheduler steps.
        scheduled: Tokens scheduled, prefill and decode.
        generated: Tokens generated.
        finished: Requests that ended.
        preemptions: Preemptions of requests that ended or are under way.
    """

    steps: Count = 0
    scheduled: Count = 0
    generated: Count = 0
    finished: Count = 0
    preemptions: Count = 0


class Snapshot(_Part):
    """One engine at one time.

    Attributes:
        version: `VERSION`.
        engine: Index of the data-parallel rank; 0 where there is one engine.
        at: Unix time.
        clock: Seconds of a clock that never goes back; only differences mean something.
        model: The model's name.
        kvplug: kvplug's version.
        vllm: vLLM's version.
        block_size: Tokens of a block.
        block_bytes: Bytes of one, in all layers.
        blocks: Blocks of the pool.
        map: State of each block, see `encode_map`.
        states: Blocks by state, in the order of `BlockState`.
        requests: Requests under way, the oldest first.
        more: Requests that are not listed.
        policies: Policies of the deployment.
        tiers: Its tiers, the fastest first.
        outcomes: What lookups came to.
        layers: What is held by layer.
        breakers: Breakers of the guard; None without one.
        totals: Totals since the start.
        cost: Seconds that taking the snapshot took of the scheduler's thread.
    """

    version: int = Field(default=VERSION, ge=VERSION, le=VERSION)
    engine: Count = 0
    at: Amount
    clock: Amount
    model: Text = ""
    kvplug: Text = ""
    vllm: Text = ""
    block_size: Annotated[int, Field(ge=1, lt=1 << 31)]
    block_bytes: Count = 0
    blocks: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    map: str
    states: Annotated[
        tuple[Count, ...], Field(min_length=len(BlockState), max_length=len(BlockState))
    ]
    requests: Annotated[tuple[RequestSpan, ...], Field(max_length=MAX_REQUESTS)] = ()
    more: Count = 0
    policies: Annotated[tuple[PolicyState, ...], Field(max_length=256)] = ()
    tiers: Annotated[tuple[TierState, ...], Field(max_length=64)] = ()
    outcomes: Annotated[tuple[Outcome, ...], Field(max_length=512)] = ()
    layers: Annotated[tuple[LayerShare, ...], Field(max_length=1024)] = ()
    breakers: Breakers | None = None
    totals: Totals = Field(default_factory=Totals)
    cost: Amount = 0.0

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a snapshot that somebody else wrote.

        Raises:
            UnreadableSnapshot: It is not one.
        """
        if len(data) > MAX_BYTES:
            raise UnreadableSnapshot(f"has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
        try:
            found = cls.model_validate_json(data)
        except ValidationError as error:
            raise UnreadableSnapshot(_first(error)) from None
        counts = np.bincount(decode_map(found.map, found.blocks), minlength=len(BlockState))
        if counts.tolist() != list(found.states):
            raise UnreadableSnapshot("states: are not those of the map")
        return found

    def json_bytes(self) -> bytes:
        """The snapshot as JSON."""
        return self.model_dump_json().encode()


class LiveState(_Part):
    """What a server shows: the engines it has.

    Attributes:
        engines: Snapshot of each that answered.
        expected: Number of engines.
        problem: Why one or all are missing, and what to do; empty if none is.
    """

    engines: Annotated[tuple[Snapshot, ...], Field(max_length=1024)] = ()
    expected: Count = 1
    problem: Annotated[str, StringConstraints(max_length=1024)] = ""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read what a server answered.

        Raises:
            UnreadableSnapshot: It is not a state.
        """
        try:
            found = cls.model_validate_json(data)
        except ValidationError as error:
            raise UnreadableSnapshot(_first(error)) from None
        return found


class UnreadableSnapshot(KVPlugError, ValueError):
    """Bytes that are no snapshot; the message says what is wrong."""

    exit_code = 2


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return one_line(f"{where}: {problem['msg']}" if where else problem["msg"], 300)


@dataclass
class Facts:
    """What the kinds of a deployment show of themselves, each its own part.

    Attributes:
        tiers: Tiers, the fastest first.
        outcomes: What lookups came to.
        breakers: Breakers of the guard; None without one.
        token_bytes: Bytes of a token by layer; empty where pages hold the model's own type.
    """

    tiers: list[TierState] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    breakers: Breakers | None = None
    token_bytes: Sequence[int] = ()


@dataclass(frozen=True)
class Rates:
    """What an engine does a second, between two snapshots of it.

    Attributes:
        scheduled: Tokens scheduled, prefill and decode.
        generated: Tokens generated.
        steps: Scheduler steps.
        finished: Requests that ended.
    """

    scheduled: float = 0.0
    generated: float = 0.0
    steps: float = 0.0
    finished: float = 0.0

    @classmethod
    def between(cls, before: Snapshot | None, now: Snapshot) -> Rates | None:
        """The rates; None without an earlier snapshot of the same run of the engine."""
        if before is None or before.engine != now.engine or now.clock <= before.clock:
            return None
        seconds = now.clock - before.clock
        made = {
            name: getattr(now.totals, name) - getattr(before.totals, name)
            for name in ("scheduled", "generated", "steps", "finished")
        }
        # The engine was started again.
        if min(made.values()) < 0:
            return None
        return cls(**{name: count / seconds for name, count in made.items()})


def encode_map(states: npt.NDArray[np.uint8]) -> str:
    """Pack the states of a pool's blocks: one byte each, deflated (zlib), as base64.

    Args:
        states: `BlockState` of each block, ``[blocks]``.
    """
    return base64.b64encode(zlib.compress(states.tobytes(), 1)).decode()


def decode_map(packed: str, blocks: int) -> npt.NDArray[np.uint8]:
    """Unpack what `encode_map` packed.

    Args:
        packed: The map; trusted in nothing.
        blocks: Blocks that it must have.

    Returns:
        `BlockState` of each block, ``[blocks]``.

    Raises:
        UnreadableSnapshot: It is no map of that many blocks.
    """
    try:
        inflater = zlib.decompressobj()
        # One byte more than wanted shows that there are too many, however many there are.
        data = inflater.decompress(base64.b64decode(packed, validate=True), blocks + 1)
    except (binascii.Error, ValueError, zlib.error):
        raise UnreadableSnapshot("map: is not deflated bytes as base64") from None
    if len(data) != blocks or not (inflater.eof or blocks == 0):
        raise UnreadableSnapshot(f"map: does not have the states of {blocks:,} blocks")
    states = np.frombuffer(data, np.uint8)
    if states.size and int(states.max()) >= len(BlockState):
        raise UnreadableSnapshot(f"map: state {int(states.max())} is not known")
    return states


def runs(held: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """Runs of true values as ``(first, after the last)``; at most `MAX_RUNS`, of which the last one
    then takes in what is between the rest.

    Args:
        held: ``[n]``.
    """
    edges = np.flatnonzero(np.diff(held.astype(np.int8), prepend=0, append=0)).tolist()
    found = list(zip(edges[::2], edges[1::2], strict=True))
    if len(found) > MAX_RUNS:
        found[MAX_RUNS - 1 :] = [(found[MAX_RUNS - 1][0], found[-1][1])]
    return tuple(found)


def plain(text: Any) -> str:
    """A name that others chose, as a snapshot shows it: one line of at most `TEXT` characters."""
    return one_line(str(text), TEXT)


def outcomes(level: str, unit: str, counts: Mapping[str, float]) -> list[Outcome]:
    """Outcomes of one level, those that never happened left out.

    Args:
        level: Where things were looked for.
        unit: What is counted.
        counts: How often, by cause.
    """
    return [
        Outcome(level=plain(level), cause=plain(cause), count=int(count), unit=unit)
        for cause, count in counts.items()
        if count >= 1
    ]


def state_bytes(engines: Iterable[bytes], expected: int, problem: str) -> bytes:
    """A `LiveState` as JSON, of snapshots that were parsed and are not written anew.

    Args:
        engines: Snapshots as JSON.
        expected: Number of engines.
        problem: As in `LiveState`.
    """
    rest = LiveState(expected=expected, problem=problem).model_dump_json(exclude={"engines"})
    return b'{"engines":[' + b",".join(engines) + b"]," + rest[1:].encode()


def counted(states: npt.NDArray[np.uint8]) -> Sequence[int]:
    """Blocks by state, in the order of `BlockState`."""
    found: list[int] = np.bincount(states, minlength=len(BlockState)).tolist()
    return found
