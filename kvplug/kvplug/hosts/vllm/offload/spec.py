"""vLLM's offloading specs with a worker for the CPU platform, where its own refuses to run."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvplug.hosts.vllm.offload.worker import CopyWorker, own_rows, shared_rows


class KVPlugOffloadingSpec(CPUOffloadingSpec):
    """Host memory below the pool, on every platform.

    On a GPU it is vLLM's own spec; on a CPU chunks are copied by torch. Its options are those of
    ``CPUOffloadingSpec``.
    """

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Return this worker's copies."""
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if not self._worker:
            rows = own_rows(kv_caches, self.num_chunks, self.blocks_per_chunk)
            self._worker: Any = CopyWorker(kv_caches, rows, self.blocks_per_chunk)
        return self._worker


class KVPlugTieringSpec(TieringOffloadingSpec):
    """Host memory below the pool and tiers below that, on every platform.

    Its options are those of ``TieringOffloadingSpec``; a tier of kvplug is one of the
    ``secondary_tiers``, of type ``KVPlugTier`` in ``kvplug.hosts.vllm.offload.tier``.
    """

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Return this worker's copies, in the memory that the scheduler's tiers read."""
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            try:
                rows = shared_rows(kv_caches, region, self.blocks_per_chunk)
            except BaseException:
                region.cleanup()
                raise
            self._worker: Any = CopyWorker(
                kv_caches, rows, self.blocks_per_chunk, release=region.cleanup
            )
        return self._worker
