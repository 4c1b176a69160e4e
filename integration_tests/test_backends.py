"""Windowed subclasses of vLLM's own attention backends, as far as a CPU machine lets them live."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.config
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvplug.contract import EngineView, FormatPolicy, Kind, LayerView, Window
from kvplug.errors import DeploymentError
from kvplug.hosts.vllm import admission, engine
from kvplug.hosts.vllm.connector_flag import CONNECTOR, MODULE
from kvplug.hosts.vllm.messages import StepReport
from kvplug.hosts.vllm.plugin import BACKENDS
from kvplug.hosts.vllm.spec import WindowedSpec
from kvplug.hosts.vllm.worker import backend
from kvplug.hosts.vllm.worker.composition import (
    is_door,
    plugged_backend,
    plugged_builder,
    plugged_impl,
    takes_steps,
)
from kvplug.hosts.vllm.worker.format import FormatRows, FormatTokens, FormatWorker
from kvplug.hosts.vllm.worker.kind import KindWorker
from kvplug.hosts.vllm.worker.kinds import METADATA_STEPS
from kvplug.hosts.vllm.worker.reuse import ReuseWorker
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.state import drop_worker_state, worker_state
from kvplug.hosts.vllm.worker.steps import (
    AttendCall,
    AttentionStep,
    Build,
    BuildCall,
    MetadataStep,
    WriteCall,
)
from kvplug.hosts.vllm.worker.window import Compaction, WindowWorker
from kvplug.reuse.settings import ReuseSettings
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.kivi import Kivi
from kvplug_policies.sequence.sink_window import SinkWindow

BLOCK = 32
CPU = torch.device("cpu")


def sink_window(**options: Any) -> SinkWindow:
    view = EngineView(
        block_size=BLOCK,
        max_model_len=2048,
        max_in_flight_tokens=256,
        layers=tuple(LayerView(i, 4) for i in range(4)),
    )
    return SinkWindow(SinkWindow.Options(**({"sink": 32, "window": 65} | options)), view)


def int4(**options: Any) -> Int4:
    layers = tuple(LayerView(i, 4, 1, 2, 64, "float32") for i in range(4))
    return Int4(Int4.Options(**options), EngineView(block_size=BLOCK, layers=layers))


def windowed_backend(
    stock: type[Any], policy: SinkWindow, *more: KindWorker, origin: Any = ("inline", "sequence")
) -> type[Any]:
    return plugged_backend(stock, (WindowWorker(policy, origin, StepRows()), *more), StepRows())


def coded_kind(policy: Int4) -> FormatWorker:
    return FormatWorker(policy, ("x.yaml", "kvplug.format"), StepRows())


def stock_class(name: str) -> type[Any]:
    module, _, cls = AttentionBackendEnum[name].value.rpartition(".")
    try:
        return getattr(importlib.import_module(module), cls)  # type: ignore[no-any-return]
    except ImportError as error:
        pytest.skip(f"{name} does not import on this machine: {error}")


@pytest.fixture(params=BACKENDS)
def stock(request: pytest.FixtureRequest) -> type[Any]:
    return stock_class(request.param)


def config() -> Any:
    """As much of a VllmConfig as builders take."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id="an engine"),
        num_speculative_tokens=0,
        use_v2_model_runner=False,
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=512),
        parallel_config=SimpleNamespace(
            cp_kv_cache_interleave_size=1, decode_context_parallel_size=1
        ),
        model_config=SimpleNamespace(
            dtype=torch.float32,
            rswa_window=None,
            is_mm_prefix_lm=False,
            hf_config=SimpleNamespace(model_type="llama"),
            get_num_attention_heads=lambda parallel: 2,
            get_num_kv_heads=lambda parallel: 1,
            get_head_size=lambda: 64,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        device_config=SimpleNamespace(device=CPU),
        compilation_config=SimpleNamespace(
            static_forward_context={},
            cudagraph_mode=CUDAGraphMode.NONE,
            cudagraph_capture_sizes=[],
            max_cudagraph_capture_size=0,
        ),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=16),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        speculative_config=None,
    )


