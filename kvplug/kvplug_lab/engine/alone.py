"""The scheduler half of reuse without an engine: only a model's config is read."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvplug.contract import Fingerprint
from kvplug.request_options import RequestOptions
from kvplug_lab.engine.trial import connector_flags

if TYPE_CHECKING:
    from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
    from kvplug.reuse.plan import ReusePlan


class LoneScheduler:
    """What a scheduler knows of stored segments, filled and asked by hand.

    Args:
        model: Model directory.
        section: The ``kvplug`` section; it has a reuse section.
        max_model_len: Tokens of a request at most.
    """

    def __init__(self, model: Path, section: Mapping[str, Any], max_model_len: int):
        from vllm.engine.arg_utils import EngineArgs

        from kvplug.hosts.vllm.admission import deployment_of
        from kvplug.hosts.vllm.scheduler.events import Events
        from kvplug.hosts.vllm.scheduler.kind import SchedulerContext
        from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
        from kvplug.hosts.vllm.scheduler.slots import Slots
        from kvplug.hosts.vllm.view import engine_view

        config = EngineArgs(
            str(model),
            max_model_len=max_model_len,
            max_num_batched_tokens=max_model_len,
            dtype="bfloat16",
            block_size=32,
            enforce_eager=True,
            kv_transfer_config=connector_flags(dict(section)),
        ).create_engine_config()
        deployment = deployment_of(config)
        view = engine_view(config, num_blocks=1024)
        self.reuse: ReuseScheduler = ReuseScheduler(
            SchedulerContext(deployment, config, view, Events(deployment), Slots())
        )
        self._identity = self.reuse.identity
        self._count = 0

    @property
    def checks(self) -> list[str]:
        """Names of the checks, in order."""
        return [check.name for check in self.reuse.checks]

    def store(
        self,
        context: npt.NDArray[np.int32],
        tokens: npt.NDArray[np.int32],
        measures: Mapping[str, float],
    ) -> None:
        """Enter a segment as stored in memory.

        Args:
            context: All tokens before it, ``[start]``.
            tokens: Its tokens, ``[length]``.
            measures: Its stability measures.
        """
        from kvplug.reuse.file import digest

        fingerprint = Fingerprint(
            **self._identity,
            lora="",
            tenant="",
            mask="causal",
            start=len(context),
            length=len(tokens),
            context=digest(context),
            tokens=digest(tokens),
            created=time.time(),
            request_id="",
        )
        segment = self.reuse.catalog.plan_save(fingerprint, tokens, context)
        assert segment is not None, "the catalog has no room for a segment"
        self.reuse.catalog.saved(segment.id, measures)

    def request(self, tokens: Sequence[int], wishes: Mapping[str, Any]) -> tuple[Any, float]:
        """A request that the scheduler has taken in, and the microseconds it took to.

        Args:
            tokens: Its prompt.
            wishes: What it asks of kvplug.
        """
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._count += 1
        extra = {"kv_transfer_params": {"kvplug": dict(wishes)}}
        request = Request(
            f"alone-{self._count}",
            list(tokens),
            SamplingParams(max_tokens=8, extra_args=extra),
            None,
        )
        before = time.perf_counter()
        parsed = RequestOptions.parse(request.kv_transfer_params, num_prompt_tokens=len(tokens))
        self.reuse.on_new_request(request, parsed.options)
        return request, 1e6 * (time.perf_counter() - before)

    def plan(self, request: Any, num_local: int) -> tuple[ReusePlan, float]:
        """What the scheduler plans for a request, and the microseconds it takes to.

        Args:
            request: As `request` gave it.
            num_local: Tokens of it that the engine itself has.
        """
        before = time.perf_counter()
        self.reuse.matched(request, num_local)
        spent = 1e6 * (time.perf_counter() - before)
        plan = self.reuse.requests[request.request_id].plan
        assert plan is not None, "a request found nothing of what is stored"
        return plan, spent
