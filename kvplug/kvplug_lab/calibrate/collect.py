"""Running a model over a text to see its keys, values and queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvplug_lab.calibrate.attention import attached
from kvplug_lab.calibrate.statistics import Collector


@torch.inference_mode()
def collect(
    model: Any, windows: Sequence[Tensor], progress: Callable[[str], None] | None = None
) -> Collector:
    """Run a causal language model over windows of a text.

    Args:
        model: A Hugging Face ``...ForCausalLM``.
        windows: Tokens, ``[n]`` each; each is read from its start, without the others.
        progress: Called once per window.
    """
    found = Collector()
    with attached(model):
        for i, ids in enumerate(windows):
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1, kvplug_probe=found)
            if progress is not None:
                progress(f"window {i + 1} of {len(windows)}")
    return found