def plain_spec(**changes: Any) -> FullAttentionSpec:
    values = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
    return FullAttentionSpec(**(values | changes))


def a_layer(**own: Any) -> SimpleNamespace:
    """An attention layer of vLLM's."""
    shape: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_size": 64}
    return SimpleNamespace(
        **{"sliding_window": None, "get_kv_cache_spec": lambda config: plain_spec()} | shape | own
    )


def layers_of(windowed: type[Any], names: list[str], **impl: Any) -> dict[str, Any]:
    """Attention layers as they are once the model is loaded, without a model."""
    context: dict[str, Any] = {}
    for name in names:
        made = object.__new__(windowed.get_impl_cls())
        made.alibi_slopes, made.scale = None, 1.0
        made.__dict__.update(impl, _kvplug_layers=context, _kvplug_config=config())
        context[name] = a_layer(impl=made, attn_backend=windowed, layer_name=name)
    for layer in list(context.values()):
        layer.impl.process_weights_after_loading(torch.float32)
    return context


NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(4)]


# -- the class -------------------------------------------------------------------------------------


def test_the_subclass_answers_as_its_parent(stock: type[Any]) -> None:
    windowed = windowed_backend(stock, sink_window())
    assert issubclass(windowed, stock)
    assert windowed.get_name() == stock.get_name()
    assert issubclass(windowed.get_impl_cls(), stock.get_impl_cls())
    for question in ("is_mla", "supports_alibi_sqrt", "get_supported_head_sizes"):
        assert getattr(windowed, question)() == getattr(stock, question)()


def test_layers_with_different_windows_are_one_backend_to_vllm(stock: type[Any]) -> None:
    """vLLM groups layers by spec and full_cls_name, and wants one backend name."""
    windowed = windowed_backend(stock, sink_window(layers={"0-1": 200}))
    layers = layers_of(windowed, NAMES)
    classes = [layer.attn_backend for layer in layers.values()]
    assert classes[0] is classes[1] is not classes[2]
    assert classes[2] is classes[3]
    assert len({c.full_cls_name() for c in [*classes, windowed]}) == 1
    assert {c.get_name() for c in classes} == {stock.get_name()}
    assert len({c.get_builder_cls() for c in classes}) == 1
    assert len({c.get_impl_cls() for c in classes}) == 1


def test_every_layer_gets_its_own_window(stock: type[Any]) -> None:
    windowed = windowed_backend(stock, sink_window(layers={"1": 200, "-1": 10}))
    layers = layers_of(windowed, NAMES)
    specs = [layer.attn_backend.customize_spec(plain_spec()) for layer in layers.values()]
    assert [s.window for s in specs] == [Window(1, 2), Window(1, 7), Window(1, 2), Window(1, 1)]
    assert {s.exact_tokens for s in specs} == {(1 + 1 + 1) * BLOCK}, "the narrowest layer decides"


