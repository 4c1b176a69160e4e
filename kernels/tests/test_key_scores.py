from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grid import grid, implementations
from paged_cases import LAYOUTS, make_pages, make_table, to_device
from torch import Tensor

import kvplug_kernels.key_scores.vectorized as vectorized
from kvplug_kernels.key_scores import (
    KEY_NORM,
    KEY_TO_MEAN,
    KEY_TO_PREVIOUS,
    VALUE_NORM,
    key_scores,
)
from kvplug_kernels.key_scores.kernel import key_scores_triton
from kvplug_kernels.key_scores.naive import key_scores_naive
from kvplug_kernels.key_scores.vectorized import key_scores_vectorized

Implementation = Callable[..., Tensor]
Launches = list[tuple[str, tuple[int, ...]]]
CompileForCuda = Callable[[str, str, dict[str, str], dict[str, int | None]], None]

KERNELS = ["split_scores_kernel", "key_to_mean_kernel"]
FAST, ALL = implementations(key_scores_naive, key_scores_triton, key_scores_vectorized)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_case(
    lens: list[int],
    width: int,
    *,
    heads: int = 2,
    block_size: int = 16,
    head_size: int = 16,
    value_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "head-major",
    device: torch.device,
    seed: int = 0,
) -> dict[str, Tensor]:
    table, num_blocks = make_table(lens, width, block_size, seed)
    shape = (table, lens, num_blocks, heads, block_size)
    key_cache = make_pages(*shape, head_size, dtype=dtype, layout=layout, device=device, seed=seed)
    value_cache = make_pages(
        *shape, value_size or head_size, dtype=dtype, layout=layout, device=device, seed=seed + 1
    )
    return {
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": table.to(device),
        "lens": torch.tensor(lens, dtype=torch.int32, device=device),
    }


def assert_scores(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def assert_matches_naive(implementation: Implementation, case: dict[str, Tensor]) -> None:
    assert_scores(implementation(**case), key_scores_naive(**case))


@ALL
def test_worked_example(implementation: Implementation, device: torch.device) -> None:
    keys = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [0.0, 5.0]], device=device)
    values = torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 12.0], [9.0, 9.0]], device=device)
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    lens = torch.tensor([3], dtype=torch.int32, device=device)
    pages = [x.view(2, 1, 2, 2).flip(0) for x in (keys, values)]
    got = implementation(*pages, table, lens)[:, 0, 0].tolist()
    # The anchor points along (0.6, 0.8) + (0, 1).
    length = math.hypot(0.6, 1.8)
    assert got[KEY_NORM] == pytest.approx([5, 0, 2, 0])
    assert got[VALUE_NORM] == pytest.approx([1, 0, 13, 0])
    expected = [(0.6 * 0.6 + 0.8 * 1.8) / length, 0, 1.8 / length, 0]
    assert got[KEY_TO_MEAN] == pytest.approx(expected)
    assert got[KEY_TO_PREVIOUS] == pytest.approx([0, 0, 0, 0])
    lens[0] = 4
    got = implementation(*pages, table, lens)[:, 0, 0].tolist()
    assert got[KEY_TO_PREVIOUS] == pytest.approx([0, 0, 0, 1])


