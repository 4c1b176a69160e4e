from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import grid, implementations, mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import LAYOUTS, lay_out, to_device
from torch import Tensor

from kvplug_kernels.coding import CodedPage, Coding, decode_vectors, encode_vectors
from kvplug_kernels.quant_write.naive import quant_write_naive
from kvplug_kernels.rerotate import rerotate, rerotate_coded
from kvplug_kernels.rerotate.kernel import key_constants, rerotate_coded_triton, rerotate_triton
from kvplug_kernels.rerotate.naive import rerotate_coded_naive, rerotate_naive
from kvplug_kernels.rerotate.vectorized import rerotate_coded_vectorized, rerotate_vectorized

Implementation = Callable[..., None]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, Any]], None]


FAST, ALL = implementations(rerotate_naive, rerotate_triton, rerotate_vectorized)
FAST_CODED, ALL_CODED = implementations(
    rerotate_coded_naive, rerotate_coded_triton, rerotate_coded_vectorized
)
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def table(pairs: int, device: torch.device, base: float = 10000.0) -> Tensor:
    return (base ** -(torch.arange(pairs) / max(pairs, 1))).to(device, torch.float32)


def make(
    n: int,
    size: int,
    *,
    device: torch.device,
    heads: int = 2,
    blocks: int = 4,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
    layout: str = "head-major",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages full of random keys, ``n`` distinct slots with padding among them, shifts of each."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(blocks, heads, block_size, size, generator=rng).to(device, dtype)
    slots = torch.randperm(blocks * block_size, generator=rng)[:n]
    slots[1::4] = -1
    shift = torch.randint(-3000, 3000, (n,), generator=rng)
    shift[2::5] = 0
    return lay_out(keys, layout), slots.to(device), shift.to(device)


def exact(keys: Tensor, shift: Tensor, frequencies: Tensor, interleaved: bool) -> Tensor:
    """The rotation in float64 as products of complex numbers, ``keys [n, heads, d]``."""
    pairs = frequencies.shape[0]
    x = keys.double()
    first = x[..., : 2 * pairs : 2] if interleaved else x[..., :pairs]
    second = x[..., 1 : 2 * pairs : 2] if interleaved else x[..., pairs : 2 * pairs]
    turn = torch.polar(
        torch.ones(pairs, dtype=torch.float64, device=keys.device),
        shift.double()[:, None] * frequencies.double(),
    )
    found = torch.complex(first, second) * turn[:, None]
    out = x.clone()
    if interleaved:
        out[..., : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2] = found.real, found.imag
    else:
        out[..., :pairs], out[..., pairs : 2 * pairs] = found.real, found.imag
    return out


def assert_rotates(
    implementation: Implementation,
    keys: Tensor,
    slots: Tensor,
    shift: int | Tensor,
    frequencies: Tensor,
    interleaved: bool,
) -> None:
    """Moved keys are the float64 rotation rounded once; every other byte is what it was."""
    before = keys.clone()
    size, pairs = keys.shape[2], frequencies.shape[0]
    implementation(keys, slots, shift, frequencies, interleaved=interleaved)
    by = shift if isinstance(shift, Tensor) else torch.full_like(slots, shift)
    moved = (slots >= 0) & (by != 0)
    block, offset = slots[moved] // size, slots[moved] % size
    expected = exact(before[block, :, offset], by[moved], frequencies, interleaved)
    got = keys[block, :, offset]
    eps = torch.finfo(keys.dtype).eps
    # Triton's interpreter cuts float32 off to bfloat16 and does not round.
    step = eps if keys.dtype == torch.bfloat16 else eps / 2
    torch.testing.assert_close(got.double(), expected, rtol=1.01 * step, atol=1e-6)
    assert torch.equal(got[..., 2 * pairs :], before[block, :, offset][..., 2 * pairs :])
    rest = torch.ones(keys.shape[0], size, dtype=torch.bool, device=keys.device)
    rest[block, offset] = False
    as_bits = {4: torch.int32, 2: torch.int16}[keys.element_size()]
    same = keys.view(as_bits) == before.contiguous().view(as_bits)
    assert same.transpose(1, 2)[rest].all()


@ALL
@INTERLEAVED
def test_worked_example(
    implementation: Implementation, interleaved: bool, device: torch.device
) -> None:
    """A quarter turn of the first pair, half a turn of the second, and one element that stays."""
    keys = torch.tensor([1.0, 2, 3, 4, 5], device=device).expand(1, 1, 2, 5).contiguous()
    frequencies = torch.tensor([torch.pi / 2, torch.pi], device=device)
    slots = torch.tensor([1], device=device)
    implementation(keys, slots, 1, frequencies, interleaved=interleaved)
    expected = [-2, 1, -3, -4, 5] if interleaved else [-3, -2, 1, -4, 5]
    assert keys[0, 0, 1].tolist() == pytest.approx(expected, abs=1e-6)
    assert keys[0, 0, 0].tolist() == [1, 2, 3, 4, 5]


@grid(
    ALL,
    INTERLEAVED,
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize(
        ("size", "pairs"), [(16, 8), (64, 32), (96, 48), (64, 8), (80, 5), (7, 0)]
    ),
    pairs=[("size", "interleaved")],
)
def test_sizes(
    implementation: Implementation,
    size: int,
    pairs: int,
    dtype: torch.dtype,
    interleaved: bool,
    device: torch.device,
) -> None:
    frequencies = table(pairs, device)
    keys, slots, shift = make(19, size, device=device, dtype=dtype)
    assert_rotates(implementation, keys, slots, shift, frequencies, interleaved)
    keys, slots, _ = make(19, size, device=device, dtype=dtype)
    assert_rotates(implementation, keys, slots, -777, frequencies, interleaved)


@grid(
    FAST,
    pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str),
    pytest.mark.parametrize("layout", LAYOUTS),
)
def test_page_layouts(
    implementation: Implementation, layout: str, integer: torch.dtype, device: torch.device
) -> None:
    keys, slots, shift = make(30, 24, device=device, layout=layout, heads=3)
    case = (keys, slots.to(integer), shift.to(integer), table(9, device))
    assert_rotates(implementation, *case, False)


