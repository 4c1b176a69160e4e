"""Common attention metadata for other rows than the runner's, made in one place.

vLLM caches values derived from the metadata in private fields of it, which ``replace`` carries
over; here is the one place that resets them. `compat` lists every field used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(
    data: Sequence[Any] | npt.NDArray[Any] | Tensor,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Copy data of the host to a device; neither waits for the other."""
    from vllm.utils.torch_utils import async_tensor_h2d

    if device.type == "cpu":
        found = torch.from_numpy(data) if isinstance(data, np.ndarray) else torch.as_tensor(data)
        return found if dtype is None else found.to(dtype)
    return async_tensor_h2d(data, device=device, dtype=dtype)


def host_lengths(common: Any) -> Tensor:
    """Return the tokens of each row on the host, ``[rows]``.

    Without waiting for a device; of rows with draft tokens vLLM may know bounds alone there.
    """
    lens: Tensor = common.seq_lens
    if lens.device.type != "cpu" and common.seq_lens_cpu_upper_bound is not None:
        lens = common.seq_lens_cpu_upper_bound
    return lens.cpu()


def with_lengths(
    common: Any,
    *,
    seq_lens: Tensor,
    block_table: Tensor,
    max_seq_len: int,
    seq_lens_cpu: Tensor | None,
) -> Any:
    """Return the same rows with other lengths and block tables.

    Args:
        common: vLLM's common metadata.
        seq_lens: Tokens of each row, ``[rows]`` int32.
        block_table: ``[rows, max_blocks]`` int32.
        max_seq_len: Most tokens of a row.
        seq_lens_cpu: Upper bounds of the lengths on the host, ``[rows]``.
    """
    return common.replace(
        seq_lens=seq_lens,
        block_table_tensor=block_table,
        max_seq_len=max_seq_len,
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        _num_computed_tokens_cache=None,
    )


def with_rows(
    common: Any,
    rows: Tensor,
    *,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    max_seq_len: int,
    seq_lens_cpu: Tensor | None,
    num_tokens: int | None = None,
    slot_mapping: Tensor | None = None,
    query_start_device: Tensor | None = None,
) -> Any:
    """Return other rows, each a part of one of the given rows.

    Args:
        common: vLLM's common metadata.
        rows: Row each new row is a part of, ``[n]`` int64 on the host.
        query_start: First query of each new row and the end, ``[n + 1]`` int32 on the host.
        seq_lens: Tokens of each new row, ``[n]`` int32.
        block_table: ``[n, max_blocks]`` int32.
        max_seq_len: Most tokens of a new row.
        seq_lens_cpu: Upper bounds of the lengths on the host, ``[n]``.
        num_tokens: Tokens of the step, padding included; None for those of the new rows.
        slot_mapping: Cache slots of the new rows' tokens; None leaves the given ones.
        query_start_device: The same as ``query_start`` on the device, if it is there already.
    """
    if query_start_device is None:
        query_start_device = to_device(query_start, common.query_start_loc.device)
    prefilling, requests = common.is_prefilling, common.req_idx
    return common.replace(
        num_reqs=len(rows),
        num_actual_tokens=int(query_start[-1]) if num_tokens is None else num_tokens,
        query_start_loc=query_start_device,
        query_start_loc_cpu=query_start,
        seq_lens=seq_lens,
        block_table_tensor=block_table,
        slot_mapping=common.slot_mapping if slot_mapping is None else slot_mapping,
        max_query_len=int((query_start[1:] - query_start[:-1]).max()),
        max_seq_len=max_seq_len,
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        is_prefilling=prefilling[rows] if prefilling is not None else None,
        req_idx=requests[rows.numpy()] if requests is not None else None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def select_rows(common: Any, rows: Sequence[int]) -> tuple[Any, Tensor]:
    """Return the metadata of some rows alone, and their tokens among the step's, ``[n]`` int64.

    Args:
        common: vLLM's common metadata.
        rows: The rows, at least one.
    """
    device = common.seq_lens.device
    starts = common.query_start_loc_cpu.long()
    index = torch.tensor(list(rows))
    index_dev = to_device(index, device)
    widths = starts[index + 1] - starts[index]
    query_start = query_starts(widths)
    tokens = torch.repeat_interleave(starts[index] - query_start[:-1], widths)
    tokens = to_device(tokens + torch.arange(int(query_start[-1])), device)
    lens_cpu = host_lengths(common)[index]
    part = with_rows(
        common,
        index,
        query_start=query_start,
        seq_lens=common.seq_lens[index_dev],
        block_table=common.block_table_tensor[index_dev],
        max_seq_len=int(lens_cpu.max()),
        seq_lens_cpu=lens_cpu,
        slot_mapping=common.slot_mapping[tokens],
    )
    return part, tokens


def of_spans(spans: Sequence[tuple[int, int]], block_table: Tensor, slot_mapping: Tensor) -> Any:
    """Return the metadata of spans of one text, each a row that sees the text up to its end.

    Args:
        spans: Start and end of each span.
        block_table: The text's blocks, ``[n]``.
        slot_mapping: Cache slot of each token of the spans, ``[num_tokens]`` int64.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    device = slot_mapping.device
    query_start = query_starts(torch.tensor([b - a for a, b in spans]))
    lens = torch.tensor([b for _, b in spans], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=to_device(query_start, device),
        query_start_loc_cpu=query_start,
        seq_lens=to_device(lens, device),
        num_reqs=len(spans),
        num_actual_tokens=int(query_start[-1]),
        max_query_len=max(b - a for a, b in spans),
        max_seq_len=int(lens.max()),
        block_table_tensor=to_device(block_table, device, torch.int32)[None]
        .expand(len(spans), -1)
        .contiguous(),
        slot_mapping=slot_mapping,
        causal=True,
        seq_lens_cpu_upper_bound=lens,
    )


def query_starts(widths: Tensor) -> Tensor:
    """First query of each row and the end, ``[rows + 1]`` int32, from queries per row."""
    starts = torch.zeros(len(widths) + 1, dtype=torch.int32)
    torch.cumsum(widths, 0, out=starts[1:])
    return starts
