"""Energy of the engine's GPUs, as a metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from kvplug.observe.catalogue import ENERGY_JOULES
from kvplug.observe.energy import EnergyMeter
from kvplug.observe.metric import Sample

logger = init_logger("vllm.kvplug")


class EnergyWatch:
    """Reads what an engine's GPUs on this machine use, where NVML counts it.

    Args:
        vllm_config: The engine's config.
        nvml: NVML, or None to look for it on a CUDA platform.
    """

    def __init__(self, vllm_config: Any, nvml: Any = None):
        self._meter: EnergyMeter | None = None
        if nvml is None and not current_platform.is_cuda():
            return
        try:
            self._meter = EnergyMeter.found(local_gpus(vllm_config.parallel_config), nvml)
        except Exception as error:
            logger.info("kvplug: energy is not counted: %s", error)

    def samples(self) -> Iterator[Sample]:
        """Joules so far; nothing where nobody counts them."""
        if self._meter is not None:
            yield ENERGY_JOULES.of(self._meter.joules)

    def stop(self) -> None:
        """Take no more readings."""
        if self._meter is not None:
            self._meter.stop()


def local_gpus(parallel: Any) -> list[int]:
    """Indices, as NVML counts them, of an engine's GPUs on this machine.

    Args:
        parallel: vLLM's ``ParallelConfig``.
    """
    count = int(parallel.local_world_size)
    first = 0
    # With Ray each engine is given a list of its own; else the lists are of all engines here.
    if parallel.data_parallel_backend != "ray" and parallel.data_parallel_size > 1:
        first = count * int(parallel.data_parallel_rank_local or 0)
    given = parallel.assigned_physical_gpu_ids
    if given is not None:
        return [int(one) for one in given[first : first + count]]
    physical = current_platform.device_id_to_physical_device_id
    return [int(physical(one)) for one in range(first, first + count)]
