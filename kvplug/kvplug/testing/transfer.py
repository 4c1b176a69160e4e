"""Laws of every transfer codec."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import zstandard
from torch import Tensor

from kvplug.contract import CorruptPayload, EngineView, LayerView, PlaneShape, Rope, TransferCodec
from kvplug.testing.laws import PolicyLaws, law, skip

LAYERS, HEADS, SIZE = 3, 2, 32
SIZES = (1, 2, 7, 16, 33, 256)
"""Tokens of a chunk."""

BITS = {2: torch.int16, 4: torch.int32, 1: torch.uint8}


@dataclass(frozen=True)
class Case:
    """A codec with options.

    Attributes:
        build: Makes it for an engine.
        error: Root of the mean square error allowed, as a part of the deviation of a channel over
            the tokens of a chunk; 0 for a codec that is exact.
        options: What it is called in a test.
    """

    build: Callable[[EngineView], TransferCodec]
    error: float = 0.0
    label: str = ""
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.bfloat16, torch.float16, torch.float32))

    def __str__(self) -> str:
        return self.label


def case(policy: type[TransferCodec], error: float = 0.0, **options: Any) -> Case:
    """A codec by its class and options."""
    shown = (f"{name}{value}" for name, value in options.items() if name != "transform")
    label = "-".join([policy.name, *shown])
    return Case(lambda engine: policy(policy.Options(**options), engine), error, label)


def engine(dtype: torch.dtype = torch.bfloat16) -> EngineView:
    """An engine of three layers with rotary keys."""
    rope = Rope(tuple(float(1e4 ** (-i / (SIZE // 2))) for i in range(SIZE // 2)))
    layers = tuple(
        LayerView(i, LAYERS, HEADS, 2 * HEADS, SIZE, str(dtype).removeprefix("torch."), rope)
        for i in range(LAYERS)
    )
    return EngineView(16, layers=layers)


_engine = engine


def chunk(tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """K and V whose channels differ in size and mean, as a model's do."""
    found = {}
    for i, name in enumerate(("key", "value")):
        random = torch.Generator().manual_seed(2 * seed + i)
        shape = (LAYERS, 1, HEADS, SIZE)
        size = torch.randn(shape, generator=random).exp()
        mean = 2 * torch.randn(shape, generator=random) * size
        noise = torch.randn(LAYERS, tokens, HEADS, SIZE, generator=random)
        found[name] = (noise * size + mean).to(dtype)
    return found


