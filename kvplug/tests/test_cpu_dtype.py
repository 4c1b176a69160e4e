"""The type that a demonstration takes on the CPU at hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

ASK = "from kvplug_lab.cpu_dtype import fast_dtype as f; print(f(), f('float32'), f('float16'))"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bfloat16")
def test_bfloat16_is_avoided_where_it_is_emulated_in_half_the_width() -> None:
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True
    )
    on_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    assert done.stdout.split() == ["float32" if on_x86 else "bfloat16", "float32", "float16"]
