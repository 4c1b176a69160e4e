"""Attention backends that stay vLLM's own unless kvplug's connector needs them otherwise.

vLLM resolves ``kvplug.hosts.vllm.worker.backend.CPU_ATTN`` while the engine's config is current,
so the module's ``__getattr__`` can answer with the stock class, or with a subclass of it: its
metadata builder compacts block tables and its layers carry a `WindowedSpec` (a sequence policy),
or its layers have pages of other bytes that it writes and attends by the policy (a format), or
both; or its layers carry a `ReusedSpec` and tell what reuse has to know of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from kvplug.contract import (
    FormatPolicy,
    Kind,
    LayerView,
    PageLayout,
    ScoringPolicy,
    SequencePolicy,
    Window,
)
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal

if TYPE_CHECKING:
    from kvplug.hosts.vllm.worker.reuse import ReusePlug

STOCK: dict[str, str] = {}
"""Path of the class each overridden backend had before."""


def path(name: str) -> str:
    """The path kvplug registers for a backend."""
    return f"{__name__}.{name}"


def __getattr__(name: str) -> Any:
    if name not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from kvplug.hosts.vllm import admission, engine

    stock = resolve_obj_by_qualname(STOCK[name])
    config = get_current_vllm_config_or_none()
    if config is None or not engine.is_kvplug(config):
        return stock
    deployment = admission.deployment_of(config)
    sequence = engine.sequence_policy(deployment, config)
    plug = None
    stored = engine.format_policy(deployment, config)
    if stored is not None:
        plug = FormatPlug(stored, _origin(deployment, Kind.FORMAT), config)
    reused = None
    if deployment.choice(Kind.REUSE) is not None:
        from kvplug.hosts.vllm.worker.reuse import ReusePlug

        reused = ReusePlug(deployment, config)
    if sequence is None:
        return stock if plug is None and reused is None else format_backend(stock, plug, reused)
    origin = _origin(deployment, Kind.SEQUENCE)
    if isinstance(sequence, ScoringPolicy):
        return pruned_backend(stock, sequence, config, origin, plug)
    return windowed_backend(stock, sequence, origin, plug)


def _origin(deployment: Deployment, kind: Kind) -> tuple[str, str]:
    choice = deployment.choice(kind)
    assert choice is not None
    return deployment.source, choice.key


class FormatPlug:
    """A format policy as a backend takes it.

    Args:
        policy: The policy, built for the engine.
        origin: Source and key of the policy in its deployment, for messages.
        vllm_config: The engine's config.
    """

    def __init__(self, policy: FormatPolicy, origin: tuple[str, str], vllm_config: Any):
        from kvplug.hosts.vllm.worker.state import worker_state

        self.policy = policy
        self.origin = origin
        self.layouts = [policy.layout(layer) for layer in policy.engine.layers]
        self.recent = max((policy.recent(layer) for layer in policy.engine.layers), default=0)
        self.apart = self.recent > 0 or len(policy.assignments()) > 1
        self.state = worker_state(vllm_config)
        self.state.format = policy

    def builders(self) -> tuple[type[Any], type[Any] | None]:
        """The mixin next to the stock builder, and the one before all others or None."""
        from kvplug.hosts.vllm.worker.format import FormatBuilder, LaneBuilder

        if not self.apart:
            return FormatBuilder, None
        return FormatBuilder, type("Lanes", (LaneBuilder,), {"kvplug_recent": self.recent})

    def impl(self) -> type[Any]:
        """The mixin next to the stock implementation."""
        from kvplug.hosts.vllm.worker.format import FormatImpl

        own = {"kvplug_format": self.policy, "kvplug_format_state": self.state}
        return type("Format", (FormatImpl,), own)


def windowed_backend(
    stock: type[Any],
    policy: SequencePolicy,
    origin: tuple[str, str] = ("inline", "kvplug.sequence"),
    plug: FormatPlug | None = None,
) -> type[Any]:
    """A subclass of a stock backend that applies a positional sequence policy.

    Args:
        stock: The backend class vLLM would use.
        policy: A policy whose `window` answers for every layer.
        origin: Source and key of the policy in its deployment, for messages.
        plug: The format its pages are in; None for the backend's own.
    """
    from kvplug.hosts.vllm.spec import WindowedSpec
    from kvplug.hosts.vllm.worker.window import CompactingBuilder

    block = policy.engine.block_size
    windows = [_window(policy, layer) for layer in policy.engine.layers]
    exact_tokens = min(w.exact_blocks for w in windows) * block

    def rule(window: Window) -> dict[str, Any]:
        return {
            "sink_tokens": window.sink_blocks * block,
            "window_tokens": window.window_blocks * block,
        }

    shortening = Shortening(
        policy, origin, CompactingBuilder, None, WindowedSpec, exact_tokens, windows, rule
    )
    return _plugged_backend(stock, shortening, plug)


def pruned_backend(
    stock: type[Any],
    policy: ScoringPolicy,
    vllm_config: Any,
    origin: tuple[str, str] = ("inline", "kvplug.sequence"),
    plug: FormatPlug | None = None,
) -> type[Any]:
    """A subclass of a stock backend that applies a scoring sequence policy.

    Args:
        stock: The backend class vLLM would use.
        policy: The policy.
        vllm_config: The engine's config.
        origin: Source and key of the policy in its deployment, for messages.
        plug: The format its pages are in; None for the backend's own.
    """
    from kvplug.hosts.vllm.engine import layer_limits
    from kvplug.hosts.vllm.spec import PrunedSpec
    from kvplug.hosts.vllm.worker.sequence import PruningBuilder, PruningImpl, ring_size
    from kvplug.hosts.vllm.worker.state import worker_state

    limits = [layer_limits(policy, layer) for layer in policy.engine.layers]
    # A hit would bring tokens whose running totals nobody kept.
    shared = 0 if policy.wants_totals else min(own.shared for own in limits)
    state = worker_state(vllm_config)
    state.block_size = policy.engine.block_size
    state.ring = ring_size(policy)
    state.totals = policy.wants_totals

    class Impl(PruningImpl):
        kvplug_policy = policy
        kvplug_state = state

    shortening = Shortening(
        policy,
        origin,
        PruningBuilder,
        Impl,
        PrunedSpec,
        shared * policy.engine.block_size,
        limits,
        lambda own: {"limits": own},
    )
    return _plugged_backend(stock, shortening, plug)


def format_backend(
    stock: type[Any], plug: FormatPlug | None, reused: ReusePlug | None = None
) -> type[Any]:
    """A subclass of a stock backend whose pages are in a format, or filled from stored KV.

    Args:
        stock: The backend class vLLM would use.
        plug: The format; None for the backend's own pages.
        reused: Reuse of stored KV; None where nothing is reused.
    """
    return _plugged_backend(stock, None, plug, reused)


@dataclass(frozen=True)
class Shortening:
    """A sequence policy as a backend takes it.

    Attributes:
        policy: The policy.
        origin: Source and key of the policy in its deployment, for messages.
        builder: Mixin of the metadata builder.
        impl: Mixin of the implementation, or None.
        spec: Class of the layers' KV-cache spec.
        exact_tokens: Leading tokens that see everything before them in every layer.
        rules: The rule of each layer.
        fields: Fields of the spec that state a rule.
    """

    policy: SequencePolicy
    origin: tuple[str, str]
    builder: type[Any]
    impl: type[Any] | None
    spec: type[Any]
    exact_tokens: int
    rules: list[Any]
    fields: Callable[[Any], dict[str, Any]]


def _plugged_backend(
    stock: type[Any],
    shortening: Shortening | None,
    plug: FormatPlug | None,
    reused: ReusePlug | None = None,
) -> type[Any]:
    """A subclass of ``stock`` whose full-attention layers carry a sequence policy's spec by their
    own rule, or a format's pages by their own layout, or both; or what reuse needs."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

    from kvplug.hosts.vllm import compat
    from kvplug.hosts.vllm.spec import ReusedSpec

    stock_builder, stock_impl = stock.get_builder_cls(), stock.get_impl_cls()
    inner, outer = plug.builders() if plug is not None else (None, None)
    first = reused.builders() if reused is not None else ()
    builders = (*first, outer, shortening.builder if shortening else None, inner, stock_builder)
    impls = (
        shortening.impl if shortening else None,
        *(reused.impls() if reused is not None else ()),
        plug.impl() if plug is not None else None,
        stock_impl,
    )

    class Builder(*filter(None, builders)):  # type: ignore[misc]
        pass

    class Impl(*filter(None, impls)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any):
            from vllm.config import get_current_vllm_config

            super().__init__(*args, **kwargs)
            self._static_forward_context = (
                get_current_vllm_config().compilation_config.static_forward_context
            )

        def process_weights_after_loading(self, act_dtype: Any) -> None:
            super().process_weights_after_loading(act_dtype)
            for name, layer in self._static_forward_context.items():
                if getattr(layer, "impl", None) is self:
                    compat.set_layer_backend(layer, layer_backend(name, self))

    @functools.cache
    def for_rule(rule: Any, layout: PageLayout | None) -> type[Any]:
        class Backend(stock):
            kvplug_layout = layout

            @staticmethod
            def get_impl_cls() -> type[Any]:
                return Impl

            @staticmethod
            def get_builder_cls() -> type[Any]:
                return Builder

            @classmethod
            def customize_spec(cls, spec: Any) -> Any:
                spec = super().customize_spec(spec)
                if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
                    return spec
                if layout is not None:
                    assert plug is not None
                    _refuse_kernel_blocks(stock, spec, plug.policy.name, plug.origin)
                    spec = replace(
                        spec,
                        dtype=torch.uint8,
                        state_content_bytes=layout.bytes_per_token_head,
                        num_head_slots=layout.heads,
                    )
                if shortening is None:
                    return spec if reused is None else replace_as(spec, ReusedSpec)
                policy = shortening.policy
                _refuse_kernel_blocks(stock, spec, policy.name, shortening.origin)
                return replace_as(
                    spec,
                    shortening.spec,
                    exact_tokens=shortening.exact_tokens,
                    in_flight_tokens=policy.engine.max_in_flight_tokens,
                    max_tokens=policy.engine.max_model_len,
                    **shortening.fields(rule),
                )

        return Backend

    def layer_backend(name: str, impl: Any) -> type[Any]:
        from vllm.model_executor.models.utils import extract_layer_index

        if getattr(impl, "alibi_slopes", None) is not None:
            if shortening is not None:
                _refuse(
                    shortening.origin,
                    f"{shortening.policy.name} cannot run on a model with ALiBi: its distances "
                    "would be counted on what is kept.",
                    "remove the sequence section for this model.",
                )
            if plug is not None:
                _refuse(
                    plug.origin,
                    f"{plug.policy.name} cannot run on a model with ALiBi: formats attend "
                    "without position biases.",
                    "remove the format section for this model.",
                )
        if plug is not None and getattr(impl, "sinks", None) is not None:
            _refuse(
                plug.origin,
                f"{plug.policy.name} cannot run on a model with learned attention sinks.",
                "remove the format section for this model.",
            )
        index = extract_layer_index(name)
        return for_rule(
            shortening.rules[index] if shortening is not None else None,
            plug.layouts[index] if plug is not None else None,
        )

    return for_rule(
        shortening.rules[0] if shortening is not None else None,
        plug.layouts[0] if plug is not None else None,
    )


def _refuse(origin: tuple[str, str], problem: str, fix: str) -> NoReturn:
    raise DeploymentError(origin[0], [Refusal(origin[1], problem, fix)])


def _refuse_kernel_blocks(
    stock: type[Any], spec: Any, policy_name: str, origin: tuple[str, str]
) -> None:
    """Refuse a block size the backend splits: windows and directives count the pool's blocks."""
    from vllm.v1.worker.utils import select_common_block_size

    try:
        size = select_common_block_size(spec.block_size, [stock], [spec])
    except ValueError:
        return
    if size != spec.block_size:
        _refuse(
            origin,
            f"{policy_name} counts in blocks of {spec.block_size} tokens, and "
            f"{stock.get_name()} splits them into blocks of {size}.",
            f"set --block-size {size}.",
        )


def _window(policy: SequencePolicy, layer: LayerView) -> Window:
    window = policy.window(layer)
    assert window is not None, "checked when the deployment was"
    return window
