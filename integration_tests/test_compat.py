"""What kvplug assumes about the installed vLLM, and how it makes itself known to it."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.layers.attention import Attention
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

from kvplug.contract import Feature
from kvplug.hosts.vllm import compat, plugin
from kvplug.hosts.vllm.features import features_of
from kvplug.hosts.vllm.worker import backend, metadata

FOREIGN = "vllm.v1.attention.backends.flex_attention.FlexAttentionBackend"
"""Stands for the backend of another plugin."""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nothing was registered yet."""
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.setattr(backend, "STOCK", {})
    yield


# -- the installed vLLM ----------------------------------------------------------------------------


def test_the_installed_vllm_has_everything() -> None:
    assert compat.missing_extension_points() == []


def test_the_installed_vllm_is_one_that_was_tested() -> None:
    assert compat.is_tested(compat.version())


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.32.0+cpu", "0.32.1", "0.32.0rc1"])
def test_a_release_of_a_tested_series_is_tested(version: str) -> None:
    assert compat.is_tested(version)


@pytest.mark.parametrize("version", ["0.320.0", "0.33.0", "0.3", "0.31.9", "10.32.0", "1.0.32.0"])
def test_any_other_release_is_not(version: str) -> None:
    assert not compat.is_tested(version)


@pytest.mark.parametrize(
    ("installed", "accepted", "admitted"),
    [
        ("0.32.1", None, True),
        ("0.33.0", None, False),
        ("0.33.0", "0.33", True),
        ("0.33.0+cu130", "0.33", True),
        ("0.33.0", "0.32", False),
        ("0.33.0", "1", False),
        ("0.330.0", "0.33", False),
        ("0.34.0", "0.34", False),
        ("0.31.0", "0.31", False),
    ],
)
def test_a_release_that_never_ran_is_admitted_by_its_name_alone(
    monkeypatch: pytest.MonkeyPatch, installed: str, accepted: str | None, admitted: bool
) -> None:
    monkeypatch.delenv(compat.ACCEPT, raising=False)
    if accepted is not None:
        monkeypatch.setenv(compat.ACCEPT, accepted)
    assert compat.is_admitted(installed) is admitted


def test_a_release_is_refused_for_what_is_known_of_it() -> None:
    problem, fix = compat.untested("0.33.0")
    assert "no engine of version 0.33.0 has run with kvplug yet" in problem
    assert fix == "install vLLM 0.32, or set KVPLUG_VLLM=0.33 to run on it all the same."
    problem, fix = compat.untested("0.34.0")
    assert problem == "version 0.34.0 was never tested with kvplug."
    assert "KVPLUG_VLLM" not in fix


@pytest.mark.parametrize(
    "target",
    [
        "vllm.no_such_module:thing",
        "vllm.v1.core.kv_cache_utils:NoSuchClass.method",
        "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.no_such_method",
    ],
)
def test_what_vanished_is_reported(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(compat, "EXTENSION_POINTS", ((target, ()),))
    (line,) = compat.missing_extension_points()
    assert line.startswith(f"{target} is gone")


@pytest.mark.parametrize(
    ("target", "name"),
    [(target, name) for target, names in compat.ATTRIBUTES for name in names],
)
def test_an_attribute_that_was_renamed_is_reported(
    monkeypatch: pytest.MonkeyPatch, target: str, name: str
) -> None:
    """Each that kvplug reads, under a name that the installed class does not know."""
    monkeypatch.setattr(compat, "EXTENSION_POINTS", ())
    monkeypatch.setattr(compat, "ATTRIBUTES", ((target, (name, f"{name}_once")),))
    assert compat.missing_extension_points() == [f"{target} no longer has {name}_once"]


def test_a_class_that_vanished_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "ATTRIBUTES", (("vllm.config:NoSuchConfig", ("model",)),))
    (line,) = compat.missing_extension_points()
    assert line.startswith("vllm.config:NoSuchConfig is gone")


