"""The simulator with the storage rules of vLLM's block pool, for traces that record answers too.

`Replay` stores every block once. vLLM's pool does not quite: a prefix cache is looked up from the
start of a text, so a block that lies cached behind a gap is not found; it is computed again into
another block, and both copies stay until each is evicted. The copies matter for orders that give
up the head of a prefix before its end. Two smaller rules: the last token of a prompt is always
computed, so a block that ends with it is never a hit; and a running request holds one block that
is not full, which it gives back without content.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvplug.contract import BlockFact, PrefixCachePolicy, Released
from kvplug.hosts.trace.simulator import Replay, _check


class PoolReplay(Replay):
    """One trace made ready to be replayed as vLLM would store it, one request after the other.

    The trace's requests must list every full block of prompt and answer, as the policy ``record``
    writes them. The capacity is that of the pool, the null block not counted, and must hold the
    longest request.
    """

    def _serve(self, policy: PrefixCachePolicy, capacity: int) -> Iterator[tuple[int, int]]:
        facts = policy.needs
        size = self.trace.block_size
        copies: dict[int, dict[int, None]] = {}
        content = [-1] * capacity
        free = list(range(capacity - 1, -1, -1))
        rows = zip(
            self._requests,
            self._views,
            self.trace.prompt_tokens.tolist(),
            self.trace.output_tokens.tolist(),
            strict=True,
        )
        for blocks, view, prompt, output in rows:
            slots: list[int] = []
            for c in blocks[: max(0, prompt - 1) // size]:
                if not (stored := copies.get(c)):
                    break
                slots.append(next(iter(stored)))  # of several copies vLLM finds the oldest
            hit = len(slots)
            if slots:
                policy.on_hit(slots)
            part = 1 if prompt + output - 1 > len(blocks) * size else 0
            gone = len(blocks) + part - hit - len(free)
            if gone > 0:
                victims = policy.victims(gone)
                _check(victims, gone, content, slots)
                for v in victims:
                    del copies[content[v]][v]
                    content[v] = -1
                policy.on_remove(victims)
                free += reversed(victims)
            for c in blocks[hit:]:
                s = free.pop()
                slots.append(s)
                content[s] = c
                copies.setdefault(c, {})[s] = None
            names = (
                [c.to_bytes(8, "little") for c in blocks]
                if facts & {BlockFact.KEY, BlockFact.FINISHED}
                else []
            )
            if BlockFact.FINISHED in facts:
                policy.on_finished(view, names, output)
            if slots:
                ids = slots[::-1]
                policy.on_release(
                    Released(
                        ids,
                        list(range(len(ids) - 1, -1, -1)) if BlockFact.POSITION in facts else None,
                        names[::-1] if BlockFact.KEY in facts else None,
                        view if BlockFact.REQUEST in facts else None,
                        [*ids[1:], -1] if BlockFact.PARENT in facts else None,
                    )
                )
            yield hit, max(gone, 0)