@FAST
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_between_pages_stays(
    implementation: Implementation, layout: str, device: torch.device
) -> None:
    keys, slots, shift = make(30, 24, device=device, layout=layout)
    memory = keys.as_strided((keys.untyped_storage().nbytes() // 4,), (1,), 0)
    hole = memory.isnan()
    implementation(keys, slots, shift, table(12, device))
    assert torch.equal(memory.isnan(), hole)


@grid(ALL, INTERLEAVED, pytest.mark.parametrize("dtype", DTYPES, ids=str))
def test_no_shift_leaves_the_bytes(
    implementation: Implementation, dtype: torch.dtype, interleaved: bool, device: torch.device
) -> None:
    """Infinities, NaN and negative zeros would not survive being multiplied by 1 and 0."""
    keys, slots, shift = make(19, 16, device=device, dtype=dtype)
    keys[0, :, :, 3], keys[1, :, :, 5], keys[2, :, :, 1] = float("inf"), float("nan"), -0.0
    bits = keys.view(torch.uint8).clone()
    implementation(keys, slots, 0, table(8, device), interleaved=interleaved)
    assert torch.equal(keys.view(torch.uint8), bits)
    implementation(keys, slots, shift * 0, table(8, device), interleaved=interleaved)
    assert torch.equal(keys.view(torch.uint8), bits)
    implementation(keys, torch.full_like(slots, -1), 5, table(8, device), interleaved=interleaved)
    assert torch.equal(keys.view(torch.uint8), bits)


@grid(
    ALL,
    INTERLEAVED,
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("shift", [1, 4096, 100_000]),
)
def test_there_and_back_is_one_rounding_each(
    implementation: Implementation,
    shift: int,
    dtype: torch.dtype,
    interleaved: bool,
    device: torch.device,
) -> None:
    keys, _, _ = make(0, 32, device=device, dtype=dtype)
    before, slots = keys.clone(), torch.arange(32, device=device)
    for by in (shift, -shift):
        implementation(keys, slots, by, table(16, device), interleaved=interleaved)
    pairs = before.float().unflatten(-1, (16, 2) if interleaved else (2, 16))
    length = pairs.square().sum(-1 if interleaved else -2).sqrt()
    length = length.repeat_interleave(2, -1) if interleaved else torch.cat([length, length], -1)
    # Two roundings of numbers no longer than the pair; the interpreter's are whole steps.
    step = torch.finfo(dtype).eps * (2.0 if dtype == torch.bfloat16 else 1.5)
    assert ((keys.float() - before.float()).abs() <= step * length + 1e-6).all()


@ALL
def test_shifts_add_up(implementation: Implementation, device: torch.device) -> None:
    keys, slots, shift = make(30, 32, device=device)
    other = keys.clone()
    frequencies = table(16, device)
    implementation(keys, slots, shift, frequencies)
    implementation(keys, slots, 250, frequencies)
    implementation(other, slots, shift + 250, frequencies)
    torch.testing.assert_close(keys, other, rtol=0, atol=3e-6)


@FAST
@pytest.mark.parametrize("shift", [100_000, -131_071, 1_000_003])
def test_long_shifts_are_exact_to_the_rounding(
    implementation: Implementation, shift: int, device: torch.device
) -> None:
    """An angle in float32 would be off by a hundredth of a radian out there."""
    for dtype in (torch.float32, torch.bfloat16):
        keys, slots, _ = make(24, 64, device=device, dtype=dtype)
        assert_rotates(implementation, keys, slots, shift, table(32, device), False)


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
}


@ALL
@pytest.mark.parametrize("scaling", SCALINGS)
def test_agrees_with_the_rotary_embedding_of_transformers(
    implementation: Implementation, scaling: str, device: torch.device
) -> None:
    """A key rotated for position s and moved by t is the key rotated for s + t, whatever factor
    the scaling puts on cosines and sines."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 10000.0, **SCALINGS[scaling]},
    )
    embedding = llama.LlamaRotaryEmbedding(config).to(device)
    rng = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 24, 64, generator=rng).to(device)

    def rotated(first: int) -> Tensor:
        cosine, sine = embedding(key, torch.arange(first, first + 24, device=device)[None])
        found: Tensor = llama.apply_rotary_pos_emb(key, key, cosine, sine)[1]
        return found

    pages = rotated(100).view(2, 3, 8, 64).transpose(0, 1).contiguous()
    slots = torch.arange(24, device=device)
    implementation(pages, slots, 900, embedding.inv_freq)
    moved = pages.transpose(0, 1).reshape(1, 2, 24, 64)
    torch.testing.assert_close(moved, rotated(1000), rtol=0, atol=5e-4)
    if scaling != "default":
        plain = llama.LlamaRotaryEmbedding(
            llama.LlamaConfig(hidden_size=128, num_attention_heads=2)
        )
        assert not torch.allclose(plain.inv_freq, embedding.inv_freq.cpu())


@ALL
def test_agrees_with_the_interleaved_rotary_embedding_of_transformers(
    implementation: Implementation, device: torch.device
) -> None:
    """GPT-J itself: pairs side by side, of the first 16 of 64 elements."""
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    rng = torch.Generator().manual_seed(0)
    key = torch.randn(1, 24, 2, 64, generator=rng).to(device)
    angles = gptj.create_sinusoidal_positions(2048, 16).to(device)

    def rotated(first: int) -> Tensor:
        sine, cosine = angles[None, first : first + 24].split(8, -1)
        turned = gptj.apply_rotary_pos_emb(key[..., :16], sine, cosine)
        return torch.cat([turned, key[..., 16:]], -1)

    pages = rotated(50).view(3, 8, 2, 64).transpose(1, 2)
    frequencies = 1.0 / (10000 ** (torch.arange(0, 16, 2, device=device).float() / 16))
    implementation(pages, torch.arange(24, device=device), -30, frequencies, interleaved=True)
    moved = pages.transpose(1, 2).reshape(1, 24, 2, 64)
    torch.testing.assert_close(moved, rotated(20), rtol=0, atol=5e-5)


@FAST
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_cases(implementation: Implementation, data: st.DataObject) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    size = data.draw(st.integers(1, 70))
    pairs = data.draw(st.integers(0, size // 2))
    keys, slots, shift = make(
        data.draw(st.integers(0, 40)),
        size,
        device=device,
        heads=data.draw(st.integers(1, 5)),
        blocks=6,
        block_size=data.draw(st.sampled_from([8, 16, 32])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        seed=data.draw(st.integers(0, 99)),
    )
    by = data.draw(st.just(shift) | st.integers(-(10**5), 10**5))
    assert_rotates(implementation, keys, slots, by, table(pairs, device), data.draw(st.booleans()))


@FAST
def test_empty(implementation: Implementation, device: torch.device) -> None:
    keys, slots, shift = make(4, 16, device=device)
    before = keys.clone()
    implementation(keys, slots[:0], shift[:0], table(8, device))
    implementation(keys, slots[:0], 3, table(8, device))
    implementation(keys, slots, 3, table(0, device))
    assert torch.equal(keys, before)
    implementation(keys[:0], slots[:0], 3, table(8, device))


def test_triton_is_one_launch(launches: Launches, device: torch.device) -> None:
    keys, slots, shift = make(8, 16, device=device)
    rerotate_triton(keys, slots, shift, table(8, device))
    assert [name for name, _ in launches] == ["rerotate_kernel"]


@pytest.mark.parametrize("programs", [1, 2, 1 << 20])
def test_a_program_takes_several_heads(
    programs: int, launches: Launches, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as leave enough programs, and each head once."""
    monkeypatch.setattr("kvplug_kernels.rerotate.kernel.PROGRAMS", programs)
    keys, slots, shift = make(8, 16, device=device)
    heads = keys.shape[1]
    assert_rotates(rerotate_triton, keys, slots, shift, table(8, device), False)
    (_, grid), *_ = launches
    assert grid[1] == min(programs, heads)
    rerotate_triton(keys, slots, 3, table(8, device))


def test_dispatch(launches: Launches, device: torch.device) -> None:
    keys, slots, shift = make(8, 16, device=device)
    assert_rotates(rerotate, keys, slots, shift, table(8, device), False)
    assert len(launches) == (1 if device.type == "cuda" else 0)


@ALL
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        pytest.param("keys must have dtype", {"keys": torch.zeros(2, 2, 8, 16).int()}, id="dtype"),
        pytest.param("keys must have shape", {"keys": torch.zeros(2, 8, 16)}, id="ndim"),
        pytest.param("keys must be", {"keys": torch.zeros(2, 2, 8, 32)[..., ::2]}, id="stride"),
        pytest.param("slots must have dtype", {"slots": torch.zeros(3)}, id="slots-dtype"),
        pytest.param("slots must have shape", {"slots": torch.zeros(3, 1).long()}, id="slots"),
        pytest.param("shift must have dtype", {"shift": torch.zeros(3)}, id="shift-dtype"),
        pytest.param("shift must have shape", {"shift": torch.zeros(4).long()}, id="shift"),
        pytest.param("frequencies must have dtype", {"frequencies": torch.ones(8).half()}, id="f"),
        pytest.param("frequencies must rotate", {"frequencies": torch.ones(9)}, id="f-many"),
    ],
)
def test_rejects(
    implementation: Implementation, message: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {
        "keys": torch.zeros(2, 2, 8, 16),
        "slots": torch.arange(3),
        "shift": torch.arange(3),
        "frequencies": torch.ones(8),
        **changes,
    }
    moved = {name: to_device(tensor, device) for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=rf"^{message}.*\.$"):
        implementation(**moved)


# -- coded keys ----------------------------------------------------------------------------------

LEVELS = {
    2: [-1.51, -0.453, 0.453, 1.51],
    3: [-2.15, -1.34, -0.756, -0.245, 0.245, 0.756, 1.34, 2.15],
    4: [i / 3 - 2.4 for i in range(16)],
}
VALUE = Coding(32, 4)
CODINGS = {
    "int8": Coding(64, 8),
    "int4": Coding(64, 4),
    "int3": Coding(64, 3),
    "int2": Coding(64, 2),
    "int4 in groups": Coding(128, 4, group=32),
    "int2 in three groups": Coding(96, 2, group=32),
    "int3 of 96": Coding(96, 3),
    "sums": Coding(64, 4, group=16, sums=True),
    "outliers": Coding(64, 4, outliers=4),
    "odd outliers": Coding(67, 4, outliers=3),
    "outliers and sums": Coding(96, 2, group=22, outliers=8, sums=True),
    "fitted int4": Coding(64, 4, fit=2),
    "fp8": Coding(64, 8, "fp8"),
    "fp8 in groups": Coding(96, 8, "fp8", group=32),
    "fp8 with outliers": Coding(64, 8, "fp8", outliers=2),
    "codebook of 4 bits": Coding(64, 4, "codebook"),
    "codebook of 3 bits": Coding(64, 3, "codebook"),
    "codebook of 2 bits": Coding(96, 2, "codebook", group=32),
    "codebook with outliers": Coding(72, 3, "codebook", outliers=8),
    "fitted codebook": Coding(64, 3, "codebook", fit=2),
    "bfloat16": Coding(64, 16, "plain"),
    "float32": Coding(24, 32, "plain"),
    "narrow plain": Coding(13, 16, "plain"),
}
BY_NAME = pytest.mark.parametrize("name", CODINGS)
# Every kind, number of bits and field of its own.
CORE = [
    "int8",
    "int3 of 96",
    "odd outliers",
    "outliers and sums",
    "fitted int4",
    "fp8 in groups",
    "codebook with outliers",
    "bfloat16",
    "float32",
]
CORE_BY_NAME = pytest.mark.parametrize("name", mostly_slow(CODINGS, CORE))


def book(coding: Coding, device: torch.device) -> Tensor | None:
    return torch.tensor(LEVELS[coding.bits], device=device) if coding.kind == "codebook" else None


def stored_dtype(coding: Coding) -> torch.dtype | None:
    wide = torch.float32 if coding.bits == 32 else torch.bfloat16
    return wide if coding.kind == "plain" else None


def coded(
    coding: Coding, device: torch.device, *, heads: int = 2, blocks: int = 3, block_size: int = 8
) -> tuple[Tensor, CodedPage]:
    """Pages with a code in every slot, and bytes of no meaning where nothing is stored."""
    layout = CodedPage(coding, VALUE)
    rng = torch.Generator().manual_seed(7)
    slots = torch.arange(blocks * block_size, device=device)
    shape = (blocks, heads, block_size, layout.bytes_per_token)
    pages = torch.full(shape, 0xAA, dtype=torch.uint8, device=device)
    key = torch.randn(len(slots), heads, coding.width, generator=rng)
    key *= 1 + 3 * torch.rand(len(slots), 1, 1, generator=rng)
    value = torch.randn(len(slots), heads, VALUE.width, generator=rng).to(device)
    key = key.to(device, stored_dtype(coding) or torch.float32)
    quant_write_naive(key, value, pages, slots, layout, key_levels=book(coding, device))
    return pages, layout


def decoded(pages: Tensor, layout: CodedPage, levels: Tensor | None) -> Tensor:
    cells = {name: layout.plane(pages, f"key_{name}") for name, _, _ in layout.key.sizes()}
    dtype = stored_dtype(layout.key) or torch.float32
    return decode_vectors(cells, layout.key, levels, dtype).float()


def some_slots(device: torch.device) -> tuple[Tensor, Tensor]:
    slots = torch.tensor([3, -1, 17, 0, 8, 22, -4, 5, 23, 11], device=device)
    return slots, torch.tensor([7, 9, -350, 0, 4000, 1, 2, -3, 100_000, 12], device=device)


@grid(FAST_CODED, INTERLEAVED, BY_NAME)
def test_coded_keys_are_unpacked_turned_and_packed(
    implementation: Implementation, name: str, interleaved: bool, device: torch.device
) -> None:
    coding = CODINGS[name]
    pages, layout = coded(coding, device)
    levels, dtype = book(coding, device), stored_dtype(coding)
    slots, shift = some_slots(device)
    for pairs in (coding.width // 2, coding.width // 4):
        for by in (shift, -63):
            expected, got = pages.clone(), pages.clone()
            case = (slots, by, layout, table(pairs, device))
            more = {"interleaved": interleaved, "key_levels": levels, "dtype": dtype}
            rerotate_coded_naive(expected, *case, **more)  # type: ignore[arg-type]
            implementation(got, *case, **more)
            assert not torch.equal(expected, pages)
            if coding.kind in ("codebook", "plain") or coding.fit:
                close(got, expected, layout, levels)
            else:
                assert torch.equal(got, expected)


def close(got: Tensor, expected: Tensor, layout: CodedPage, levels: Tensor | None) -> None:
    """Sums of floats may differ in their last place, and with them a code that lies on a bound;
    the interpreter rounds bfloat16 its own way."""
    differs = (got != expected).any(-1)
    assert differs.float().mean() <= (1.0 if layout.key.kind == "plain" else 0.1)
    one, other = decoded(got, layout, levels), decoded(expected, layout, levels)
    step = 2**-7 if layout.key.kind == "plain" else 0.3
    assert (one - other).norm() <= step * other.norm()
    for name, _, _ in layout.value.sizes():
        assert torch.equal(
            layout.plane(got, f"value_{name}"), layout.plane(expected, f"value_{name}")
        )


@grid(ALL_CODED, CORE_BY_NAME)
def test_coded_keys_are_near_the_rotation(
    implementation: Implementation, name: str, device: torch.device
) -> None:
    """Against float64, within the error that coding the rotated key has by itself."""
    coding = CODINGS[name]
    pages, layout = coded(coding, device)
    levels, dtype = book(coding, device), stored_dtype(coding)
    frequencies = table(coding.width // 2, device)
    size = pages.shape[2]
    slots = torch.arange(24, device=device)
    at = (slots // size, slice(None), slots % size)
    before = decoded(pages, layout, levels)[at]
    want = exact(before, torch.full_like(slots, 321), frequencies, False).float()
    again = encode_vectors(want.to(dtype or torch.float32), coding, levels)
    own = decode_vectors(again, coding, levels, dtype or torch.float32).float() - want
    implementation(pages, slots, 321, layout, frequencies, key_levels=levels, dtype=dtype)
    error = decoded(pages, layout, levels)[at] - want
    assert error.norm() <= 1.05 * own.norm() + 2**-8 * want.norm()


@grid(ALL_CODED, CORE_BY_NAME)
def test_coded_bytes_that_stay(
    implementation: Implementation, name: str, device: torch.device
) -> None:
    coding = CODINGS[name]
    pages, layout = coded(coding, device)
    more = {"key_levels": book(coding, device), "dtype": stored_dtype(coding)}
    before, frequencies = pages.clone(), table(coding.width // 2, device)
    slots, shift = some_slots(device)
    implementation(pages, slots, 0, layout, frequencies, **more)
    implementation(pages, slots, shift * 0, layout, frequencies, **more)
    implementation(pages, slots[:0], 4, layout, frequencies, **more)
    implementation(pages, slots, shift, layout, frequencies[:0], **more)
    implementation(pages[:0], slots[:0], 4, layout, frequencies, **more)
    assert torch.equal(pages, before)
    implementation(pages, slots, shift, layout, frequencies, **more)
    untouched = torch.ones(24, dtype=torch.bool, device=device)
    untouched[slots[(slots >= 0) & (shift != 0)]] = False
    blocks, offsets = untouched.nonzero()[:, 0] // 8, untouched.nonzero()[:, 0] % 8
    for field in layout.fields:
        plane, old = layout.plane(pages, field.name), layout.plane(before, field.name)
        assert torch.equal(plane[blocks, :, offsets], old[blocks, :, offsets])
        if field.name.startswith("value_"):
            assert torch.equal(plane, old)
    padding = layout.bytes_per_token - sum(field.size for field in layout.fields)
    used = 8 * (layout.bytes_per_token - padding)
    assert pages.flatten(2)[..., used:].eq(0xAA).all()


@FAST_CODED
def test_coded_pages_within_a_larger_tensor(
    implementation: Implementation, device: torch.device
) -> None:
    layout = CodedPage(Coding(64, 4), Coding(64, 4))
    pages, _ = coded(Coding(64, 4), device)
    layout = CodedPage(Coding(64, 4), VALUE)
    wide = torch.full((3, 3, *pages.shape[1:]), 0xAA, dtype=torch.uint8, device=device)
    inside = wide[:, 1]
    inside.copy_(pages)
    slots, shift = some_slots(device)
    implementation(inside, slots, shift, layout, table(32, device))
    rerotate_coded_naive(pages, slots, shift, layout, table(32, device))
    assert torch.equal(inside, pages)
    assert wide[:, 0].eq(0xAA).all() and wide[:, 2].eq(0xAA).all()


def test_coded_is_one_launch(launches: Launches, device: torch.device) -> None:
    pages, layout = coded(Coding(64, 4), device)
    rerotate_coded_triton(pages, *some_slots(device), layout, table(32, device))
    assert [name for name, _ in launches] == ["rerotate_coded_kernel"]


def test_coded_dispatch(launches: Launches, device: torch.device) -> None:
    pages, layout = coded(Coding(64, 4), device)
    expected = pages.clone()
    rerotate_coded_naive(expected, *some_slots(device), layout, table(32, device))
    rerotate_coded(pages, *some_slots(device), layout, table(32, device))
    assert torch.equal(pages, expected)
    assert len(launches) == (1 if device.type == "cuda" else 0)


@ALL_CODED
def test_coded_rejects(implementation: Implementation, device: torch.device) -> None:
    slots, shift = some_slots(device)
    frequencies = table(32, device)
    by_tokens = CodedPage(Coding(64, 2, group=8, axis="tokens"), VALUE)
    pages = torch.zeros(3, 2, 8, by_tokens.bytes_per_token, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"^layout must group keys along channels.*\.$"):
        implementation(pages, slots, shift, by_tokens, frequencies)
    pages, layout = coded(Coding(64, 4), device)
    with pytest.raises(ValueError, match=r"^pages must have \d+ bytes a token.*\.$"):
        implementation(pages, slots, shift, CodedPage(Coding(64, 8), VALUE), frequencies)
    with pytest.raises(ValueError, match=r"^frequencies must rotate at most the 64.*\.$"):
        implementation(pages, slots, shift, layout, table(33, device))
    with pytest.raises(ValueError, match=r"^shift must have shape.*\.$"):
        implementation(pages, slots, shift[1:], layout, frequencies)
    pages, layout = coded(Coding(64, 3, "codebook"), device)
    with pytest.raises(ValueError, match=r"^key_levels must be given.*\.$"):
        implementation(pages, slots, shift, layout, frequencies)
    pages, layout = coded(Coding(64, 16, "plain"), device)
    for dtype in (None, torch.float32, torch.int16):
        with pytest.raises(ValueError, match=r"^dtype must be that of plain keys of 16 bits.*\.$"):
            implementation(pages, slots, shift, layout, frequencies, dtype=dtype)


# -- the compiler and the GPU --------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    keys, slots, shift = make(24, 64, device=device, dtype=torch.bfloat16)
    expected, frequencies = keys.clone(), table(32, device)
    rerotate(keys, slots, shift, frequencies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rerotate(keys, slots, shift, frequencies)
    keys.copy_(expected)
    shift.add_(100)
    graph.replay()
    torch.cuda.synchronize()
    rerotate(expected, slots, shift, frequencies)
    assert torch.equal(keys, expected)


@grid(INTERLEAVED, pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"]))
def test_compiles_for_cuda(compile_for_cuda: CompileForCuda, dtype: str, interleaved: bool) -> None:
    strides = ("stride_kb", "stride_kh", "stride_kt", "stride_cn")
    compile_for_cuda(
        "kvplug_kernels.rerotate.kernel",
        "rerotate_kernel",
        {
            "keys": f"*{dtype}",
            "slots": "*i64",
            **dict.fromkeys(("cosine", "sine"), "*fp32"),
            **dict.fromkeys(("n_slots", *strides), "i32"),
        },
        {
            "HEADS": 8,
            "HEADS_AT_ONCE": 3,
            "BLOCK_SIZE": 16,
            "PAIRS": 48,
            "INTERLEAVED": interleaved,
            "ONE_SHIFT": interleaved,
            "BLOCK_R": 32,
            "BLOCK_P": 64,
        },
    )


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["int4 in groups", "int3 of 96", "outliers and sums", "fp8", "fitted codebook"],
        ["outliers and sums", "fp8", "fitted codebook"],
    ),
)
def test_coded_compiles_for_cuda(compile_for_cuda: CompileForCuda, name: str) -> None:
    coding = CODINGS[name]
    known = key_constants(CodedPage(coding, VALUE), 8, 16)
    codebook = coding.kind == "codebook"
    compile_for_cuda(
        "kvplug_kernels.rerotate.kernel",
        "rerotate_coded_kernel",
        {
            "pages": "*u8",
            "halves": "*i16",
            "slots": "*i64",
            **dict.fromkeys(("cosine", "sine", "rotated"), "*fp32"),
            **({"levels": "*fp32"} if codebook else {}),
            **dict.fromkeys(("n_rows", "stride_pb", "stride_ph", "stride_cn"), "i32"),
        },
        {
            **({} if codebook else {"levels": None}),
            **known,
            "PAIRS": coding.width // 2,
            "INTERLEAVED": False,
            "BLOCK_D": 1 << (coding.width - 1).bit_length(),
        },
    )
