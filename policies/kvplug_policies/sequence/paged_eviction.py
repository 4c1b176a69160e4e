"""PagedEviction: evicts whole pages, by the norms of their values and keys.

Chitty-Venkata et al., arXiv 2509.04377: a token scores the norm of its value over the norm of its
key. At the end of a prompt single tokens are dropped; while generating, whenever a page fills up,
the page with the lowest mean score is evicted whole, so the rest of the cache stays where it is and
no page is ever partly empty.

Differences from the paper, forced by paging or by serving:

* A page goes at every decision, ``interval`` generated tokens apart, not at every page that fills
  up: ``interval`` over the block size pages go at once.
* Every KV head evicts its own pages. The paper's page is one for all heads; here a page of a head
  is as many tokens, neighbours among those the head still holds.
* Pages are counted back from the newest full block of the text, so that they stay the same pages
  from decision to decision when ``interval`` is a multiple of the block size.
* The first ``sink`` and latest ``recent`` tokens are always kept; the paper keeps none, which is
  ``sink: 0, recent: 0``. A first token that attention rests on often has a small value, so the
  score alone would drop it. While generating, a page that holds one of these is kept whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvplug.contract import ResidentView, ScoringPolicy
from kvplug_kernels.key_scores import KEY_NORM, VALUE_NORM
from kvplug_policies.scores import TextOrder, raised


class PagedEviction(ScoringPolicy):
    """Keeps prompt tokens, then whole pages, that have large values and small keys."""

    name = "paged_eviction"
    changes = "drops prompt tokens, then whole pages, with small values and large keys, per KV head"
    paper = (
        "PagedEviction: Structured Block-wise KV Cache Pruning for Efficient Large Language Model "
        "Inference, arXiv 2509.04377"
    )

    def score(self, resident: ResidentView) -> Tensor:
        norms = resident.key_scores
        token = norms[VALUE_NORM] / norms[KEY_NORM].clamp(min=1e-6)
        generating = resident.num_tokens > resident.num_prompt_tokens
        return torch.where(generating[:, None, None], self._by_page(resident, token), token)

    def _by_page(self, resident: ResidentView, token: Tensor) -> Tensor:
        """Mean score of each token's page."""
        page, count, device = self.engine.block_size, resident.count, token.device
        text = TextOrder(resident.positions)
        # Counted back from the newest token, the block being filled is page 0, and every page
        # after it ends where a block of the text does.
        filling = (resident.num_tokens % page).long()[:, None]
        back = torch.arange(count, device=device).flip(0)[None]
        index = torch.div(back - filling, page, rounding_mode="floor") + 1
        starts = torch.arange(-(-count // page) + 1, device=device) * page
        starts = (starts + filling - page)[:, :, None]
        slots = starts + torch.arange(page, device=device)
        inside = ((slots >= 0) & (slots < count))[:, None]
        places = (count - 1 - slots).clamp(0, count - 1)[:, None]

        def of_pages(values: Tensor) -> Tensor:
            heads = values.shape[1]
            taken = values.gather(-1, places.expand(-1, heads, -1, -1).flatten(2))
            return torch.where(inside, taken.view(-1, heads, *places.shape[2:]), 0)

        always = (text.positions < self.options.sink) | (
            text.positions >= (resident.num_tokens - self.options.recent)[:, None, None]
        )
        sums = of_pages(text.sort(token)).sum(-1)
        mean = raised(sums / inside.sum(-1).clamp(min=1), of_pages(always).any(-1))
        return text.unsort(mean.gather(-1, index[:, None].expand(-1, token.shape[1], -1)))
