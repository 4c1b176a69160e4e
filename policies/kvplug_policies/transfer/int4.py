"""K and V as 4-bit integers with a scale and a zero point per channel and run of tokens.

Along tokens, as KIVI codes keys (arXiv 2402.02750): a channel of a key stays about where it is from
token to token, while the channels of one token differ by orders of magnitude. In a page a scale
over tokens is a burden, since tokens come one by one; a chunk is whole. On KV of SmolLM2 the error
of keys is about half that of rotated groups along channels, at as many bits; that of values is
smaller too.
"""

from __future__ import annotations

from pydantic import Field

from kvplug.contract import PolicyOptions
from kvplug_policies.integers import IntegerCodec

LEAST_TOKENS = 8
"""Tokens below which a group along tokens would be mostly scales."""


class Int4Codec(IntegerCodec):
    """Half a byte a number, and four bytes for each channel and group of tokens."""

    name = "int4"
    changes = "stores KV outside the pool as 4-bit integers, scaled per channel over some tokens"
    paper = "KIVI, arXiv 2402.02750 (for keys)"
    bits = 4

    class Options(PolicyOptions):
        """Options of `int4`."""

        group: int = Field(
            default=32, ge=LEAST_TOKENS, le=4096, description="tokens that share a scale"
        )

    options: Options

    def fingerprint(self) -> str:
        return f"group={self.options.group}"

    def groups(self, tokens: int) -> int:
        return max(1, tokens // self.options.group) if tokens >= LEAST_TOKENS else 0
