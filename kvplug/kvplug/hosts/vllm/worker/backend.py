"""Attention backends that stay vLLM's own unless a deployment has kinds that shape layers.

vLLM resolves ``kvplug.hosts.vllm.worker.backend.CPU_ATTN`` while the engine's config is current,
so the module's ``__getattr__`` can answer with the stock class, or with a `Door` to it. vLLM keeps
the answer for the life of the process, whichever engines come after, so a door belongs to no
engine: it asks the current config which engine a layer is built for, and what a layer is given
once it is loaded belongs to that engine alone. On CUDA vLLM resolves a class again from its module
and qualified name, so every door is an attribute of this module. Imported in every vLLM process, so
it imports little.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

STOCK: dict[str, str] = {}
"""Path of the class each overridden backend had before."""


def path(name: str) -> str:
    """The path kvplug registers for a backend."""
    return f"{__name__}.{name}"


def __getattr__(name: str) -> Any:
    stock_name = name.removesuffix("_DOOR")
    if stock_name not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from kvplug.hosts.vllm import admission, engine

    stock = resolve_obj_by_qualname(STOCK[stock_name])
    if name != stock_name:
        return _door(name, stock)
    config = get_current_vllm_config_or_none()
    if config is None:
        return stock
    admission.refuse_inside(config)
    return _door(f"{name}_DOOR", stock) if engine.is_kvplug(config) else stock


@functools.cache
def _door(name: str, stock: type[Any]) -> type[Any]:
    class Door(stock):
        kvplug_door: ClassVar[bool] = True

        @staticmethod
        def get_impl_cls() -> type[Any]:
            from vllm.config import get_current_vllm_config_or_none

            made = engine_backend(stock, get_current_vllm_config_or_none())
            found: type[Any] = (stock if made is None else made).get_impl_cls()
            return found

    Door.__module__, Door.__qualname__, Door.__name__ = __name__, name, name
    return Door


def engine_backend(stock: type[Any], vllm_config: Any) -> type[Any] | None:
    """Return an engine's own subclass of a stock backend, made on first use; None for an engine
    whose layers are vLLM's own.

    Args:
        stock: The class vLLM would use.
        vllm_config: The engine's config, or None.
    """
    from kvplug.hosts.vllm import admission, engine

    if vllm_config is None or not engine.is_kvplug(vllm_config):
        return None
    from kvplug.hosts.vllm.worker.composition import plugged_backend
    from kvplug.hosts.vllm.worker.kinds import worker_kinds
    from kvplug.hosts.vllm.worker.layer_check import LayerCheck
    from kvplug.hosts.vllm.worker.state import worker_state

    state = worker_state(vllm_config)
    if stock in state.backends:
        return state.backends[stock]
    deployment = admission.deployment_of(vllm_config)
    kinds = worker_kinds(deployment, vllm_config)
    made = None
    if kinds:
        made = plugged_backend(
            stock, kinds, state.rows, state.built, LayerCheck(deployment, vllm_config)
        )
    state.backends[stock] = made
    return made
