"""Perplexity and first choices of formats over many decoded tokens, at the price of a prefill.

    python -m kvplug_lab.fidelity.decoded --format kivi,int4,vllm_int4 --json rows.json

The first half of a passage is read exactly, as one step of an engine. Every token of the second
half is then a decode step: what it attends of earlier tokens is what the format's own ``write``
stored and its ``read`` gives back, its own key and value are as computed (or read back too, where
the format does that), and so are those that the format keeps exact (`FormatPolicy.recent`). All of
these steps are computed in one pass, which `kvplug eval` takes a thousand passes for: the codes of
a token are final before anything reads them from a page, so they do not depend on the step.

Keys and values are rounded to bfloat16 first, for the full cache too; all else is float32. Layers
with a sliding window stay as they are, as in an engine. Intervals are 95 %, from a paired bootstrap
over the passages.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from kvplug.contract import FormatPolicy, LayerView, WriteBatch
from kvplug.errors import KVPlugError
from kvplug.hosts.transformers import Host
from kvplug_lab.fidelity import variants
from kvplug_lab.fidelity.peer_formats import TurboQuant
from kvplug_lab.fidelity.report import bootstrap
from kvplug_lab.fidelity.run import bytes_per_token
from kvplug_lab.models import smollm2
from kvplug_lab.texts import encoder_of, first_tokens, passages, shakespeare

BLOCK = 128
QUERIES = 128
"""Queries of a tile; formats that keep more tokens exact have tiles of so many."""
LOGITS = 128
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class Passage:
    """What a format did to one passage.

    Attributes:
        nll: Added log-perplexity, nats per token.
        agree: Part of the tokens whose most probable next token is the full cache's.
        kl: Mean divergence of the full cache's distributions from the format's, nats.
    """

    nll: float
    agree: float
    kl: float


@dataclass
class Row:
    """One format.

    Attributes:
        format: Its name and options, as asked for.
        bytes: Bytes of K and V of one token and KV head, mean over the layers under the format.
        bytes_of_64: The same for 64 elements a head.
        exact: Most tokens of a request that are kept exact beside the pages.
        tokens: Tokens scored.
        perplexity: Added perplexity, a part of the full cache's, and its interval.
        agree: Mean of `Passage.agree`, and its interval.
        kl: Mean of `Passage.kl`, and its interval.
        passages: Each passage.
    """

    format: str
    bytes: float
    bytes_of_64: float
    exact: int
    tokens: int
    perplexity: tuple[float, float, float]
    agree: tuple[float, float, float]
    kl: tuple[float, float, float]
    passages: list[Passage] = field(default_factory=list)


class Reader:
    """Attention of a model whose second half of a text is under a format.

    Args:
        model: A causal language model of transformers.
        first: Tokens of the first half.
    """

    def __init__(self, model: Any, first: int):
        self.first = first
        self.host = Host(model, BLOCK, kv_dtype=torch.bfloat16)
        self.format: FormatPolicy | None = None
        self._begun: dict[int, tuple[Tensor, Tensor]] = {}
        self._reads_first = False
        transformers.AttentionInterface.register("kvplug_decoded", self._attend)
        model.set_attn_implementation("kvplug_decoded")

    @torch.inference_mode()
    def begin(self, ids: Tensor) -> None:
        """Read the first half of a text, ``[n]``."""
        self._begun, self._reads_first = {}, True
        self.host.model.model(ids[None, : self.first], use_cache=False)
        self._reads_first = False

    def planes(self) -> dict[str, Tensor]:
        """K and V of the first half as an engine holds them, bfloat16
        ``[layers, tokens, kv_heads, head_size]``."""
        pairs = zip(*(self._begun[index] for index in sorted(self._begun)), strict=True)
        both = [torch.stack([x.transpose(0, 1).bfloat16() for x in side]) for side in pairs]
        return dict(zip(("key", "value"), both, strict=True))

    def replace(self, planes: Mapping[str, Tensor]) -> None:
        """Take other K and V for the first half, as `planes` returns them."""
        for i, index in enumerate(sorted(self._begun)):
            key, value = (planes[name][i].transpose(0, 1).float() for name in ("key", "value"))
            self._begun[index] = (key, value)

    @torch.inference_mode()
    def go_on(self, ids: Tensor, format: FormatPolicy | None) -> Iterator[Tensor]:
        """Log-probabilities after the tokens of the second half but the last, some rows at a
        time.

        Args:
            ids: The text that was begun, ``[n]``.
            format: What it is under; None for the full cache.
        """
        self.format = format
        model = self.host.model
        at = torch.arange(self.first, len(ids))[None]
        hidden = model.model(ids[None, self.first :], position_ids=at, use_cache=False)[0][0, :-1]
        cap = getattr(model.config, "final_logit_softcapping", None)
        for part in hidden.split(LOGITS):
            logits = model.lm_head(part).float()
            if cap:
                logits = cap * torch.tanh(logits / cap)
            yield logits.log_softmax(-1)

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        index = int(module.layer_idx)
        layer, whole = self.host.layers[index], index in self.host.prunable
        scale = scaling or layer.head_size**-0.5
        dtype, query = query.dtype, query.float()
        key, value = (x[0].bfloat16().float() for x in (key, value))
        if not self._reads_first:
            key, value = (
                torch.cat([a, b], 1) for a, b in zip(self._begun[index], (key, value), strict=True)
            )
        else:
            self._begun[index] = (key, value)
        n, stored = query.shape[2], key.shape[1]
        if self._reads_first or self.format is None or not whole:
            at, past = torch.arange(stored - n, stored)[:, None], torch.arange(stored)
            seen = past <= at
            window = getattr(module, "sliding_window", None)
            if window and not whole:
                seen &= at - past < window
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key[None], value[None], attn_mask=seen, scale=scale, enable_gqa=True
            )
            return out.transpose(1, 2).contiguous().to(dtype), None
        return _decoded(self.format, layer, query[0], key, value, scale).to(dtype), None


def _decoded(
    policy: FormatPolicy, layer: LayerView, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention of the latest tokens, each a decode step.

    Args:
        policy: The format.
        layer: The layer.
        query: ``[num_heads, n, head_size]``.
        key: ``[num_kv_heads, stored, head_size]``, numbers of bfloat16.
        value: The same shape.
        scale: Softmax scale.

    Returns:
        ``[1, n, num_heads, head_size]``.
    """
    (heads, stored, size), n = key.shape, query.shape[1]
    coded_key, coded_value = _through(policy, layer, key, value)
    kept = policy.recent(layer)
    own = bool(getattr(policy.options, "exact_chunk", True)) and not isinstance(policy, TurboQuant)
    # Tokens behind the last whole multiple of `kept` are exact: with tiles of as many queries, all
    # of the tile's. Before the tile there are only codes.
    tile = kept or QUERIES
    grouped = query.reshape(heads, -1, n, size)
    out = torch.empty_like(grouped)
    first = stored - n
    assert first % tile == 0
    for low in range(0, n, tile):
        part = grouped[:, :, low : low + tile]
        begin, width = first + low, part.shape[2]
        past = torch.einsum("hgqd,htd->hgqt", part, coded_key[:, :begin])
        here = slice(begin, begin + width)
        near_key = key[:, here] if kept else coded_key[:, here]
        near_value = value[:, here] if kept else coded_value[:, here]
        near = torch.einsum("hgqd,htd->hgqt", part, near_key)
        if own and not kept:
            near.diagonal(dim1=-2, dim2=-1).copy_((part * key[:, None, here]).sum(-1))
        near.masked_fill_(torch.ones(width, width, dtype=torch.bool).triu(1), -torch.inf)
        weights = torch.cat([past, near], -1).mul_(scale).softmax(-1)
        found = torch.einsum("hgqt,htd->hgqd", weights[..., :begin], coded_value[:, :begin])
        found += torch.einsum("hgqt,htd->hgqd", weights[..., begin:], near_value)
        if own and not kept:
            mine = weights[..., begin:].diagonal(dim1=-2, dim2=-1)[..., None]
            found += mine * (value - coded_value)[:, None, here]
        out[:, :, low : low + tile] = found
    return out.flatten(0, 1).transpose(0, 1)[None]


