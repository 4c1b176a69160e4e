"""Which tokens kvplug keeps against those a kvpress press keeps, on one prompt.

    kvpress-env/bin/python run_kvpress.py --model DIR --prompts prompts.json --kept kept.npz
    python docs/examples/kvpress_comparison/kept_tokens.py --model DIR --kept kept.npz

With kvpress's settings the two must keep the same tokens in every layer and head. With kvplug's own
defaults they need not, and the table says how far apart they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from kvplug.hosts.transformers import Host, Watched
from kvplug_lab import models

SNAPKV = {"pooling": "mean", "sink": 0, "recent": 0}
ALONE = {"sink": 0, "recent": 0}
SETTINGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("snapkv", "SnapKVPress", {"window": 64, "kernel": 5, **SNAPKV}),
    ("snapkv", "SnapKVPress(window_size=32, kernel_size=7)", SNAPKV),
    ("tova", "TOVAPress", {}),
    ("h2o", "ObservedAttentionPress", {"recent_part": 0.0, "per_query": True, **ALONE}),
    ("expected_attention", "ExpectedAttentionPress", {"recent": 0}),
    ("knorm", "KnormPress", ALONE),
    ("keydiff", "KeyDiffPress", ALONE),
)
"""kvplug's policy, the press, and the options that make one the other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct by default")
    parser.add_argument("--kept", type=Path, required=True)
    asked = parser.parse_args()
    theirs = np.load(asked.kept, allow_pickle=False)
    model = AutoModelForCausalLM.from_pretrained(
        asked.model or models.smollm2(), dtype=torch.float32
    )
    # One token a block: budgets are kept to the token.
    host = Host(model.eval(), block_size=1)
    context = torch.from_numpy(theirs["context"])
    full, _ = host.read(context, watched=Watched(len(context), True))
    keys = [name.split("|") for name in theirs.files if "|" in name]
    budgets = sorted({budget for _, budget, _ in keys})
    print("| kvplug | kvpress | kept | same tokens, kvpress's settings | kvplug's defaults |")
    print("|---|---|---|---|---|")
    for name, press, options in SETTINGS:
        if name == "expected_attention":
            # kvpress takes every query but those of the sinks.
            options = {**options, "queries": len(context) - 4}
        for budget in budgets:
            if f"{press}|{budget}|0" not in theirs:
                continue
            parts = []
            for chosen in (options, {}):
                policy = host.policy(name, budget=float(budget), **chosen)
                layers = full.branch(policy).layers
                same = total = 0
                for index, layer in enumerate(layers):
                    wanted = theirs[f"{press}|{budget}|{index}"]
                    for ours, other in zip(layer.positions[0].numpy(), wanted, strict=True):
                        same += len(np.intersect1d(ours, other))
                        total += len(other)
                parts.append(f"{same / total:.2%}")
            print(f"| {name} | {press} | {float(budget):.0%} | {' | '.join(parts)} |", flush=True)


if __name__ == "__main__":
    main()
