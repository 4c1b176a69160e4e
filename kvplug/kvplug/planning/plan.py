"""Plans deployments of a model on a GPU: tokens in the pool, users at once, needs and price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvplug.contract import (
    EngineView,
    FormatPolicy,
    Kind,
    LayerView,
    ScoringPolicy,
    SequencePolicy,
)
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, KVPlugError
from kvplug.hosts.sizes import query_places, query_ring, recent_places, tail_fields
from kvplug.hosts.vllm.engine import layer_limits, layer_rules, plain_defaults
from kvplug.hosts.vllm.features import features_from_flags
from kvplug.hosts.vllm.flags import RUNS
from kvplug.hosts.vllm.worker.page_tails import with_tail
from kvplug.parser import load_deployment
from kvplug.planning.candidates import Candidate
from kvplug.planning.model import ELEMENT, Model
from kvplug.planning.pool import (
    Page,
    Pool,
    Positional,
    Pruned,
    Rule,
    Sliding,
    Texts,
    Whole,
    pool_of,
)
from kvplug.planning.prices import Price, prices
from kvplug.planning.weights import Weights

GIB = 1 << 30
UTILIZATION = 0.92
"""vLLM's default of ``--gpu-memory-utilization``."""
OVERHEAD = 3 * GIB
"""Assumed for activations, CUDA graphs and the driver; vLLM measures it when it starts."""
BLOCK_SIZE = 16
BATCHED = 8192
MOST_SLOTS = 4096
"""Most requests that a plan lets run at once where the question sets no limit."""
MOST_CONTEXT = 1 << 24


