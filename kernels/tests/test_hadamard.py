from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import grid, implementations
from paged_cases import to_device
from torch import Tensor

from kvplug_kernels.hadamard import block_width, hadamard
from kvplug_kernels.hadamard.kernel import hadamard_triton
from kvplug_kernels.hadamard.naive import hadamard_naive
from kvplug_kernels.hadamard.vectorized import hadamard_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, Any]], None]

FAST, ALL = implementations(hadamard_naive, hadamard_triton, hadamard_vectorized)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [16, 32, 48, 64, 80, 96, 128, 192, 256]


def make(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng)
    signs = torch.randint(0, 2, shape[-1:], generator=rng) * 2.0 - 1
    return x.to(device, dtype), signs.to(device)


def assert_matches_naive(
    implementation: Implementation, x: Tensor, signs: Tensor | None, **more: Any
) -> None:
    """Equal up to the rounding of float32 sums, and to the dtype of the result."""
    before = x.clone()
    wide = torch.zeros(x.shape, device=x.device)
    hadamard_naive(x, signs, out=wide, **more)
    got = implementation(x, signs, out=torch.empty_like(wide), **more)
    torch.testing.assert_close(got, wide, rtol=1e-5, atol=1e-5 * float(x.float().abs().max()))
    narrow = implementation(x, signs, **more)
    assert narrow.dtype == x.dtype and narrow.shape == x.shape and narrow.is_contiguous()
    # Triton's interpreter cuts float32 off to bfloat16 and does not round.
    last = torch.finfo(x.dtype).eps if x.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(narrow, got.to(x.dtype), rtol=last, atol=0)
    assert torch.equal(x, before)


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    """A unit vector becomes a row of the matrix: signs by common bits of the indices."""
    x = torch.zeros(2, 16, device=device)
    x[0, 0] = x[1, 5] = 4.0
    expected = [1.0, -1, 1, -1, -1, 1, -1, 1, 1, -1, 1, -1, -1, 1, -1, 1]
    assert implementation(x).tolist() == [[1.0] * 16, expected]
    signs = torch.ones(16, device=device)
    signs[5] = signs[2] = -1
    assert implementation(x, signs)[1].tolist() == [-number for number in expected]
    expected[5], expected[2] = -expected[5], -expected[2]
    assert implementation(x, signs, inverse=True)[1].tolist() == expected


@ALL
def test_blocks_do_not_mix(implementation: Implementation, device: torch.device) -> None:
    x, signs = make(3, 48, device=device)
    whole = implementation(x, signs)
    for part in (slice(0, 16), slice(16, 32), slice(32, 48)):
        alone = implementation(x[:, part].contiguous(), signs[part].contiguous())
        torch.testing.assert_close(whole[:, part], alone, rtol=1e-6, atol=1e-6)


@grid(
    FAST,
    pytest.mark.parametrize("inverse", [False, True]),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("width", WIDTHS),
    pairs=[("width", "inverse")],
)
def test_widths(
    implementation: Implementation,
    width: int,
    dtype: torch.dtype,
    inverse: bool,
    device: torch.device,
) -> None:
    x, signs = make(3, 3, width, device=device, dtype=dtype)
    assert_matches_naive(implementation, x, signs, inverse=inverse)
    assert_matches_naive(implementation, x, None, inverse=inverse)


