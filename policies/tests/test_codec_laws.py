"""The laws of `kvplug.testing` for every transfer codec that ships."""

from __future__ import annotations

from typing import Any

from transforms import transform_file

from kvplug.contract import Kind, TransferCodec
from kvplug.testing import CodecLaws, each
from kvplug_policies.builtin import BUILTIN
from kvplug_policies.transfer.cachegen import CacheGen
from kvplug_policies.transfer.fp8 import Fp8Codec
from kvplug_policies.transfer.int4 import Int4Codec
from kvplug_policies.transfer.int8 import Int8Codec
from kvplug_policies.transfer.kvtc import Kvtc
from kvplug_policies.transfer.lossless import Lossless
from kvplug_policies.transfer.raw import Raw

CASES: list[tuple[type[TransferCodec], float, dict[str, Any]]] = [
    (Raw, 0, {}),
    (Lossless, 0, {}),
    (Fp8Codec, 0.15, {}),
    (Fp8Codec, 0.15, {"entropy": True}),
    (Int8Codec, 0.05, {}),
    (Int4Codec, 0.11, {}),
    (Int4Codec, 0.09, {"group": 16}),
    (CacheGen, 0.9, {}),
    (CacheGen, 0.05, {"group": 4, "bins": [0.1, 0.1, 0.1]}),
    (Kvtc, 0.07, {"transform": transform_file(), "ratio": 2.5}),
    (Kvtc, 0.7, {"transform": transform_file(), "ratio": 6, "sinks": 0}),
]


def label(policy: type[TransferCodec], options: dict[str, Any]) -> str:
    shown = (f"{name}{value}" for name, value in options.items() if name != "transform")
    return "-".join([policy.name, *shown])


globals().update(
    each(
        CodecLaws,
        [(label(p, o), {"policy": p, "error": e, "options": o}) for p, e, o in CASES],
    )
)


def test_every_codec_is_here() -> None:
    assert {p.name for p, _, _ in CASES} == {p.name for p in BUILTIN if p.kind is Kind.TRANSFER}
