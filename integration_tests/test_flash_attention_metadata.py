"""vLLM's FlashAttention builder under kvplug's, with a stand-in for FlashAttention 3's scheduler.

FlashAttention 3 can be given its schedule ahead, which vLLM's builder asks a compiled function for
and keeps in one buffer that CUDA graphs read. The stand-in checks what that function checks and
gives back what it gives: a tensor whose size follows from the number of rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvplug.contract import EngineView, LayerView
from kvplug.hosts.vllm.worker import metadata
from kvplug.hosts.vllm.worker.composition import plugged_backend
from kvplug.hosts.vllm.worker.format import FormatWorker
from kvplug.hosts.vllm.worker.kind import KindWorker
from kvplug.hosts.vllm.worker.rows import StepRows
from kvplug.hosts.vllm.worker.window import WindowWorker
from kvplug_policies.format.int4 import Int4
from kvplug_policies.sequence.sink_window import SinkWindow

fa = pytest.importorskip("vllm.v1.attention.backends.flash_attn")

BLOCK, MAX_SEQS, MAX_LEN = 16, 8, 512
CPU = torch.device("cpu")
LAYERS = (LayerView(0, 1, 2, 4, 64, "bfloat16"),)
VIEW = EngineView(BLOCK, max_model_len=MAX_LEN, max_in_flight_tokens=64, layers=LAYERS)
FLOATS = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


class Scheduler:
    """The stand-in.

    Attributes:
        lens: Lengths of the rows of each call.
    """

    def __init__(self) -> None:
        self.lens: list[list[int]] = []

    def __call__(
        self,
        *,
        batch_size: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        cache_seqlens: Tensor,
        cu_seqlens_q: Tensor,
        qkv_dtype: torch.dtype,
        page_size: int,
        **_: Any,
    ) -> Tensor:
        assert qkv_dtype in FLOATS, f"FlashAttention 3 takes no {qkv_dtype}"
        assert cache_seqlens.shape == (batch_size,) and cache_seqlens.dtype == torch.int32
        assert cu_seqlens_q.shape == (batch_size + 1,) and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
        assert max_seqlen_k >= int(cache_seqlens.max()) and page_size == BLOCK
        self.lens.append(cache_seqlens.tolist())
        return torch.full((1 + -(-batch_size // 4) * 16,), int(cache_seqlens.sum())).int()


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    made = Scheduler()
    monkeypatch.setattr(fa, "get_scheduler_metadata", made, raising=False)
    monkeypatch.setattr(fa, "get_flash_attn_version", lambda *_, **__: 3)
    monkeypatch.setattr(fa, "_get_sliding_window_configs", lambda _: {None})
    return made


def config() -> Any:
    """As much of a VllmConfig as the builders take, with graphs on."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id="an engine"),
        num_speculative_tokens=0,
        use_v2_model_runner=True,
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=512),
        parallel_config=SimpleNamespace(
            cp_kv_cache_interleave_size=1, decode_context_parallel_size=1
        ),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            rswa_window=None,
            is_mm_prefix_lm=False,
            hf_config=SimpleNamespace(model_type="llama"),
            get_num_attention_heads=lambda _: 4,
            get_num_kv_heads=lambda _: 2,
            get_head_size=lambda: 64,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            static_forward_context={},
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            cudagraph_capture_sizes=[MAX_SEQS],
            max_cudagraph_capture_size=MAX_SEQS,
        ),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=16),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        speculative_config=None,
    )


def window_kind(rows: StepRows) -> WindowWorker:
    policy = SinkWindow(SinkWindow.Options(sink=BLOCK, window=2 * BLOCK), VIEW)
    return WindowWorker(policy, ("x.yaml", "kvplug.sequence"), rows)


def format_kind(rows: StepRows) -> FormatWorker:
    return FormatWorker(Int4(Int4.Options(), VIEW), ("x.yaml", "kvplug.format"), rows, MAX_SEQS)


def plain_spec(**changes: Any) -> FullAttentionSpec:
    values = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return FullAttentionSpec(**(values | changes))


def stock_builder(spec: Any = None) -> Any:
    return fa.FlashAttentionMetadataBuilder(spec or plain_spec(), [], config(), CPU)


