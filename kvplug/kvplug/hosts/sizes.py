"""What policies take of an engine's memory, by arithmetic: shared by the engine that allocates it
and by plans made before one starts."""

from __future__ import annotations

from kvplug.contract import ScoringPolicy
from kvplug.hosts.pruning import FLUSH, Limits

RECALL_QUERIES = 8
"""Latest queries that say which evicted tokens are recalled from host memory."""


def in_flight_blocks(tokens: int, block_size: int) -> int:
    """Most blocks of tokens that are scheduled and not yet computed and acknowledged.

    Args:
        tokens: Most such tokens.
        block_size: Tokens per block.
    """
    return -(-tokens // block_size) + 1


def cap_blocks(resident: int, in_flight_tokens: int, max_tokens: int, block_size: int) -> int:
    """Most blocks of a request at once, by which it is admitted.

    Args:
        resident: Most blocks it holds, what is in flight not counted.
        in_flight_tokens: Most tokens scheduled and not yet computed and acknowledged.
        max_tokens: Longest sequence.
        block_size: Tokens per block.
    """
    whole = -(-max_tokens // block_size)
    return min(resident + in_flight_blocks(in_flight_tokens, block_size), whole)


def pruned_blocks(limits: Limits, max_tokens: int) -> int:
    """Most blocks of a request under a scoring policy, what is in flight not counted.

    Args:
        limits: The limits of its group of layers, with the prefill limit in force.
        max_tokens: Longest sequence.
    """
    return max(limits.prefill_limit + 1, limits.most(max_tokens))


def default_prefill_limit(num_blocks: int, pruned_groups: int) -> int:
    """Blocks of a prompt before tokens inside it are evicted, where a policy's options set none.

    Args:
        num_blocks: Blocks of the pool, the null block not counted.
        pruned_groups: KV-cache groups under the policy.
    """
    return num_blocks // (2 * pruned_groups)


def tail_fields(cumulative: bool) -> int:
    """Numbers of 4 bytes kept beside each token of each head under a scoring policy: its position,
    and the attention it received where that is wanted."""
    return 2 if cumulative else 1


def query_ring(policy: ScoringPolicy) -> int:
    """Queries remembered per request and layer."""
    return max(
        policy.observation,
        FLUSH if policy.wants_cumulative_attention else 0,
        RECALL_QUERIES if policy.options.on_demand else 0,
    )


def query_places(ring: int, slots: int) -> int:
    """Queries that a layer has room for: a ring for each slot, and one place for all others."""
    return slots * ring + 1


def recent_places(recent: int, slots: int) -> int:
    """Tokens that a layer has room for beside its pages, where a format keeps recent ones: a ring
    for each slot, and one place for all others."""
    return slots * recent + 1
