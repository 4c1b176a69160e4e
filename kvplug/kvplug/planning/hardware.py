"""What a machine's hardware suggests: block size, splits, transfers and format, with the reason.

A suggestion follows from what was measured, and names the machine, or from arithmetic on facts that
were read from the device or that its vendor publishes. It says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvplug.planning.prices import Price, prices

Evidence = Literal["measured", "arithmetic", "not measured"]

Setting = Literal["block-size", "splits", "transfer", "format"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
"""What is suggested, in the order of the table's columns."""

GB = 10**9
BLOCK_SIZE = 16
"""vLLM's default on a GPU, with which all of kvplug's measurements there were made."""
CPU_BLOCK_SIZE = 32
KV_HEADS = 8
MODEL_BYTES = 16 * GB
"""Weights of an 8B model in 16 bits, which a decode step reads once."""
TOKEN_BYTES = 128 << 10
"""Bytes of one token's KV in an 8B model: 32 layers of 8 KV heads of 128, in 16 bits."""
CHUNK = BLOCK_SIZE * TOKEN_BYTES
"""Bytes of a block of such a model: the example of a transfer."""
SLOT_BYTES = 32 << 20
"""Bytes of chunks that one copy over the link takes: `kvplug.hosts.vllm.worker.tier_line`."""
PROGRAMS = 2
"""Programs for each multiprocessor that decode kernels start: `kvplug_kernels.splits`."""


@dataclass(frozen=True)
class Card:
    """Facts of an accelerator, from its vendor's data sheet; none of them was measured here.

    Attributes:
        name: Its name.
        pattern: What torch calls it, as a regular expression; the first that matches counts.
        memory: Bytes.
        bandwidth: Bytes a second of its memory.
        multiprocessors: Streaming multiprocessors or compute units.
        link: Bytes a second to host memory, one way.
        fp8: Whether it computes in 8-bit floats.
    """

    name: str
    pattern: str
    memory: int
    bandwidth: int
    multiprocessors: int
    link: int
    fp8: bool

    @property
    def hidden(self) -> int:
        """Chunks that cross the link while a decode step of an 8B model reads its weights."""
        return int(self.link * MODEL_BYTES / self.bandwidth / CHUNK)


CARDS = (
    Card("A100 40 GB", r"A100.*40 ?GB", 40 * GB, 1_555 * GB, 108, 32 * GB, False),
    Card("A100 80 GB", r"A100", 80 * GB, 2_039 * GB, 108, 32 * GB, False),
    Card("GH200 144 GB", r"GH200.*144", 144 * GB, 4_900 * GB, 132, 450 * GB, True),
    Card("GH200 96 GB", r"GH200", 96 * GB, 4_000 * GB, 132, 450 * GB, True),
    Card("H100 PCIe", r"H100.*PCIe", 80 * GB, 2_000 * GB, 114, 64 * GB, True),
    Card("H100 NVL", r"H100.*NVL", 94 * GB, 3_900 * GB, 132, 64 * GB, True),
    Card("H100 SXM", r"H100", 80 * GB, 3_350 * GB, 132, 64 * GB, True),
    Card("H200", r"H200", 141 * GB, 4_800 * GB, 132, 64 * GB, True),
    Card("MI300X", r"MI300X", 192 * GB, 5_300 * GB, 304, 64 * GB, True),
)
CPU = "CPU"


@dataclass(frozen=True)
class Suggestion:
    """One setting for a machine.

    Attributes:
        setting: What is set.
        value: To what.
        reason: Why, a sentence.
        evidence: How that is known.
    """

    setting: Setting
    value: str
    reason: str
    evidence: Evidence


def card_of(name: str) -> Card | None:
    """Find the card that torch calls by a name; None for one that is not in the table."""
    return next((card for card in CARDS if re.search(card.pattern, name)), None)


def table() -> Iterator[tuple[str, Card | None, list[Suggestion]]]:
    """Name, facts and suggestions of every card, and of a CPU, which has no facts."""
    for card in CARDS:
        yield card.name, card, suggest({"name": card.name})
    yield CPU, None, suggest(None)


