from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from grid import INTERPRETED, grid, implementations
from hypothesis import HealthCheck, given, settings
from paged_cases import LAYER_LAYOUTS, NO_BLOCK, lay_out_layers
from torch import Tensor

from kvplug_kernels.coding import Coding
from kvplug_kernels.pack_pages import LayerCaches, Packed, pack_pages, unpack_pages
from kvplug_kernels.pack_pages.kernel import SIZES, pack_pages_triton, unpack_pages_triton
from kvplug_kernels.pack_pages.naive import pack_pages_naive, unpack_pages_naive
from kvplug_kernels.pack_pages.vectorized import pack_pages_vectorized, unpack_pages_vectorized

Pair = tuple[Callable[..., None], Callable[..., None]]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, Any]], str]

NAIVE = (pack_pages_naive, unpack_pages_naive)
TRITON = (pack_pages_triton, unpack_pages_triton)
VECTORIZED = (pack_pages_vectorized, unpack_pages_vectorized)
FAST, ALL = implementations(NAIVE, TRITON, VECTORIZED)
BLOCKS = 13

CODINGS = {
    "bytes": None,
    "int8": lambda width: Coding(width, 8),
    "int4": lambda width: Coding(width, 4),
    "int4 in groups": lambda width: Coding(width, 4, group=width // 2),
    "int8 in groups": lambda width: Coding(width, 8, group=width // 2),
    "fp8": lambda width: Coding(width, 8, "fp8"),
}


def make_layers(
    layout: str,
    layers: int,
    heads: int,
    size: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    shape = (layers, BLOCKS, heads, size, width)
    if dtype.is_floating_point:
        made = torch.randn(shape, generator=rng).to(dtype)
    else:
        made = torch.randint(0, 256, shape, generator=rng).to(dtype)
    return lay_out_layers(made.to(device), layout)


def some_blocks(
    chunks: int, n: int, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    return torch.randperm(BLOCKS, generator=rng)[: chunks * n].view(chunks, n).to(device, dtype)


def room(
    caches: LayerCaches, chunks: int, tokens: int, coding: Coding | None, fill: int = 0x55
) -> Packed:
    need = Packed.room(caches, chunks, tokens, coding)
    buffer = torch.full((need,), fill, dtype=torch.uint8, device=caches.device)
    return Packed.within(buffer, caches, chunks, tokens, coding)


def assert_packs(
    implementation: Pair,
    layers: list[Tensor],
    blocks: Tensor,
    tokens: int,
    coding: Coding | None = None,
) -> None:
    """Packed as the specification packs, and unpacked as it unpacks, into other blocks; no other
    byte of the caches changes."""
    pack, unpack = implementation
    caches, chunks = LayerCaches(layers), len(blocks)
    wanted, found = (room(caches, chunks, tokens, coding, fill) for fill in (0x55, 0xAA))
    pack_pages_naive(caches, blocks, wanted, coding)
    pack(caches, blocks, found, coding)
    for name, field in wanted.fields.items():
        assert torch.equal(found.fields[name].view(torch.uint8), field.view(torch.uint8)), name
    targets = (blocks + 1) % BLOCKS
    before = [layer.clone() for layer in layers]
    unpack_pages_naive(caches, targets, wanted, coding)
    expected = [layer.clone() for layer in layers]
    for layer, was in zip(layers, before, strict=True):
        layer.copy_(was)
    unpack(caches, targets, wanted, coding)
    for layer, want in zip(layers, expected, strict=True):
        if coding is not None and layer.dtype == torch.bfloat16 and INTERPRETED:
            # Triton's interpreter cuts float32 off to bfloat16 and does not round.
            torch.testing.assert_close(layer, want, rtol=torch.finfo(layer.dtype).eps, atol=1e-6)
        else:
            assert torch.equal(layer, want)


@grid(
    ALL,
    pytest.mark.parametrize("layout", sorted(LAYER_LAYOUTS)),
    pytest.mark.parametrize("coding", sorted(CODINGS)),
)
def test_packs_and_unpacks(
    implementation: Pair, layout: str, coding: str, device: torch.device
) -> None:
    layers = make_layers(layout, 2, 2, 4, 64, device)
    how = CODINGS[coding]
    assert_packs(implementation, layers, some_blocks(3, 2, device), 8, how(64) if how else None)


@FAST
@pytest.mark.parametrize("coding", ["bytes", "int8", "int4", "fp8"])
@pytest.mark.parametrize("width", [16, 48, 80])
def test_widths_that_are_no_power_of_two(
    implementation: Pair, width: int, coding: str, device: torch.device
) -> None:
    layers = make_layers("LBNHC", 1, 2, 4, width, device)
    how = CODINGS[coding]
    assert_packs(implementation, layers, some_blocks(2, 2, device), 8, how(width) if how else None)


@FAST
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("coding", ["bytes", "int4", "fp8"])
def test_types(implementation: Pair, coding: str, dtype: torch.dtype, device: torch.device) -> None:
    layers = make_layers("LBHNC", 2, 2, 4, 32, device, dtype)
    how = CODINGS[coding]
    assert_packs(implementation, layers, some_blocks(2, 2, device), 8, how(32) if how else None)


@FAST
@pytest.mark.parametrize("width", [7, 68, 132])
def test_opaque_bytes_of_a_format(implementation: Pair, width: int, device: torch.device) -> None:
    layers = make_layers("LBHNC", 3, 1, 4, width, device, torch.uint8)
    assert_packs(implementation, layers, some_blocks(2, 2, device), 8)


@FAST
@pytest.mark.parametrize("coding", ["bytes", "int8"])
@pytest.mark.parametrize("tokens", [5, 7])
def test_a_part_of_the_last_block(
    implementation: Pair, tokens: int, coding: str, device: torch.device
) -> None:
    layers = make_layers("LBNHC", 2, 3, 4, 16, device)
    how = CODINGS[coding]
    blocks = some_blocks(3, 2, device, torch.int32)
    assert_packs(implementation, layers, blocks, tokens, how(16) if how else None)


@FAST
def test_keys_and_values_side_by_side_come_apart(
    implementation: Pair, device: torch.device
) -> None:
    """All keys of a chunk, then all of its values, out of slots that hold both."""
    layers = make_layers("LBNHC", 3, 2, 4, 32, device)
    opened = [*(layer[..., :16] for layer in layers), *(layer[..., 16:] for layer in layers)]
    blocks = some_blocks(2, 2, device)
    caches = LayerCaches(opened)
    packed = room(caches, 2, 8, None)
    implementation[0](caches, blocks, packed)
    planes = packed.content.view(torch.bfloat16)
    for c, table in enumerate(blocks):
        for i, layer in enumerate(layers):
            tokens = layer[table].transpose(1, 2).flatten(0, 1)
            assert torch.equal(planes[c, i], tokens[..., :16])
            assert torch.equal(planes[c, 3 + i], tokens[..., 16:])
    assert_packs(implementation, opened, blocks, 8)


@FAST
@pytest.mark.parametrize("coding", ["int8", "int4", "fp8"])
def test_what_is_no_number_is_coded_as_zero(
    implementation: Pair, coding: str, device: torch.device
) -> None:
    layers = make_layers("LBHNC", 1, 1, 4, 32, device)
    layers[0][..., 3] = float("nan")
    layers[0][:, :, 1, 4] = float("inf")
    layers[0][:, :, 2, 5] = -1e38
    layers[0][:, :, 3] = 0
    how = CODINGS[coding]
    assert how is not None
    blocks = some_blocks(1, 2, device)
    caches = LayerCaches(layers)
    wanted, found = room(caches, 1, 8, how(32)), room(caches, 1, 8, how(32))
    pack_pages_naive(caches, blocks, wanted, how(32))
    implementation[0](caches, blocks, found, how(32))
    for name, field in wanted.fields.items():
        assert torch.equal(found.fields[name].view(torch.uint8), field.view(torch.uint8)), name


@FAST
def test_no_chunks(implementation: Pair, device: torch.device) -> None:
    layers = make_layers("LBHNC", 1, 1, 4, 16, device)
    caches, blocks = LayerCaches(layers), some_blocks(0, 2, device)
    for call in implementation:
        call(caches, blocks, room(caches, 0, 8, None))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layers=st.integers(1, 3),
    chunks=st.integers(1, 3),
    n=st.integers(1, 3),
    heads=st.integers(1, 3),
    size=st.integers(1, 5),
    width=st.integers(1, 40),
    layout=st.sampled_from(sorted(LAYER_LAYOUTS)),
    missing=st.integers(0, 4),
)
def test_random_chunks_of_bytes(
    layers: int,
    chunks: int,
    n: int,
    heads: int,
    size: int,
    width: int,
    layout: str,
    missing: int,
    device: torch.device,
) -> None:
    for implementation in (TRITON, VECTORIZED):
        made = make_layers(layout, layers, heads, size, width, device, torch.uint8)
        tokens = n * size - missing % size
        assert_packs(implementation, made, some_blocks(chunks, n, device), tokens)


def test_one_launch_each(launches: Launches, device: torch.device) -> None:
    caches = LayerCaches(make_layers("LBNHC", 3, 2, 4, 64, device))
    blocks = some_blocks(2, 2, device)
    for coding in (None, Coding(64, 8)):
        packed = room(caches, 2, 8, coding)
        pack_pages_triton(caches, blocks, packed, coding)
        unpack_pages_triton(caches, blocks, packed, coding)
    # Three layers of two chunks; sixteen pairs of a token and a head are one tile.
    assert [name for name, _ in launches] == ["pack_bytes_kernel"] * 2 + ["pack_coded_kernel"] * 2
    assert {grid for _, grid in launches} == {(6, 1)}


def test_dispatch(launches: Launches, device: torch.device) -> None:
    layers = make_layers("LBNHC", 2, 2, 4, 64, device)
    assert_packs((pack_pages, unpack_pages), layers, some_blocks(2, 2, device), 8)
    assert len(launches) == (2 if device.type == "cuda" else 0)


def test_fields_lie_in_one_buffer_behind_another(device: torch.device) -> None:
    caches = LayerCaches(make_layers("LBNHC", 2, 3, 4, 16, device))
    coding = Coding(16, 4)
    need = Packed.room(caches, 2, 5, coding)
    buffer = torch.zeros(need + 7, dtype=torch.uint8, device=device)
    packed = Packed.within(buffer, caches, 2, 5, coding)
    assert packed.content.shape == (2, 2, 5, 3, 8)
    assert packed.scale is not None and packed.zero is not None
    assert packed.scale.shape == packed.zero.shape == (2, 2, 5, 3, 1)
    starts = [field.data_ptr() - buffer.data_ptr() for field in packed.fields.values()]
    assert starts == [0, 480, 608] and need == 736
    with pytest.raises(ValueError, match=r"^buffer must have at least 736 bytes, got 735\.$"):
        Packed.within(buffer[:735], caches, 2, 5, coding)
    assert list(Packed.within(buffer, caches, 1, 5, Coding(16, 8, "fp8")).fields) == [
        "content",
        "scale",
    ]


PAGES = [torch.zeros(6, 2, 4, 16)] * 2
TABLE = torch.zeros(3, 2, dtype=torch.int64)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("blocks", {"blocks": TABLE.float()}, id="dtype"),
        pytest.param("blocks", {"blocks": TABLE[0]}, id="ndim"),
        pytest.param("packed.content", {"blocks": TABLE[:, :1]}, id="too many tokens"),
        pytest.param("packed.content", {"blocks": TABLE.repeat(1, 2)}, id="too few tokens"),
        pytest.param("packed.content", {"blocks": TABLE[:2]}, id="chunks"),
        pytest.param("packed", {"coding": Coding(16, 8)}, id="fields"),
        pytest.param("coding", {"coding": Coding(32, 8)}, id="width"),
        pytest.param("coding", {"coding": Coding(16, 2)}, id="bits"),
        pytest.param("coding", {"coding": Coding(16, 4, "codebook")}, id="kind"),
        pytest.param("coding", {"coding": Coding(16, 8, sums=True)}, id="sums"),
        pytest.param("coding", {"coding": Coding(16, 8, axis="tokens", group=4)}, id="axis"),
    ],
)
def test_rejects(implementation: Pair, name: str, changes: dict[str, Any]) -> None:
    caches = LayerCaches(PAGES)
    arguments = {"blocks": TABLE, "packed": room(caches, 3, 8, None), "coding": None} | changes
    for call in implementation:
        with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
            call(caches, **arguments)


def test_rejects_groups_that_fall_across_runs() -> None:
    layers = [torch.zeros(6, 2, 4, 96)]
    caches, coding = LayerCaches(layers), Coding(96, 8, group=16)
    packed = room(caches, 3, 8, coding)
    with pytest.raises(ValueError, match="groups of whole runs of 24 channels, got 16"):
        pack_pages(caches, TABLE, packed, coding)
    with pytest.raises(ValueError, match=r"^caches must have dtype .* to be coded"):
        pack_pages(LayerCaches([layers[0].byte()]), TABLE, packed, Coding(96, 8))


def test_rejects_what_is_not_aligned() -> None:
    caches = LayerCaches(PAGES)
    buffer = torch.zeros(Packed.room(caches, 3, 8) + 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^packed\.content must be aligned"):
        pack_pages(caches, TABLE, Packed.within(buffer[4:], caches, 3, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cache beyond 2**31 elements")
def test_offsets_beyond_int32(device: torch.device) -> None:
    cache = torch.zeros(2**15 + 8, 8, 64, 144, dtype=torch.uint8, device=device)
    assert cache.numel() > 2**31
    cache[-1] = 7
    caches = LayerCaches([cache])
    blocks = torch.tensor([[cache.shape[0] - 1]], device=device)
    packed = room(caches, 1, 64, None)
    pack_pages(caches, blocks, packed)
    assert bool((packed.content == 7).all())
    packed.content.fill_(9)
    unpack_pages(caches, blocks, packed)
    assert bool((cache[-1] == 9).all()) and not cache[-2].any()


@pytest.mark.parametrize("unpack", [False, True], ids=["pack", "unpack"])
@pytest.mark.parametrize(
    ("word", "vector", "content"), [(8, 2, 32), (8, 1, 17), (4, 1, 33), (2, 1, 65), (1, 1, 7)]
)
def test_bytes_compile_for_cuda(
    compile_for_cuda: CompileForCuda, word: int, vector: int, content: int, unpack: bool
) -> None:
    pointer = {8: "*i64", 4: "*i32", 2: "*i16", 1: "*i8"}[word]
    ptx = compile_for_cuda(
        "kvplug_kernels.pack_pages.kernel",
        "pack_bytes_kernel",
        {
            "pointers": "*i64",
            "blocks": "*i64",
            "content": pointer,
            **dict.fromkeys(SIZES, "i32"),
        },
        {
            "HEADS": 8,
            "BLOCK_SIZE": 16,
            "CONTENT": content,
            "WORD": word,
            "VECTOR": vector,
            "BLOCK_R": 16,
            "BLOCK_C": 1 << (content - 1).bit_length(),
            "UNPACK": unpack,
        },
    )
    assert "st.global" in ptx


@pytest.mark.parametrize("unpack", [False, True], ids=["pack", "unpack"])
@pytest.mark.parametrize("element", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("kind", "bits", "width", "group", "parts"),
    [
        ("int", 8, 128, 128, 4),
        ("int", 4, 128, 128, 4),
        ("int", 4, 128, 32, 4),
        ("int", 8, 80, 80, 1),
        ("int", 4, 40, 40, 2),
        ("fp8", 8, 128, 128, 4),
    ],
)
def test_codes_compile_for_cuda(
    compile_for_cuda: CompileForCuda,
    kind: str,
    bits: int,
    width: int,
    group: int,
    parts: int,
    element: str,
    unpack: bool,
) -> None:
    n = 1 << (width // parts - 1).bit_length()
    pointers = {"pointers": "*i64", "blocks": "*i64", "content": "*u8", "scale": "*i16"}
    constants: dict[str, Any] = {}
    if kind == "int":
        pointers["zero"] = "*i16"
    else:
        constants["zero"] = None
    compile_for_cuda(
        "kvplug_kernels.pack_pages.kernel",
        "pack_coded_kernel",
        {**pointers, **dict.fromkeys(SIZES, "i32")},
        {
            "HEADS": 8,
            "BLOCK_SIZE": 16,
            "ELEMENT": element,
            "VECTOR": 8,
            "KIND": kind,
            "BITS": bits,
            "WIDTH": width,
            "GROUP": group,
            "PARTS": parts,
            "BLOCK_N": n,
            "BLOCK_R": 8,
            "UNPACK": unpack,
            **constants,
        },
    )


def test_no_block_is_looked_up_beyond_a_chunk(device: torch.device) -> None:
    """A table whose rows are parts of longer ones."""
    layers = make_layers("LBNHC", 1, 1, 4, 16, device)
    wide = torch.full((2, 6), NO_BLOCK, dtype=torch.int64, device=device)
    wide[:, 2:4] = some_blocks(2, 2, device)
    for implementation in (TRITON, VECTORIZED):
        caches, packed = LayerCaches(layers), room(LayerCaches(layers), 2, 6, None)
        implementation[0](caches, wide[:, 2:4], packed)
        expected = layers[0][wide[:, 2:4]].transpose(2, 3).flatten(1, 2)[:, :6]
        assert torch.equal(packed.content.view(torch.bfloat16)[:, 0], expected)
