"""Sends shadows: in the server, on behalf of the scheduler.

The scheduler cannot make requests, so it asks the server for them (`kvplug.hosts.vllm.metrics`
hands its orders on). `ShadowMiddleware`, a value of vLLM's ``--middleware``, changes nothing; it
gives this module the server's engine client. With several server processes each has its own, and
the one that an order reaches sends the shadow.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.inputs.engine import tokens_input
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind, SamplingParams

from kvplug.hosts.vllm.shadow_orders import ASK, NUMBER, STOP, ShadowOrder

if TYPE_CHECKING:
    from kvplug.hosts.vllm.asgi import Application, Receive, Scope, Send

__all__ = ["ERRANDS", "Errands", "ShadowMiddleware"]

logger = init_logger("vllm.kvplug")

PRIORITY = 1 << 30
"""After every user's, where the engine schedules by priority."""


class Errands:
    """Sends the shadows that engines ask for, one per engine at a time. Used by one event loop.

    Attributes:
        client: The server's engine client; None until the middleware has it.
    """

    def __init__(self) -> None:
        self.client: Any = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failed = False

    def put(self, order: ShadowOrder, engine: int, engines: int) -> None:
        """Carry out an order, or leave it where there is no server.

        Args:
            order: The order.
            engine: Number of the engine that gave it.
            engines: Engines of the server.
        """
        if (task := self._running.get(order.get(STOP, ""))) is not None:
            task.cancel()
        number = order.get(ASK)
        if number is None or self.client is None:
            return
        task = asyncio.get_running_loop().create_task(
            self._send(order, engine if engines > 1 else None)
        )
        self._running[number] = task
        task.add_done_callback(lambda _: self._running.pop(number, None))

    async def _send(self, order: ShadowOrder, rank: int | None) -> None:
        number, prompt = order[ASK], np.frombuffer(order["prompt"], dtype=np.int32).tolist()
        params = SamplingParams(
            temperature=0,
            max_tokens=order["tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {NUMBER: number}},
        )
        try:
            async for _ in self.client.generate(
                tokens_input(prompt, cache_salt=order["salt"]),
                params,
                f"kvplug-shadow-{number[:8]}",  # vLLM adds to it; the number itself is secret
                priority=PRIORITY,
                data_parallel_rank=rank,
            ):
                pass
        except Exception as error:
            if not self._failed:
                self._failed = True
                logger.error("kvplug: a shadow could not be sent: %r", error)


ERRANDS = Errands()
"""Those of this process's server."""


class ShadowMiddleware:
    """Finds the server's engine client; changes nothing.

    Args:
        app: The server, an ASGI application.
    """

    def __init__(self, app: Application):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection, or the server's own start."""
        if ERRANDS.client is None:
            state = getattr(scope.get("app"), "state", None)
            ERRANDS.client = getattr(state, "engine_client", None)
        await self.app(scope, receive, send)
