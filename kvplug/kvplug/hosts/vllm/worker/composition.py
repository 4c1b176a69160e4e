"""Backends, builders and implementations of vLLM's with the steps of a deployment's kinds.

`kinds` says which kinds there are and in which order their steps come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvplug.contract import Kind
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.worker.kind import KindWorker
from kvplug.hosts.vllm.worker.kinds import METADATA_STEPS
from kvplug.hosts.vllm.worker.pages import TokenPages
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.steps import (
    Attend,
    AttendCall,
    AttentionStep,
    BuildCall,
    RowSlots,
    Write,
    WriteCall,
    attend_chain,
    build_chain,
    write_chain,
)

Kinds = Sequence[KindWorker]

Check = Callable[[str, Any], None]
"""``check(name, layer)``: raises DeploymentError for a layer that the kinds cannot shape."""


def plugged_backend(
    stock: type[Any],
    kinds: Kinds,
    rows: StepRows,
    built: set[str] | None = None,
    check: Check | None = None,
) -> type[Any]:
    """Make a subclass of a stock backend that runs the steps of an engine's kinds.

    Each full-attention layer gets a backend class with the KV-cache spec of its own rules; layers
    of equal rules share one. All of them go by one full name, so that layers with equal specs share
    a metadata builder.

    Args:
        stock: The backend class vLLM would use.
        kinds: The kinds, in the order of `kinds.KINDS`.
        rows: Slots of the engine's rows.
        built: Where the layers are noted that a builder was made for; None for nowhere.
        check: Checks each layer once it is loaded.
    """
    builder = plugged_builder(stock.get_builder_cls(), kinds, rows, built)
    impl = plugged_impl(stock.get_impl_cls(), kinds, lambda name, own: for_layer(name, own), check)

    @functools.cache
    def for_rules(rules: tuple[Hashable, ...]) -> type[Any]:
        class Backend(stock):
            kvplug_rules: ClassVar[dict[Kind, Hashable]] = dict(
                zip((kind.kind for kind in kinds), rules, strict=True)
            )

            # A model would write keys and values by itself, past the kinds.
            supports_kv_cache_update_bypass = False

            @staticmethod
            def get_impl_cls() -> type[Any]:
                return impl

            @staticmethod
            def get_builder_cls() -> type[Any]:
                return builder

            @classmethod
            def customize_spec(cls, spec: Any) -> Any:
                from vllm.v1.kv_cache_interface import FullAttentionSpec

                spec = super().customize_spec(spec)
                if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
                    return spec
                for kind, rule in reversed(list(zip(kinds, rules, strict=True))):
                    spec = kind.customize_spec(spec, rule, stock)
                return spec

            @classmethod
            def supported_kv_cache_layouts(cls) -> tuple[Any, ...] | None:
                layouts = super().supported_kv_cache_layouts()
                for kind in kinds:
                    layouts = kind.layouts(layouts)
                return layouts

        # vLLM gathers layers for builders by this name, and not by the class.
        Backend.__module__, Backend.__qualname__ = __name__, f"{stock.__qualname__}.Backend"
        return Backend

    def for_layer(name: str, own: Any) -> type[Any]:
        from vllm.model_executor.models.utils import extract_layer_index

        for kind in kinds:
            kind.check_impl(own)
        index = extract_layer_index(name)
        return for_rules(tuple(kind.rule(index) for kind in kinds))

    return for_rules(tuple(kind.rule(0) for kind in kinds))


def plugged_builder(
    stock: type[Any], kinds: Kinds, rows: StepRows, built: set[str] | None = None
) -> type[Any]:
    """Make a subclass of a stock metadata builder that runs the kinds' metadata steps.

    Args:
        stock: The builder class.
        kinds: The kinds.
        rows: Slots of the engine's rows.
        built: Where the builder's layers are noted; None for nowhere.
    """

    class Builder(stock):
        if not all(kind.supports_update_block_table for kind in kinds):
            supports_update_block_table = False

        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: Any,
            device: torch.device,
            *args: Any,
            **kwargs: Any,
        ):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
            self._kvplug_block_size = kv_cache_spec.block_size
            self._kvplug_layers = tuple(layer_names)
            made = [s for k in kinds for s in k.metadata_steps(kv_cache_spec, vllm_config, device)]
            self._kvplug_build = build_chain(
                sorted(made, key=lambda step: METADATA_STEPS.index(type(step))), self._stock_build
            )
            if built is not None:
                built.update(layer_names)

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            for kind in kinds:
                support = kind.cudagraph_support(kv_cache_spec, support)
            return support

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            if common_attn_metadata.req_idx is not None:
                rows.see(common_attn_metadata.req_idx)
            slots = RowSlots(rows, common_attn_metadata, self._kvplug_block_size)
            call = BuildCall(
                common_attn_metadata, common_prefix_len, fast_build, slots, self._kvplug_layers
            )
            return self._kvplug_build(call)

        def _stock_build(self, call: BuildCall) -> Any:
            return super().build(call.prefix_len, call.common, call.fast)

    return Builder


def _given(vllm_config: Any) -> bool:
    """True where the size of the KV cache is given, so that vLLM measures no memory."""
    return getattr(vllm_config.cache_config, "kv_cache_memory_bytes", None) is not None


def is_door(backend: type[Any]) -> bool:
    """True for the class that vLLM resolved, and not for those that vLLM derives from it for layers
    that attend in a way of their own."""
    return "kvplug_door" in vars(backend)


def takes_steps(backend: type[Any]) -> bool:
    """True for the backend of a layer that runs kinds' steps, or will once it is loaded."""
    return is_door(backend) or "kvplug_rules" in vars(backend)