@FAST
@pytest.mark.parametrize("width", [512, 1024])
def test_wider_than_a_head(
    implementation: Implementation, width: int, device: torch.device
) -> None:
    x, signs = make(2, width, device=device)
    wide = implementation(x, signs)
    torch.testing.assert_close(implementation(wide, signs, inverse=True), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(wide.norm(dim=-1), x.norm(dim=-1))


@ALL
@pytest.mark.parametrize("width", [64, 96, 128])
def test_the_inverse_undoes_it_and_products_stay(
    implementation: Implementation, width: int, device: torch.device
) -> None:
    x, signs = make(4, width, device=device)
    y, _ = make(4, width, device=device, seed=1)
    rotated = implementation(x, signs)
    torch.testing.assert_close(implementation(rotated, signs, inverse=True), x, rtol=0, atol=1e-5)
    products = (rotated * implementation(y, signs)).sum(-1)
    torch.testing.assert_close(products, (x * y).sum(-1), rtol=1e-4, atol=1e-4)


@FAST
@pytest.mark.parametrize("shape", [(64,), (1, 64), (33, 64), (2, 2, 3, 64), (2, 1, 2, 2, 64)])
def test_leading_dimensions(
    implementation: Implementation, shape: tuple[int, ...], device: torch.device
) -> None:
    assert_matches_naive(implementation, *make(*shape, device=device))


@FAST
def test_strides(implementation: Implementation, device: torch.device) -> None:
    """Heads cut out of one projection, and outputs within a larger buffer."""
    wide, signs = make(7, 3, 2, 100, device=device, dtype=torch.bfloat16)
    signs = signs[:96].contiguous()
    x = wide[:, 1, :, 2:98]
    assert_matches_naive(implementation, x, signs)
    assert_matches_naive(implementation, wide[..., :96].transpose(1, 2), signs)
    buffer = torch.full((7, 2, 2, 100), 99.0, device=device)
    for out in (buffer[:, 1, :, 2:98], buffer.transpose(0, 1)[1, ..., 2:98]):
        got = implementation(x, signs, out=out)
        assert got.data_ptr() == out.data_ptr()
        expected = hadamard_naive(x, signs, out=torch.empty(out.shape, device=device))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out.fill_(99)
        assert (buffer == 99).all()
    deep = torch.full((7, 2, 3, 2, 100), 99.0, device=device).transpose(1, 2)[..., :96]
    source = wide[:, :, None, :, :96].expand(7, 3, 2, 2, 96)
    implementation(source, signs, out=deep)
    expected = hadamard_naive(source, signs, out=torch.empty(deep.shape, device=device))
    torch.testing.assert_close(deep, expected, rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.parametrize("width", [64, 80, 256])
def test_in_place(implementation: Implementation, width: int, device: torch.device) -> None:
    x, signs = make(5, 3, width, device=device)
    expected = hadamard_naive(x, signs)
    got = implementation(x, signs, out=x)
    assert got.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@FAST
def test_empty(implementation: Implementation, device: torch.device) -> None:
    assert implementation(torch.zeros(0, 3, 64, device=device)).shape == (0, 3, 64)


@FAST
def test_what_is_not_finite_stays_in_its_vector(
    implementation: Implementation, device: torch.device
) -> None:
    x, signs = make(5, 64, device=device)
    expected = hadamard_naive(x, signs)
    x[2, 3] = float("nan")
    got = implementation(x, signs)
    assert got[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4], device=device)
    torch.testing.assert_close(got[others], expected[others], rtol=1e-5, atol=1e-5)


def test_block_widths() -> None:
    assert [block_width(d) for d in WIDTHS] == [16, 32, 16, 64, 16, 32, 128, 64, 256]


def test_triton_is_one_launch(launches: Launches, device: torch.device) -> None:
    hadamard_triton(*make(5, 3, 64, device=device))
    assert [name for name, _ in launches] == ["hadamard_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    x, signs = make(5, 3, 64, device=device)
    assert torch.allclose(hadamard(x, signs), hadamard_naive(x, signs), atol=1e-5)
    assert len(launches) == (1 if device.type == "cuda" else 0)


@ALL
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        pytest.param("x must have dtype", {"x": torch.zeros(3, 64).int()}, id="x-dtype"),
        pytest.param("x must be contiguous", {"x": torch.zeros(3, 128)[:, ::2]}, id="x-stride"),
        pytest.param("x must have vectors of a multiple of 16", {"x": torch.zeros(3, 40)}, id="40"),
        pytest.param("x must have vectors of a multiple of 16", {"x": torch.zeros(3, 0)}, id="0"),
        pytest.param("x must have a last dimension", {"x": torch.zeros(())}, id="x-ndim"),
        pytest.param("signs must have dtype", {"signs": torch.ones(64).half()}, id="signs-dtype"),
        pytest.param("signs must have shape", {"signs": torch.ones(32)}, id="signs-shape"),
        pytest.param("out must have dtype", {"out": torch.zeros(3, 64).half()}, id="out-dtype"),
        pytest.param("out must have shape", {"out": torch.zeros(2, 64)}, id="out-shape"),
        pytest.param("out must be", {"out": torch.zeros(3, 128)[:, ::2]}, id="out-stride"),
    ],
)
def test_rejects(
    implementation: Implementation, message: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {"x": torch.zeros(3, 64), **changes}
    moved = {name: to_device(tensor, device) for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=rf"^{message}.*\.$"):
        implementation(**moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    x, signs = make(9, 3, 128, device=device, dtype=torch.bfloat16)
    fresh, _ = make(9, 3, 128, device=device, dtype=torch.bfloat16, seed=1)
    out = torch.zeros_like(x)
    hadamard(x, signs, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hadamard(x, signs, out=out)
    x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, hadamard(fresh, signs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "parts", "inverse"),
    [
        ("bf16", 16, 1, 5, False),
        ("fp16", 32, 1, 3, True),
        ("fp32", 64, 1, 1, False),
        ("bf16", 64, 2, 1, True),
        ("fp32", 64, 4, 1, True),
    ],
)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, dtype: str, low: int, high: int, parts: int, inverse: bool
) -> None:
    strides = ("stride_xn", "stride_xh", "stride_on", "stride_oh")
    compile_for_cuda(
        "kvplug_kernels.hadamard.kernel",
        "hadamard_kernel",
        {
            **dict.fromkeys(("x", "out"), f"*{dtype}"),
            **dict.fromkeys(("n_blocks", *strides), "i32"),
            "signs": "*fp32",
        },
        {
            "HEADS": 8,
            "PARTS": parts,
            "HIGH": high,
            "LOW": low,
            "SCALE": 0.125,
            "INVERSE": inverse,
            "WIDEN": False,
            "BLOCK_R": 4096 // (low * high),
        },
    )
