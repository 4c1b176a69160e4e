"""What a windowed model must answer, computed without an engine, a cache or kvplug's code.

Plain transformers with an attention mask that says, token by token, what a query may see. It runs
the whole text again for every token, so there is nothing to free, to compact or to get wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def visible(n: int, block_size: int, sink: int, window: int) -> torch.Tensor:
    """``[n, n]`` bool: query row sees key column.

    Straight from the policy's description: the sink is rounded up to blocks, and a query sees the
    blocks that hold any of the latest ``window`` tokens of the first query of its block.
    """
    query, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
    sink_end = -(-sink // block_size) * block_size
    own_block = query // block_size * block_size
    oldest = own_block - (window - 1)
    in_window = key // block_size >= torch.div(oldest, block_size, rounding_mode="floor")
    return (key <= query) & ((key < sink_end) | in_window)


class Oracle:
    """Greedy decoding of a small model under a mask.

    Args:
        model: Directory of the model; run in float32.
    """

    def __init__(self, model: Path):
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.num_layers = self.model.config.num_hidden_layers

    @torch.inference_mode()
    def greedy(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        block_size: int = 32,
        sink: int = 1 << 20,
        window: int = 1 << 20,
        windows: list[int] | None = None,
        sliding: Mapping[int, int] | None = None,
    ) -> list[int]:
        """Generated token ids.

        ``windows`` gives one window per layer instead of ``window``. ``sliding`` names the layers
        that have a sliding window of the model's own: a query sees its latest tokens, no sink.
        """
        tokens = list(prompt)
        own = sliding or {}
        per_layer = windows or [window] * self.num_layers
        for _ in range(max_tokens):
            n = len(tokens)
            seen = [
                visible(n, 1, 0, own[i]) if i in own else visible(n, block_size, sink, w)
                for i, w in enumerate(per_layer)
            ]
            masks = [torch.where(s, 0.0, float("-inf"))[None, None] for s in seen]
            hooks = [
                layer.register_forward_pre_hook(_with_mask(mask), with_kwargs=True)
                for layer, mask in zip(self.model.model.layers, masks, strict=True)
            ]
            try:
                logits = self.model(torch.tensor([tokens]), use_cache=False).logits
            finally:
                for hook in hooks:
                    hook.remove()
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) :]


def _with_mask(mask: torch.Tensor):
    def replace(module, args, kwargs):
        kwargs["attention_mask"] = mask
        return args, kwargs

    return replace
