"""The KV caches a worker was given, compared with what its kinds ask for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvplug.contract import EngineView, LayerView
from kvplug.errors import DeploymentError
from kvplug.hosts.vllm.spec import ApproximateSpec
from kvplug.hosts.vllm.worker import backend
from kvplug.hosts.vllm.worker.composition import plugged_backend
from kvplug.hosts.vllm.worker.format import FormatWorker
from kvplug.hosts.vllm.worker.kind import KindWorker
from kvplug.hosts.vllm.worker.page_tails import with_tail
from kvplug.hosts.vllm.worker.registered import (
    require_own,
    require_registered,
    spec_differences,
)
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug_policies.format.int8 import Int8

NAMES = ["model.layers.0.attn", "model.layers.1.attn"]
BLOCKS = 3
STOCK = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)


class Worker:
    """A worker of an engine with int8 pages, as it is once its caches are registered."""

    def __init__(self) -> None:
        views = tuple(LayerView(i, 2, 2, 4, 64, "float32") for i in range(2))
        policy = Int8(Int8.Options(), EngineView(block_size=32, layers=views))
        self.kinds: tuple[KindWorker, ...] = (
            FormatWorker(policy, ("x.yaml", "kvplug.format"), StepRows()),
        )
        self.stock = stock_class()
        plugged = plugged_backend(self.stock, self.kinds, StepRows())
        self.asked = plugged.customize_spec(STOCK)
        impl = SimpleNamespace(kvplug_kinds=self.kinds)
        self.layers = {
            name: SimpleNamespace(
                attn_backend=plugged,
                impl=impl,
                sliding_window=None,
                attn_type="decoder",
                get_kv_cache_spec=lambda config: STOCK,
            )
            for name in NAMES
        }
        self.specs = dict.fromkeys(NAMES, self.asked)
        self.caches = {name: pages(self.asked) for name in NAMES}
        for name, layer in self.layers.items():
            layer.kv_cache = self.caches[name]
        self.built = set(NAMES)

    def refused(self) -> str:
        uniform = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=self.specs)
        config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(NAMES, uniform)])
        try:
            require_registered(self.kinds, self.layers, self.caches, config, None, self.built)
        except DeploymentError as error:
            return str(error)
        return ""


def stock_class() -> type[Any]:
    module, _, name = AttentionBackendEnum.CPU_ATTN.value.rpartition(".")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def pages(spec: Any, blocks: int = BLOCKS) -> torch.Tensor:
    content = spec.state_content_size_bytes // spec.dtype.itemsize
    return torch.zeros((blocks, spec.num_heads, spec.block_size, content), dtype=spec.dtype)


def test_what_the_kinds_made_is_taken() -> None:
    worker = Worker()
    assert worker.refused() == ""
    assert require_own(worker.layers, worker.caches) is None


def test_caches_of_another_engine_are_seen() -> None:
    worker = Worker()
    worker.caches[NAMES[1]] = worker.caches[NAMES[1]].clone()
    found = require_own(worker.layers, worker.caches)
    assert found is not None and "belongs to another engine of this process" in found
    del worker.layers[NAMES[0]]
    assert require_own(worker.layers, worker.caches) is not None


def _stock_backend(worker: Worker) -> None:
    worker.layers[NAMES[1]].attn_backend = worker.stock


def _no_plugin(worker: Worker) -> None:
    _stock_backend(worker)
    backend.STOCK.clear()


def _own_backend(worker: Worker) -> None:
    other = SimpleNamespace(get_name=lambda: "FLASHINFER", __mro__=())
    worker.layers[NAMES[1]].attn_backend = other


def _derived(worker: Worker) -> None:
    base = worker.layers[NAMES[1]].attn_backend
    worker.layers[NAMES[1]].attn_backend = type("ChunkedLocalAttention_64", (base,), {})


def _another_engine(worker: Worker) -> None:
    worker.layers[NAMES[1]].impl = SimpleNamespace(kvplug_kinds=Worker().kinds)


def _never_loaded(worker: Worker) -> None:
    worker.layers[NAMES[1]].attn_backend = type("Door", (worker.stock,), {"kvplug_door": True})


def _other_bytes(worker: Worker) -> None:
    worker.specs[NAMES[1]] = replace(worker.asked, state_content_bytes=72)


def _stock_pages(worker: Worker) -> None:
    worker.specs[NAMES[1]] = STOCK


def _other_manager(worker: Worker) -> None:
    worker.specs[NAMES[1]] = ApproximateSpec(**vars(worker.asked))


def _longer_blocks(worker: Worker) -> None:
    worker.specs[NAMES[1]] = replace(worker.asked, block_size=64)


def _split_blocks(worker: Worker) -> None:
    worker.caches[NAMES[1]] = pages(replace(worker.asked, block_size=16), 2 * BLOCKS)


def _other_dtype(worker: Worker) -> None:
    worker.caches[NAMES[1]] = worker.caches[NAMES[1]].view(torch.int8)


def _no_builder(worker: Worker) -> None:
    worker.built.discard(NAMES[1])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (_stock_backend, "an engine with another connector chose in this process before."),
        (_no_plugin, "kvplug's plugin is not loaded in the process of attention layer"),
        (_own_backend, "runs on FLASHINFER. Fix: set --attention-backend FLASH_ATTN"),
        (_derived, "attends in a way of its own (ChunkedLocalAttention_64)."),
        (_another_engine, "model.layers.1.attn belongs to another engine."),
        (_never_loaded, "was loaded past vLLM's weight processing."),
        (_other_bytes, "has state_content_bytes 72 instead of 136."),
        (_stock_pages, "has dtype torch.float32 instead of torch.uint8"),
        (_other_manager, "has a ApproximateSpec instead of a FullAttentionSpec."),
        (_longer_blocks, "has block_size 64 instead of 32."),
        (_split_blocks, "are torch.uint8 of [6, 2, 16, 136] bytes instead of"),
        (_other_dtype, "are torch.int8 of [3, 2, 32, 136] bytes instead of torch.uint8"),
        (_no_builder, "vLLM builds the metadata of model.layers.1.attn by a builder of its own."),
    ],
)
def test_whatever_differs_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Worker], None], said: str
) -> None:
    monkeypatch.setattr(backend, "STOCK", {"CPU_ATTN": "a.path"})
    monkeypatch.setattr("kvplug.hosts.vllm.worker.registered.STOCK", backend.STOCK)
    worker = Worker()
    fault(worker)
    found = worker.refused()
    assert found.startswith("x.yaml: kvplug.format: the engine is not what the format section")
    assert said in found
    worker.kinds = ()
    assert worker.refused() == "", "nothing was asked for"


def test_layers_with_a_window_of_their_own_are_vllms() -> None:
    worker = Worker()
    windowed = worker.layers[NAMES[1]]
    windowed.sliding_window, windowed.attn_backend = 48, worker.stock
    worker.specs[NAMES[1]] = SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=48
    )
    worker.built.discard(NAMES[1])
    assert worker.refused() == ""


def test_pages_may_be_longer_than_asked_for_and_no_shorter() -> None:
    """vLLM brings the pages of all layers to one length."""
    asked = with_tail(STOCK, 1)
    longer = replace(asked, page_size_padded=asked.page_size_bytes + 4096)
    assert spec_differences(asked, longer) == spec_differences(STOCK, longer) == ""
    assert "page_size_padded None instead of" in spec_differences(asked, STOCK)
    assert "page_size_padded" in spec_differences(longer, asked)
