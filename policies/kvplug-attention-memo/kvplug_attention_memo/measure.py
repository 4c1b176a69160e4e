"""What attention memory skips on a real text, and what it costs in answers.

    python -m kvplug_attention_memo.measure
    python -m kvplug_attention_memo.measure --cosine 0.5 0.7 --near 128 --every 8

A model reads a passage of Shakespeare and continues it greedily with full attention. Then it is
given the same continuation again, token by token, with every layer's far attention remembered, once
for each bound: so all bounds meet the same text, each token is compared with the choice that full
attention makes there, and the tokens before the first other choice are those that a run on its own
would have shared.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kvplug.errors import KVPlugError
from kvplug_attention_memo.memory import AttentionMemo, MemoOptions
from kvplug_lab.models import smollm2
from kvplug_lab.texts import passages, shakespeare

NAME = "kvplug_memo"
COSINES = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class Outcome:
    """One bound over all passages.

    Attributes:
        cosine: Least cosine of a query with the one remembered.
        skipped: Share of the rows, of every layer and step, that reused far attention.
        read: Keys and values read, over those that full attention reads.
        layers: Least and largest share skipped of one layer.
        error: Mean relative error of the attention output of rows that reused; None for none.
        worst: The largest of them.
        agreed: Share of the steps whose choice is that of full attention.
        before: Tokens before the first other choice, mean over the passages.
        identical: Passages without another choice.
    """

    cosine: float
    skipped: float
    read: float
    layers: tuple[float, float]
    error: float | None
    worst: float | None
    agreed: float
    before: float
    identical: int


class Decoder:
    """One decode with remembered far attention.

    Args:
        memo: When a query is alike; None for full attention.

    Attributes:
        rows: Rows that could have reused, by layer.
        skipped: Those that did, by layer.
        errors: Relative errors of their outputs.
        read: Tokens whose keys and values were read.
        tokens: Tokens whose keys and values full attention reads.
        cosines: Of each query with that of the step before, ``[num_heads]`` for each layer and
            step; with full attention only.
    """

    def __init__(self, memo: MemoOptions | None):
        self.memo = memo
        self.layers: dict[int, AttentionMemo] = {}
        self.rows: dict[int, int] = {}
        self.skipped: dict[int, int] = {}
        self.errors: list[Tensor] = []
        self.read = 0
        self.tokens = 0
        self.cosines: list[Tensor] = []
        self._last: dict[int, Tensor] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float
    ) -> Tensor:
        """Attention of one layer, ``[1, heads, n, head_size]`` of everything."""
        heads, kv_heads, held = query.shape[1], key.shape[1], key.shape[2]
        if query.shape[2] == 1 and self.memo is None:
            now = query[0, :, 0]
            if layer in self._last:
                self.cosines.append(torch.cosine_similarity(now, self._last[layer], dim=-1))
            self._last[layer] = now
        if query.shape[2] > 1 or self.memo is None:
            if softcap:
                raise KVPlugError("a model that caps its logits is not measured here")
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=query.shape[2] > 1,
                scale=scale,
                enable_gqa=heads != kv_heads,
            )
        if layer not in self.layers:
            self.layers[layer] = AttentionMemo(
                self.memo, heads, kv_heads, query.shape[3], scale, softcap=softcap, slots=1
            )
        read = 0

        def gather(
            rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]
        ) -> tuple[Tensor, Tensor]:
            nonlocal read
            part = slice(starts[0], ends[0])
            read += ends[0] - starts[0]
            return key[:, :, part], value[:, :, part]

        found = self.layers[layer].attend(query[:, :, 0], [0], [0], [held], gather, audit=True)
        # What only the audit reads does not count.
        self.read += read - (held if found.skipped else 0)
        self.tokens += held
        self.rows[layer] = self.rows.get(layer, 0) + found.rows
        self.skipped[layer] = self.skipped.get(layer, 0) + found.skipped
        if found.errors is not None and len(found.errors):
            self.errors.append(found.errors)
        return found.out[:, :, None].to(query.dtype)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    kvplug_decoder: Decoder | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if kvplug_decoder is None:
        raise KVPlugError(f"{type(module).__name__} does not pass on what its model is handed")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = kvplug_decoder.attend(module.layer_idx, query, key, value, scale, softcap or 0.0)
    return out.transpose(1, 2).contiguous(), None


class Passage:
    """A text that the model has read, and how it goes on with full attention.

    Args:
        model: A Hugging Face ``...ForCausalLM`` whose attention is this module's.
        ids: The text, ``[1, n]``.
        generate: Tokens that it goes on for.
    """

    def __init__(self, model: Any, ids: Tensor, generate: int):
        self.model = model
        exact = Decoder(None)
        done = model(ids, use_cache=True, logits_to_keep=1, kvplug_decoder=exact)
        self._cache = done.past_key_values
        self.chosen = [int(done.logits[0, -1].argmax())]
        cache = copy.deepcopy(self._cache)
        while len(self.chosen) <= generate:
            self.chosen.append(self._step(self.chosen[-1], cache, exact))
        self.cosines = exact.cosines

    def _step(self, token: int, cache: Any, decoder: Decoder) -> int:
        ids = torch.tensor([[token]])
        done = self.model(ids, past_key_values=cache, use_cache=True, kvplug_decoder=decoder)
        return int(done.logits[0, -1].argmax())

    def again(self, decoder: Decoder) -> list[bool]:
        """The same continuation with another decoder: which choices are the same."""
        cache = copy.deepcopy(self._cache)
        return [
            self._step(token, cache, decoder) == after
            for token, after in zip(self.chosen, self.chosen[1:], strict=False)
        ]


@torch.inference_mode()
def read(model_path: Path, tokens: int, generate: int, count: int) -> list[Passage]:
    """Passages of Shakespeare, read and continued with full attention.

    Args:
        model_path: Directory of a model that transformers loads; it runs in float32.
        tokens: Tokens of each passage.
        generate: Tokens that each goes on for.
        count: How many passages.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    transformers.AttentionInterface.register(NAME, _attend)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation=NAME
    )
    model.eval()
    texts = passages(shakespeare(), count, tokens, seed=0)
    return [
        Passage(model, tokenizer(text, return_tensors="pt").input_ids[:, :tokens], generate)
        for text in texts
    ]