def cells(tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Cells of a format: codes, and bytes that change little from token to token."""
    random = torch.Generator().manual_seed(seed)
    shape = (LAYERS, tokens, HEADS)
    codes = torch.randint(0, 256, (*shape, 16), generator=random)
    skewed = torch.randn(*shape, 8, generator=random).mul(6).add(128)
    walk = torch.randint(-1, 2, (*shape, 4), generator=random).cumsum(1).add(100)
    return {"cells": torch.cat([codes, skewed, walk], -1).to(torch.uint8)}


def special() -> dict[str, Tensor]:
    """Every bfloat16: all NaNs with their payloads, both zeros, infinities, subnormal numbers."""
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    every = words.view(torch.bfloat16).view(1, 64, 2, 512)
    return {"key": every, "value": every.flip(1)}


def shapes_of(planes: Mapping[str, Tensor]) -> dict[str, PlaneShape]:
    """What `decode` is told of planes."""
    return {
        name: PlaneShape(str(plane.dtype).removeprefix("torch."), tuple(plane.shape))
        for name, plane in planes.items()
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one type and shape, and equal to the bit, NaNs too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = BITS[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def as_stored(coded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Coded tensors as they come back from a tier: copies in host memory."""
    return {name: tensor.cpu().clone() for name, tensor in coded.items()}


# -- the laws --------------------------------------------------------------------------------------


def check_round_trip(codec: TransferCodec, planes: dict[str, Tensor], start: int = 0) -> float:
    """Encode and decode a chunk; an exact codec's comes back to the bit.

    Returns:
        Bytes coded over bytes given.
    """
    before = {name: plane.clone() for name, plane in planes.items()}
    coded = codec.encode(planes, start)
    for name, plane in planes.items():
        assert same_bits(plane, before[name]), "encode writes into its planes"
    for name, tensor in coded.items():
        assert tensor.is_contiguous(), f"encode returns {name}, which is not contiguous"
    stored = as_stored(coded)
    kept = as_stored(coded)
    found = codec.decode(stored, shapes_of(planes), start)
    assert list(found) == list(planes), f"planes {list(planes)} come back as {list(found)}"
    shape = {n: (list(p.shape), str(p.dtype)) for n, p in planes.items()}
    for name, plane in planes.items():
        got = found[name]
        alike = got.shape == plane.shape and got.dtype == plane.dtype
        assert alike, f"{name} of {shape[name]} comes back as {list(got.shape)} {got.dtype}"
        if codec.exact or plane.dtype == torch.uint8:
            assert same_bits(got, plane), f"{name} of {shape[name]} comes back with other bits"
    for name, tensor in kept.items():
        kept_so = torch.equal(tensor, stored[name]) or tensor.is_floating_point()
        assert kept_so, f"decode writes into {name}"
    size = sum(tensor.nbytes for tensor in coded.values())
    given = sum(plane.nbytes for plane in planes.values())
    assert size <= given, f"{given} bytes of {shape} are coded in {size}"
    return size / given


def check_error(codec: TransferCodec, planes: dict[str, Tensor], bound: float, start: int) -> None:
    """The error of a codec that is not exact, over the tokens of a chunk."""
    coded = as_stored(codec.encode(planes, start))
    found = codec.decode(coded, shapes_of(planes), start)
    for name, plane in planes.items():
        right, got = plane.double(), found[name].double()
        off = (got - right).square().mean((1, 3)).sqrt()
        spread = (right - right.mean(1, keepdim=True)).square().mean((1, 3)).sqrt()
        worst = float((off / spread).max())
        tokens = plane.shape[1]
        assert worst <= bound, f"{name} of {tokens} tokens has an error of {worst:.3g}"


def hostile(coded: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Damaged and hostile forms of coded tensors, each with what was done."""
    yield "nothing", {}
    yield "one more", {**coded, "more": torch.zeros(3)}
    for name, tensor in coded.items():
        rest = {other: t for other, t in coded.items() if other != name}
        yield f"no {name}", rest
        yield f"{name} in another place", {**rest, f"{name}.x": tensor}
        yield f"{name} as double", {**rest, name: tensor.double()}
        yield f"{name} as bool", {**rest, name: torch.zeros(tensor.shape, dtype=torch.bool)}
        yield f"{name} with one dimension more", {**rest, name: tensor[None]}
        yield f"{name} as a number", {**rest, name: tensor.new_zeros(())}
        yield f"{name} empty", {**rest, name: tensor.new_empty(0)}
        if len(tensor) > 1:
            yield f"{name} cut", {**rest, name: tensor[:-1].clone()}
        yield f"{name} longer", {**rest, name: torch.cat([tensor, tensor])}
        if tensor.dtype == torch.uint8 and tensor.ndim == 1:
            claims = zstandard.ZstdCompressor().compress(bytes(64))
            huge = bytearray(claims)
            # A single-segment frame whose size takes eight bytes: one of 2**40.
            huge[4:6] = bytes([0xE0]) + (1 << 40).to_bytes(8, "little")
            yield f"{name} claims a TiB", {**rest, name: torch.frombuffer(huge, dtype=torch.uint8)}


def check_hostile(codec: TransferCodec, planes: dict[str, Tensor], start: int) -> None:
    """Tensors that no `encode` returned are refused, as corrupt and as nothing else."""
    coded = as_stored(codec.encode(planes, start))
    shapes = shapes_of(planes)
    for what, damaged in hostile(coded):
        if damaged.keys() == coded.keys() and all(
            damaged[n].shape == t.shape and damaged[n].dtype == t.dtype for n, t in coded.items()
        ):
            continue
        try:
            found = codec.decode(damaged, shapes, start)
        except CorruptPayload:
            continue
        raise AssertionError(f"{codec.name}: {what} was decoded to {list(found)}")


def check_noise(codec: TransferCodec, planes: dict[str, Tensor], start: int) -> None:
    """Tensors of the right types and shapes with other contents: corrupt, or planes of the shape
    asked for."""
    coded = as_stored(codec.encode(planes, start))
    shapes = shapes_of(planes)
    random = torch.Generator().manual_seed(9)
    for name, tensor in coded.items():
        for flips in (1, 1000):
            if not tensor.numel():
                continue
            view = tensor.clone().view(torch.uint8).reshape(-1)
            at = torch.randint(0, len(view), (flips,), generator=random)
            view[at] ^= torch.randint(1, 256, (flips,), generator=random).to(torch.uint8)
            damaged = view.view(tensor.dtype).reshape(tensor.shape)
            try:
                found = codec.decode({**coded, name: damaged}, shapes, start)
            except CorruptPayload:
                continue
            alike = all(found[n].shape == p.shape for n, p in planes.items())
            assert alike, f"{flips} bytes of {name} flipped: planes of other shapes"


def check_other_shapes(codec: TransferCodec, planes: dict[str, Tensor], start: int) -> None:
    """What was coded of other planes is refused."""
    coded = as_stored(codec.encode(planes, start))
    right = shapes_of(planes)
    for name, plane in right.items():
        layers, tokens, heads, size = plane.shape
        for shape in (
            (layers + 1, tokens, heads, size),
            (layers, tokens + 1, heads, size),
            (layers, tokens, heads + 1, size),
            (layers, tokens, heads, size * 2),
            (layers, tokens * heads, size),
        ):
            _refused(codec, coded, {**right, name: PlaneShape(plane.dtype, shape)}, start)
        _refused(codec, coded, {**right, name: PlaneShape("float8", plane.shape)}, start)


def _refused(
    codec: TransferCodec, coded: dict[str, Tensor], asked: dict[str, PlaneShape], start: int
) -> None:
    try:
        codec.decode(coded, asked, start)
    except CorruptPayload:
        return
    raise AssertionError(f"{codec.name}: coded of other planes, decoded as {asked}")


def check_views(codec: TransferCodec, planes: dict[str, Tensor], start: int) -> None:
    """Planes that are views of others are coded as their copies are."""
    views = {
        name: torch.cat([plane, plane], -1)[..., : plane.shape[-1]].transpose(0, 1)
        for name, plane in planes.items()
    }
    views = {name: view.transpose(0, 1) for name, view in views.items()}
    assert not any(view.is_contiguous() for view in views.values())
    once, again = codec.encode(planes, start), codec.encode(views, start)
    alike = list(once) == list(again) and all(torch.equal(once[n], again[n]) for n in once)
    assert alike, f"planes that are views are coded otherwise than their copies: {list(planes)}"


def check_threads(codec: TransferCodec, tokens: int = 512) -> None:
    """Calls of several threads do not meet."""
    chunks = [chunk(tokens, seed=seed) for seed in range(24)]
    shapes = shapes_of(chunks[0])

    def one(planes: dict[str, Tensor]) -> dict[str, Tensor]:
        return codec.decode(as_stored(codec.encode(planes, 64)), shapes, 64)

    alone = [one(planes) for planes in chunks]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, chunks))
    for a, b in zip(alone, together, strict=True):
        alike = all(same_bits(a[name], b[name]) for name in a)
        assert alike, f"a chunk of {tokens} tokens is another beside others in 8 threads"


class CodecLaws(PolicyLaws):
    """Laws of every transfer codec.

    Attributes:
        error: As in `Case`; 0 for a codec that is exact.
    """

    policy: ClassVar[type[TransferCodec]]
    error: float = 0.0

    def build(self, engine: EngineView | None = None, **more: Any) -> Any:
        """Make the codec, by default for three layers of bfloat16."""
        return super().build(_engine() if engine is None else engine, **more)

    @law("Policy", "True if it leaves the engine's outputs unchanged.")
    def test_an_exact_codec_says_so(self) -> None:
        exact = self.build().exact
        assert exact == (not self.error), f"exact is {exact}, and the error allowed {self.error}"

    @law("TransferCodec.decode", "the inverse of `encode`")
    def test_chunks_come_back(self) -> None:
        for tokens in SIZES:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                codec = self.build(_engine(dtype))
                for start in (0, 1008):
                    check_round_trip(codec, chunk(tokens, dtype), start)

    @law("TransferCodec.encode", "where a format stores the pages")
    def test_cells_come_back_to_the_bit(self) -> None:
        for tokens in SIZES:
            check_round_trip(self.build(), cells(tokens))

    @law("TransferCodec.decode", "Decode one chunk; the inverse of `encode`.")
    def test_every_bfloat16_comes_back(self) -> None:
        if self.error:
            skip("the codec is not exact")
        check_round_trip(self.build(), special())

    @law("TransferCodec.decode", "Decode one chunk")
    def test_the_error_is_bounded(self) -> None:
        if not self.error:
            skip("the codec is exact")
        codec = self.build()
        for tokens in (16, 33, 256):
            for start in (0, 1008):
                check_error(codec, chunk(tokens), self.error, start)

    @law("CorruptPayload", "Raised for bytes that cannot be what they say they are.")
    def test_hostile_tensors_are_refused(self) -> None:
        for planes in (chunk(2), cells(33), chunk(33)):
            check_hostile(self.build(), planes, 16)

    @law("TransferCodec.decode", "as damaged or hostile bytes left them")
    def test_noise_is_refused_or_decoded_to_the_shape_asked_for(self) -> None:
        for planes in (chunk(2), cells(33), chunk(33)):
            check_noise(self.build(), planes, 16)

    @law("TransferCodec.decode", "They do not describe such planes.")
    def test_planes_of_other_shapes_are_refused(self) -> None:
        for planes in (chunk(2), cells(33), chunk(33)):
            check_other_shapes(self.build(), planes, 16)

    @law("TransferCodec.encode", "Read only.")
    def test_views_are_coded_as_copies(self) -> None:
        check_views(self.build(), chunk(33), 16)
        check_views(self.build(), cells(33), 16)

    @law("TransferCodec", "several\n    threads may call it at once")
    def test_threads_do_not_meet(self) -> None:
        check_threads(self.build())