@grid(
    FAST,
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
)
def test_dtypes_and_layouts(
    implementation: Implementation, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    assert_matches_naive(
        implementation, make_case([37, 16], 3, dtype=dtype, layout=layout, device=device)
    )


@FAST
@pytest.mark.parametrize(
    ("block_size", "head_size", "value_size"),
    [
        (16, 32, 32),
        (32, 64, 80),
        (64, 80, 16),
        (128, 96, 96),
        (16, 128, 128),
        (16, 256, 64),
        (7, 24, 5),
        (3, 1, 1),
    ],
)
def test_shapes(
    implementation: Implementation,
    block_size: int,
    head_size: int,
    value_size: int,
    device: torch.device,
) -> None:
    case = make_case(
        [2 * block_size - 1, block_size + 1],
        2,
        block_size=block_size,
        head_size=head_size,
        value_size=value_size,
        dtype=torch.bfloat16,
        device=device,
    )
    assert_matches_naive(implementation, case)


@FAST
def test_lengths_at_the_edges(implementation: Implementation, device: torch.device) -> None:
    case = make_case([0, 1, 15, 16, 17, 31, 32], 2, heads=1, device=device)
    assert_matches_naive(implementation, case)


@FAST
def test_lengths_are_cut_to_what_there_is(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case([40, 9], 2, device=device)
    case["lens"][1] = -5
    assert_matches_naive(implementation, case)
    assert not implementation(**case)[:, 1].any()


@FAST
def test_many_tiles(implementation: Implementation, device: torch.device) -> None:
    case = make_case([1400, 129], 90, heads=1, head_size=32, device=device)
    assert_matches_naive(implementation, case)


@FAST
def test_zero_keys(implementation: Implementation, device: torch.device) -> None:
    """A row of zeros has no anchor; two opposite keys cancel theirs."""
    case = make_case([20, 2, 5], 2, device=device)
    case["key_cache"][case["block_table"][0, :2].long()] = 0
    first = case["block_table"][1, 0]
    case["key_cache"][first, :, 1] = -case["key_cache"][first, :, 0]
    case["key_cache"][case["block_table"][2, 0], :, 2] = 0
    got = implementation(**case)
    assert_scores(got, key_scores_naive(**case))
    assert not got[[KEY_NORM, KEY_TO_MEAN, KEY_TO_PREVIOUS], 0].any()
    assert not got[KEY_TO_MEAN, 1].any()
    assert not got[KEY_TO_PREVIOUS, 2, :, 2:4].any()


@FAST
def test_cosines_do_not_depend_on_the_size_of_keys(
    implementation: Implementation, device: torch.device
) -> None:
    case = make_case([37, 20], 3, device=device)
    before = implementation(**case)
    factor = torch.rand(case["key_cache"].shape[:3], device=device)[..., None] * 100 + 0.01
    after = implementation(**{**case, "key_cache": case["key_cache"] * factor})
    cosines = [KEY_TO_MEAN, KEY_TO_PREVIOUS]
    assert_scores(after[cosines], before[cosines])
    assert not torch.allclose(after[KEY_NORM], before[KEY_NORM])


@ALL
@pytest.mark.parametrize("max_len", [40, 48, 131])
def test_persistent_buffer(
    implementation: Implementation, max_len: int, device: torch.device
) -> None:
    case = make_case([37, 20], 3, device=device)
    expected = torch.zeros(4, 2, 2, 131, device=device)
    expected[..., :48] = key_scores_naive(**case)
    buffer = torch.full((5, 4, 6, 140), 7.0, device=device)
    out = buffer[1:, 1:3, 2:4, 3 : 3 + max_len]
    got = implementation(**case, out=out)
    assert got.data_ptr() == out.data_ptr()
    assert_scores(got, expected[..., :max_len])
    out.fill_(7)
    assert (buffer == 7).all()


@FAST
@pytest.mark.parametrize(("lens", "width"), [([], 2), ([0, 0], 2), ([0], 0)])
def test_empty(
    implementation: Implementation, lens: list[int], width: int, device: torch.device
) -> None:
    got = implementation(**make_case(lens, width, device=device))
    assert got.shape == (4, len(lens), 2, width * 16) and not got.any()


@pytest.mark.parametrize("bound", [1, 5_000, 10_000])
def test_vectorized_in_pieces(
    bound: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    case = make_case([37, 20, 0, 45], 3, device=device)
    expected = key_scores_naive(**case)
    monkeypatch.setattr(vectorized, "TOKENS_BYTES", bound)
    assert_scores(key_scores_vectorized(**case), expected)


@FAST
def test_deterministic(implementation: Implementation, device: torch.device) -> None:
    case = make_case([300], 20, device=device)
    assert torch.equal(implementation(**case), implementation(**case))


def test_triton_is_two_launches(launches: Launches, device: torch.device) -> None:
    key_scores_triton(**make_case([37, 20], 3, device=device))
    assert [name for name, _ in launches] == KERNELS


def test_the_anchor_alone_takes_a_second_launch(launches: Launches, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    for which, count in (((KEY_NORM, VALUE_NORM, KEY_TO_PREVIOUS), 1), ((KEY_TO_MEAN,), 2)):
        launches.clear()
        key_scores_triton(**case, which=which)
        assert [name for name, _ in launches] == KERNELS[:count]


@ALL
@pytest.mark.parametrize("which", [(VALUE_NORM,), (KEY_TO_PREVIOUS, KEY_NORM), (KEY_TO_MEAN,)])
def test_some_scores(implementation: Any, which: tuple[int, ...], device: torch.device) -> None:
    """Of keys that nobody asks for nothing is read, and of values likewise."""
    case = make_case([37, 0, 20], 3, device=device)
    expected = key_scores_naive(**case)[list(which)]
    unread = "key_cache" if which == (VALUE_NORM,) else "value_cache"
    case[unread] = torch.full_like(case[unread], float("nan"))
    assert_scores(implementation(**case, which=which), expected)


@FAST
@pytest.mark.parametrize("rows", [1, 64])
def test_one_long_row_and_many_short(
    implementation: Implementation, rows: int, device: torch.device
) -> None:
    lens = [1100] if rows == 1 else [5] * rows
    case = make_case(lens, 70 if rows == 1 else 1, heads=1, device=device)
    assert_matches_naive(implementation, case)


def test_a_long_row_is_shared_by_programs(launches: Launches, device: torch.device) -> None:
    key_scores_triton(**make_case([1100], 70, heads=1, device=device))
    assert all(grid[1] > 1 for _, grid in launches)


def test_dispatch(launches: Launches, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    assert_scores(key_scores(**case), key_scores_naive(**case))
    assert [name for name, _ in launches] == (KERNELS if device.type == "cuda" else [])


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


PAGES = torch.zeros(5, 2, 16, 8)


@ALL
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("key_cache", {"key_cache": torch.zeros(5, 2, 8)}, id="key_cache-ndim"),
        pytest.param("key_cache", {"key_cache": PAGES.double()}, id="key_cache-dtype"),
        pytest.param("key_cache", {"key_cache": PAGES[..., ::2]}, id="key_cache-stride"),
        pytest.param("key_cache", {"key_cache": PAGES[..., :0]}, id="key_cache-empty"),
        pytest.param("value_cache", {"value_cache": PAGES.half()}, id="value_cache-dtype"),
        pytest.param("value_cache", {"value_cache": PAGES[:4]}, id="value_cache-blocks"),
        pytest.param("value_cache", {"value_cache": PAGES[:, :, :8]}, id="value_cache-block_size"),
        pytest.param("block_table", {"block_table": torch.zeros(2, 3)}, id="block_table-dtype"),
        pytest.param("block_table", {"block_table": integers(2)}, id="block_table-ndim"),
        pytest.param("lens", {"lens": integers(3)}, id="lens-rows"),
        pytest.param("lens", {"lens": integers(2).long()}, id="lens-dtype"),
        pytest.param("which", {"which": ()}, id="which-none"),
        pytest.param("which", {"which": (0, 0)}, id="which-twice"),
        pytest.param("which", {"which": (4,)}, id="which-unknown"),
        pytest.param("out", {"out": torch.zeros(4, 2, 2, 48).half()}, id="out-dtype"),
        pytest.param("out", {"out": torch.zeros(3, 2, 2, 48)}, id="out-shape"),
        pytest.param("out", {"out": torch.zeros(4, 2, 2, 96)[..., ::2]}, id="out-stride"),
    ],
)
def test_rejects(
    implementation: Implementation, name: str, changes: dict[str, Any], device: torch.device
) -> None:
    arguments: dict[str, Any] = {
        "key_cache": PAGES,
        "value_cache": PAGES,
        "block_table": integers(2, 3),
        "lens": integers(2),
        **changes,
    }
    with pytest.raises(ValueError, match=rf"^{name} must .*\.$"):
        implementation(
            **{
                key: to_device(value, device) if isinstance(value, Tensor) else value
                for key, value in arguments.items()
            }
        )


@ALL
def test_rejects_output_on_input(implementation: Implementation, device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    out = case["value_cache"].flatten()[: 4 * 2 * 2 * 3].view(4, 2, 2, 3)
    with pytest.raises(ValueError, match="out must not share memory with value_cache"):
        implementation(**case, out=out)


def test_rejects_another_device() -> None:
    with pytest.raises(ValueError, match="lens must be on cpu like the other tensors, got meta"):
        key_scores(PAGES, PAGES, integers(2, 3), integers(2).to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replay(device: torch.device) -> None:
    case = make_case([37, 20], 3, device=device)
    fresh = make_case([40, 7], 3, device=device, seed=1)
    out = torch.zeros(4, 2, 2, 48, device=device)
    key_scores(**case, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        key_scores(**case, out=out)
    for name, tensor in fresh.items():
        case[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    assert_scores(out, key_scores_naive(**fresh))


@pytest.mark.parametrize(
    ("kernel", "element", "head_size"),
    [
        ("split_scores_kernel", "fp32", 256),
        ("split_scores_kernel", "bf16", 96),
        ("key_to_mean_kernel", "fp32", 256),
        ("key_to_mean_kernel", "fp16", 96),
    ],
)
def test_compiles_for_cuda(
    compile_for_cuda: CompileForCuda, kernel: str, element: str, head_size: int
) -> None:
    types: dict[str, Any] = {
        **dict.fromkeys(("key_cache", "value_cache"), f"*{element}"),
        **dict.fromkeys(("block_table", "lens"), "*i32"),
        **dict.fromkeys(("split_sum", "out"), "*fp32"),
    }
    constants: dict[str, int | None] = {
        "KEY_NORM": KEY_NORM,
        "VALUE_NORM": VALUE_NORM,
        "KEY_TO_MEAN": KEY_TO_MEAN,
        "KEY_TO_PREVIOUS": KEY_TO_PREVIOUS,
        "KV_HEADS": 8,
        "BLOCK_SIZE": 24,
        "HEAD_SIZE": head_size,
        "VALUE_SIZE": 80,
        "BLOCK_T": 32,
        "BLOCK_S": 16,
        "STAGES": 3,
        "BLOCK_D": 1 << (head_size - 1).bit_length(),
        "BLOCK_V": 128,
    }
    import kvplug_kernels.key_scores.kernel as module

    names = getattr(module, kernel).arg_names
    compile_for_cuda(
        module.__name__,
        kernel,
        {name: types.get(name, "i32") for name in names if name not in constants},
        {name: constants[name] for name in names if name in constants},
    )