@torch.inference_mode()
def measure(read_passages: Sequence[Passage], memo: MemoOptions) -> Outcome:
    """What one setting skips and costs."""
    decoders, same = [], []
    for passage in read_passages:
        decoders.append(Decoder(memo))
        same.append(passage.again(decoders[-1]))
    layers = sorted(decoders[0].layers)
    by_layer = [
        sum(d.skipped[i] for d in decoders) / max(sum(d.rows[i] for d in decoders), 1)
        for i in layers
    ]
    errors = torch.cat([torch.zeros(0), *(e for d in decoders for e in d.errors)])
    runs = [row.index(False) if False in row else len(row) for row in same]
    return Outcome(
        cosine=memo.cosine,
        skipped=sum(by_layer) / len(by_layer),
        read=sum(d.read for d in decoders) / sum(d.tokens for d in decoders),
        layers=(min(by_layer), max(by_layer)),
        error=float(errors.mean()) if len(errors) else None,
        worst=float(errors.max()) if len(errors) else None,
        agreed=sum(map(sum, same)) / sum(map(len, same)),
        before=sum(runs) / len(runs),
        identical=sum(all(row) for row in same),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m kvplug_attention_memo.measure", description=__doc__
    )
    parser.add_argument("--model", type=Path, help="model directory; SmolLM2-135M-Instruct if none")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each passage")
    parser.add_argument("--generate", type=int, default=64, help="tokens that it goes on for")
    parser.add_argument("--passages", type=int, default=4, help="how many passages")
    parser.add_argument("--cosine", type=float, nargs="+", default=list(COSINES), help="bounds")
    parser.add_argument("--near", type=int, default=256, help="latest tokens attended afresh")
    parser.add_argument("--every", type=int, default=16, help="steps until computed anyway")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to PATH")
    asked = parser.parse_args(arguments)
    try:
        if min(asked.tokens, asked.generate, asked.passages) < 1:
            raise KVPlugError("--tokens, --generate and --passages must be at least 1")
        memos = [MemoOptions(cosine=c, near=asked.near, every=asked.every) for c in asked.cosine]
        texts = read(asked.model or smollm2(), asked.tokens, asked.generate, asked.passages)
    except (KVPlugError, OSError, ValueError, ValidationError) as error:
        print(error, file=sys.stderr)
        return 2
    titles = (
        "cosine",
        "skipped",
        "of a layer",
        "K and V read",
        "error",
        "worst",
        "same choice",
        "tokens before another",
        "identical",
    )
    print(f"| {' | '.join(titles)} |")
    print(f"| {' | '.join(['--:'] * len(titles))} |")
    rows = []
    for memo in memos:
        found = measure(texts, memo)
        rows.append(found)
        low, high = found.layers
        cells = (
            f"{found.cosine:g}",
            _percent(found.skipped),
            f"{low:.0%} to {high:.0%}",
            _percent(found.read),
            _percent(found.error),
            _percent(found.worst),
            _percent(found.agreed),
            f"{found.before:.1f} of {asked.generate}",
            f"{found.identical} of {asked.passages}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    cosines = [found for text in texts for found in text.cosines]
    if cosines:
        by_head = torch.stack(cosines)
        print(
            "\nCosine of a query with the one of the step before, median over layers and steps: "
            f"{float(by_head.median()):.2f} of a head, "
            f"{float(by_head.amin(1).median()):.2f} of a layer's least alike head, "
            f"at most {float(by_head.amin(1).max()):.3f} of that."
        )
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
