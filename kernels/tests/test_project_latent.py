from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import grid, implementations
from paged_cases import to_device
from torch import Tensor

from kvplug_kernels.project_latent import project_latent
from kvplug_kernels.project_latent.kernel import project_latent_triton
from kvplug_kernels.project_latent.naive import project_latent_naive
from kvplug_kernels.project_latent.vectorized import project_latent_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, Any]], None]

FAST, ALL = implementations(project_latent_naive, project_latent_triton, project_latent_vectorized)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    n: int,
    heads: int,
    d: int,
    r: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    narrow: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, orthonormal bases and means."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, heads, d, generator=rng)
    # More basis vectors than dimensions are a legal, if useless, projection.
    basis = torch.randn(heads, d, max(d, r), generator=rng) / d**0.5
    mean = torch.randn(heads, d, generator=rng) * 5
    basis = basis[..., :r].contiguous().to(device, dtype if narrow else torch.float32)
    return x.to(device, dtype), basis, mean.to(device)


def assert_matches_naive(
    implementation: Implementation, x: Tensor, basis: Tensor, mean: Tensor | None
) -> None:
    before = x.clone(), basis.clone()
    wide = torch.zeros(*x.shape[:2], basis.shape[2], device=x.device)
    project_latent_naive(x, basis, mean, out=wide)
    got = implementation(x, basis, mean, out=torch.empty_like(wide))
    torch.testing.assert_close(got, wide, rtol=1e-5, atol=5e-5)
    own = implementation(x, basis, mean)
    assert own.dtype == x.dtype and own.shape == wide.shape and own.is_contiguous()
    # Triton's interpreter cuts float32 off to bfloat16 and does not round.
    last = torch.finfo(x.dtype).eps if x.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(own, got.to(x.dtype), rtol=last, atol=0)
    assert torch.equal(x, before[0]) and torch.equal(basis, before[1])


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=device)
    basis = torch.tensor([[[1.0], [10.0]], [[100.0], [1000.0]]], device=device)
    mean = torch.tensor([[0.0, 1.0], [2.0, 0.0]], device=device)
    assert implementation(x, basis).tolist() == [[[21.0], [4300.0]]]
    assert implementation(x, basis, mean).tolist() == [[[11.0], [4100.0]]]


@grid(
    FAST,
    pytest.mark.parametrize("centred", [False, True]),
    pytest.mark.parametrize("narrow", [False, True]),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pairs=[("dtype", "narrow")],
)
def test_dtypes(
    implementation: Implementation,
    dtype: torch.dtype,
    narrow: bool,
    centred: bool,
    device: torch.device,
) -> None:
    x, basis, mean = make(5, 2, 80, 24, device=device, dtype=dtype, narrow=narrow)
    assert_matches_naive(implementation, x, basis, mean if centred else None)


@grid(
    FAST,
    pytest.mark.parametrize("d", [64, 96, 128, 256]),
    pytest.mark.parametrize("r", [1, 16, 40, 100]),
    pytest.mark.parametrize("n", [1, 17, 70]),
)
def test_shapes(
    implementation: Implementation, n: int, d: int, r: int, device: torch.device
) -> None:
    assert_matches_naive(implementation, *make(n, 3, d, r, device=device))


@FAST
@pytest.mark.parametrize(("d", "r"), [(1, 1), (7, 5), (33, 31), (130, 66)])
def test_odd_shapes(implementation: Implementation, d: int, r: int, device: torch.device) -> None:
    assert_matches_naive(implementation, *make(3, 5, d, r, device=device, dtype=torch.float16))


@FAST
def test_strides(implementation: Implementation, device: torch.device) -> None:
    wide, _, _ = make(6, 6, 40, 1, device=device, dtype=torch.bfloat16)
    _, basis, mean = make(1, 2, 36, 30, device=device)
    x = wide.view(6, 3, 2, 40)[:, 1, :, 3:39]
    for strided in (basis[..., 2:20], basis.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_matches_naive(implementation, x, strided, mean)
    assert_matches_naive(implementation, x, basis, torch.cat([mean, mean], 1)[:, :36])
    buffer = torch.full((6, 3, 40), 99.0, device=device)
    out = buffer[:, 1:, 4:34]
    got = implementation(x, basis, mean, out=out)
    assert got.data_ptr() == out.data_ptr()
    expected = project_latent_naive(x, basis, mean, out=torch.zeros(6, 2, 30, device=device))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=5e-5)
    out.fill_(99)
    assert (buffer == 99).all()