@dataclass(frozen=True)
class Question:
    """What is asked of a plan.

    Attributes:
        memory: Bytes of one GPU.
        context: Tokens of a request when it ends, its answer among them.
        weights: Memory of the model's weights, on all GPUs together.
        output: Tokens of an answer.
        users: Requests that are to fit at once; 0 for as many as there is room for.
        ranks: GPUs that share the model by tensor parallelism.
        utilization: Part of the memory that vLLM may use.
        overhead: Bytes that are neither weights nor KV, on each GPU.
        batched: vLLM's ``--max-num-batched-tokens``.
        slots: vLLM's ``--max-num-seqs``, for which formats and policies keep rings; 0 for as many
            as fit.
        host: Bytes of host memory for a tier; 0 for none.
    """

    memory: int
    context: int
    weights: Weights
    output: int = 512
    users: int = 0
    ranks: int = 1
    utilization: float = UTILIZATION
    overhead: int = OVERHEAD
    batched: int = BATCHED
    slots: int = 0
    host: int = 0

    def __post_init__(self) -> None:
        """Raises KVPlugError for what cannot be planned."""
        for name, value, low, high in (
            ("--memory", self.memory, 1, 1 << 50),
            ("--context", self.context, 2, MOST_CONTEXT),
            ("--output-tokens", self.output, 1, self.context - 1),
            ("--users", self.users, 0, 1 << 20),
            ("--tensor-parallel", self.ranks, 1, 1 << 10),
            ("--gpu-memory-utilization", self.utilization, 0.01, 1),
            ("--overhead", self.overhead, 0, 1 << 50),
            ("--max-num-batched-tokens", self.batched, 1, 1 << 24),
            ("--max-num-seqs", self.slots, 0, 1 << 20),
            ("--host", self.host, 0, 1 << 50),
        ):
            if not low <= value <= high:
                raise KVPlugError(
                    f"{name} is {value:,}. Fix: pass a value between {low:,} and {high:,}."
                )
        if self.overhead >= self.memory:
            raise KVPlugError(
                f"--memory is {self.memory / GIB:.1f} GiB, and {self.overhead / GIB:.1f} GiB of it "
                "are taken to be neither weights nor KV. Fix: pass more --memory, or --overhead "
                "with what vLLM prints when it starts."
            )

    @property
    def kv_bytes(self) -> int:
        """Bytes left on one GPU for KV, and for what policies keep beside it."""
        weights = -(-self.weights.bytes // self.ranks)
        return int(self.memory * self.utilization) - weights - self.overhead

    def texts(self, in_flight: int) -> Texts:
        """The requests that are planned for.

        Args:
            in_flight: Most tokens scheduled and not yet computed and acknowledged.
        """
        return Texts(self.context, self.output, in_flight)


@dataclass(frozen=True)
class Needs:
    """What a deployment leaves of vLLM's features.

    Attributes:
        graphs: What CUDA graphs hold.
        prefix_cache: What requests share.
        runner: Model runner that it needs for that, or ``either``.
    """

    graphs: str = "whole steps"
    prefix_cache: str = "kept"
    runner: str = "either"


@dataclass(frozen=True)
class Planned:
    """A deployment in a plan.

    Attributes:
        candidate: The deployment.
        refused: Why it cannot run, a sentence; None if it can.
        exact: True if answers stay what stock gives.
        block_size: Tokens per block.
        pool: Its pool on one GPU; None where it is refused.
        users: Requests at once, each at its largest.
        slots: vLLM's ``--max-num-seqs`` that it was planned with.
        admitted: Blocks that must be free to admit one.
        held: Blocks of one while it generates.
        kept: Part of a text that layers under a sequence policy hold while it generates; 1 for
            none.
        beside: Bytes that policies keep on one GPU beside the pages.
        longest: Longest context at which the asked number of users fits; 0 for none.
        host_tokens: Tokens whose KV, and nothing else, fills the host tier.
        needs: What it leaves of vLLM's features.
        prices: What was measured of it.
    """

    candidate: Candidate
    refused: str | None = None
    exact: bool = True
    block_size: int = BLOCK_SIZE
    pool: Pool | None = None
    users: int = 0
    slots: int = 0
    admitted: int = 0
    held: int = 0
    kept: float = 1.0
    beside: int = 0
    longest: int = 0
    host_tokens: int = 0
    needs: Needs = field(default_factory=lambda: Needs())
    prices: tuple[Price, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Return the deployment as plain data."""
        pool = self.pool
        return {
            "name": self.candidate.name,
            "section": _shown(self.candidate.section),
            "flags": dict(self.candidate.flags),
            "refused": self.refused,
            "exact": self.exact,
            "block_size": self.block_size,
            "blocks": pool.blocks if pool else 0,
            "block_bytes": pool.block_bytes if pool else 0,
            "groups": len(pool.groups) if pool else 0,
            "tokens": pool.tokens if pool else 0,
            "token_bytes": round(pool.token_bytes, 1) if pool else 0,
            "users": self.users,
            "max_num_seqs": self.slots,
            "blocks_to_admit": self.admitted,
            "blocks_generating": self.held,
            "part_kept": round(self.kept, 4),
            "bytes_beside_pages": self.beside,
            "longest_context_for_users": self.longest,
            "host_tier_tokens": self.host_tokens,
            **asdict(self.needs),
            "measured": [
                {
                    "what": p.what,
                    "budget": p.budget,
                    "values": p.values,
                    "model": p.model,
                    "context": p.context,
                    "machine": p.machine,
                    "date": p.date,
                    "command": p.command,
                }
                for p in self.prices
            ],
        }


def _shown(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without the options of its tiers, which may hold passwords."""
    found = dict(section)
    if isinstance(found.get("tiers"), list):
        found["tiers"] = [
            next(iter(t), "") if isinstance(t, Mapping) else t for t in found["tiers"]
        ]
    return found


@dataclass(frozen=True)
class _Policies:
    """The policies of a deployment that shape pages, built for the planned engine."""

    engine: EngineView
    format: FormatPolicy | None = None
    sequence: SequencePolicy | None = None


@dataclass
class Planner:
    """Plans deployments of one model for one question.

    Attributes:
        model: The model.
        question: The question.
    """

    model: Model
    question: Question
    _views: dict[int, tuple[LayerView, ...]] = field(default_factory=dict, repr=False)

    @plain_defaults()
    def plan(self, candidate: Candidate) -> Planned:
        """Plan one deployment; what it cannot do on the model is in the answer."""
        flags = {
            "block-size": BLOCK_SIZE,
            "max-num-batched-tokens": self.question.batched,
            "max-model-len": self.question.context,
            "tensor-parallel-size": self.question.ranks,
            **candidate.flags,
        }
        block_size = int(flags["block-size"])
        try:
            deployment = load_deployment(dict(candidate.section), source=candidate.name)
            policies = self._built(deployment, flags)
            layers = self._layers(policies, block_size, flags)
        except DeploymentError as error:
            return Planned(candidate, error.refusals[0].problem, block_size=block_size)
        except ValueError as error:
            return Planned(candidate, f"{error}.", block_size=block_size)
        texts = self._texts(flags)
        slots = self.question.slots or self._slots(policies, layers, texts)
        beside = self._beside(policies, slots)
        pool = pool_of(layers, self.question.kv_bytes - beside)
        one = pool.request(texts)
        content = sum(page.unpadded_page_size_bytes / page.block_size for page, _ in layers)
        return Planned(
            candidate,
            exact=all(choice.policy.exact for choice in deployment.all())
            and "kv-cache-dtype" not in candidate.flags,
            block_size=block_size,
            pool=pool,
            users=min(pool.users(texts), slots),
            slots=slots,
            admitted=one.admitted,
            held=one.held,
            kept=_kept(pool, texts),
            beside=beside,
            longest=self._longest(pool, texts) if self.question.users else 0,
            host_tokens=int(self.question.host / (content * self.question.ranks)),
            needs=_needs(policies, self.model),
            prices=tuple(prices(*candidate.measured_as)),
        )

    def _texts(self, flags: Any) -> Texts:
        in_flight = int(flags["max-num-batched-tokens"]) * (
            2 if not flags.get("no-async-scheduling") else 1
        )
        return self.question.texts(in_flight)

    def _built(self, deployment: Deployment, flags: Any) -> _Policies:
        texts = self._texts(flags)
        engine = EngineView(
            block_size=int(flags["block-size"]),
            max_model_len=texts.context,
            max_in_flight_tokens=texts.in_flight,
            features=features_from_flags(flags) | self.model.features,
            layers=self.model.views(self.question.ranks),
        )
        self.model.require_runnable(deployment)
        deployment.require_compatible(engine, runs=RUNS, host="vllm")
        built: dict[Kind, Any] = {
            kind: choice.build(engine)
            for kind in (Kind.FORMAT, Kind.SEQUENCE)
            if (choice := deployment.choice(kind)) is not None
        }
        return _Policies(engine, built.get(Kind.FORMAT), built.get(Kind.SEQUENCE))

    def _layers(self, policies: _Policies, block_size: int, flags: Any) -> list[tuple[Page, Rule]]:
        quantized = str(flags.get("kv-cache-dtype", "auto")).startswith("fp8")
        element = 1 if quantized else ELEMENT[self.model.dtype]
        if policies.sequence is not None:
            layer_rules(policies.sequence)
        found: list[tuple[Page, Rule]] = []
        for layer, view in zip(self.model.layers, policies.engine.layers, strict=True):
            cell = (layer.head_size + layer.value_size) * element
            page = Page(view.num_kv_heads, block_size, cell)
            if layer.window is not None:
                found.append((page, Sliding(layer.window)))
            else:
                found.append(_shaped(page, view, policies))
        return found

    def _slots(self, policies: _Policies, layers: list[tuple[Page, Rule]], texts: Texts) -> int:
        """Most requests that fit at once together with what is kept for each beside the pages."""
        low, high = 1, MOST_SLOTS
        while low < high:
            middle = (low + high + 1) // 2
            left = self.question.kv_bytes - self._beside(policies, middle)
            if pool_of(layers, left).users(texts) >= middle:
                low = middle
            else:
                high = middle - 1
        return max(low, self.question.users)

    def _beside(self, policies: _Policies, slots: int) -> int:
        """Bytes that policies keep beside the pages, for every request that may run."""
        total = 0
        element = ELEMENT[self.model.dtype]
        ring = 0
        if isinstance(policies.sequence, ScoringPolicy):
            ring = query_ring(policies.sequence)
        for layer, view in zip(self.model.layers, policies.engine.layers, strict=True):
            if layer.window is not None:
                continue
            if policies.format is not None and (recent := policies.format.recent(view)):
                places = recent_places(recent, slots)
                total += 2 * places * view.num_kv_heads * view.head_size * element
            if ring:
                total += query_places(ring, slots) * view.num_heads * view.head_size * element
        return total

    def _longest(self, pool: Pool, texts: Texts) -> int:
        """Longest context at which the asked number of users fits."""
        low, high = 0, self.model.longest or MOST_CONTEXT
        while low < high:
            middle = (low + high + 1) // 2
            output = min(texts.output, max(middle - 1, 1))
            tried = replace(texts, context=middle, output=output)
            if pool.users(tried) >= self.question.users:
                low = middle
            else:
                high = middle - 1
        return low


def plan(model: Model, question: Question, these: Sequence[Candidate]) -> list[Planned]:
    """Plan deployments, in the order they are given.

    Raises:
        KVPlugError: The weights leave no memory.
    """
    if question.kv_bytes <= 0:
        weights = question.weights.bytes / question.ranks / GIB
        raise KVPlugError(
            f"{model.name}: its weights take {weights:.1f} GiB of each GPU, which leaves no "
            f"memory for KV. Fix: pass more --memory, a higher --tensor-parallel, or --weights "
            "of a quantized model."
        )
    planner = Planner(model, question)
    return [planner.plan(candidate) for candidate in these]


def _shaped(page: Page, view: LayerView, policies: _Policies) -> tuple[Page, Rule]:
    """A full-attention layer's page and rule, in the order the worker makes its spec: a format sets
    the bytes of a page, and a sequence policy builds on that."""
    stored, sequence = policies.format, policies.sequence
    if stored is not None:
        layout = stored.layout(view)
        recent = stored.recent(view)
        if recent and page.block_size % recent:
            raise ValueError(
                f"{stored.name} keeps {recent} recent tokens, which does not divide the block "
                f"size of {page.block_size} tokens"
            )
        page = Page(layout.stored_heads(view), page.block_size, layout.bytes_per_token_head)
    if isinstance(sequence, ScoringPolicy):
        fields = tail_fields(bool(sequence.wants_cumulative_attention))
        return with_tail(page, fields), Pruned(layer_limits(sequence, view))
    if sequence is not None:
        window = sequence.window(view)
        if window is None:
            raise ValueError(f"{sequence.name} gives no window, and is no ScoringPolicy")
        return page, Positional(window)
    return page, Whole()


def _kept(pool: Pool, texts: Texts) -> float:
    """Part of a text that layers under a sequence policy hold, on average."""
    shortened = [g for g in pool.groups if isinstance(g.rule, Positional | Pruned)]
    if not shortened:
        return 1.0
    held = sum(g.rule.blocks(texts, g.block_size).held * g.block_size * g.layers for g in shortened)
    return min(held / (texts.context * sum(g.layers for g in shortened)), 1.0)


def _needs(policies: _Policies, model: Model) -> Needs:
    stored, sequence, size = policies.format, policies.sequence, policies.engine.block_size
    graphs, prefix, runner = "whole steps", "kept", "either"
    if stored is not None:
        prefix = "kept, in its bytes"
        if not stored.graph_safe or model.config.get("attn_logit_softcapping"):
            graphs = "end at attention"
        elif any(stored.recent(view) for view in policies.engine.layers):
            runner = "second"
    if isinstance(sequence, ScoringPolicy):
        runner = "first" if sequence.options.on_demand else "second"
        if runner == "first":
            graphs = "end at attention"
        shared = min(layer_limits(sequence, view).protected for view in policies.engine.layers)
        cumulative = bool(sequence.wants_cumulative_attention)
        prefix = "none" if cumulative else f"first {shared * size:,}"
    elif sequence is not None:
        windows = [sequence.window(view) for view in policies.engine.layers]
        shared = min(window.exact_blocks for window in windows if window is not None)
        prefix = f"first {shared * size:,}"
    return Needs(graphs, prefix, runner)
