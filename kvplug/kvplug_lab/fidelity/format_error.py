"""Errors of formats on K and V of a real text, and on the attention over them.

    python -m kvplug_lab.fidelity.format_error
    python -m kvplug_lab.fidelity.format_error --use int4 '{"group": 32}'

One text is read once, exactly; every format then stores the same keys and values and answers the
same queries, each of them as a decode step: its own token exact, and all before it from the pages
(and, where a format keeps recent tokens, from those).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import (
    AttendBatch,
    EngineView,
    FormatPolicy,
    Kind,
    LayerView,
    Recent,
    WriteBatch,
)
from kvplug.errors import KVPlugError
from kvplug.registry import plugins
from kvplug_lab.models import smollm2
from kvplug_lab.texts import passages, shakespeare

BLOCK = 32

SHOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fp8", {}),
    ("int8", {}),
    ("int4", {}),
    ("int4", {"group": 32}),
    ("rotated", {"bits": 4}),
    ("rotated", {"bits": 4, "levels": "uniform"}),
    ("rotated", {"bits": 3}),
    ("rotated", {"bits": 2}),
    ("kivi", {"bits": 4}),
    ("kivi", {"bits": 4, "value_group": 32}),
    ("kivi", {"bits": 2}),
    ("kivi", {"bits": 2, "value_group": 32}),
    ("hack", {"bits": 8}),
    ("hack", {"bits": 4}),
    ("hack", {"bits": 4, "group": 32}),
    ("hack", {"bits": 2}),
    ("hack", {"bits": 2, "rotate": False}),
)
"""Formats of the table when none is asked for."""


@dataclass(frozen=True)
class Read:
    """One layer's part in a text that was read exactly.

    Attributes:
        layer: The layer.
        scale: Softmax scale.
        query: ``[n, num_heads, head_size]``, after RoPE.
        key: ``[n, num_kv_heads, head_size]``, after RoPE.
        value: The same shape.
    """

    layer: LayerView
    scale: float
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Errors:
    """Root-mean-square errors over root mean square, averaged over the layers.

    Attributes:
        bytes_per_token_head: Bytes of K and V of a token and KV head, averaged over the layers.
        key: Of the keys read back.
        value: Of the values.
        output: Of the attention outputs.
        worst: Of the attention outputs of the layer where they are largest.
    """

    bytes_per_token_head: float
    key: float
    value: float
    output: float
    worst: float


def read(model_path: Path, tokens: int) -> list[Read]:
    """Keys, values and queries of a passage of Shakespeare, of every layer of a model.

    Args:
        model_path: Directory of a model that transformers loads.
        tokens: How many tokens of the passage.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    (text,) = passages(shakespeare(), 1, tokens, seed=0)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = model.config
    found: list[Read] = []

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        _, heads, _, size = query.shape
        kv_heads = key.shape[1]
        scale = scaling or size**-0.5
        view = LayerView(
            module.layer_idx, config.num_hidden_layers, kv_heads, heads, size, "float32"
        )
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        found.append(Read(view, scale, q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("kvplug_read", attend)
    model.set_attn_implementation("kvplug_read")
    with torch.inference_mode():
        model.model(ids)
    return found


def errors(policy: FormatPolicy, layers: Sequence[Read], queries: int) -> Errors:
    """Errors of a format on what was read.

    Args:
        policy: A format built for these layers and blocks of `BLOCK` tokens.
        layers: What was read.
        queries: How many of the latest tokens are decode steps.
    """
    each = [_layer_errors(policy, layer, queries) for layer in layers]
    size, key, value, output = (sum(column) / len(each) for column in zip(*each, strict=True))
    return Errors(size, key, value, output, max(row[3] for row in each))


def _layer_errors(
    policy: FormatPolicy, read: Read, queries: int
) -> tuple[float, float, float, float]:
    layer, n = read.layer, len(read.key)
    blocks = -(-n // BLOCK)
    layout = policy.layout(layer)
    pages = layout.pages(layer, blocks, BLOCK)
    policy.write(layer, WriteBatch(read.key, read.value, torch.arange(n)), pages)
    key, value = (
        x.transpose(1, 2).flatten(0, 1)[:n] for x in policy.read(layer, pages, torch.arange(blocks))
    )
    out = torch.empty_like(read.query[-queries:])
    lens = torch.arange(n - queries, n) + 1
    batch = AttendBatch(
        read.query[-queries:],
        torch.arange(queries + 1, dtype=torch.int32),
        torch.arange(blocks, dtype=torch.int32).expand(queries, -1).contiguous(),
        lens.int(),
        read.scale,
        1,
        n,
        read.key[-queries:],
        read.value[-queries:],
        request_slots=torch.arange(queries),
        recent=_recent(policy.recent(layer), read, lens),
    )
    policy.attend(layer, batch, pages, out)
    return (
        layout.bytes_per_token_head,
        relative(key, read.key),
        relative(value, read.value),
        relative(out, exact(read, queries)),
    )


def _recent(size: int, read: Read, lens: Tensor) -> Recent | None:
    """Kept positions before each decode step, one slot per step."""
    if not size:
        return None
    slot = torch.arange(size)
    before = lens[:, None] - 1
    # The latest token before this one whose place in the ring is `slot`.
    at = before - 1 - (before - 1 - slot) % size
    return Recent(read.key[at], read.value[at])


def exact(read: Read, queries: int) -> Tensor:
    """Attention of the latest tokens, exactly, ``[queries, num_heads, head_size]``."""
    n, groups = len(read.key), read.layer.num_heads // read.layer.num_kv_heads
    key, value = (x.repeat_interleave(groups, 1) for x in (read.key, read.value))
    logits = torch.einsum("qhd,thd->hqt", read.query[-queries:], key) * read.scale
    unseen = torch.arange(n) > torch.arange(n - queries, n)[:, None]
    return torch.einsum("hqt,thd->qhd", logits.masked_fill(unseen, -torch.inf).softmax(-1), value)


def relative(found: Tensor, right: Tensor) -> float:
    """Root-mean-square error over the root mean square of what is right."""
    return float((found.float() - right).norm() / right.norm())


def build(use: str, options: dict[str, Any], layers: Sequence[Read]) -> FormatPolicy:
    """A format for a model that was read.

    Raises:
        KVPlugError: There is none of the name.
        ValueError: It refuses the options or the model.
    """
    registry = plugins().registry
    policy = registry.get(Kind.FORMAT, use)
    if policy is None:
        raise KVPlugError(f"unknown format {use!r}. Fix: {registry.choose(Kind.FORMAT, use)}.")
    engine = EngineView(BLOCK, layers=tuple(read.layer for read in layers), host="transformers")
    made = policy(policy.Options.model_validate(options), engine)
    assert isinstance(made, FormatPolicy)
    return made


def _options(use: str, given: str) -> dict[str, Any]:
    try:
        options = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise KVPlugError(f"options of {use} are not JSON: {error}") from None
    if not isinstance(options, dict):
        raise KVPlugError(f"options of {use} must be a JSON object, not {given}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m kvplug_lab.fidelity.format_error", description=__doc__
    )
    parser.add_argument("--model", type=Path, help="model directory; SmolLM2-135M-Instruct if none")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text")
    parser.add_argument("--queries", type=int, default=64, help="latest tokens that are decoded")
    parser.add_argument(
        "--use", nargs=2, action="append", metavar=("FORMAT", "OPTIONS"), help="options as JSON"
    )
    parser.add_argument("--json", type=Path, help="write the errors, one row a format")
    asked = parser.parse_args(arguments)
    try:
        shown = [(use, _options(use, given)) for use, given in asked.use or ()] or list(SHOWN)
        if not 0 < asked.queries <= asked.tokens:
            raise KVPlugError(f"--queries must be from 1 to {asked.tokens}, not {asked.queries}")
        layers = read(asked.model or smollm2(), asked.tokens)
        built = [(use, options, build(use, options, layers)) for use, options in shown]
    except (KVPlugError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("| format | options | bytes | keys | values | output | worst layer |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    rows = []
    for use, options, policy in built:
        found = errors(policy, layers, asked.queries)
        columns = ", ".join(f"`{name}: {value}`" for name, value in options.items())
        cells = (f"{e:.2%}" for e in (found.key, found.value, found.output, found.worst))
        size = f"{found.bytes_per_token_head:g}"
        print(f"| {use} | {columns} | {size} | {' | '.join(cells)} |", flush=True)
        label = ":".join([use, *(f"{name}={_plain(value)}" for name, value in options.items())])
        rows.append(
            {
                "format": label,
                "bytes": found.bytes_per_token_head,
                "keys": found.key,
                "values": found.value,
                "output": found.output,
                "worst": found.worst,
            }
        )
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _plain(value: Any) -> str:
    """A value as ``NAME:OPTION=VALUE`` has it."""
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
