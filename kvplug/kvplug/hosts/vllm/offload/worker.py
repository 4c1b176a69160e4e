"""Chunks between the pool and host memory by copies of torch, for vLLM's offloading framework."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

logger = logging.getLogger("kvplug")


def own_rows(caches: CanonicalKVCaches, chunks: int, blocks_per_chunk: int) -> list[Tensor]:
    """Return host memory for so many chunks: ``[chunks, blocks_per_chunk * page bytes]`` int8 for
    each tensor of the caches."""
    return [
        torch.zeros((chunks, blocks_per_chunk * own.page_size_bytes), dtype=torch.int8)
        for own in caches.tensors
    ]


def shared_rows(caches: CanonicalKVCaches, region: Any, blocks_per_chunk: int) -> list[Tensor]:
    """Return the same as views of vLLM's shared region, which the scheduler's tiers read."""
    return [
        region.create_next_worker_view(blocks_per_chunk * own.page_size_bytes)
        for own in caches.tensors
    ]


class CopyWorker(OffloadingWorker):
    """Copies chunks at once, in the step that asks for them.

    Args:
        caches: The pool's tensors.
        rows: Host memory of each, ``[chunks, blocks_per_chunk * page bytes]`` int8.
        blocks_per_chunk: Blocks of the pool in a chunk.
        release: Called at the end, once nothing is copied any more.
    """

    def __init__(
        self,
        caches: CanonicalKVCaches,
        rows: Sequence[Tensor],
        blocks_per_chunk: int,
        release: Callable[[], None] | None = None,
    ):
        self._pages = [_bytes(own.tensor) for own in caches.tensors]
        self._sizes = [own.page_size_bytes for own in caches.tensors]
        self._rows = list(rows)
        self._per_chunk = blocks_per_chunk
        self._release = release
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """Copy blocks of the pool into chunks."""
        return self._copy(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        """Copy chunks into blocks of the pool; every load is expedited here."""
        return self._copy(job_id, dst_spec, src_spec, to_host=False)

    def get_finished(self) -> list[TransferResult]:
        """Return what was copied since last asked."""
        found, self._finished = self._finished, []
        return found

    def wait(self, job_ids: set[int]) -> None:
        """Return at once: nothing is under way."""

    def shutdown(self) -> None:
        """Release the host memory."""
        self._rows = []
        if self._release is not None:
            self._release()
            self._release = None

    def _copy(self, job_id: int, pool: GPULoadStoreSpec, host: Any, *, to_host: bool) -> bool:
        begun = time.perf_counter()
        try:
            blocks, chunks, within = self._places(pool, host)
            for pages, rows, size in zip(self._pages, self._rows, self._sizes, strict=True):
                # Parts of chunks as rows of their own: a view, since a chunk's blocks lie together.
                parts = rows.view(len(rows), self._per_chunk, size)
                if to_host:
                    parts[chunks, within, : pages.shape[1]] = pages[blocks]
                else:
                    pages[blocks] = parts[chunks, within, : pages.shape[1]]
        except Exception:
            logger.exception("a chunk was not copied")
            self._finished.append(TransferResult(job_id, False))
            return True
        moved = len(blocks) * sum(self._sizes)
        taken = time.perf_counter() - begun
        self._finished.append(TransferResult(job_id, True, moved, taken))
        return True

    def _places(self, pool: GPULoadStoreSpec, host: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Block of the pool, chunk, and block within the chunk, of each block that is copied.

        Each group's blocks follow one another in a text, and begin anywhere in their first chunk.
        """
        chunks, within, taken = [], [], 0
        for size, first in zip(pool.group_sizes, pool.block_indices, strict=True):
            at = first % self._per_chunk + np.arange(size)
            chunks.append(host.block_ids[taken + at // self._per_chunk])
            within.append(at % self._per_chunk)
            taken += -(-(first % self._per_chunk + size) // self._per_chunk) if size else 0
        if taken != len(host.block_ids):
            raise ValueError(f"{len(pool.block_ids)} blocks are not {len(host.block_ids)} chunks")
        found = (pool.block_ids, np.concatenate(chunks), np.concatenate(within))
        blocks, chunk, part = (torch.from_numpy(ids.astype(np.int64)) for ids in found)
        return blocks, chunk, part


def _bytes(cache: Tensor) -> Tensor:
    """``[blocks, bytes]`` int8 of a cache."""
    wide = cache.view(torch.int8)
    return wide if wide.ndim == 2 else wide.flatten(1)
