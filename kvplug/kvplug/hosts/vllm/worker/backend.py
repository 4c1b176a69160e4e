"""Attention backends that stay vLLM's own unless a deployment has kinds that shape layers.

vLLM resolves ``kvplug.hosts.vllm.worker.backend.CPU_ATTN`` while the engine's config is current,
so the module's ``__getattr__`` can answer with the stock class, or with a subclass of it that
`composition` makes. On CUDA vLLM resolves a class again from its module and qualified name, so
every class made is an attribute of this module. Imported in every vLLM process, so it imports
little.
"""

from __future__ import annotations

from typing import Any

STOCK: dict[str, str] = {}
"""Path of the class each overridden backend had before."""


def path(name: str) -> str:
    """The path kvplug registers for a backend."""
    return f"{__name__}.{name}"


_MADE: dict[str, type[Any]] = {}
"""Classes made so far, by their qualified names."""


def __getattr__(name: str) -> Any:
    if name in _MADE:
        return _MADE[name]
    if name not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from kvplug.hosts.vllm import admission, engine

    stock = resolve_obj_by_qualname(STOCK[name])
    config = get_current_vllm_config_or_none()
    if config is None or not engine.is_kvplug(config):
        return stock
    from kvplug.hosts.vllm.worker.composition import plugged_backend
    from kvplug.hosts.vllm.worker.kinds import worker_kinds
    from kvplug.hosts.vllm.worker.state import worker_state

    def of_config(vllm_config: Any) -> tuple[Any, Any]:
        state = worker_state(vllm_config)
        kinds = state.kinds
        if kinds is None:
            kinds = worker_kinds(admission.deployment_of(vllm_config), vllm_config)
        return kinds, state.rows

    kinds, rows = of_config(config)
    if not kinds:
        return stock
    made = worker_state(config).backends
    if name not in made:
        own = f"{name}_{len(_MADE) + 1}"
        made[name] = plugged_backend(stock, kinds, rows, of_config, name=(__name__, own))
        _MADE[own] = made[name]
    return made[name]
