"""Stock vLLM and deployments, each with as many blocks as the same KV memory holds under it.

How many those are is planned, as ``kvplug plan`` does, for values of 16 bits. A CPU without
AVX-512 computes in float32, and pages without a format then take twice the bytes in this machine's
memory; the blocks, and the bytes that are reported, are those of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.contract import Kind
from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.flags import ConfigFile
from kvplug.planning.candidates import Candidate
from kvplug.planning.model import ELEMENT, Model, read_model
from kvplug.planning.plan import Planner, Question
from kvplug.planning.weights import Weights
from kvplug_lab.cpu_dtype import fast_dtype

STOCK = "stock vLLM"
ALIGNED = 128
"""Tokens of whose multiples a context is, so that blocks of every size divide it."""
CPU_BLOCK, GPU_BLOCK, BATCHED = 32, 16, 512

SIZED_HERE = (
    "max-model-len",
    "max-num-seqs",
    "num-gpu-blocks-override",
    "kv-cache-memory-bytes",
    "gpu-memory-utilization",
    "shutdown-timeout",
)
"""Flags of a deployment that are set by the work."""


class DoesNotFit(KVPlugError):
    """A deployment that cannot be compared with stock; the message says why."""

    exit_code = 2


@dataclass(frozen=True)
class Deployment:
    """What one engine runs.

    Attributes:
        name: Its name in tables.
        section: Its ``kvplug`` section; None for stock vLLM.
        engine: Arguments of ``vllm.LLM``.
        says: What it does, a phrase.
        exact: True if it promises stock's answers.
        blocks: Blocks that requests can have.
        block_size: Tokens of a block.
        block_bytes: Bytes of a block in all layers, of 16-bit values where a format codes none.
        beside: Bytes kept beside the blocks.
        pool_tokens: Tokens that the pool holds.
        host: Host memory that it may take in addition, as its section says; empty for none.
    """

    name: str
    section: Mapping[str, Any] | None
    engine: Mapping[str, Any]
    says: str
    exact: bool
    blocks: int
    block_size: int
    block_bytes: int
    beside: int
    pool_tokens: int
    host: str = ""


@dataclass(frozen=True)
class Room:
    """The memory, and what is to run in it.

    Attributes:
        model: Model directory.
        longest: Tokens of the longest request.
        output_tokens: Tokens of an answer.
        sessions: Requests in flight at most.
        at_once: Whole requests that stock has room for.
        engines: Engines that live at once.
    """

    model: Path
    longest: int
    output_tokens: int
    sessions: int
    at_once: int
    engines: int

    @property
    def context(self) -> int:
        """Longest request that an engine takes, in tokens."""
        return -(-(self.longest + 1) // ALIGNED) * ALIGNED


def in_the_same_memory(room: Room, files: list[ConfigFile]) -> list[Deployment]:
    """Stock and deployments, sized for the same bytes of KV.

    Stock runs with the first file's flags.

    Raises:
        DoesNotFit: A deployment cannot run on the model, or holds not one request in the memory.
        UnknownModel: What the model's layers keep is not known.
    """
    dtype = _dtype(files[0].flags)
    model = read_model(str(room.model), dtype if ELEMENT[dtype] == 2 else "bfloat16")
    cuda = _cuda()
    of_stock = _flags(files[0].flags, cuda)
    block = int(of_stock["block-size"])
    whole = max(room.at_once * -(-room.longest // block), room.context // block)
    memory = (whole + 1) * block * model.token_bytes()
    found = [_deployment(room, model, memory, STOCK, None, of_stock, cuda)]
    for name, file in zip(_names(files), files, strict=True):
        found.append(_deployment(room, model, memory, name, file, _flags(file.flags, cuda), cuda))
    return found


def _names(files: list[ConfigFile]) -> list[str]:
    """Stems of the files; with their folder where two have one stem."""
    stems = [file.path.stem for file in files]
    full = [f"{file.path.resolve().parent.name}/{file.path.stem}" for file in files]
    names = [f if stems.count(s) > 1 else s for s, f in zip(stems, full, strict=True)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DoesNotFit(f"--config: {twice} is given twice")
    return names


def _flags(flags: Mapping[str, Any], cuda: bool) -> dict[str, Any]:
    own = {key: value for key, value in flags.items() if key not in SIZED_HERE}
    own.setdefault("block-size", GPU_BLOCK if cuda else CPU_BLOCK)
    own.setdefault("max-num-batched-tokens", BATCHED)
    return own


def _dtype(flags: Mapping[str, Any]) -> str:
    """The type that flags ask for, by torch's name; bfloat16 where they leave it to the model."""
    asked = str(flags.get("dtype", "auto"))
    return {"half": "float16", "float": "float32"}.get(
        asked, asked if asked in ELEMENT else "bfloat16"
    )


def _deployment(
    room: Room,
    model: Model,
    memory: int,
    name: str,
    file: ConfigFile | None,
    flags: Mapping[str, Any],
    cuda: bool,
) -> Deployment:
    section = dict(file.deployment.section) if file is not None else None
    question = Question(
        memory,
        room.context,
        Weights(0, "none, as the memory is for KV alone"),
        output=room.output_tokens,
        utilization=1.0,
        overhead=0,
        batched=int(flags["max-num-batched-tokens"]),
        slots=room.sessions,
    )
    planned = Planner(model, question).plan(Candidate(name, section or {}, flags))
    if planned.pool is None:
        raise DoesNotFit(f"{name}: {planned.refused}")
    if not planned.users:
        raise DoesNotFit(
            f"{name}: {memory / 2**20:.0f} MiB hold {planned.pool.tokens:,} tokens under it, and a "
            f"request takes {room.context:,}"
        )
    engine = {key.replace("-", "_"): value for key, value in flags.items()} | {
        "max_model_len": room.context,
        "max_num_seqs": room.sessions,
        "num_gpu_blocks_override": planned.pool.blocks,
        "enable_prefix_caching": True,
    }
    engine["dtype"] = fast_dtype(_dtype(flags))
    if cuda:
        # Engines that live at once share the card; the pool's size is stated.
        engine["gpu_memory_utilization"] = round(0.9 / room.engines, 3)
    return Deployment(
        name=name,
        section=section,
        engine=engine,
        says=_says(file) if file is not None else "every token, 16 bits a value",
        exact=file is None or bool(planned.exact),
        blocks=planned.pool.usable,
        block_size=planned.block_size,
        block_bytes=planned.pool.block_bytes,
        beside=planned.beside,
        pool_tokens=planned.pool.tokens,
        host=_host(file) if file is not None else "",
    )


def _says(file: ConfigFile) -> str:
    """The policies by kind, with the options that the file sets."""
    parts = []
    for choice in file.deployment.all():
        if choice.policy.kind is Kind.PREFIX_CACHE and choice.policy.name == "lru":
            continue
        given = choice.options.model_dump(exclude_unset=True) if choice.options else {}
        options = ", ".join(f"{key} {value}" for key, value in given.items())
        parts.append(
            f"{choice.policy.kind.value} {choice.policy.name}" + f" ({options})" * bool(options)
        )
    return "; ".join(parts) or "vLLM's own order"


def _host(file: ConfigFile) -> str:
    for tier in file.deployment.section.get("tiers") or ():
        if isinstance(tier, Mapping) and isinstance(tier.get("host"), Mapping):
            return str(tier["host"].get("size", ""))
    return ""


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())
