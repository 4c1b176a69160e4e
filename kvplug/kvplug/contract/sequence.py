"""Sequence policies: decide which tokens of a running request to keep.

Two families share the kind. A positional rule (`SequencePolicy.window`) is known in advance. A
`ScoringPolicy` scores the resident tokens of a request at points the host plans; the host keeps the
best of each KV head, compacts them and frees the blocks behind them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kvplug.contract.policy import EngineView, Feature, Kind, LayerView, Policy, PolicyOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """A positional rule: sink blocks and a window of blocks before the current one.

    A query in block ``b`` sees blocks ``[0, sink_blocks)`` and ``[b - window_blocks, b]``; both
    sides of the engine evaluate this, so nothing is sent. What a token sees depends on its position
    alone, never on how a prompt is chunked or which requests run beside it.

    Attributes:
        sink_blocks: Blocks kept from the start of the text.
        window_blocks: Full blocks kept before the block a query is in.
    """

    sink_blocks: int
    window_blocks: int

    def __post_init__(self) -> None:
        if self.sink_blocks < 0 or self.window_blocks < 0:
            raise ValueError(f"sink_blocks and window_blocks must be at least 0, got {self}")

    def gap(self, block: int) -> tuple[int, int]:
        """Block range ``[start, end)`` that a query in ``block`` does not see; empty when equal."""
        return self.sink_blocks, max(self.sink_blocks, block - self.window_blocks)

    @property
    def exact_blocks(self) -> int:
        """Leading blocks whose tokens see everything before them."""
        return self.sink_blocks + self.window_blocks + 1


class SequencePolicy(Policy):
    """Decides what a running request keeps. Approximate unless the budget covers the text."""

    kind: ClassVar[Kind] = Kind.SEQUENCE
    exact: ClassVar[bool] = False
    changes_length: ClassVar[bool] = True

    @abstractmethod
    def window(self, layer: LayerView) -> Window | None:
        """Return the positional rule of a layer, or None for a policy that scores.

        Layers with equal windows share block tables; each distinct window costs the engine one
        more KV-cache group.
        """


@dataclass(frozen=True)
class ResidentView:
    """The resident tokens of some requests in one layer at a decision, on the worker.

    Rows are requests with equally many resident tokens. Resident token ``t`` of a row and KV head
    is the slot ``(block_table[row, t // page], t % page)`` of the pages, ``page`` being their third
    dimension; each KV head may hold different tokens of the text there. The tensors belong to the
    host: read them, never write them.

    Attributes:
        layer: The layer; its head counts are those of this rank.
        scale: Softmax scale of the layer's attention.
        softcap: Soft cap of its logits, 0 for none.
        num_tokens: Tokens of the text computed so far, ``[rows]`` int32.
        num_prompt_tokens: Tokens of the prompt, ``[rows]`` int32.
        count: Resident tokens per row and head.
        positions: Position in the text of each resident token, ``[rows, kv_heads, count]`` int32.
        key_pages: ``[pages, kv_heads, page, head_size]``, keys after RoPE; the last dimension is
            contiguous.
        value_pages: The same shape.
        block_table: ``[rows, width]`` int32.
        queries: Queries of the latest tokens after RoPE, oldest first, ``[rows, observation,
            num_heads, head_size]``, or None if the policy observes none.
        query_positions: Their positions, ``[rows, observation]`` int32; -1 if the text is shorter
            than the observation.
        cumulative_attention: Mass each resident token received from every query since
            it was written, mean over the query heads of its group, ``[rows, kv_heads, count]``
            float32, or None unless the policy sets `ScoringPolicy.wants_cumulative_attention`.
        longest: A number that no position reaches; 0 if the host does not know one.
        dense: True if each row has one page that is its ``count`` tokens.
    """

    layer: LayerView
    scale: float
    softcap: float
    num_tokens: Tensor
    num_prompt_tokens: Tensor
    count: int
    positions: Tensor
    key_pages: Tensor
    value_pages: Tensor
    block_table: Tensor
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    cumulative_attention: Tensor | None = None
    longest: int = 0
    dense: bool = False

    def _dense(self, pages: Tensor) -> Tensor:
        if self.dense:
            return pages
        rows, page = self.block_table.shape[0], pages.shape[2]
        width = -(-self.count // page)
        taken = pages[self.block_table[:, :width].long()]
        flat = taken.transpose(1, 2).reshape(rows, pages.shape[1], width * page, pages.shape[3])
        return flat[:, :, : self.count]

    @cached_property
    def keys(self) -> Tensor:
        """Keys in slot order, ``[rows, kv_heads, count, head_size]``; gathered at first use."""
        return self._dense(self.key_pages)

    @cached_property
    def values(self) -> Tensor:
        """Values in slot order, ``[rows, kv_heads, count, head_size]``; gathered at first use."""
        return self._dense(self.value_pages)

    @cached_property
    def lens(self) -> Tensor:
        """`count` for each row, ``[rows]`` int32, as kernels take it."""
        import torch

        rows = self.block_table.shape[0]
        return torch.full((rows,), self.count, dtype=torch.int32, device=self.positions.device)

    def attention_mass(
        self, window: int | None = None, how: Literal["sum", "max"] = "sum"
    ) -> Tensor:
        """Compute the attention mass that each resident token receives from the latest queries.

        Args:
            window: Number of latest queries; all observed ones by default.
            how: Sum over the queries, or the largest weight that one of them gives.

        Returns:
            ``[rows, num_heads, count]`` float32; each query's softmax is over the resident tokens
            it may see.

        Raises:
            ValueError: The policy observes no queries.
        """
        import torch

        from kvplug_kernels.attention_mass import attention_mass

        if self.queries is None or self.query_positions is None:
            raise ValueError("attention_mass needs queries: set the policy's `observation`")
        window = self.queries.shape[1] if window is None else window
        queries = self.queries[:, -window:]
        rows, _, heads, _ = queries.shape
        return attention_mass(
            queries,
            self.key_pages,
            self.block_table,
            self.lens,
            self.scale,
            key_positions=self.positions,
            query_positions=self.query_positions[:, -window:],
            softcap=self.softcap,
            how=how,
            out=queries.new_empty((rows, heads, self.count), dtype=torch.float32),
        )

    def over_groups(self, values: Tensor) -> Tensor:
        """Average over the query heads of each KV head.

        Args:
            values: ``[rows, num_heads, ...]``.

        Returns:
            ``[rows, kv_heads, ...]``.
        """
        rows, heads = values.shape[:2]
        kv_heads = self.positions.shape[1]
        return values.reshape(rows, kv_heads, heads // kv_heads, *values.shape[2:]).mean(2)

    def pooled_mass(
        self,
        mass: Tensor,
        latest: int | Tensor,
        *,
        window: int = 0,
        kernel: int = 1,
        how: Literal["mean", "max"] = "max",
        kept: float = math.inf,
    ) -> Tensor:
        """Score tokens by a mass they receive: mean over the query heads of each KV head, pooled
        over neighbours in the text, the latest tokens kept. One launch on an accelerator.

        Args:
            mass: At least 0, ``[rows, num_heads, count]`` or ``[rows, kv_heads, count]`` float32.
            latest: Tokens at the end of the text that count as mass 0 and score ``kept``: a number,
                or one per row, ``[rows]`` int32.
            window: Divide by how many of that many latest queries there are; 0 divides by nothing.
            kernel: Tokens pooled, odd: the token and as many to either side. A token that is not
                resident counts as one of mass 0.
            how: Mean or largest of them.
            kept: Score of the latest tokens.

        Returns:
            ``[rows, kv_heads, count]`` float32.

        Raises:
            ValueError: ``window`` is given and the policy observes no queries.
        """
        from kvplug_kernels.pool_mass import pool_mass

        if window and self.query_positions is None:
            raise ValueError("window needs queries: set the policy's `observation`")
        queries = self.query_positions[:, -window:] if self.query_positions is not None else None
        longest = self.longest
        if kernel > 1 and not longest:
            longest = int(self.positions.max()) + 1 if self.positions.numel() else 0
        return pool_mass(
            mass,
            self.positions,
            self.num_tokens,
            latest=latest,
            longest=longest,
            query_positions=queries if window else None,
            kernel=kernel,
            how=how,
            kept=kept,
        )

    def key_score(self, which: int) -> Tensor:
        """One of `key_scores` alone, ``[rows, kv_heads, count]`` float32: it reads what it needs.

        Args:
            which: A constant of `kvplug_kernels.key_scores`.
        """
        return self._key_scores((which,))[0]

    @cached_property
    def key_scores(self) -> Tensor:
        """Norms and similarities of the resident keys, ``[4, rows, kv_heads, count]`` float32.

        Indexed by the constants of `kvplug_kernels.key_scores`: ``KEY_NORM``, ``VALUE_NORM``,
        ``KEY_TO_MEAN`` (cosine with the mean of the normalised keys), ``KEY_TO_PREVIOUS``.
        """
        return self._key_scores((0, 1, 2, 3))

    def _key_scores(self, which: tuple[int, ...]) -> Tensor:
        import torch

        from kvplug_kernels.key_scores import key_scores

        shape = (len(which), *self.positions.shape)
        return key_scores(
            self.key_pages,
            self.value_pages,
            self.block_table,
            self.lens,
            which=which,
            out=torch.empty(shape, dtype=torch.float32, device=self.positions.device),
        )


class ScoringOptions(PolicyOptions):
    """Options of every scoring policy: how much is kept, what is always kept, and when.

    ``budget`` counts tokens per KV head and layer, including sinks and recent tokens; it is rounded
    up to blocks. Between two decisions a request holds up to ``interval`` tokens more.
    """

    budget: int | float = Field(
        1024,
        description="tokens kept per request (an integer), or a fraction of its prompt (0.0-1.0)",
    )
    sink: int = Field(4, ge=0, le=1 << 20, description="first tokens that are always kept")
    recent: int = Field(32, ge=0, le=1 << 24, description="latest tokens that are always kept")
    interval: int = Field(
        128, ge=1, le=1 << 20, description="generated tokens between two decisions"
    )
    prefill: int = Field(
        0,
        ge=0,
        le=1 << 24,
        description="prefill limit: resident tokens of a prompt at which a decision is forced; "
        "0: half of the pool",
    )
    shared: int = Field(
        0,
        ge=0,
        le=1 << 24,
        description="protected prefix: leading tokens that stay in the prefix cache; at least one "
        "interval",
    )
    on_demand: int = Field(
        0,
        ge=0,
        le=1 << 24,
        description="evicted tokens per request, layer and KV head that are kept in host memory "
        "and recalled when a query needs them; 0: none",
    )
    layers: dict[str, float] = Field(
        default_factory=dict,
        description="share of the budget by layer or range of layers, e.g. {'0-9': 1.5}; "
        "layers left out have 1.0; each distinct share is one more KV-cache group",
    )

    @field_validator("budget")
    @classmethod
    def _budget_is_tokens_or_fraction(cls, value: int | float) -> int | float:
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(
                "a budget that is a fraction of the prompt must be above 0 and at most 1"
            )
        if isinstance(value, int) and value < 1:
            raise ValueError("a budget in tokens must be at least 1")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_keys_are_text(cls, value: object) -> object:
        if isinstance(value, dict):
            return {str(k): float(v) if isinstance(v, int) else v for k, v in value.items()}
        return value

    @field_validator("layers")
    @classmethod
    def _shares_are_positive(cls, value: dict[str, float]) -> dict[str, float]:
        for layers, share in value.items():
            layer_range(layers, None)
            if not 0 < share <= 16:
                raise ValueError(f"share of layers {layers} must be above 0 and at most 16")
        return value

    @model_validator(mode="after")
    def _budget_holds_what_is_always_kept(self) -> Self:
        if isinstance(self.budget, int) and self.budget < self.sink + self.recent:
            raise ValueError(
                f"budget {self.budget} is smaller than sink + recent = {self.sink + self.recent}"
            )
        return self


def layer_range(text: str, num_layers: int | None) -> tuple[int, int]:
    """Parse a layer or range of layers, ``"3"``, ``"-1"`` or ``"0-9"``, into its first and last.

    Args:
        text: The range; a negative layer counts from the end and stands alone.
        num_layers: Layers of the model, or None to check the form only.

    Raises:
        ValueError: The text is not a range, or outside the model.
    """
    try:
        if text.lstrip("-").isdigit():
            first = last = int(text)
            if first < 0 and num_layers is not None:
                first = last = first + num_layers
        else:
            start, _, end = text.partition("-")
            first, last = int(start), int(end)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a layer or range of layers; write '0' or '0-3'"
        ) from None
    if last < first:
        raise ValueError(f"{text!r}: the last layer is before the first")
    if num_layers is not None and (first < 0 or last >= num_layers):
        raise ValueError(f"layers {text!r} is outside the model's 0-{num_layers - 1}")
    return first, last


class ScoringPolicy(SequencePolicy):
    """Scores each resident token; the host keeps the best of each KV head.

    A minimal policy is one method::

        class Knorm(ScoringPolicy):
            name, changes = "knorm", "drops the tokens with the largest keys"

            def score(self, resident):
                return -resident.keys.float().norm(dim=-1)

    Decisions fall at points of the text known in advance to both sides of the engine: at the end
    of the prompt, every ``interval`` generated tokens, and inside a prompt that is longer than
    ``prefill``. At each of them `score` runs on the worker, once per layer or for several layers
    together, with every request that reached one; the host keeps sinks and recent tokens whatever
    their score.

    Attributes:
        observation: Latest queries that `ResidentView.queries` carries; 0 for none.
        wants_cumulative_attention: True to keep `ResidentView.cumulative_attention`
            up to date.
        layerwise: True if a layer's scores depend on which layer it is. Otherwise a host may show
            the rows of several layers of one shape together; `ResidentView.layer` is then one of
            them.
    """

    observation: int = 0
    wants_cumulative_attention: bool = False
    layerwise: ClassVar[bool] = False
    mutates_blocks: ClassVar[bool] = True
    supports: ClassVar[frozenset[Feature]] = frozenset(
        {
            Feature.PREFIX_CACHING,
            Feature.CHUNKED_PREFILL,
            Feature.PREEMPTION,
            Feature.ASYNC_SCHEDULING,
            Feature.CUDA_GRAPHS,
            Feature.TENSOR_PARALLEL,
            Feature.PIPELINE_PARALLEL,
            Feature.DATA_PARALLEL,
            Feature.LORA,
            Feature.SLIDING_WINDOW_LAYERS,
        }
    )

    class Options(ScoringOptions):
        """Options of every scoring policy."""

    options: ScoringOptions

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        for layers in self.options.layers:
            if engine.layers:
                layer_range(layers, engine.layers[0].num_layers)

    def window(self, layer: LayerView) -> None:
        return None

    @abstractmethod
    def score(self, resident: ResidentView) -> Tensor:
        """Score each resident token, ``[rows, kv_heads, count]`` float; higher scores are kept.

        Deterministic, and row by row: a request's scores must not depend on its neighbours.
        """

    def share(self, layer: LayerView) -> float:
        """Return the layer's share of the budget; 1.0 is an equal share.

        Layers with equal shares form one KV-cache group: use few distinct values.
        """
        for layers, share in self.options.layers.items():
            first, last = layer_range(layers, layer.num_layers)
            if first <= layer.index <= last:
                return share
        return 1.0

    def measure(self, resident: ResidentView, scores: Tensor) -> Tensor | None:
        """Measure a decision for the scheduler, ``[rows, n]`` float, or None for nothing.

        Called after each `score` with its result, on the worker. The host averages it over the
        layers and ranks and hands it to `resize`.
        """
        return None

    def resize(self, measured: Sequence[float], budget: int, num_tokens: int) -> int:
        """Choose the budget of a request's next decision from what its last one measured.

        Called in the scheduler, once per decision of a request, if `measure` is overridden.

        Args:
            measured: The request's latest measurement, averaged over layers and ranks.
            budget: Tokens kept by its last decision, in the group with share 1.
            num_tokens: Tokens of its text.

        Returns:
            Tokens to keep at its next decision; the host clips it to the possible range.
        """
        return budget

    @property
    def resizes(self) -> bool:
        """True if the policy changes budgets at run time."""
        return type(self).measure is not ScoringPolicy.measure