def test_no_compiled_graph_and_no_model_writes_past_the_kinds(
    stock: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a stock implementation says that a fused operation may do in its place."""
    inner = stock.get_impl_cls()
    names = [n for n in dir(inner) if n.startswith("fused_") and n.endswith("_supported")]
    assert len(names) >= 4
    for name in names:
        monkeypatch.setattr(inner, name, lambda self, *args: True)
    monkeypatch.setattr(stock, "supports_kv_cache_update_bypass", True, raising=False)
    plugged = windowed_backend(stock, sink_window())
    assert plugged.supports_kv_cache_update_bypass is False
    impl = plugged.get_impl_cls()
    own = object.__new__(impl)
    for name in names:
        asked = getattr(own, name)
        assert asked(*[None] * len(inspect.signature(asked).parameters)) is False, name


def test_layers_of_other_impls_are_left_alone(stock: type[Any]) -> None:
    windowed = windowed_backend(stock, sink_window())
    made = object.__new__(windowed.get_impl_cls())
    made.alibi_slopes = None
    mine, other = (
        a_layer(impl=made, attn_backend=windowed),
        SimpleNamespace(attn_backend=None),
    )
    third = SimpleNamespace(impl=object(), attn_backend=None)
    made._kvplug_config = config()
    made._kvplug_layers = {NAMES[2]: mine, "model.norm": other, NAMES[1]: third}
    made.process_weights_after_loading(torch.float32)
    assert issubclass(mine.attn_backend, stock)
    assert other.attn_backend is None and third.attn_backend is None


def test_alibi_is_refused(stock: type[Any]) -> None:
    windowed = windowed_backend(stock, sink_window())
    with pytest.raises(DeploymentError, match="ALiBi"):
        layers_of(windowed, NAMES, alibi_slopes=torch.ones(2))


def test_an_impl_finds_its_layer_through_the_config_it_was_made_under(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windowed = windowed_backend(stock_class("CPU_ATTN"), sink_window(layers={"3": 1}))
    current = config()
    monkeypatch.setattr("vllm.config.vllm._current_vllm_config", current)
    made = windowed.get_impl_cls()(2, 64, 1.0, 1, None, None, "auto")
    monkeypatch.undo()
    assert made.num_heads == 2
    layer = a_layer(impl=made, attn_backend=windowed)
    current.compilation_config.static_forward_context[NAMES[3]] = layer
    made.process_weights_after_loading(torch.float32)
    assert layer.attn_backend.customize_spec(plain_spec()).window == Window(1, 0)


# -- the spec --------------------------------------------------------------------------------------


def test_full_attention_becomes_windowed(stock: type[Any]) -> None:
    windowed = windowed_backend(stock, sink_window())
    plain = plain_spec()
    spec = windowed.customize_spec(plain)
    assert type(spec) is WindowedSpec
    assert (spec.sink_tokens, spec.window_tokens, spec.exact_tokens) == (32, 64, 128)
    assert (spec.in_flight_tokens, spec.max_tokens) == (256, 2048)
    assert spec.page_size_bytes == stock.customize_spec(plain).page_size_bytes
    assert windowed.customize_spec(spec) is spec, "asked twice, it answers once"


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=64
        ),
        MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32),
        plain_spec(sliding_window=128),
    ],
    ids=["sliding", "mla", "full-with-sliding-window"],
)
def test_every_other_spec_is_left_to_stock(stock: type[Any], spec: Any) -> None:
    windowed = windowed_backend(stock, sink_window())
    assert windowed.customize_spec(spec) == stock.customize_spec(spec)
    assert type(windowed.customize_spec(spec)) is type(spec)


@pytest.mark.parametrize("name", ["LBHNC", "BLHNC", "LBNHC"])
def test_a_format_takes_the_layouts_whose_pages_are_one_run_of_bytes(name: str) -> None:
    backend = plugged_backend(stock_class("TRITON_ATTN"), (coded_kind(int4()),), StepRows())
    layouts = backend.supported_kv_cache_layouts()
    assert layouts[0] is KVCacheLayout.LBHNC, "most preferred first"
    assert (KVCacheLayout[name] in layouts) == (name != "LBNHC")
    assert coded_kind(int4()).layouts((KVCacheLayout.LBNHC, KVCacheLayout.BLHNC)) == (
        KVCacheLayout.BLHNC,
    )
    windowed = windowed_backend(stock_class("TRITON_ATTN"), sink_window())
    assert windowed.supported_kv_cache_layouts() is None, "windows take any"


def test_stocks_own_changes_to_a_spec_are_kept() -> None:
    class Packing(stock_class("CPU_ATTN")):  # type: ignore[misc]
        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            return type(spec)(**{**vars(spec), "state_content_bytes": 4096})

    spec = windowed_backend(Packing, sink_window()).customize_spec(plain_spec())
    assert type(spec) is WindowedSpec
    assert spec.state_content_bytes == 4096


# -- the builder -----------------------------------------------------------------------------------


def test_the_builder_is_stocks_with_steps_before_it(stock: type[Any]) -> None:
    builder = windowed_backend(stock, sink_window()).get_builder_cls()
    inherited = stock.get_builder_cls()
    assert issubclass(builder, inherited)
    assert builder.supports_update_block_table is False
    assert builder._cudagraph_support is inherited._cudagraph_support
    assert builder.reorder_batch_threshold == inherited.reorder_batch_threshold


def test_a_kind_that_only_watches_leaves_block_tables_to_be_swapped(stock: type[Any]) -> None:
    class Watches(KindWorker):
        kind = Kind.REUSE

    inherited = stock.get_builder_cls()
    watched = plugged_builder(inherited, (Watches(("", "")),), StepRows())
    assert watched.supports_update_block_table is inherited.supports_update_block_table


@pytest.mark.parametrize("support", list(AttentionCGSupport), ids=lambda s: s.name)
def test_graphs_of_mixed_batches_are_given_up_and_no_others(support: AttentionCGSupport) -> None:
    """Splitting prefill rows changes how many rows there are, which a captured graph cannot."""
    inherited = stock_class("TRITON_ATTN").get_builder_cls()

    class Supports(inherited):  # type: ignore[misc, valid-type]
        _cudagraph_support = support

    kind = WindowWorker(sink_window(), ("", ""), StepRows())
    builder = plugged_builder(Supports, (kind,), StepRows())
    windowed = windowed_backend(stock_class("CPU_ATTN"), sink_window())
    with_window = windowed.customize_spec(plain_spec())
    limit = min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda s: s.value)
    assert builder.get_cudagraph_support(config(), with_window) is limit
    assert builder.get_cudagraph_support(config(), plain_spec()) is support


@pytest.mark.parametrize("support", list(AttentionCGSupport), ids=lambda s: s.name)
def test_graphs_hold_steps_of_a_format_that_is_safe_in_them(support: AttentionCGSupport) -> None:
    inherited = stock_class("TRITON_ATTN").get_builder_cls()

    class Supports(inherited):  # type: ignore[misc, valid-type]
        _cudagraph_support = support

    def support_of(policy: FormatPolicy, slots: int | None = None, softcap: float = 0) -> Any:
        kind = FormatWorker(policy, ("x.yaml", "kvplug.format"), StepRows(), slots)
        kind.check_impl(SimpleNamespace(logits_soft_cap=softcap))
        builder = plugged_builder(Supports, (kind,), StepRows())
        return builder.get_cudagraph_support(config(), plain_spec())

    limit = min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda s: s.value)
    assert support_of(int4()) is limit
    assert support_of(int4(), softcap=30.0) is AttentionCGSupport.NEVER, "it may be read back"
    kivi = Kivi(Kivi.Options(), int4().engine)
    assert support_of(kivi, slots=8) is limit
    assert support_of(kivi) is AttentionCGSupport.NEVER, "the first runner's slots may grow"
    unsafe = int4()
    unsafe.graph_safe = False
    assert support_of(unsafe) is AttentionCGSupport.NEVER


def a_step() -> CommonAttentionMetadata:
    """A decode row at 300 and a chunk of 40 that ends at 230."""
    starts = torch.tensor([0, 1, 41], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor([300, 230], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=41,
        max_query_len=40,
        max_seq_len=300,
        block_table_tensor=torch.arange(1, 25, dtype=torch.int32).view(2, 12),
        slot_mapping=torch.arange(41),
        seq_lens_cpu_upper_bound=torch.tensor([300, 230], dtype=torch.int32),
    )


def construct(cls: type[Any], spec: Any) -> Any:
    try:
        return cls(spec, [], config(), CPU)
    except Exception as error:
        pytest.skip(f"{cls.__mro__[-1]} of stock cannot be built on this machine: {error!r}")


@pytest.mark.parametrize("name", BACKENDS)
def test_attention_gets_the_compacted_rows(name: str) -> None:
    stock = stock_class(name)
    construct(stock.get_builder_cls(), plain_spec())
    kind = WindowWorker(sink_window(), ("", ""), StepRows())
    windowed = plugged_backend(stock, (kind,), StepRows())
    builder = windowed.get_builder_cls()(windowed.customize_spec(plain_spec()), [], config(), CPU)
    common = a_step()
    built = builder.build(0, common)
    # 299 is in block 9: sink 0 and blocks 7 to 9. The chunk is in blocks 5, 6 and 7.
    assert built.seq_lens.tolist() == [300 - 6 * BLOCK, 128, 128, 230 - 4 * BLOCK]
    assert built.query_start_loc.tolist() == [0, 1, 3, 35, 41]
    assert built.block_table[:, :4].tolist() == [
        [1, 8, 9, 10],
        [13, 16, 17, 18],
        [13, 17, 18, 19],
        [13, 18, 19, 20],
    ]
    assert built.num_actual_tokens == 41
    assert built.slot_mapping is common.slot_mapping
    assert common.seq_lens.tolist() == [300, 230]
    kind.report(report := StepReport())
    assert report.sequence is not None
    assert (report.sequence.rows, report.sequence.split_rows) == (4, 2)
    kind.report(report := StepReport())
    assert not report, "reported once"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_builder_of_a_group_without_window_builds_what_stock_builds(name: str) -> None:
    stock = stock_class(name)
    construct(stock.get_builder_cls(), plain_spec())
    kind = WindowWorker(sink_window(), ("", ""), StepRows())
    windowed = plugged_backend(stock, (kind,), StepRows())
    builder = windowed.get_builder_cls()(plain_spec(), [], config(), CPU)
    built = builder.build(0, a_step())
    assert built.seq_lens.tolist() == [300, 230]
    assert kind.counts.rows == 0


# -- the order of steps ----------------------------------------------------------------------------


class Noted:
    """Kinds whose steps write down when they are called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def kind(self, name: str, *metadata: type[MetadataStep]) -> KindWorker:
        calls = self.calls

        class Step(AttentionStep):
            def write(self, inner: Any, call: WriteCall) -> None:
                calls.append(f"{name} writes")
                inner(call)

            def attend(self, inner: Any, call: AttendCall) -> Any:
                calls.append(f"{name} attends")
                return inner(call)

        class Made(KindWorker):
            kind = Kind.FORMAT

            def attention_step(self) -> AttentionStep:
                return Step()

            def metadata_steps(self, *args: Any) -> list[MetadataStep]:
                return [noted(cls, calls) for cls in metadata]

        return Made(("", ""))


def noted(of: type[MetadataStep], calls: list[str]) -> MetadataStep:
    """An object of the class itself, as the order goes by classes."""
    made = object.__new__(of)

    def build(inner: Build, call: BuildCall) -> Any:
        calls.append(of.__name__)
        return inner(call)

    made.build = build  # type: ignore[method-assign]
    return made


class NotingBuilder:
    supports_update_block_table = True

    def __init__(self, *args: Any):
        pass

    def build(self, prefix: int, common: Any, fast: bool = False) -> Any:
        return prefix, common, fast


def test_metadata_steps_run_in_their_order_whatever_order_the_kinds_have() -> None:
    """A format counts tokens before rows are split, and notes rows after."""
    note = Noted()
    kinds = (note.kind("one", FormatTokens, FormatRows), note.kind("other", Compaction))
    for order in (kinds, kinds[::-1]):
        built = plugged_builder(NotingBuilder, order, StepRows())
        builder = built(SimpleNamespace(block_size=16), [], None, CPU)
        common = SimpleNamespace(req_idx=None)
        assert builder.build(5, common, True) == (5, common, True)
        assert note.calls == ["FormatTokens", "Compaction", "FormatRows"]
        note.calls.clear()
    assert len(set(METADATA_STEPS)) == len(METADATA_STEPS)


def test_attention_steps_run_from_the_first_kind_to_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    note = Noted()

    class Stock:
        def do_kv_cache_update(self, *args: Any) -> None:
            note.calls.append(f"stock writes {args}")

        def forward(self, *args: Any, **kwargs: Any) -> str:
            note.calls.append(f"stock attends {args} {kwargs}")
            return "output"

    impl = object.__new__(
        plugged_impl(Stock, (note.kind("one"), note.kind("two")), lambda *a: Stock)
    )
    impl.do_kv_cache_update(1, 2, 3, 4, 5)
    assert impl.forward(1, 2, 3, 4, 5, 6, 7, 8, more=9) == "output"
    assert note.calls == [
        "one writes",
        "two writes",
        "stock writes (1, 2, 3, 4, 5)",
        "one attends",
        "two attends",
        "stock attends (1, 2, 3, 4, 5, 6, 7, 8) {'more': 9}",
    ]
    assert impl.kvplug_pages(1, 2) is None


def test_a_layer_that_attends_in_a_way_of_its_own_runs_no_steps() -> None:
    """vLLM derives a backend for layers that attend in chunks, or across; that class stays."""
    windowed = windowed_backend(stock_class("CPU_ATTN"), sink_window())
    chunked = type("ChunkedLocalAttention", (windowed,), {})
    assert takes_steps(windowed) and not takes_steps(chunked)
    layer = layers_of(windowed, NAMES)[NAMES[0]]
    layer.attn_backend = chunked
    layer.impl.process_weights_after_loading(torch.float32)
    assert layer.attn_backend is chunked
    assert layer.impl._kvplug.steps == []


# -- which class a name stands for -----------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_a_name_is_stock_unless_the_engine_runs_a_policy_of_layers(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stock = stock_class(name)
    current: Any = None
    policy: Any = None
    stored: Any = None
    monkeypatch.setattr(backend, "STOCK", {name: AttentionBackendEnum[name].value})
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: current)
    reuse: Any = None
    a_choice = SimpleNamespace(key="sequence", policy=SimpleNamespace(kind="a", name="policy"))
    chosen = SimpleNamespace(
        source="x.yaml",
        choices={},
        choice=lambda kind: reuse if kind is Kind.REUSE else a_choice,
        reuse=ReuseSettings(),
        tiers=(),
    )
    monkeypatch.setattr(admission, "deployment_of", lambda vllm_config: chosen)
    monkeypatch.setattr(engine, "sequence_policy", lambda deployment, vllm_config: policy)
    monkeypatch.setattr(engine, "format_policy", lambda deployment, vllm_config: stored)
    monkeypatch.setattr(engine, "attention_policy", lambda deployment, vllm_config: None)

    assert getattr(backend, name) is stock, "no engine is being made"
    current = SimpleNamespace(kv_transfer_config=None)
    assert getattr(backend, name) is stock, "an engine without a connector"
    transfer = SimpleNamespace(
        kv_connector="Another", kv_connector_module_path="another.module", engine_id="an engine"
    )
    current = config()
    current.kv_transfer_config = transfer
    current.cache_config.block_size = BLOCK
    policy = sink_window()
    assert getattr(backend, name) is stock, "an engine with another connector"
    transfer.kv_connector, transfer.kv_connector_module_path = CONNECTOR, MODULE
    door = getattr(backend, name)
    assert door is not stock and issubclass(door, stock) and is_door(door)
    assert door.get_name() == stock.get_name()
    assert door.get_builder_cls() is stock.get_builder_cls(), "what vLLM derives from it is stock"
    assert door.customize_spec(plain_spec()) == stock.customize_spec(plain_spec())
    module, qualified = door.full_cls_name()
    assert module == backend.__name__
    assert getattr(backend, qualified) is door, "found again by its name"

    def behind() -> tuple[Any, ...]:
        """Kinds of the layers that another engine builds behind the door that vLLM has kept."""
        drop_worker_state(current)
        return getattr(door.get_impl_cls(), "kvplug_kinds", ())

    first = behind()
    assert [kind.kind for kind in first] == [Kind.SEQUENCE]
    assert door.get_impl_cls().kvplug_kinds is first is worker_state(current).kinds
    stored = int4()
    both = behind()
    assert [kind.kind for kind in both] == [Kind.SEQUENCE, Kind.FORMAT]
    assert first[0] is not both[0], "each engine has its own"
    policy = None
    assert [kind.kind for kind in behind()] == [Kind.FORMAT]
    stored = None
    assert behind() == () and door.get_impl_cls() is stock.get_impl_cls()
    reuse = SimpleNamespace(key="reuse")
    (reused,) = behind()
    assert isinstance(reused, ReuseWorker)
    drop_worker_state(current)
    current = None
    assert door.get_impl_cls() is stock.get_impl_cls(), "no engine is being made"


