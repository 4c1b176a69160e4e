"""Run the prompts of `kvplug eval --save-prompts` through NVIDIA kvpress.

Runs in an environment of its own, with kvpress and without kvplug:

    python -m venv kvpress-env
    kvpress-env/bin/pip install kvpress==0.5.5
    kvpress-env/bin/python run_kvpress.py --model DIR --prompts prompts.json --out kvpress.json

A context is read once; then each press's own `compress` is called on each layer's full keys and
values, for each budget. `--prove` runs every press on the first prompt as kvpress itself would,
with hooks on a fresh prefill, and stops unless keys and values come out bit for bit the same.

`--kept FILE.npz` writes instead which tokens each scoring press keeps of the first passkey prompt;
`kept_tokens.py` compares that with kvplug's choice, token by token.

The output of a run is of the form that `kvplug eval --json` writes; `python -m
kvplug_lab.fidelity.compare` reads both.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FULL = "full cache"


def presses() -> dict[str, Callable[[float], Any]]:
    """The presses compared, each by the ratio it removes; settings are kvpress's own defaults
    but where the name says otherwise."""
    return {
        "SnapKVPress": lambda r: kvpress.SnapKVPress(r),
        "SnapKVPress(window_size=32, kernel_size=7)": lambda r: kvpress.SnapKVPress(r, 32, 7),
        "PyramidKVPress": lambda r: kvpress.PyramidKVPress(r),
        "TOVAPress": lambda r: kvpress.TOVAPress(r),
        "ObservedAttentionPress": lambda r: kvpress.ObservedAttentionPress(r),
        "ExpectedAttentionPress": lambda r: kvpress.ExpectedAttentionPress(r),
        "KnormPress": lambda r: kvpress.KnormPress(r),
        "KeyDiffPress": lambda r: kvpress.KeyDiffPress(r),
        "StreamingLLMPress": lambda r: kvpress.StreamingLLMPress(r),
        "AdaKVPress(SnapKVPress)": lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(r)),
    }


@dataclass
class Layer:
    """What a press is given of one layer, captured during the prefill."""

    module: Any
    hidden: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attentions: torch.Tensor | None
    kwargs: dict[str, Any]


def own_masks(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function with a causal mask of each layer's own length: transformers makes
    one for all layers, after the first, and PyramidKV's layers hold different numbers of tokens."""

    def wrapped(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        new, held = query.shape[2], key.shape[2]
        if mask is not None and mask.shape[-1] != held:
            mask = torch.ones(new, held, dtype=torch.bool).tril(held - new)[None, None]
        return attention(module, query, key, value, mask, **kwargs)

    return wrapped


ALL_ATTENTION_FUNCTIONS["sdpa"] = own_masks(ALL_ATTENTION_FUNCTIONS["sdpa"])


class Model:
    """A model and its prefill, read once per context."""

    def __init__(self, path: str, attention: str):
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention
        )
        for layer in self.model.model.layers:
            layer.self_attn.rotary_emb = self.model.model.rotary_emb

    def read(self, context: list[int]) -> tuple[list[Layer], torch.Tensor]:
        """Every layer's inputs to a press, and the logits of the last token."""
        layers: list[Layer] = []

        def hook(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            held = kwargs["past_key_values"].layers[module.layer_idx]
            layers.append(
                Layer(
                    module, kwargs["hidden_states"], held.keys, held.values, output[1], dict(kwargs)
                )
            )

        hooks = [
            layer.self_attn.register_forward_hook(hook, with_kwargs=True)
            for layer in self.model.model.layers
        ]
        try:
            ids = torch.tensor([context])
            output = self.model(ids, past_key_values=DynamicCache(), logits_to_keep=1)
        finally:
            for one in hooks:
                one.remove()
        return layers, output.logits[0, -1]

    def feed(self, cache: DynamicCache, ids: list[int], at: int, keep: int) -> torch.Tensor:
        """Logits of the last ``keep`` of ``ids``, which stand at position ``at`` and on."""
        positions = torch.arange(at, at + len(ids))[None]
        return self.model(
            torch.tensor([ids]),
            past_key_values=cache,
            position_ids=positions,
            logits_to_keep=keep,
        ).logits[0]


def cache_of(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds these keys and values, one pair a layer."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys, values, index)
    return cache


def compressed(
    press: Any, layers: list[Layer], model: Any
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[Any]]:
    """Each layer's keys and values after the press, and what it masks (AdaKV)."""
    press.post_init_from_model(model)
    pairs, masks = [], []
    for layer in layers:
        layer.module.masked_key_indices = None
        keys, values = press.compress(
            layer.module, layer.hidden, layer.keys, layer.values, layer.attentions, layer.kwargs
        )
        masks.append(layer.module.masked_key_indices)
        layer.module.masked_key_indices = None
        pairs.append((keys, values))
    return pairs, masks


def ratio_of(kept: int, context: int) -> float:
    """The ratio at which kvpress keeps exactly this many tokens."""
    ratio = 1 - kept / context
    while int(context * (1 - ratio)) < kept:
        ratio -= 1e-9
    assert int(context * (1 - ratio)) == kept, (kept, context, ratio)
    return ratio


def prove(model: Model, press: Any, context: list[int]) -> None:
    """Stop unless `compressed` gives what kvpress itself leaves in the cache."""
    layers, _ = model.read(context)
    pairs, masks = compressed(copy.deepcopy(press), layers, model.model)
    cache = DynamicCache()
    with press(model.model):
        model.model.model(torch.tensor([context]), past_key_values=cache)
    for (keys, values), held in zip(pairs, cache.layers, strict=True):
        assert torch.equal(keys, held.keys) and torch.equal(values, held.values), press
    for mask, layer in zip(masks, layers, strict=True):
        theirs = layer.module.masked_key_indices
        assert (mask is None) == (theirs is None), press
        if mask is not None:
            assert all(torch.equal(a, b) for a, b in zip(mask, theirs, strict=True)), press
        layer.module.masked_key_indices = None


def kept_tokens(
    models: dict[str, Model], context: list[int], chosen: list[str], budgets: list[float]
) -> dict[str, Any]:
    """Indices each press keeps, ``[kv_heads, n]`` ascending, by ``press|budget|layer``."""
    found: dict[str, Any] = {"context": torch.tensor(context).numpy()}
    for name in chosen:
        model = models["eager" if name == "ObservedAttentionPress" else "sdpa"]
        layers, _ = model.read(context)
        for budget in budgets:
            press = presses()[name](ratio_of(round(budget * len(context)), len(context)))
            press.post_init_from_model(model.model)
            if not isinstance(press, kvpress.ScorerPress):
                continue
            for index, one in enumerate(layers):
                scores = press.score(
                    one.module, one.hidden, one.keys, one.values, one.attentions, one.kwargs
                )
                pairs, _ = compressed(press, [one], model.model)
                count = pairs[0][0].shape[2]
                best = scores.topk(count, dim=-1).indices[0].sort(-1).values
                kept = one.keys[0].gather(1, best[..., None].expand(-1, -1, one.keys.shape[3]))
                # The press orders what it keeps by score: as sums they must be the same.
                assert torch.allclose(kept.sum(1), pairs[0][0][0].sum(1), rtol=1e-4, atol=1e-3)
                found[f"{name}|{budget:g}|{index}"] = best.to(torch.int32).numpy()
    return found


def run(
    models: dict[str, Model],
    prompts: list[dict[str, Any]],
    budgets: list[float],
    chosen: list[str],
    block: int,
) -> Iterator[dict[str, Any]]:
    """A record per press, budget and prompt; the full cache first."""
    known = presses()
    batches: list[list[dict[str, Any]]] = []
    for prompt in prompts:
        if batches and batches[-1][0]["context"] == prompt["context"]:
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    for batch in batches:
        context = batch[0]["context"]
        read = {kind: model.read(context) for kind, model in models.items()}
        reference: dict[str, torch.Tensor] = {}
        for name in [FULL, *chosen]:
            kind = "eager" if name == "ObservedAttentionPress" else "sdpa"
            model, (layers, last) = models[kind], read[kind]
            for budget in [1.0] if name == FULL else budgets:
                kept = len(context)
                if name == FULL:
                    pairs, masks = [(one.keys, one.values) for one in layers], None
                else:
                    # kvplug keeps whole blocks and the block being filled.
                    full = len(context) // block * block
                    kept = min(full, -(-round(budget * len(context)) // block) * block)
                    kept += len(context) - full
                    press = known[name](ratio_of(kept, len(context)))
                    pairs, masks = compressed(press, layers, model.model)
                held = sum(keys.shape[2] for keys, _ in pairs) / len(pairs)
                if masks is not None and masks[0] is not None:
                    held = kept
                for prompt in batch:
                    for one, mask in zip(layers, masks or [None] * len(layers), strict=True):
                        one.module.masked_key_indices = mask
                    cache = cache_of([(k.clone(), v.clone()) for k, v in pairs])
                    record = one_record(model, cache, prompt, last, reference)
                    yield {
                        "variant": name,
                        "budget": budget,
                        "task": prompt["task"],
                        "prompt": prompt["name"],
                        "held": held,
                        **record,
                    }
                for one in layers:
                    one.module.masked_key_indices = None


def one_record(
    model: Model,
    cache: DynamicCache,
    prompt: dict[str, Any],
    last: torch.Tensor,
    reference: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Score or generate one prompt after its cut."""
    at = len(prompt["context"])
    if prompt["new_tokens"]:
        ids = [int(last.argmax())]
        while len(ids) < prompt["new_tokens"]:
            ids.append(int(model.feed(cache, ids[-1:], at + len(ids) - 1, 1)[0].argmax()))
        return {"nll": [], "top": [], "right": [], "kl": None, "ids": ids[1:]}
    answer = prompt["answer"]
    fed = [*prompt["then"], *answer[:-1]]
    logs = model.feed(cache, fed, at, len(answer)).float().log_softmax(-1)
    full = reference.setdefault(prompt["name"], logs)
    wanted = torch.tensor(answer)
    top = logs.argmax(-1)
    return {
        "nll": [round(-x, 5) for x in logs.gather(-1, wanted[:, None])[:, 0].tolist()],
        "top": top.tolist(),
        "right": (top == wanted).tolist(),
        "kl": round(float((full.exp() * (full - logs)).sum(-1).mean()), 6),
        "ids": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--kept", type=Path, help="write kept tokens of one prompt; then stop")
    parser.add_argument("--budget", default="0.25,0.5,0.75")
    parser.add_argument("--press", default=",".join(presses()).replace(", ", ";"))
    parser.add_argument("--block-size", type=int, default=16, help="kvplug's block size")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prove", action="store_true")
    asked = parser.parse_args()
    if not asked.out and not asked.kept:
        parser.error("give --out or --kept")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    chosen = [name.replace(";", ", ") for name in asked.press.split(",")]
    unknown = [name for name in chosen if name not in presses()]
    if unknown:
        sys.exit(f"unknown presses {unknown}; known: {list(presses())}")
    prompts = json.loads(asked.prompts.read_text())["prompts"]
    budgets = [float(part) for part in asked.budget.split(",")]
    kinds = {"sdpa"} | ({"eager"} if "ObservedAttentionPress" in chosen else set())
    models = {kind: Model(asked.model, kind) for kind in sorted(kinds)}
    if asked.prove:
        for name in chosen:
            kind = "eager" if name == "ObservedAttentionPress" else "sdpa"
            prove(models[kind], presses()[name](0.5), prompts[0]["context"])
            print(f"{name}: compress() on a captured prefill is what kvpress does", flush=True)
    if asked.kept:
        context = next(p["context"] for p in prompts if p["task"] == "passkey")
        np.savez_compressed(asked.kept, **kept_tokens(models, context, chosen, budgets))
        return
    about = {
        "program": f"kvpress {importlib.metadata.version('kvpress')}",
        "transformers": importlib.metadata.version("transformers"),
        "torch": torch.__version__,
        "proved": asked.prove,
        "seconds": 0.0,
    }
    records: list[dict[str, Any]] = []
    started = time.monotonic()
    for record in run(models, prompts, budgets, chosen, asked.block_size):
        records.append(record)
        if sys.stderr.isatty() or len(records) % 50 == 0:
            print(f"{time.monotonic() - started:.0f}s {len(records)} records", file=sys.stderr)
    about["seconds"] = round(time.monotonic() - started, 1)
    data = {"format": "kvplug eval 1", "about": about, "summary": [], "records": records}
    asked.out.write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    main()