@pytest.mark.parametrize(
    "name",
    ["is_prefilling", "req_idx", "_num_computed_tokens_cache", "_token_to_req_indices_cache"],
)
def test_a_field_of_the_common_metadata_that_was_renamed_is_reported(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Private ones too, which `worker.metadata` resets."""
    have = inspect.signature(CommonAttentionMetadata)
    fewer = have.replace(parameters=[p for n, p in have.parameters.items() if n != name])
    monkeypatch.setattr(CommonAttentionMetadata, "__signature__", fewer, raising=False)
    (line,) = compat.missing_extension_points()
    assert line.endswith(f"CommonAttentionMetadata no longer takes {name}")


def test_the_metadata_sets_no_field_that_is_not_listed() -> None:
    """`worker.metadata` is the one place; what it passes to vLLM stands in the table."""
    (listed,) = (p for t, p in compat.EXTENSION_POINTS if t.endswith(":CommonAttentionMetadata"))
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(metadata)))
        if isinstance(node, ast.Call)
        and (ast.unparse(node.func) in ("common.replace", "CommonAttentionMetadata"))
    ]
    assert len(calls) == 3
    assert {k.arg for call in calls for k in call.keywords} <= set(listed)


def test_a_method_taken_away_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FreeKVCacheBlockQueue, "prepend_n")
    (line,) = compat.missing_extension_points()
    assert "FreeKVCacheBlockQueue.prepend_n is gone" in line


def test_a_lost_parameter_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def popleft_n(self: object, count: int) -> None: ...

    monkeypatch.setattr(FreeKVCacheBlockQueue, "popleft_n", popleft_n)
    (line,) = compat.missing_extension_points()
    assert line.endswith("FreeKVCacheBlockQueue.popleft_n no longer takes n")


def test_every_loss_is_reported_not_only_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FreeKVCacheBlockQueue, "prepend_n")
    monkeypatch.delattr(KVCacheMetricsCollector, "on_block_evicted")
    assert len(compat.missing_extension_points()) == 2


# -- the attributes touched ------------------------------------------------------------------------


def test_a_pool_has_the_attributes_that_are_replaced() -> None:
    collector = KVCacheMetricsCollector()
    pool = BlockPool(4, True, 16, metrics_collector=collector)
    assert type(pool.free_block_queue) is FreeKVCacheBlockQueue
    assert pool.metrics_collector is collector
    queue, other = object(), object()
    compat.install_queue(pool, queue, other)
    assert pool.free_block_queue is queue
    assert pool.metrics_collector is other


def test_a_layer_has_the_attribute_that_is_set_and_asks_it_for_its_spec() -> None:
    assert "self.attn_backend =" in inspect.getsource(Attention.__init__)
    assert "self.attn_backend.customize_spec(" in inspect.getsource(Attention.get_kv_cache_spec)
    assert "self.attn_backend" in inspect.getsource(Attention.get_attn_backend)
    layer = SimpleNamespace(attn_backend=None)
    compat.set_layer_backend(layer, int)
    assert layer.attn_backend is int


# -- where releases differ -------------------------------------------------------------------------


class AnnouncingWrapper:
    """Stands for vLLM's wrapper of a worker where it calls hooks of the extension."""

    def __init__(self, worker: Any, extension: type[Any]):
        self.worker, self._worker_extension_cls = worker, extension

    def init_device(self) -> None:
        self.worker.init_device()
        hook = getattr(self._worker_extension_cls, "init_worker_extension", None)
        if callable(hook):
            hook(self.worker)


class SilentWrapper(AnnouncingWrapper):
    """Stands for the wrapper where it does not."""

    def init_device(self) -> None:
        self.worker.init_device()


class DeferringConnector:
    """Stands for the second runner's connector where a step's end may come after its report."""

    def post_forward(self, finished_req_ids: set[str], defer_finalize: bool = False) -> None: ...


def test_the_installed_vllm_has_neither() -> None:
    assert not compat.announces_worker()
    assert not compat.reports_before_end()


@pytest.mark.parametrize("wrapper", [AnnouncingWrapper, SilentWrapper])
def test_the_runner_reaches_kvplug_by_whatever_vllm_has(
    monkeypatch: pytest.MonkeyPatch, wrapper: type[AnnouncingWrapper]
) -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from kvplug.hosts.vllm import engine, extension

    announces = wrapper is AnnouncingWrapper
    monkeypatch.setattr(WorkerWrapperBase, "init_device", wrapper.init_device)
    assert compat.announces_worker() is announces
    ours = importlib.reload(extension)
    try:
        # A property would keep vLLM from having an attribute of that name on its worker.
        assert hasattr(ours.WorkerExtension, "model_runner") is not announces
        state = SimpleNamespace(model_runner=None)
        monkeypatch.setattr(engine, "is_kvplug", lambda config: config.on)
        monkeypatch.setattr(ours, "worker_state", lambda config: state)
        runner = object()

        class Worker:
            def __init__(self, on: bool):
                self.vllm_config = SimpleNamespace(on=on)

            def init_device(self) -> None:
                self.model_runner = runner

        class Extended(Worker, ours.WorkerExtension):  # type: ignore[name-defined]
            pass

        for on in (False, True):
            assert state.model_runner is None
            worker = Extended(on)
            wrapper(worker, ours.WorkerExtension).init_device()
            assert worker.model_runner is runner
        assert state.model_runner is runner
    finally:
        monkeypatch.undo()
        importlib.reload(extension)


def test_a_report_that_may_come_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

    monkeypatch.setattr(ActiveKVConnector, "post_forward", DeferringConnector.post_forward)
    assert compat.reports_before_end()


# -- the plugin ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_registering_changes_no_class_while_kvplug_is_not_configured() -> None:
    stock = {name: AttentionBackendEnum[name].get_class() for name in plugin.BACKENDS}
    plugin.register()
    for name, cls in stock.items():
        member = AttentionBackendEnum[name]
        assert member.get_path() == backend.path(name) == f"kvplug.hosts.vllm.worker.backend.{name}"
        assert member.get_class() is cls


def test_registering_imports_no_kind_of_a_worker_or_a_scheduler() -> None:
    """It runs in every vLLM process, most of which never use kvplug."""
    script = (
        "import sys; from kvplug.hosts.vllm import plugin; plugin.register();"
        "rooms = ('kvplug.hosts.vllm.worker.', 'kvplug.hosts.vllm.scheduler.');"
        "print(sorted(m for m in sys.modules if m.startswith(rooms)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "['kvplug.hosts.vllm.worker.backend']"


@pytest.mark.usefixtures("fresh")
def test_only_the_backends_named_are_touched() -> None:
    plugin.register()
    assert {m.name for m in AttentionBackendEnum if m.is_overridden()} == set(plugin.BACKENDS)


@pytest.mark.usefixtures("fresh")
def test_registering_again_changes_nothing() -> None:
    plugin.register()
    stock = dict(backend.STOCK)
    assert stock == {name: AttentionBackendEnum[name].value for name in plugin.BACKENDS}
    for _ in range(2):
        plugin.register()
    assert stock == backend.STOCK
    assert AttentionBackendEnum.CPU_ATTN.get_class().__name__ == "CPUAttentionBackend"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("before", [True, False], ids=["before-ours", "between-ours"])
def test_another_plugins_backend_stays_underneath(before: bool) -> None:
    if not before:
        plugin.register()
    register_backend(AttentionBackendEnum.CPU_ATTN, FOREIGN)
    plugin.register()
    assert backend.STOCK["CPU_ATTN"] == FOREIGN
    assert AttentionBackendEnum.CPU_ATTN.get_path() == backend.path("CPU_ATTN")
    assert AttentionBackendEnum.CPU_ATTN.get_class() is resolve_obj_by_qualname(FOREIGN)
    assert backend.STOCK["TRITON_ATTN"] == AttentionBackendEnum.TRITON_ATTN.value


@pytest.mark.usefixtures("fresh")
def test_on_a_vllm_never_tested_the_plugin_stays_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.33.0")
    with caplog.at_level(logging.WARNING, logger="kvplug"):
        plugin.register()
    assert backend.STOCK == {}
    assert not any(m.is_overridden() for m in AttentionBackendEnum)
    assert "0.33.0" in caplog.text and "KVPLUG_VLLM=0.33" in caplog.text


@pytest.mark.usefixtures("fresh")
def test_a_release_that_is_accepted_by_name_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.33.0")
    monkeypatch.setenv(compat.ACCEPT, "0.33")
    plugin.register()
    assert {m.name for m in AttentionBackendEnum if m.is_overridden()} == set(plugin.BACKENDS)


def test_a_name_that_is_no_backend_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="NO_SUCH"):
        _ = backend.NO_SUCH


def features(hf: Any, text: Any = None) -> frozenset[Feature]:
    """Features of a model with a Hugging Face config, and that of its text part."""
    text = hf if text is None else text
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        cache_config=SimpleNamespace(
            enable_prefix_caching=True, cache_dtype="auto", kv_sharing_fast_prefill=False
        ),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=True, async_scheduling=False),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        model_config=SimpleNamespace(
            hf_config=hf,
            hf_text_config=text,
            get_sliding_window=lambda: getattr(text, "sliding_window", None),
            is_multimodal_model=False,
        ),
        kv_transfer_config=SimpleNamespace(kv_role="kv_both"),
        speculative_config=None,
        lora_config=None,
    )
    return features_of(config)


