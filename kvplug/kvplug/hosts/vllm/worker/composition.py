"""Backends, builders and implementations of vLLM's with the steps of a deployment's kinds.

`kinds` says which kinds there are and in which order their steps come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
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

OfConfig = Callable[[Any], tuple[Kinds, StepRows]]
"""``of_config(vllm_config)``: the kinds and rows of the engine a config belongs to. vLLM chooses a
backend class once per process, so the objects it makes must find those of their own engine."""


def plugged_backend(
    stock: type[Any],
    kinds: Kinds,
    rows: StepRows,
    of_config: OfConfig | None = None,
    name: tuple[str, str] | None = None,
) -> type[Any]:
    """Make a subclass of a stock backend that runs the steps of some kinds.

    Each full-attention layer gets a backend class with the KV-cache spec of its own rules; layers
    of equal rules share one. All of them go by one full name, so that layers with equal specs share
    a metadata builder.

    Args:
        stock: The backend class vLLM would use.
        kinds: The kinds, in the order of `kinds.KINDS`.
        rows: Slots of the engine's rows.
        of_config: Finds both for another engine of the process; None to use these in all.
        name: Module and qualified name by which vLLM resolves the class again.
    """
    builder = plugged_builder(stock.get_builder_cls(), kinds, rows, of_config)
    impl = plugged_impl(
        stock.get_impl_cls(), kinds, lambda name, own: for_layer(name, own), of_config
    )

    @functools.cache
    def for_rules(rules: tuple[Hashable, ...]) -> type[Any]:
        class Backend(stock):
            kvplug_rules: ClassVar[dict[Kind, Hashable]] = dict(
                zip((kind.kind for kind in kinds), rules, strict=True)
            )

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

        if name is not None:
            Backend.__module__, Backend.__qualname__ = name
            Backend.__name__ = name[1]
        return Backend

    def for_layer(name: str, own: Any) -> type[Any]:
        from vllm.model_executor.models.utils import extract_layer_index

        for kind in kinds:
            kind.check_impl(own)
        index = extract_layer_index(name)
        return for_rules(tuple(kind.rule(index) for kind in kinds))

    return for_rules(tuple(kind.rule(0) for kind in kinds))


def require_plugged(kinds: Kinds, layers: Mapping[str, Any]) -> None:
    """Check that every full-attention layer runs the steps of some kinds.

    vLLM chooses a backend by itself where ``--attention-backend`` is left out.

    Args:
        kinds: The kinds.
        layers: vLLM's layers, by name.

    Raises:
        DeploymentError: One has a backend that kvplug does not extend.
    """
    for name, layer in layers.items():
        backend = getattr(layer, "attn_backend", None)
        if backend is None or hasattr(backend, "kvplug_rules"):
            continue
        if getattr(layer, "sliding_window", None) is not None:
            continue
        for kind in kinds:
            kind.refuse(
                f"attention layer {name} runs on {backend.get_name()}, where the {kind.kind!s} "
                "section would do nothing.",
                "set --attention-backend FLASH_ATTN or TRITON_ATTN.",
            )


def plugged_builder(
    stock: type[Any], kinds: Kinds, rows: StepRows, of_config: OfConfig | None = None
) -> type[Any]:
    """Make a subclass of a stock metadata builder that runs the kinds' metadata steps.

    Args:
        stock: The builder class.
        kinds: The kinds.
        rows: Slots of the engine's rows.
        of_config: Finds both for another engine of the process; None to use these in all.
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
            own, self._kvplug_rows = of_config(vllm_config) if of_config else (kinds, rows)
            made = [s for k in own for s in k.metadata_steps(kv_cache_spec, vllm_config, device)]
            self._kvplug_build = build_chain(
                sorted(made, key=lambda step: METADATA_STEPS.index(type(step))), self._stock_build
            )

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
                self._kvplug_rows.see(common_attn_metadata.req_idx)
            slots = RowSlots(self._kvplug_rows, common_attn_metadata, self._kvplug_block_size)
            call = BuildCall(
                common_attn_metadata, common_prefix_len, fast_build, slots, self._kvplug_layers
            )
            return self._kvplug_build(call)

        def _stock_build(self, call: BuildCall) -> Any:
            return super().build(call.prefix_len, call.common, call.fast)

    return Builder


class _Chains(NamedTuple):
    """Some kinds, and their attention steps, alone and composed."""

    kinds: Kinds
    steps: Sequence[AttentionStep]
    write: Write
    attend: Attend


def plugged_impl(
    stock: type[Any],
    kinds: Kinds,
    backend_of: Callable[[str, Any], type[Any]],
    of_config: OfConfig | None = None,
) -> type[Any]:
    """Make a subclass of a stock attention implementation that runs the kinds' attention steps.

    Args:
        stock: The implementation class.
        kinds: The kinds, outermost first.
        backend_of: ``backend_of(layer_name, impl)``: the backend class of a layer.
        of_config: Finds the kinds of another engine of the process; None to use these in all.
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
        return _Chains(
            own, steps, write_chain(steps, stock_write), attend_chain(steps, stock_attend)
        )

    class Impl(stock):
        _kvplug = chains(kinds)

        def __init__(self, *args: Any, **kwargs: Any):
            from vllm.config import get_current_vllm_config

            super().__init__(*args, **kwargs)
            config = get_current_vllm_config()
            self._kvplug_layers = config.compilation_config.static_forward_context
            if of_config is not None:
                own, _ = of_config(config)
                if own is not kinds:
                    self._kvplug = chains(own)

        def process_weights_after_loading(self, act_dtype: Any) -> None:
            super().process_weights_after_loading(act_dtype)
            for name, layer in self._kvplug_layers.items():
                if getattr(layer, "impl", None) is self:
                    compat.set_layer_backend(layer, backend_of(name, self))
                    for kind in self._kvplug.kinds:
                        kind.loaded(name, layer, act_dtype)

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

        def kvplug_pages(self, layer: Any, cache: Tensor) -> TokenPages | None:
            """Open the layer's pages if they are in bytes of a kind's own, else return None."""
            opened = (step.pages(self, layer, cache) for step in self._kvplug.steps)
            return next((pages for pages in opened if pages is not None), None)

    return Impl
