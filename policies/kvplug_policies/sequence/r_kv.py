"""R-KV: important tokens, but not the same thing twice.

Cai et al., arXiv 2505.24133: a reasoning model repeats itself, and attention alone keeps every
repetition. A token's importance is the attention of the latest ``window`` queries, pooled over
neighbours by their maximum; its redundancy is how similar its key is to the others of its head, on
average. Of the tokens whose keys are most similar to a given one, the most recent is not penalized,
so the last of many repetitions stays. The score is ``mix * importance - (1 - mix) * redundancy``,
each normalised over the resident tokens.

Differences from the paper, forced by paging or by serving:

* A decision falls every ``interval`` generated tokens: the paper's buffer, 128 tokens as there. A
  budget is whole blocks.
* Each query's attention is normalised over everything it sees; the published code leaves the
  window itself out. Query heads that share a KV head are joined by the largest of their weights,
  the published code takes the largest of their logits.
* In the published code a key unlike all others excuses the first token of the cache; here it
  excuses none.
* The paper decides while generating; here the end of a prompt is a decision too.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kvplug.contract import EngineView, PolicyOptions, ResidentView, ScoringOptions, ScoringPolicy
from kvplug_policies.scores import CHUNK_BYTES, latest, raised


def redundancy(keys: Tensor, positions: Tensor, threshold: float, spare: int) -> Tensor:
    """Redundancy of each key with the others of its head; sums to 1 over the keys.

    Args:
        keys: ``[rows, kv_heads, resident, head_size]``.
        positions: Position in the text, ``[rows, kv_heads, resident]``.
        threshold: Cosine above which two keys are alike.
        spare: Latest keys alike to a given one that it does not count against.

    Returns:
        ``[rows, kv_heads, resident]`` float32.
    """
    rows, heads, resident, _ = keys.shape
    unit = torch.nn.functional.normalize(keys.float(), dim=-1, eps=1e-8)
    penalty = unit.new_zeros((rows, heads, resident))
    # The similarity itself, its mask and the masked positions live at one time.
    step = max(1, CHUNK_BYTES // (12 * max(1, rows * heads * resident)))
    others = torch.arange(resident, device=keys.device)
    for start in range(0, resident, step):
        some = unit[:, :, start : start + step]
        similarity = some @ unit.mT
        mine = others[start : start + step, None] == others
        similarity = similarity.masked_fill(mine, 0.0)
        alike = similarity > threshold
        places = torch.where(alike, positions[:, :, None], -1)
        last = (
            places.amax(-1, keepdim=True)
            if spare == 1
            else places.topk(min(spare, resident), dim=-1).values[..., -1:]
        )
        penalty += similarity.masked_fill_(alike & (places >= last), 0.0).sum(2)
    return (penalty / resident).softmax(-1)


class RKV(ScoringPolicy):
    """Keeps the tokens of each KV head that are attended to and do not repeat others."""

    name = "r_kv"
    changes = "drops the tokens that are attended to least or repeat others, per KV head"
    paper = "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, arXiv 2505.24133"

    class Options(ScoringOptions):
        """Options of `RKV`."""

        recent: int = Field(8, ge=0, le=1 << 24, description="latest tokens that are always kept")
        window: int = Field(8, ge=1, le=1024, description="latest queries observed, and kept")
        kernel: int = Field(7, ge=1, le=63, description="neighbouring tokens pooled, an odd number")
        mix: float = Field(
            0.1, ge=0, le=1, description="weight of importance against that of redundancy"
        )
        threshold: float = Field(
            0.5, ge=-1, le=1, description="cosine above which two keys are redundant"
        )
        spare: int = Field(
            1, ge=1, le=64, description="latest of redundant keys that are not penalized"
        )

        @field_validator("kernel")
        @classmethod
        def _kernel_has_a_middle(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("kernel must be odd")
            return value

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.observation = self.options.window

    def score(self, resident: ResidentView) -> Tensor:
        options = self.options
        rows, kv_heads = resident.positions.shape[:2]
        mass = resident.attention_mass(options.window).view(rows, kv_heads, -1, resident.count)
        window = options.window
        importance = resident.pooled_mass(
            mass.amax(2), window, window=window, kernel=options.kernel, kept=0.0
        )
        repeated = redundancy(resident.keys, resident.positions, options.threshold, options.spare)
        scores = options.mix * importance - (1.0 - options.mix) * repeated
        return raised(scores, latest(resident, window))