@pytest.mark.parametrize(
    ("text_config", "sliding"),
    [
        ({}, False),
        ({"layer_types": ["full_attention", "full_attention"]}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"sliding_window": 512}, True),
    ],
)
def test_sliding_window_layers_are_a_feature(text_config: dict[str, Any], sliding: bool) -> None:
    found = features(SimpleNamespace(**text_config))
    assert (Feature.SLIDING_WINDOW_LAYERS in found) is sliding


@pytest.mark.parametrize(
    ("text_config", "shared"),
    [
        ({}, False),
        ({"num_kv_shared_layers": 0}, False),
        ({"num_kv_shared_layers": None}, False),
        ({"num_kv_shared_layers": 2}, True),
        ({"use_cla": True, "cla_share_factor": 2}, True),
        ({"use_cla": False, "cla_share_factor": 2}, False),
        ({"text_config": SimpleNamespace(num_kv_shared_layers=2)}, True),
        ({"thinker_config": {"text_config": {"num_kv_shared_layers": 2}}}, True),
    ],
)
def test_layers_that_share_kv_are_a_feature(text_config: dict[str, Any], shared: bool) -> None:
    """However deep in a model's config it stands."""
    whole = SimpleNamespace(**text_config)
    whole.parent_config = whole
    assert (Feature.KV_SHARING in features(whole)) is shared
    assert (Feature.KV_SHARING in features(whole, SimpleNamespace())) is shared
