"""K and V as 8-bit integers with a scale and a zero point per token and KV head."""

from __future__ import annotations

from kvplug_policies.integers import IntegerCodec


class Int8Codec(IntegerCodec):
    """One byte a number; nothing is shared between tokens."""

    name = "int8"
    changes = "stores KV outside the pool as 8-bit integers, scaled per token and KV head"
    bits = 8