def suggest(device: Mapping[str, Any] | None) -> list[Suggestion]:
    """Suggest settings for a machine, in the order of `SETTINGS`.

    Args:
        device: What was read of its accelerator: ``name``, and where they are known
            ``multiprocessors`` and ``capability``, a list of two numbers. None for a machine
            without one.

    Returns:
        One for each setting; of a card that is not in the table, those that follow from what was
        read.
    """
    if device is None:
        return _of_a_cpu()
    name = str(device.get("name", ""))
    card = card_of(name)
    count = device.get("multiprocessors") or (card.multiprocessors if card else 0)
    capability = device.get("capability")
    fp8 = card.fp8 if card else None
    if isinstance(capability, list):
        fp8 = capability >= [8, 9]
    speed = _speed("int4")
    measured = speed is not None and _same(speed.machine, card)
    rocm = card is not None and card.name.startswith("MI")
    found = [_block_size(measured, rocm)]
    if count:
        programs = PROGRAMS * int(count)
        found.append(
            Suggestion(
                "splits",
                f"{programs} programs, {max(programs // KV_HEADS, 1)} a KV head",
                "Two for each multiprocessor, among which one request's tokens are divided: here "
                f"in a model of {KV_HEADS} KV heads. The kernels choose that themselves; nothing "
                "is to be set.",
                "arithmetic",
            )
        )
    if card is not None:
        found.append(_transfer(card))
    found.append(_format(speed, measured, fp8, rocm))
    return found


def _block_size(measured: bool, rocm: bool) -> Suggestion:
    reason = (
        "vLLM's default, with which kvplug was measured on an H100. The preset with kivi takes "
    )
    reason += "64, because kivi keeps up to a block of each request's latest tokens exact; its "
    reason += "speed on a GPU was not measured."
    if rocm:
        reason = "vLLM's default; kvplug never ran on ROCm."
    return Suggestion(
        "block-size", str(BLOCK_SIZE), reason, "measured" if measured else "not measured"
    )


def _transfer(card: Card) -> Suggestion:
    """What a tier moves at once, and how much of it a decode step hides."""
    return Suggestion(
        "transfer",
        f"{CHUNK >> 20} MiB a chunk, {card.hidden} in a decode step",
        f"A chunk is a block: {BLOCK_SIZE} tokens of an 8B model. At most so many cross the link "
        f"to the host while a step reads {MODEL_BYTES // GB} GB of weights; a copy takes up to "
        f"{SLOT_BYTES >> 20} MiB of them. Models whose tokens take less than 32 KiB want larger "
        "blocks, because chunks below 512 KiB waste most media.",
        "arithmetic",
    )


def _format(speed: Price | None, measured: bool, fp8: bool | None, rocm: bool) -> Suggestion:
    if rocm:
        return Suggestion(
            "format",
            "stock",
            "kvplug never ran on ROCm: begin with a prefix_cache policy.",
            "not measured",
        )
    reason = "int8 has the smallest price in answers, measured on SmolLM2-135M, and twice the "
    reason += "tokens; int4 has three times as many"
    if speed is not None:
        reason += f", and gave {speed.values['ratio']:.2f} times stock's tokens/s in the same KV "
        reason += f"memory on {speed.machine}"
    reason += "."
    if fp8 is False:
        reason += " This card does not compute in 8-bit floats: stock fp8 saves memory alone."
    return Suggestion(
        "format",
        "stock while the pool is large enough, then int8, then int4",
        reason,
        "measured" if measured else "not measured",
    )


def _of_a_cpu() -> list[Suggestion]:
    return [
        Suggestion(
            "block-size",
            str(CPU_BLOCK_SIZE),
            "vLLM's CPU attention takes multiples of 32, and its default of 128 shares and evicts "
            "in coarser steps.",
            "arithmetic",
        ),
        Suggestion(
            "splits",
            "four parts for each thread",
            "The compiled kernels cut long rows so that every thread has something to do until the "
            "end, into at least 256 tokens each. Nothing is to be set.",
            "not measured",
        ),
        Suggestion(
            "transfer",
            "512 KiB a chunk or more",
            "There is no link to cross, but every chunk costs some tenths of a millisecond: host "
            "memory was read 4.8 times as fast in chunks of 512 KiB as in chunks of 64 KiB. A "
            "block of 32 tokens of SmolLM2-135M has 720 KiB.",
            "measured",
        ),
        Suggestion(
            "format",
            "stock while memory is large enough, then int4",
            "With compiled kernels int4 gave 0.90 of stock's tokens per second of CPU time where "
            "the same requests ran at once, in one run on 2 cores of an AMD EPYC, and it holds 3.5 "
            "times the tokens.",
            "measured",
        ),
    ]


def _speed(name: str) -> Price | None:
    return next((price for price in prices(name) if price.what == "speed"), None)


def _same(machine: str, card: Card | None) -> bool:
    return card is not None and card is card_of(machine)
