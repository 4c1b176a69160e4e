"""What the scheduler and the server say to each other about shadows."""

from __future__ import annotations

from typing import Any

from kvplug.request_options import RequestOptions

__all__ = ["ASK", "EXACT", "NUMBER", "SHADOW", "STOP", "ShadowOrder"]

SHADOW = "shadow"
"""Key of a step's statistics that holds an order."""

ASK = "ask"
"""Key of an order to send a shadow: its secret number. With it come ``prompt``, the tokens as bytes
of int32, ``tokens``, how many to answer, and ``salt``, the cache salt or None."""

STOP = "stop"
"""Key of an order to stop the shadow of a number."""

NUMBER = "kvplug_shadow"
"""Key of the ``kv_transfer_params`` by which a shadow is known: its secret number."""

ShadowOrder = dict[str, Any]

EXACT = RequestOptions(sequence="off", reuse="off", attention="exact", store=False)
"""Options of a shadow."""
