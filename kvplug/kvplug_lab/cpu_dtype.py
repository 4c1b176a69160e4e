"""The type in which a CPU computes models at a usable speed."""

from __future__ import annotations

SLOW = "AVX2"
"""What torch calls an x86 CPU without AVX-512. Products in bfloat16, with no instructions for them
and half the width to emulate them in, then run at about 8 GFLOP/s, a twentieth of float32's."""


def fast_dtype(wanted: str = "bfloat16") -> str:
    """Return ``float32`` for ``bfloat16`` where this machine would compute that on a slow CPU.

    Args:
        wanted: A type as vLLM takes it.
    """
    import torch

    if wanted != "bfloat16" or torch.cuda.is_available():
        return wanted
    return "float32" if torch.backends.cpu.get_cpu_capability() == SLOW else wanted