def _through(
    policy: FormatPolicy, layer: LayerView, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """K and V ``[heads, n, head_size]`` written to pages and read back, float32."""
    n = key.shape[1]
    blocks = -(-n // BLOCK)
    pages = policy.layout(layer).pages(layer, blocks, BLOCK)
    new_key, new_value = (x.transpose(0, 1).bfloat16().contiguous() for x in (key, value))
    policy.write(layer, WriteBatch(new_key, new_value, torch.arange(n)), pages)
    back = policy.read(layer, pages, torch.arange(blocks))
    coded_key, coded_value = (x.transpose(0, 1).flatten(1, 2)[:, :n].float() for x in back)
    return coded_key, coded_value


def measure(reader: Reader, ids: Tensor, formats: Iterable[FormatPolicy]) -> list[Passage]:
    """What each format does to one passage.

    Args:
        reader: The model.
        ids: The passage, ``[n]``.
        formats: The formats.
    """
    reader.begin(ids)
    wanted = ids[reader.first + 1 :, None]
    full = list(reader.go_on(ids, None))
    right = torch.cat([part.gather(-1, want) for part, want in _with(full, wanted)])
    found = []
    for policy in formats:
        nll, agree, kl = [], [], []
        for (exact, want), logs in zip(_with(full, wanted), reader.go_on(ids, policy), strict=True):
            nll.append(logs.gather(-1, want))
            agree.append(logs.argmax(-1) == exact.argmax(-1))
            kl.append((exact.exp() * (exact - logs)).sum(-1))
        found.append(
            Passage(
                round(float((right - torch.cat(nll)).mean()), 7),
                round(float(torch.cat(agree).float().mean()), 6),
                round(float(torch.cat(kl).mean()), 7),
            )
        )
    return found


def _with(parts: Sequence[Tensor], whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of rows, each with its rows of another tensor."""
    return zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True)


def row(label: str, policy: FormatPolicy, found: Sequence[Passage], tokens: int) -> Row:
    """The row of a format.

    Args:
        label: What was asked for.
        policy: The format.
        found: Its passages.
        tokens: Tokens scored in each.
    """
    layers = policy.engine.layers
    heads = sum(layer.num_kv_heads for layer in layers)
    each = bytes_per_token(policy, layers) / heads
    nll, agree, kl = ([getattr(p, name) for p in found] for name in ("nll", "agree", "kl"))
    low, high = bootstrap(nll)
    return Row(
        label,
        round(each, 3),
        round(each * 64 / layers[0].head_size, 3),
        max(policy.recent(layer) for layer in layers),
        tokens * len(found),
        (math.expm1(sum(nll) / len(nll)), math.expm1(low), math.expm1(high)),
        (sum(agree) / len(agree), *bootstrap(agree)),
        (sum(kl) / len(kl), *bootstrap(kl)),
        list(found),
    )


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| format | bytes of 64 | exact | tokens | added perplexity | first choice | divergence |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for one in rows:
        ppl, agree, kl = one.perplexity, one.agree, one.kl
        lines.append(
            f"| {one.format} | {one.bytes_of_64:g} | {one.exact} | {one.tokens:,} | "
            f"{ppl[0]:+.2%} ({ppl[1]:+.2%} to {ppl[2]:+.2%}) | "
            f"{agree[0]:.1%} ({agree[1]:.1%} to {agree[2]:.1%}) | {kl[0]:.4f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, in Markdown; the file is written after every passage."""
    parser = argparse.ArgumentParser(
        prog="python -m kvplug_lab.fidelity.decoded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="model directory; SmolLM2-135M-Instruct if none")
    parser.add_argument("--text", type=Path, help="UTF-8 text; Shakespeare's plays if none")
    parser.add_argument(
        "--format", action="append", required=True, metavar="NAME[:OPTION=VALUE...],..."
    )
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a passage")
    parser.add_argument("--seed", type=int, default=7, help="of the choice of passages")
    parser.add_argument("--json", type=Path, help="write the rows")
    asked = parser.parse_args(arguments)
    try:
        if asked.tokens < 4 * BLOCK or asked.tokens % (2 * BLOCK) or asked.passages < 1:
            raise KVPlugError(
                f"--tokens must be a multiple of {2 * BLOCK} from {4 * BLOCK}, and --passages at "
                "least 1"
            )
        chosen = variants.formats(asked.format)
        directory = asked.model or smollm2()
        words = asked.text.read_text("utf-8") if asked.text else shakespeare()
        texts = passages(words, asked.passages, asked.tokens, asked.seed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        transformers.utils.logging.disable_progress_bar()
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )
        reader = Reader(loaded.eval(), asked.tokens // 2)
        policies = [variant.build(reader.host) for variant in chosen]
        encode, begins = encoder_of(tokenizer), first_tokens(directory, tokenizer)
        read = [torch.tensor([*begins, *encode(text)][: asked.tokens]) for text in texts]
        if any(len(ids) < asked.tokens for ids in read):
            raise KVPlugError(f"passages of {asked.tokens} words have fewer tokens")
    except (KVPlugError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    found: list[list[Passage]] = []
    rows: list[Row] = []
    started, each = time.monotonic(), asked.tokens // 2 - 1
    for ids in read:
        found.append(measure(reader, ids, policies))
        rows = [
            row(variant.label, policy, [one[i] for one in found], each)
            for i, (variant, policy) in enumerate(zip(chosen, policies, strict=True))
        ]
        spent = time.monotonic() - started
        print(f"{len(found)} of {len(read)} passages, {spent:.0f} s", file=sys.stderr, flush=True)
        if asked.json is not None:
            about = {"model": Path(directory).name, "seed": asked.seed, "tokens": asked.tokens}
            plain = about | {"block_size": BLOCK, "rows": [asdict(one) for one in rows]}
            asked.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
