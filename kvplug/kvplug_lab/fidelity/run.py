"""Runs prompts through a model under many policies and budgets, or formats.

A prompt is read once for all sequence policies that act behind it. Under formats its first chunk is
read once for all: its tokens see each other as computed. What follows is read under each format, in
chunks, through its own ``write`` and ``attend``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvplug.contract import FormatPolicy, LayerView, SequencePolicy
from kvplug.errors import KVPlugError
from kvplug.hosts.transformers import Host, Text, Watched, watched_by
from kvplug_lab.fidelity.asked import Reader
from kvplug_lab.fidelity.peer_formats import PeerFormat
from kvplug_lab.fidelity.records import FULL, Record
from kvplug_lab.fidelity.scores import MATCHES, score
from kvplug_lab.fidelity.tasks import Prompt, Wanted

if TYPE_CHECKING:
    from kvplug.contract import Policy

PIECE = 1
"""Scored tokens of one pass under a format, as in decoding: the latest tokens get much attention,
and taking more of them as computed makes every format look several times better than it is."""

AT_ONCE = 48
"""Most texts that generate together: a pass over the weights serves them all."""

CPU_BYTES = 4 << 30
"""Bytes of K and V of texts that generate together on a CPU."""

READ = 8192
"""Tokens of a context read in one pass: what a pass needs beside K and V grows with them."""


@dataclass(frozen=True)
class Variant:
    """A policy at a budget.

    Attributes:
        label: The policy with the options asked for.
        budget: Share of the context to keep.
        policy: Its class.
        options: Its options, without the budget.
    """

    label: str
    budget: float
    policy: type[Policy]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, host: Host, context: int) -> SequencePolicy:
        """The policy for contexts of this many tokens.

        Raises:
            KVPlugError: The policy has no option that sets a budget, or refuses it.
        """
        fields = self.policy.Options.model_fields
        options = dict(self.options)
        if "budget" in fields:
            options["budget"] = self.budget
        elif {"sink", "window"} <= set(fields):
            size = host.block_size
            sink = int(options.get("sink", fields["sink"].get_default()))
            blocks = -(-round(self.budget * context) // size) - -(-sink // size)
            options["window"] = max(0, blocks) * size + 1
        else:
            raise KVPlugError(
                f"{self.policy.name} has no budget to set (options: {', '.join(fields) or 'none'})"
            )
        try:
            built = host.policy(self.policy, **options)
        except ValueError as error:
            raise KVPlugError(
                f"{self.label} at budget {self.budget:g}: {' '.join(str(error).split())}"
            ) from error
        assert isinstance(built, SequencePolicy)
        return built


@dataclass(frozen=True)
class FormatVariant:
    """A format.

    Attributes:
        label: What was asked for.
        policy: Its class.
        options: Its options.
    """

    label: str
    policy: type[Policy]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, host: Host) -> FormatPolicy:
        """The format for a model.

        Raises:
            KVPlugError: The format refuses the model or the block size.
        """
        try:
            built = host.policy(self.policy, **self.options)
        except ValueError as error:
            raise KVPlugError(f"{self.label}: {' '.join(str(error).split())}") from error
        assert isinstance(built, FormatPolicy)
        for layer in built.engine.layers:
            kept = built.recent(layer)
            if kept and host.block_size % kept:
                raise KVPlugError(
                    f"{self.label}: it keeps {kept} recent tokens, which do not divide blocks of "
                    f"{host.block_size}: use --block-size {kept}"
                )
        return built


def bytes_per_token(policy: FormatPolicy | None, layers: Sequence[LayerView]) -> int:
    """Bytes of K and V of one token in all layers given; bfloat16's without a format.

    A peer's are those that vLLM counts.
    """
    total = 0
    for layer in layers:
        if policy is None:
            total += 4 * layer.head_size * layer.num_kv_heads
        elif isinstance(policy, PeerFormat):
            total += policy.published_bytes(layer) * layer.num_kv_heads
        else:
            total += policy.layout(layer).token_bytes(layer)
    return total


def run(
    host: Host,
    prompts: Sequence[Prompt],
    variants: Sequence[Variant],
    progress: Callable[[str], None] = lambda line: None,
    reader: Reader | None = None,
) -> Iterator[Record]:
    """Run every prompt under the full cache and every variant.

    Prompts of one context share its reading; so do all policies that act after it.

    Args:
        host: The model.
        prompts: The prompts; those of one context are adjacent.
        variants: The policies and budgets.
        progress: Called before each prompt and variant, as many times as `steps` counts.
        reader: Reads answers; needed where prompts want one.

    Raises:
        KVPlugError: A variant cannot be built.
    """
    for batch in _by_context(prompts):
        yield from _context(host, batch, variants, progress, reader)


def run_formats(
    host: Host,
    prompts: Sequence[Prompt],
    variants: Sequence[FormatVariant],
    progress: Callable[[str], None] = lambda line: None,
    piece: int = PIECE,
    reader: Reader | None = None,
) -> Iterator[Record]:
    """Run every prompt under the full cache and every format.

    A record's budget is the format's part of the bytes that bfloat16 takes.

    Args:
        host: The model; its ``chunk`` is what a prompt is read in.
        prompts: The prompts; those of one context are adjacent.
        variants: The formats.
        progress: As in `run`.
        piece: Scored tokens of one pass.
        reader: As in `run`.

    Raises:
        KVPlugError: A variant cannot be built.
    """
    formats = [variant.build(host) for variant in variants]
    whole = bytes_per_token(None, host.engine.layers)
    labels: list[tuple[str, float, int]] = [(FULL, 1.0, whole)]
    for variant, format in zip(variants, formats, strict=True):
        size = bytes_per_token(format, host.engine.layers)
        labels.append((variant.label, round(size / whole, 4), size))
    for batch in _by_context(prompts):
        yield from _stored(host, batch, formats, labels, progress, piece, reader)


def steps(prompts: Sequence[Prompt], variants: Sequence[Variant | FormatVariant]) -> int:
    """Number of times that `run` and `run_formats` call their progress."""
    return len(prompts) * (len(variants) + 1)


def _by_context(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    batches: list[list[Prompt]] = []
    for prompt in prompts:
        if batches and batches[-1][0].context == prompt.context:
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches


def _context(
    host: Host,
    prompts: Sequence[Prompt],
    variants: Sequence[Variant],
    progress: Callable[[str], None],
    reader: Reader | None,
) -> Iterator[Record]:
    """The records of prompts that share a context."""
    device = next(host.model.parameters()).device
    context = torch.tensor(prompts[0].context, device=device)
    policies = [variant.build(host, len(context)) for variant in variants]
    needs = [watched_by(policy) for policy in policies]
    watched = Watched(
        max((need.observation for need in needs), default=0), any(need.totals for need in needs)
    )

    def read(policy: SequencePolicy | None, **watched: Watched) -> tuple[Text, Tensor]:
        text = host.open(len(context), policy, **watched)
        return text, host.feed(text, context, 1, READ)[0]

    full, last = read(None, watched=watched)

    def start(which: int) -> Text:
        policy = None if which < 0 else policies[which]
        if full.can_branch(policy):
            return full.branch(policy)
        return read(policy)[0]

    def label_of(which: int) -> tuple[str, float]:
        return (FULL, 1.0) if which < 0 else (variants[which].label, variants[which].budget)

    everyone = range(-1, len(variants))
    reference: dict[str, Tensor] = {}
    generate = [prompt for prompt in prompts if prompt.new_tokens]
    for which in everyone:
        begun = start(which)
        for i, prompt in enumerate(p for p in prompts if not p.new_tokens):
            progress(f"{prompt.name} {label_of(which)[0]}")
            # The text is fed on, so each prompt needs one of its own.
            text = begun if i == 0 else start(which)
            held = text.kept
            logits = _scored(host, text, prompt, device)
            yield _record(*label_of(which), prompt, held, logits, reference)
    for prompt in generate:
        at_once = _at_once(host, len(context))
        for at in range(0, len(everyone), at_once):
            chosen = everyone[at : at + at_once]
            texts = [start(which) for which in chosen]
            helds = [text.kept for text in texts]
            labels = [label_of(which) for which in chosen]
            for label, _ in labels:
                progress(f"{prompt.name} {label}")
            yield from _written(host, prompt, texts, labels, helds, int(last.argmax()), reader)


def _stored(
    host: Host,
    prompts: Sequence[Prompt],
    formats: Sequence[FormatPolicy],
    labels: Sequence[tuple[str, float, int]],
    progress: Callable[[str], None],
    piece: int,
    reader: Reader | None,
) -> Iterator[Record]:
    """Measure prompts that share a context under formats; the first label is the full cache's."""
    device = next(host.model.parameters()).device
    context = torch.tensor(prompts[0].context, device=device)
    begun = host.open(len(context))
    lead = host.feed(begun, context[: host.chunk], 1)
    rest = context[host.chunk :]
    reference: dict[str, Tensor] = {}
    first = 0
    generate: list[tuple[Text, str, float, int]] = []
    for (label, budget, size), format in zip(labels, (None, *formats), strict=True):
        if begun.can_branch(format):
            text, last = begun.branch(format), lead
            if len(rest):
                last = host.feed(text, rest, 1)
        else:
            text, logits = host.read(context, format)
            last = logits[None]
        if format is None:
            first = int(last[0].argmax())
        scored = [prompt for prompt in prompts if not prompt.new_tokens]
        for prompt in scored:
            progress(f"{prompt.name} {label}")
            logs = _scored(host, text.branch(format), prompt, device, piece)
            yield _record(label, budget, prompt, text.kept, logs, reference, size)
        generate.append((text, label, budget, size))
    for prompt in (p for p in prompts if p.new_tokens):
        at_once = _at_once(host, len(context))
        for at in range(0, len(generate), at_once):
            some = generate[at : at + at_once]
            texts = [text.branch(text.policy) for text, *_ in some]
            for _, label, *_ in some:
                progress(f"{prompt.name} {label}")
            found = _written(
                host,
                prompt,
                texts,
                [(label, budget) for _, label, budget, _ in some],
                [text.kept for text, *_ in some],
                first,
                reader,
            )
            for record, (*_, size) in zip(found, some, strict=True):
                yield replace(record, bytes=size)