@pytest.mark.parametrize("nested", [False, True])
def test_one_connector_among_several_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    ours = {"kv_connector": CONNECTOR, "kv_connector_module_path": MODULE}
    inner: dict[str, Any] = {"connectors": [{"kv_connector": "Another"}, ours]}
    if nested:
        several = {"kv_connector": "MultiConnector", "kv_connector_extra_config": inner}
        inner = {"connectors": [several]}
    transfer = SimpleNamespace(
        kv_connector="MultiConnector",
        kv_connector_module_path=None,
        kv_connector_extra_config=inner,
    )
    current = SimpleNamespace(kv_transfer_config=transfer)
    monkeypatch.setattr(backend, "STOCK", {"CPU_ATTN": AttentionBackendEnum.CPU_ATTN.value})
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: current)
    with pytest.raises(DeploymentError, match="one of several connectors inside MultiConnector"):
        _ = backend.CPU_ATTN
    inner["connectors"] = [{"kv_connector": "Another"}]
    assert not is_door(backend.CPU_ATTN)


def test_a_format_says_what_a_layers_pages_take() -> None:
    """Bytes instead of elements; two layers of different bits differ, the rest stays."""
    stock = stock_class("CPU_ATTN")
    kind = coded_kind(int4(layers={"1": 8}))
    coded = plugged_backend(stock, (kind,), StepRows())
    spec = coded.customize_spec(plain_spec())
    assert (type(spec), spec.dtype) == (type(plain_spec()), torch.uint8)
    assert spec.page_size_bytes == spec.num_kv_heads * spec.block_size * 72
    assert [kind.rule(i).bytes_per_token_head for i in range(3)] == [72, 136, 72]


