from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SIGNATURE = {
    **dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b", "out"), "*fp32"),
    "n_pairs": "i32",
    **dict.fromkeys(
        (f"stride_{s}" for s in ("at", "ah", "lat", "lah", "bt", "bh", "lbt", "lbh", "ot", "oh")),
        "i32",
    ),
}
CONSTANTS = {"HEADS": 4, "HEAD_SIZE": 16, "BLOCK_P": 16, "BLOCK_D": 16}
KERNEL = ("kvplug_kernels.attend_exact.kernel", "merge_attention_kernel")


def test_a_kernel_that_does_not_compile_fails(
    compile_for_cuda: Callable[..., None], compilers: list[Any]
) -> None:
    """And the next one is compiled, also after the compiler's process died."""
    with pytest.raises(AssertionError, match="no_kernel"):
        compile_for_cuda(KERNEL[0], "no_kernel", SIGNATURE, CONSTANTS)
    with pytest.raises(AssertionError, match="arange's range must be a power of 2"):
        compile_for_cuda(*KERNEL, SIGNATURE, {**CONSTANTS, "BLOCK_P": 12})
    compile_for_cuda(*KERNEL, SIGNATURE, CONSTANTS)
    compilers[-1].process.kill()
    compilers[-1].process.wait()
    compile_for_cuda(*KERNEL, SIGNATURE, CONSTANTS)
