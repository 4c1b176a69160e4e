"""Deployments that are worth measuring against a bottleneck, each with its reason and its price."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvplug.contract import Kind
from kvplug.hosts.vllm.flags import EXTENSION
from kvplug.planning.candidates import sequence_section
from kvplug.planning.prices import Price, prices
from kvplug.registry import plugins
from kvplug_lab.tune import bottleneck as named
from kvplug_lab.tune.bottleneck import Bottleneck, Profile
from kvplug_lab.tune.load import Load

STOCK = "stock"
ORDERS = 2
"""Orders of the prefix cache that are proposed: the best in simulation."""

RECOMPUTED = 16
"""Tokens at the beginning of a reused run that one of two proposals computes again."""


@dataclass(frozen=True)
class Proposal:
    """A deployment to measure.

    Attributes:
        name: Its name in tables.
        section: Its ``kvplug`` section; None for stock vLLM.
        reason: Why it is proposed.
        exact: True if its policies promise stock's answers.
        prices: What was measured of it elsewhere.
        flags: vLLM's flags that it sets, by name with dashes.
        takes: Memory that it takes beside the pool, in words.
        asks: What requests must ask of kvplug for it to act.
    """

    name: str
    section: Mapping[str, Any] | None
    reason: str = ""
    exact: bool = True
    prices: tuple[Price, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    takes: str = ""
    asks: Mapping[str, Any] = field(default_factory=dict)


def stock() -> Proposal:
    """Stock vLLM."""
    return Proposal(STOCK, None)


@dataclass(frozen=True)
class Means:
    """What proposals may use.

    Attributes:
        host: Bytes of host memory that a tier may take; 0 for none.
        block_size: Tokens of a block.
        exact_only: True to propose no approximate deployment.
    """

    host: int
    block_size: int
    exact_only: bool


def proposals(
    load: Load, profile: Profile, held: Sequence[Bottleneck], means: Means
) -> list[Proposal]:
    """Deployments against bottlenecks, in the order of the bottlenecks; each section once.

    Args:
        load: The requests.
        profile: Stock's round of them.
        held: The bottlenecks.
        means: What may be used.
    """
    found: dict[str, Proposal] = {}
    names = {b.name for b in held}
    for one in held:
        for made in _against(one.name, load, profile, names, means):
            if not (means.exact_only and not made.exact):
                found.setdefault(made.name, made)
    return list(found.values())


def _against(
    bottleneck: str, load: Load, profile: Profile, names: set[str], means: Means
) -> Iterator[Proposal]:
    if bottleneck == named.RECOMPUTATION:
        yield from _tiers(means, coded=named.TRANSFER in names)
        yield from _orders(load, profile, means)
    elif bottleneck == named.ELSEWHERE:
        yield from _reuse(load)
    elif bottleneck == named.MEMORY:
        why = "more tokens in the same memory"
        yield _format("int8", {}, why)
        yield _format("rotated", {}, why)
        yield _format("kivi", {"bits": 4}, why, block_size=max(64, means.block_size))
        yield _format("int4", {}, why)
        yield from _sequences(load, means, ("sink_window", "snapkv"), "a request holds less")
    elif bottleneck == named.FRAGMENTATION:
        if means.block_size >= 16:
            size = means.block_size // 2
            yield Proposal(
                f"blocks of {size}",
                {},
                "a request's last block is half empty on average; smaller blocks waste less",
                flags={"block-size": size},
            )
    elif bottleneck == named.LONG_CONTEXT:
        why = "attention reads fewer tokens"
        yield from _sequences(load, means, ("snapkv", "sink_window"), why)
        yield _format("int8", {}, "attention reads fewer bytes")


def _format(name: str, options: Mapping[str, Any], why: str, block_size: int = 0) -> Proposal:
    label = ":".join([name, *(f"{k}={v}" for k, v in options.items())])
    section = {"format": {"use": name, **options}}
    flags = {"block-size": block_size} if block_size else {}
    return Proposal(label, section, why, False, tuple(prices(label)), flags)


def _sequences(load: Load, means: Means, names: Sequence[str], why: str) -> Iterator[Proposal]:
    # Half of the longest request, in whole blocks: what the shipped prices were measured at.
    budget = max(load.longest // 2 // means.block_size, 4) * means.block_size
    for name in names:
        section = {"sequence": sequence_section(name, budget)}
        yield Proposal(
            f"{name}, {budget} tokens",
            section,
            f"{why}: at most {budget} tokens",
            False,
            tuple(p for p in prices(name) if p.budget == 0.5 or isinstance(p.budget, int)),
        )


def _tiers(means: Means, coded: bool) -> Iterator[Proposal]:
    if not means.host:
        return
    why = "KV that leaves the pool is kept in host memory, and loaded when its text returns"
    takes = f"{means.host / 2**30:.3g} GiB of host memory"
    for codec in ("raw", "lossless", "int8") if coded else ("raw",):
        policy = plugins().registry.get(Kind.TRANSFER, codec)
        if policy is None:
            continue
        tiers = [{"host": {"size": means.host}}]
        section: dict[str, Any] = {"tiers": tiers}
        if codec != "raw":
            section["transfer"] = codec
        yield Proposal(
            "host tier" + (f", {codec}" if codec != "raw" else ""),
            section,
            why + (", in fewer bytes" if codec != "raw" else ""),
            bool(policy.exact),
            takes=takes,
        )


def _reuse(load: Load) -> Iterator[Proposal]:
    by = "request" if load.names_segments else "paragraph"
    why = "KV of a text is used again wherever the text stands"
    for again in (0, RECOMPUTED):
        own: dict[str, Any] = {
            "use": ["structure", "position", "mask"],
            "approximate": True,
            "segments": {"by": by},
        }
        if again:
            own["recompute"] = {"boundary": again}
        yield Proposal(
            "reuse" + (f", {again} tokens again" if again else ""),
            {"reuse": own},
            why + (f"; its first {again} tokens are computed again" if again else ""),
            False,
            flags={"worker-extension-cls": EXTENSION} if again else {},
            takes="1 GiB of host memory",
            asks={"reuse": "approximate"},
        )


def _orders(load: Load, profile: Profile, means: Means) -> Iterator[Proposal]:
    """The best orders in simulation, where they hit more than vLLM's."""
    rates = simulated(load, means.block_size, profile.pool_tokens // means.block_size)
    base = rates.pop("lru", 0.0)
    best = sorted(rates, key=lambda name: -rates[name])[:ORDERS]
    for name in best:
        if rates[name] > base:
            why = f"in simulation it hits {rates[name]:.1%} of blocks, vLLM's order {base:.1%}"
            yield Proposal(name, {"prefix_cache": {"use": name}}, why)


def simulated(load: Load, block_size: int, blocks: int) -> dict[str, float]:
    """Hit rate of every order that needs no options, one request after another."""
    from kvplug.contract import PrefixCachePolicy
    from kvplug.hosts.trace.simulator import PolicyFailed, Replay
    from kvplug.parser import load_deployment
    from kvplug_lab.prefix_orders import ready_orders

    replay = Replay(trace_of(load, block_size))
    found: dict[str, float] = {}
    for name in ready_orders():
        deployment = load_deployment({"prefix_cache": name}, source="kvplug tune", key="")
        choice = deployment.choice(Kind.PREFIX_CACHE)
        assert choice is not None
        built = choice.build(replay.engine(blocks))
        assert isinstance(built, PrefixCachePolicy)
        try:
            found[name] = replay.run(built, blocks).hit_rate
        except PolicyFailed:
            continue
    return found


def trace_of(load: Load, block_size: int) -> Any:
    """The load's prompts as a trace: what a block holds, and all before it, in numbers."""
    import numpy as np

    from kvplug.hosts.trace.traces import Trace
    from kvplug_lab.tune.load import chained

    numbers: dict[tuple[str | None, int], int] = {}
    ids: list[int] = []
    off = [0]
    for request in load.requests:
        for key in chained(request.prompt, block_size):
            ids.append(numbers.setdefault((request.salt, key), len(numbers)))
        off.append(len(ids))
    names = {name: i for i, name in enumerate(dict.fromkeys(["", *load.sessions]))}
    return Trace(
        name=load.name,
        off=np.array(off),
        ids=np.array(ids, dtype=np.int64),
        arrival=np.arange(len(load.requests), dtype=np.float64),
        prompt_tokens=np.array([len(r.prompt) for r in load.requests]),
        output_tokens=np.array([r.max_tokens for r in load.requests]),
        session=np.array([names[s] for s in load.sessions]),
        block_size=block_size,
        num_distinct=len(numbers),
    )


def combined(first: Proposal, second: Proposal) -> Proposal | None:
    """Both in one deployment, or None where they decide the same thing."""
    a, b = first.section or {}, second.section or {}
    if set(a) & set(b) or any(first.flags.get(k, v) != v for k, v in second.flags.items()):
        return None
    return Proposal(
        f"{first.name} + {second.name}",
        {**a, **b},
        "each was better than stock alone",
        first.exact and second.exact,
        (*first.prices, *second.prices),
        {**first.flags, **second.flags},
        "; ".join(filter(None, dict.fromkeys((first.takes, second.takes)))),
        {**first.asks, **second.asks},
    )