def test_a_format_under_a_window_keeps_both() -> None:
    stock = stock_class("CPU_ATTN")
    both = windowed_backend(stock, sink_window(), coded_kind(int4()))
    spec = both.customize_spec(plain_spec())
    plain = windowed_backend(stock, sink_window()).customize_spec(plain_spec())
    assert spec.rule() == plain.rule()
    assert spec.page_size_bytes == spec.num_kv_heads * spec.block_size * 72


@pytest.mark.parametrize("what", ["alibi_slopes", "sinks"])
def test_a_format_refuses_what_its_attention_does_not_do(what: str) -> None:
    coded = plugged_backend(stock_class("CPU_ATTN"), (coded_kind(int4()),), StepRows())
    plain: dict[str, Any] = {"alibi_slopes": None, "sinks": None}
    layers_of(coded, NAMES, **plain)
    with pytest.raises(DeploymentError, match=r"x\.yaml: kvplug\.format: int4 does not support"):
        layers_of(coded, NAMES, **(plain | {what: torch.ones(2)}))


def test_a_block_size_the_backend_would_split_is_refused() -> None:
    """Windows and directives count the pool's blocks, not the kernel's."""

    class Halves(stock_class("CPU_ATTN")):  # type: ignore[misc]
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
            return [BLOCK // 2]

    windowed = windowed_backend(Halves, sink_window(), origin=("x.yaml", "kvplug.sequence.use"))
    with pytest.raises(DeploymentError, match=f"set --block-size {BLOCK // 2}") as refused:
        windowed.customize_spec(plain_spec())
    assert str(refused.value).startswith("x.yaml: kvplug.sequence.use: sink_window counts in")