def _at_once(host: Host, tokens: int) -> int:
    """Texts of so many tokens that generate together."""
    model = host.model
    size = torch.finfo(model.dtype).bits // 8
    each = tokens * sum(2 * size * v.num_kv_heads * v.head_size for v in host.layers)
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_BYTES
    # A text's room grows by half of what it holds.
    return max(1, min(AT_ONCE, free * 2 // (3 * each)))


def _written(
    host: Host,
    prompt: Prompt,
    texts: Sequence[Text],
    labels: Sequence[tuple[str, float]],
    helds: Sequence[float],
    first: int,
    reader: Reader | None,
) -> Iterator[Record]:
    """The records of what texts write on a prompt."""
    device = next(host.model.parameters()).device
    wanted = prompt.wanted
    if wanted is None:
        written = _generate(host, texts, first, prompt.new_tokens - 1, device)
    elif reader is None:
        raise ValueError(f"{prompt.name} wants an answer: give a reader")
    else:
        written = _answers(host, texts, prompt, wanted, reader, device)
    for label, held, ids in zip(labels, helds, written, strict=True):
        record = Record(*label, prompt.task, prompt.name, held, ids=ids)
        if wanted is None or reader is None:
            yield record
            continue
        answer = reader.decode(ids)
        yield replace(
            record,
            group=wanted.group,
            score=round(_score(wanted, answer), 6),
            answer=answer,
        )


def _score(wanted: Wanted, answer: str) -> float:
    return score(wanted.score, answer, wanted.answers, wanted.classes, wanted.first_line)


def _answers(
    host: Host,
    texts: Sequence[Text],
    prompt: Prompt,
    wanted: Wanted,
    reader: Reader,
    device: torch.device,
) -> list[list[int]]:
    """Greedy answers, without the token that ends them.

    A text stops where its answer ends, or where its score cannot change any more.
    """
    then = torch.tensor(prompt.then, device=device)
    ids = torch.stack([host.feed(text, then, 1)[0].argmax() for text in texts])
    written: list[list[int]] = [[] for _ in texts]
    going = list(range(len(texts)))
    while going:
        left = []
        for place, (which, token) in enumerate(zip(going, ids.tolist(), strict=True)):
            if token in reader.ends:
                continue
            written[which].append(token)
            if len(written[which]) < prompt.new_tokens and not _settled(
                wanted, reader, written[which]
            ):
                left.append(place)
        going = [going[place] for place in left]
        if going:
            ids = host.step([texts[which] for which in going], ids[left]).argmax(-1)
    return written


def _settled(wanted: Wanted, reader: Reader, ids: Sequence[int]) -> bool:
    if wanted.score in MATCHES:
        # More text takes nothing away from it.
        return _score(wanted, reader.decode(ids)) == 1
    return wanted.first_line and "\n" in reader.decode(ids).lstrip("\n")


def _scored(
    host: Host, text: Text, prompt: Prompt, device: torch.device, piece: int | None = None
) -> Tensor:
    """Log-probabilities at each scored token, ``[n, vocabulary]``."""
    fed = torch.tensor([*prompt.then, *prompt.answer[:-1]], device=device)
    return host.feed(text, fed, len(prompt.answer), piece).float().log_softmax(-1)


def _record(
    label: str,
    budget: float,
    prompt: Prompt,
    held: float,
    logs: Tensor,
    reference: dict[str, Tensor],
    size: int | None = None,
) -> Record:
    """The record of scored tokens; the first variant of a prompt is the reference."""
    wanted = torch.tensor(prompt.answer, device=logs.device)
    full = reference.setdefault(prompt.name, logs)
    top = logs.argmax(-1)
    return Record(
        label,
        budget,
        prompt.task,
        prompt.name,
        held,
        nll=[round(-x, 5) for x in logs.gather(-1, wanted[:, None])[:, 0].tolist()],
        top=top.tolist(),
        right=(top == wanted).tolist(),
        kl=round(float((full.exp() * (full - logs)).sum(-1).mean()), 6),
        bytes=size,
    )


def _generate(
    host: Host, texts: Sequence[Text], first: int, count: int, device: torch.device
) -> list[list[int]]:
    """Greedy continuations after the first token, all texts in step."""
    ids = torch.full((len(texts),), first, device=device)
    written = []
    for _ in range(count):
        ids = host.step(texts, ids).argmax(-1)
        written.append(ids.tolist())
    return [list(row) for row in zip(*written, strict=True)]