@FAST
@pytest.mark.parametrize(("n", "heads", "r"), [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_empty(
    implementation: Implementation, n: int, heads: int, r: int, device: torch.device
) -> None:
    x = torch.zeros(n, heads, 16, device=device)
    assert implementation(x, torch.zeros(heads, 16, r, device=device)).shape == (n, heads, r)


@FAST
def test_what_is_not_finite_stays_in_its_vector(
    implementation: Implementation, device: torch.device
) -> None:
    x, basis, mean = make(5, 2, 32, 16, device=device)
    expected = project_latent_naive(x, basis, mean)
    x[2, 1, 3] = float("nan")
    got = implementation(x, basis, mean)
    assert got[2, 1].isnan().all()
    got[2, 1] = expected[2, 1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-5)


@ALL
def test_an_orthonormal_basis_of_all_dimensions_loses_nothing(
    implementation: Implementation, device: torch.device
) -> None:
    x, _, mean = make(4, 2, 16, 16, device=device)
    basis = torch.linalg.qr(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3)))[0]
    basis = basis.contiguous().to(device)
    latent = implementation(x, basis, mean)
    back = implementation(latent, basis.mT.contiguous()) + mean
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


def test_triton_is_one_launch(launches: Launches, device: torch.device) -> None:
    project_latent_triton(*make(5, 3, 64, 20, device=device))
    assert [name for name, _ in launches] == ["project_latent_kernel"]


def test_dispatch(launches: Launches, device: torch.device) -> None:
    arguments = make(5, 3, 64, 20, device=device)
    expected = project_latent_naive(*arguments)
    torch.testing.assert_close(project_latent(*arguments), expected, rtol=1e-5, atol=5e-5)
    assert len(launches) == (1 if device.type == "cuda" else 0)


X, BASIS = torch.zeros(3, 2, 16), torch.zeros(2, 16, 4)


@ALL
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        pytest.param("x must have dtype", {"x": X.int()}, id="x-dtype"),
        pytest.param("x must have shape", {"x": X[0]}, id="x-ndim"),
        pytest.param("basis must have dtype", {"basis": BASIS.half()}, id="basis-dtype"),
        pytest.param("basis must have shape", {"basis": BASIS[:, :8]}, id="basis-d"),
        pytest.param("basis must have shape", {"basis": BASIS[:1]}, id="basis-heads"),
        pytest.param("basis must be contiguous", {"basis": BASIS[..., ::2]}, id="basis-stride"),
        pytest.param("mean must have dtype", {"mean": torch.zeros(2, 16).half()}, id="mean-dtype"),
        pytest.param("mean must have shape", {"mean": torch.zeros(16)}, id="mean-shape"),
        pytest.param("out must have dtype", {"out": torch.zeros(3, 2, 4).half()}, id="out-dtype"),
        pytest.param("out must have shape", {"out": torch.zeros(3, 2, 5)}, id="out-shape"),
    ],
)
def test_rejects(
    implementation: Implementation, message: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments = {"x": X, "basis": BASIS, **changes}
    moved = {name: to_device(tensor, device) for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=rf"^{message}.*\.$"):
        implementation(**moved)


@ALL
def test_rejects_output_on_input(implementation: Implementation, device: torch.device) -> None:
    x = torch.zeros(3, 2, 16, device=device)
    with pytest.raises(ValueError, match="out must not share memory with x"):
        implementation(x, torch.zeros(2, 16, 16, device=device), out=x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    x, basis, mean = make(9, 3, 128, 40, device=device, dtype=torch.bfloat16)
    fresh, _, _ = make(9, 3, 128, 40, device=device, dtype=torch.bfloat16, seed=1)
    out = torch.zeros(9, 3, 40, device=device)
    project_latent(x, basis, mean, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        project_latent(x, basis, mean, out=out)
    x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    again = project_latent(fresh, basis, mean, out=torch.zeros_like(out))
    torch.testing.assert_close(out, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "basis", "mean"),
    [
        ("bf16", "fp32", True),
        ("bf16", "bf16", True),
        ("fp16", "fp16", False),
        ("fp32", "fp32", True),
    ],
)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, dtype: str, basis: str, mean: bool
) -> None:
    strides = ("xn", "xh", "bh", "bd", "mh", "on", "oh")
    constants: dict[str, Any] = {
        "D": 96,
        "RANK": 40,
        "WIDEN": False,
        "BLOCK_M": 64,
        "BLOCK_D": 64,
        "BLOCK_N": 64,
    }
    compile_for_cuda(
        "kvplug_kernels.project_latent.kernel",
        "project_latent_kernel",
        {
            **dict.fromkeys(("x", "out"), f"*{dtype}"),
            **dict.fromkeys(("n", *(f"stride_{s}" for s in strides)), "i32"),
            "basis": f"*{basis}",
            **({"mean": "*fp32"} if mean else {}),
        },
        constants if mean else {**constants, "mean": None},
    )