def builder(*make: Any) -> Any:
    """A builder of the plugged backend, over the spec that the kinds make of a plain one."""
    rows = StepRows()
    kinds: list[KindWorker] = [one(rows) for one in make]
    backend = plugged_backend(fa.FlashAttentionBackend, kinds, rows)
    spec = backend.customize_spec(plain_spec())
    return backend.get_builder_cls()(spec, [], config(), CPU)


def step(*rows: tuple[int, int], first: int = 0) -> CommonAttentionMetadata:
    """Rows of so many queries at the end of so many tokens."""
    widths, lens = zip(*rows, strict=True)
    starts = torch.tensor([0, *np.cumsum(widths)], dtype=torch.int32)
    lens_of = torch.tensor(lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lens_of,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(widths),
        max_seq_len=max(lens),
        block_table_tensor=torch.arange(
            1, 1 + len(rows) * MAX_LEN // BLOCK, dtype=torch.int32
        ).view(len(rows), -1),
        slot_mapping=torch.arange(int(starts[-1])),
        seq_lens_cpu_upper_bound=lens_of.clone(),
        req_idx=np.arange(first, first + len(rows)),
    )


DECODE = [(1, 100), (1, 40), (1, 300)]
SPLIT = [(1, 100), (400, 400), (90, 190)]
"""A prompt of 400 tokens in blocks of 16: more rows than requests that can run at once."""


# -- what would go wrong ---------------------------------------------------------------------------


def test_the_stand_in_sees_what_fails_on_a_gpu(scheduler: Scheduler) -> None:
    with pytest.raises(AssertionError, match="takes no torch"):
        stock_builder(plain_spec(dtype=torch.uint8)).build(0, step(*DECODE))
    stock = stock_builder()
    with pytest.raises(RuntimeError, match="must match"):
        stock.build(0, step(*[(1, 50)] * (MAX_SEQS + 4)))
    first = stock.build(0, step(*DECODE)).scheduler_metadata
    kept = first.clone()
    stock.build(0, step((1, 7)))
    assert not torch.equal(first, kept)


# -- formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [DECODE, SPLIT], ids=["decode", "chunk"])
def test_no_schedule_is_asked_for_under_a_format(
    scheduler: Scheduler, rows: list[tuple[int, int]]
) -> None:
    """Pages of bytes are attended by the format, and the scheduler takes none."""
    for kinds in ((format_kind,), (window_kind, format_kind)):
        built = builder(*kinds).build(0, step(*rows))
        assert built.scheduler_metadata is None
        assert built.kvplug_format.num_tokens == sum(width for width, _ in rows)
    assert scheduler.lens == []


# -- windows ---------------------------------------------------------------------------------------


def test_whole_rows_are_scheduled_by_what_the_window_leaves(scheduler: Scheduler) -> None:
    """In the buffer that a captured graph reads, for the lengths that attention sees."""
    made = builder(window_kind)
    first = made.build(0, step(*DECODE))
    # The sink, the window and the block that is written; 40 tokens are all seen.
    assert scheduler.lens == [[52, 40, 60]]
    second = made.build(0, step((1, 101), (1, 41), (1, 301)))
    assert second.scheduler_metadata.data_ptr() == first.scheduler_metadata.data_ptr()


def test_rows_of_a_split_chunk_do_not_reach_the_buffer(scheduler: Scheduler) -> None:
    made = builder(window_kind)
    built = made.build(0, step(*SPLIT))
    assert built.seq_lens.shape[0] > MAX_SEQS
    assert built.scheduler_metadata is None and scheduler.lens == []
    assert made.build(0, step(*DECODE)).scheduler_metadata is not None, "only of that step"


def test_forwards_within_a_step_leave_its_schedule_alone(scheduler: Scheduler) -> None:
    """Recomputation builds metadata of its own while the step's waits for its forward."""
    made = builder(window_kind)
    first = made.build(0, step(*DECODE))
    kept = [x.clone() for x in (first.scheduler_metadata, first.block_table, first.seq_lens)]
    table, slots = torch.arange(40, 40 + MAX_LEN // BLOCK), torch.arange(2)
    made.build(0, metadata.of_spans([(200, 201), (300, 301)], table, slots), fast_build=True)
    for own, before in zip(
        (first.scheduler_metadata, first.block_table, first.seq_lens), kept, strict=True
    ):
        assert torch.equal(own, before)