class _Chains(NamedTuple):
    """Attention steps, alone and composed."""

    steps: Sequence[AttentionStep]
    write: Write
    attend: Attend


def plugged_impl(
    stock: type[Any],
    kinds: Kinds,
    backend_of: Callable[[str, Any], type[Any]],
    check: Check | None = None,
) -> type[Any]:
    """Make a subclass of a stock attention implementation that runs the kinds' attention steps.

    Layers whose backend vLLM derived for a way of attending of their own (in chunks, of an encoder,
    across) run none of them.

    Args:
        stock: The implementation class.
        kinds: The kinds, outermost first.
        backend_of: ``backend_of(layer_name, impl)``: the backend class of a layer.
        check: Checks each layer once it is loaded.
    """

    def stock_write(call: WriteCall) -> None:
        stock.do_kv_cache_update(
            call.impl, call.layer, call.key, call.value, call.cache, call.slot_mapping
        )

    def stock_attend(call: AttendCall) -> Tensor:
        return stock.forward(
            call.impl,
            call.layer,
            call.query,
            call.key,
            call.value,
            call.cache,
            call.metadata,
            call.output,
            *call.args,
            **call.kwargs,
        )

    def chains(own: Kinds) -> _Chains:
        steps = [step for kind in own if (step := kind.attention_step()) is not None]
        return _Chains(steps, write_chain(steps, stock_write), attend_chain(steps, stock_attend))

    class Impl(stock):
        kvplug_kinds: ClassVar[Kinds] = kinds
        _kvplug = chains(kinds)

        def __init__(self, *args: Any, **kwargs: Any):
            from vllm.config import get_current_vllm_config

            super().__init__(*args, **kwargs)
            config = get_current_vllm_config()
            self._kvplug_layers = config.compilation_config.static_forward_context
            self._kvplug_config = config

        def process_weights_after_loading(self, act_dtype: Any) -> None:
            super().process_weights_after_loading(act_dtype)
            for name, layer in self._kvplug_layers.items():
                if getattr(layer, "impl", None) is not self:
                    continue
                if check is not None:
                    check(name, layer)
                if not takes_steps(layer.attn_backend):
                    self._kvplug = chains(())
                    continue
                compat.set_layer_backend(layer, backend_of(name, self))
                for kind in kinds:
                    kind.held.measured = not _given(self._kvplug_config)
                    kind.loaded(name, layer, act_dtype, self._kvplug_config)

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
        ) -> None:
            self._kvplug.write(WriteCall(self, layer, key, value, kv_cache, slot_mapping))

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            output: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            return self._kvplug.attend(
                AttendCall(
                    self, layer, query, key, value, kv_cache, attn_metadata, output, args, kwargs
                )
            )

        # Compiled graphs would write keys and values, or quantize the output, past the kinds.

        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return False

        def fused_qk_norm_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_mrope_kvcache_supported(self) -> bool:
            return False

        def fused_rope_kvcache_supported(self) -> bool:
            return False

        def kvplug_pages(self, layer: Any, cache: Tensor) -> TokenPages | None:
            """Open the layer's pages if they are in bytes of a kind's own, else return None."""
            opened = (step.pages(self, layer, cache) for step in self._kvplug.steps)
            return next((pages for pages in opened if pages is not None), None)

    return Impl
