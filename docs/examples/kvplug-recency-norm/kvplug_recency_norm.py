"""Recency norm: keeps tokens with small keys, and discounts old ones.

A key of small L2 norm tends to draw much attention, which is known without a query. An old token
needs an ever smaller key to stay: every `half_life` tokens of age count as a norm twice as large.
"""

from pydantic import Field
from torch import Tensor

from kvplug import hookimpl
from kvplug.contract import ResidentView, ScoringOptions, ScoringPolicy
from kvplug.registry import PolicyRegistry
from kvplug_kernels.key_scores import KEY_NORM


class RecencyNorm(ScoringPolicy):
    """Keeps the tokens of each KV head with the smallest keys, old ones discounted."""

    name = "recency_norm"
    changes = "drops old tokens with large keys, per KV head, beyond the budget"
    paper = "the key norm of arXiv 2406.11430, with a half-life"

    class Options(ScoringOptions):
        """Options of `RecencyNorm`, besides those of every scoring policy."""

        half_life: int = Field(
            512, ge=1, le=1 << 20, description="tokens of age that count as doubling the norm"
        )

    options: Options

    def score(self, resident: ResidentView) -> Tensor:
        norms = resident.key_scores[KEY_NORM].clamp_min(1e-6)
        age = resident.num_tokens[:, None, None] - resident.positions
        return -(norms.log2() + age / self.options.half_life)


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    registry.add(RecencyNorm)
