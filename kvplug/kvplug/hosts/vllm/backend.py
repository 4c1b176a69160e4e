"""Attention backends that stay vLLM's own unless kvplug's connector needs them otherwise.

vLLM resolves ``kvplug.hosts.vllm.backend.CPU_ATTN`` while the engine's config is current, so the
module's ``__getattr__`` can answer with the stock class, or with a subclass of it whose metadata
builder compacts block tables and whose layers carry a `WindowedSpec`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.contract import Kind, LayerView, ScoringPolicy, SequencePolicy, Window
from kvplug.errors import DeploymentError, Refusal

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

    from kvplug.hosts.vllm import engine

    stock = resolve_obj_by_qualname(STOCK[name])
    config = get_current_vllm_config_or_none()
    if config is None or not engine.is_kvplug(config):
        return stock
    deployment = engine.deployment_of(config)
    choice = deployment.choice(Kind.SEQUENCE)
    policy = engine.sequence_policy(deployment, config)
    if choice is None or policy is None:
        return stock
    origin = (deployment.source, choice.key)
    if isinstance(policy, ScoringPolicy):
        return pruned_backend(stock, policy, config, origin)
    return windowed_backend(stock, policy, origin)


def windowed_backend(
    stock: type[Any],
    policy: SequencePolicy,
    origin: tuple[str, str] = ("inline", "kvplug.sequence"),
) -> type[Any]:
    """A subclass of a stock backend that applies a positional sequence policy.

    Args:
        stock: The backend class vLLM would use.
        policy: A policy whose `window` answers for every layer.
        origin: Source and key of the policy in its deployment, for messages.
    """
    from kvplug.hosts.vllm.compaction import CompactingBuilder
    from kvplug.hosts.vllm.spec import WindowedSpec

    block = policy.engine.block_size
    windows = [_window(policy, layer) for layer in policy.engine.layers]
    exact_tokens = min(w.exact_blocks for w in windows) * block

    def rule(window: Window) -> dict[str, Any]:
        return {
            "sink_tokens": window.sink_blocks * block,
            "window_tokens": window.window_blocks * block,
        }

    return _shortening_backend(
        stock, policy, origin, CompactingBuilder, None, WindowedSpec, exact_tokens, windows, rule
    )


def pruned_backend(
    stock: type[Any],
    policy: ScoringPolicy,
    vllm_config: Any,
    origin: tuple[str, str] = ("inline", "kvplug.sequence"),
) -> type[Any]:
    """A subclass of a stock backend that applies a scoring sequence policy.

    Args:
        stock: The backend class vLLM would use.
        policy: The policy.
        vllm_config: The engine's config.
        origin: Source and key of the policy in its deployment, for messages.
    """
    from kvplug.hosts.vllm.engine import layer_limits
    from kvplug.hosts.vllm.pruner import PruningBuilder, PruningImpl, ring_size
    from kvplug.hosts.vllm.spec import PrunedSpec
    from kvplug.hosts.vllm.worker import worker_state

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

    return _shortening_backend(
        stock,
        policy,
        origin,
        PruningBuilder,
        Impl,
        PrunedSpec,
        shared * policy.engine.block_size,
        limits,
        lambda own: {"limits": own},
    )


def _shortening_backend(
    stock: type[Any],
    policy: SequencePolicy,
    origin: tuple[str, str],
    builder_mixin: type[Any],
    impl_mixin: type[Any] | None,
    spec_cls: type[Any],
    exact_tokens: int,
    rules: list[Any],
    spec_fields: Callable[[Any], dict[str, Any]],
) -> type[Any]:
    """A subclass of ``stock`` whose full-attention layers carry ``spec_cls`` by their own rule."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

    from kvplug.hosts.vllm import compat

    stock_builder, stock_impl = stock.get_builder_cls(), stock.get_impl_cls()

    class Builder(builder_mixin, stock_builder):  # type: ignore[misc, valid-type]
        pass

    class Impl(*filter(None, (impl_mixin, stock_impl))):  # type: ignore[misc]
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
    def for_rule(rule: Any) -> type[Any]:
        class Backend(stock):
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
                _refuse_kernel_blocks(stock, spec, policy, origin)
                return replace_as(
                    spec,
                    spec_cls,
                    exact_tokens=exact_tokens,
                    in_flight_tokens=policy.engine.max_in_flight_tokens,
                    max_tokens=policy.engine.max_model_len,
                    **spec_fields(rule),
                )

        return Backend

    def layer_backend(name: str, impl: Any) -> type[Any]:
        from vllm.model_executor.models.utils import extract_layer_index

        if getattr(impl, "alibi_slopes", None) is not None:
            raise DeploymentError(
                origin[0],
                [
                    Refusal(
                        origin[1],
                        f"{policy.name} cannot run on a model with ALiBi: its distances would be "
                        "counted on what is kept.",
                        "remove the sequence section for this model.",
                    )
                ],
            )
        return for_rule(rules[extract_layer_index(name)])

    return for_rule(rules[0])


def _refuse_kernel_blocks(
    stock: type[Any], spec: Any, policy: SequencePolicy, origin: tuple[str, str]
) -> None:
    """Refuse a block size the backend splits: windows and directives count the pool's blocks."""
    from vllm.v1.worker.utils import select_common_block_size

    try:
        size = select_common_block_size(spec.block_size, [stock], [spec])
    except ValueError:
        return
    if size != spec.block_size:
        raise DeploymentError(
            origin[0],
            [
                Refusal(
                    origin[1],
                    f"{policy.name} counts in blocks of {spec.block_size} tokens, and "
                    f"{stock.get_name()} splits them into blocks of {size}.",
                    f"set --block-size {size}.",
                )
            ],
        )


def _window(policy: SequencePolicy, layer: LayerView) -> Window:
    window = policy.window(layer)
    assert window is not None, "checked when the deployment was"
    return window
