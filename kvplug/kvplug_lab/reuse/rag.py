"""Retrieved documents in any order before a question: time to first token, and answers, with reuse.

Every document is read once behind a common prefix, by every engine alike. Then each request takes
some of them in random order and puts a question behind them; every engine is asked the same request
in turn. Stock finds the prefix and at most the first document in its prefix cache. A request is of
one of three kinds:

* ``greedy``: a question about the texts; the answer is compared with what recomputation answers.
* ``continuation``: the end of one document once more; the answer is forced to be what really
  follows it in the book, and its perplexity is compared.
* ``passkey``: exactly one of the documents holds a pass key, and it is asked for.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplug_lab.reuse.runs import (
    BLOCK,
    STOCK,
    Agreement,
    Encode,
    ReuseVariant,
    TooFew,
    encoder,
    engine_arguments,
    engines,
    passages_of,
    perplexity,
    reported,
    turns,
)
from kvplug_lab.spread import Spread

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import Answer, TrialRequest

KINDS = ("greedy", "continuation", "passkey")

PREFIX = (
    "Below are texts out of old plays. A pass key is hidden inside one of them. Read the texts and "
    "remember the pass key, then answer the question that stands at the end.\n\n"
)

QUESTIONS = {
    "greedy": "Question: What do the people in the texts above speak about? Answer:",
    "continuation": "One of the texts above ends with these words and goes on after them:\n\n",
    "passkey": "What is the pass key hidden in the text above? The pass key is",
}

REPEATED = 24
"""Tokens of a document's end that a continuation begins with."""

PUBLISHED = {
    "system": "CacheBlend",
    "source": "arXiv 2405.16444",
    "ttft": "2.2x to 3.3x",
    "against": "full recompute; its own models, hardware and data",
}
"""What CacheBlend's authors report for it; measured on other models and hardware."""


@dataclass(frozen=True)
class RagSizes:
    """Sizes of the experiment.

    Attributes:
        documents: Documents read once.
        shortest: Tokens of the shortest document.
        longest: Tokens of the longest.
        taken: Documents a request takes.
        requests: Requests, of the three kinds in turn.
        generated: Tokens generated after a question about the texts.
        scored: Tokens of a true continuation.
        keys: Documents that hold a pass key.
        seed: Seed of documents, orders and keys.
    """

    documents: int = 20
    shortest: int = 200
    longest: int = 300
    taken: int = 4
    requests: int = 30
    generated: int = 24
    scored: int = 32
    keys: int = 6
    seed: int = 0


QUICK = RagSizes(
    documents=6, shortest=64, longest=96, taken=3, requests=6, generated=4, scored=6, keys=2
)


@dataclass(frozen=True)
class Document:
    """A document and what is known of it.

    Attributes:
        tokens: Its tokens, the empty line behind it among them.
        follows: Tokens that follow it in the book.
        key: The pass key it holds, or the empty string.
    """

    tokens: tuple[int, ...]
    follows: tuple[int, ...]
    key: str = ""


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        kind: One of `KINDS`.
        prompt: Its tokens.
        lengths: Tokens of the prefix, of each document, and of headings where there are any.
        max_tokens: Tokens to generate.
        force: What the answer is made to be, or None.
        key: The pass key asked for, or the empty string.
    """

    kind: str
    prompt: tuple[int, ...]
    lengths: tuple[int, ...]
    max_tokens: int
    force: tuple[int, ...] | None = None
    key: str = ""


@dataclass(frozen=True)
class Workload:
    """Prompts that are read once, and requests after them.

    Attributes:
        warm: A prompt and its lengths per document.
        plain: Requests, documents one behind the other.
        headed: The same with a heading before every document that no one stored.
    """

    warm: list[Asked]
    plain: list[Asked]
    headed: list[Asked]


def workload(encode: Encode, bos: Sequence[int], text: str, sizes: RagSizes) -> Workload:
    """The requests, the same ones for the same arguments.

    Args:
        encode: The model's tokenizer.
        bos: Tokens that every text begins with.
        text: Long plain text.
        sizes: Sizes of the experiment.

    Raises:
        TooFew: A size or the text cannot serve.
    """
    if not sizes.keys <= sizes.documents - sizes.taken + 1:
        raise TooFew(
            f"{sizes.documents} documents with {sizes.keys} pass keys leave fewer than "
            f"{sizes.taken - 1} without; take fewer keys or more documents"
        )
    documents = _documents(encode, text, sizes)
    prefix = (*bos, *encode(PREFIX))
    warm = [Asked("warm", (*prefix, *d.tokens), (len(prefix), len(d.tokens)), 1) for d in documents]
    source = random.Random(f"{sizes.seed} requests")
    plain, headed = [], []
    for number in range(sizes.requests):
        kind = KINDS[number % len(KINDS)]
        chosen = _chosen(kind, number // len(KINDS), documents, sizes.taken, source)
        about = source.choice(chosen)
        plain.append(_asked(encode, kind, prefix, chosen, about, sizes, headings=False))
        headed.append(_asked(encode, kind, prefix, chosen, about, sizes, headings=True))
    return Workload(warm, plain, headed)


def _documents(encode: Encode, text: str, sizes: RagSizes) -> list[Document]:
    source = random.Random(f"{sizes.seed} documents")
    end = list(encode("\n\n"))
    room = sizes.longest + sizes.scored
    found = []
    for number, (tokens, _) in enumerate(
        passages_of(encode, text, sizes.documents, room, sizes.seed)
    ):
        fact: list[int] = []
        key = ""
        if number < sizes.keys:
            key = str(source.randrange(10_000, 100_000))
            fact = list(encode(f"\nThe pass key is {key}. Remember it: {key} is the pass key.\n"))
        length = source.randint(sizes.shortest, sizes.longest) - len(end)
        body = length - len(fact)
        at = source.randint(body // 5, body - body // 5)
        found.append(
            Document(
                (*tokens[:at], *fact, *tokens[at:body], *end),
                tuple(tokens[body : body + sizes.scored]),
                key,
            )
        )
    return found


def _chosen(
    kind: str, number: int, documents: list[Document], taken: int, source: random.Random
) -> list[Document]:
    if kind != "passkey":
        return source.sample(documents, taken)
    keyed = [d for d in documents if d.key]
    others = source.sample([d for d in documents if not d.key], taken - 1)
    chosen = [keyed[number % len(keyed)], *others]
    source.shuffle(chosen)
    return chosen


def _asked(
    encode: Encode,
    kind: str,
    prefix: Sequence[int],
    chosen: Sequence[Document],
    about: Document,
    sizes: RagSizes,
    *,
    headings: bool,
) -> Asked:
    prompt, lengths = list(prefix), [len(prefix)]
    for number, document in enumerate(chosen, 1):
        if headings:
            heading = list(encode(f"Text {number} of {len(chosen)}:\n\n"))
            prompt += heading
            lengths.append(len(heading))
        prompt += document.tokens
        lengths.append(len(document.tokens))
    prompt += encode(QUESTIONS[kind])
    if kind == "continuation":
        end = len(document_end := about.tokens) - len(encode("\n\n"))
        prompt += document_end[max(0, end - REPEATED) : end]
        return Asked(kind, tuple(prompt), tuple(lengths), len(about.follows), about.follows)
    if kind == "passkey":
        key = next(d.key for d in chosen if d.key)
        new = len(encode(f" {key}"))
        return Asked(kind, tuple(prompt), tuple(lengths), new, key=key)
    return Asked(kind, tuple(prompt), tuple(lengths), sizes.generated)


@dataclass
class Measured:
    """Times and answers of one engine.

    Attributes:
        variant: Its name.
        ttft: Seconds to the first token, per request.
        ratio: Stock's seconds by its own, per request.
        busy: Processor seconds to the first token, per request.
        busy_ratio: Stock's processor seconds by its own, per request.
        reused: Tokens of prompts that were not computed, by kvplug and the engine's cache together.
        computed: Tokens of them that were recomputed inside a reused run.
        prompt: Tokens of prompts.
        approximate: Requests whose answer says that reuse was approximate.
        greedy: Answers to questions about the texts against stock's.
        keys: Answers to passkey questions against stock's.
        logprobs: Log-probabilities of the true continuations, in nats.
        found: Pass keys answered right.
        asked: Pass keys asked for.
    """

    variant: str
    ttft: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    busy_ratio: list[float] = field(default_factory=list)
    reused: int = 0
    computed: int = 0
    prompt: int = 0
    approximate: int = 0
    greedy: Agreement = field(default_factory=Agreement)
    keys: Agreement = field(default_factory=Agreement)
    logprobs: list[float] = field(default_factory=list)
    found: int = 0
    asked: int = 0

    def add(self, asked: Asked, answer: Answer, stock: Answer, busy: tuple[float, float]) -> None:
        """Take one more answer, with the processor seconds of its own engine and of stock."""
        assert answer.ttft is not None and stock.ttft is not None
        self.ttft.append(answer.ttft)
        self.ratio.append(stock.ttft / answer.ttft)
        self.busy.append(busy[0])
        self.busy_ratio.append(busy[1] / busy[0])
        self.prompt += answer.prompt_tokens
        reuse = reported(answer)
        self.reused += answer.cached_tokens - reuse.computed
        self.computed += reuse.computed
        self.approximate += reuse.approximate
        if asked.kind == "continuation":
            self.logprobs += answer.logprobs or []
            return
        side = self.keys if asked.kind == "passkey" else self.greedy
        side.add(answer.token_ids, stock.token_ids)
        if asked.kind == "passkey":
            self.asked += 1
            self.found += answer.text.strip().startswith(asked.key)

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {
            "variant": self.variant,
            "requests": len(self.ttft),
            "ttft_s": asdict(Spread.of(self.ttft)),
            "ttft_ratio": asdict(Spread.of(self.ratio)),
            "processor_s": asdict(Spread.of(self.busy)),
            "processor_ratio": asdict(Spread.of(self.busy_ratio)),
            "ttft_ratio_of_sums": sum(r * t for r, t in zip(self.ratio, self.ttft, strict=True))
            / (sum(self.ttft) or 1.0),
            "reused_share": self.reused / self.prompt if self.prompt else 0.0,
            "computed_share": self.computed / self.prompt if self.prompt else 0.0,
            "approximate_requests": self.approximate,
            "greedy": self.greedy.plain(),
            "passkey_agreement": self.keys.plain(),
            "perplexity": perplexity(self.logprobs),
            "passkeys": {"found": self.found, "asked": self.asked},
            "ttft_each": self.ttft,
            "ratio_each": self.ratio,
            "processor_ratio_each": self.busy_ratio,
        }


def request_of(asked: Asked, *, reuse: str | None = "approximate") -> TrialRequest:
    """A request to an engine with its option ``reuse``, or without it for None."""
    from kvplug_lab.engine.trial import TrialRequest

    options: dict[str, Any] = {"segments": list(asked.lengths)}
    if reuse is not None:
        options["reuse"] = reuse
    return TrialRequest(
        list(asked.prompt),
        asked.max_tokens,
        kvplug=options,
        force=list(asked.force) if asked.force is not None else None,
    )


def warm_up(asked: Asked) -> Asked:
    """A forced answer to nothing but the prefix."""
    (prefix, *_), force = asked.lengths, asked.prompt[:2]
    return Asked("warm", asked.prompt[:prefix], (prefix,), len(force), force)


def without_documents(asked: Asked) -> Asked:
    """The same request with its documents left out: what they are worth."""
    first, rest = asked.lengths[0], sum(asked.lengths)
    prompt = (*asked.prompt[:first], *asked.prompt[rest:])
    return Asked(asked.kind, prompt, (first,), asked.max_tokens, asked.force, asked.key)


@dataclass
class RagFigures:
    """Figures of the benchmark.

    Attributes:
        sizes: How much was measured.
        stock: Stock on the plain requests, and on the headed ones where a variant asked them.
        variants: Every variant, in the order asked for.
        bare: Perplexity of the continuations where stock is shown no document.
        counters: Per variant, kvplug's own counters of reuse.
        prompt_tokens: Tokens of a plain request.
    """

    sizes: RagSizes
    stock: list[Measured]
    variants: list[Measured]
    bare: float
    counters: dict[str, dict[str, float]]
    prompt_tokens: Spread

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {
            "sizes": asdict(self.sizes),
            "prompt_tokens": asdict(self.prompt_tokens),
            "perplexity_without_documents": self.bare,
            "stock": [m.plain() for m in self.stock],
            "variants": [m.plain() for m in self.variants],
            "counters": self.counters,
            "published": PUBLISHED,
        }


def measure(
    model: Path,
    text: str,
    sizes: RagSizes,
    variants: Sequence[ReuseVariant],
    logs: Path,
    say: Callable[[str], None],
    *,
    dtype: str = "bfloat16",
) -> RagFigures:
    """Ask stock and every variant the same requests in turn.

    Args:
        model: Model directory.
        text: Long plain text.
        sizes: Sizes of the experiment.
        variants: Ways to reuse, each in an engine of its own, all running at once.
        logs: Folder for the engines' logs.
        say: Called with a line about each step.
        dtype: Of the model.
    """
    encode, bos = encoder(model)
    work = workload(encode, bos, text, sizes)
    longest = max(len(a.prompt) + a.max_tokens for a in [*work.plain, *work.headed])
    tokens = sum(len(a.prompt) + a.max_tokens for a in [*work.warm, *work.plain, *work.headed])
    arguments = engine_arguments(longest, dtype)
    arguments |= {
        "max_num_batched_tokens": max(arguments["max_model_len"], 2048),
        # No document is ever evicted: stock finds all that it can.
        "num_gpu_blocks_override": min(2 * tokens // BLOCK + 64, 2400),
    }
    sections: dict[str, Mapping[str, Any] | None] = {STOCK: None}
    sections |= {v.name: v.section for v in variants}
    kinds: dict[str, bool] = {v.name: v.headed for v in variants}
    stock = {headed: Measured(f"{STOCK}{', headed' * headed}") for headed in (False, True)}
    found = {v.name: Measured(v.name) for v in variants}
    bare: list[float] = []
    with engines(model, sections, logs, say, **arguments) as running:
        for name, engine in running.items():
            say(f"{name}: reading {len(work.warm)} documents")
            # The first forced answer of an engine sets up log-probabilities.
            engine.ask([request_of(warm_up(work.warm[0]), reuse=None)])
            for asked in work.warm:
                engine.ask([request_of(asked, reuse=None)])
        turn = 0
        for headed in (False, True):
            names = [name for name, own in kinds.items() if own is headed]
            if not names:
                continue
            for number, asked in enumerate(work.headed if headed else work.plain, 1):
                answers = {
                    name: running[name].ask([request_of(asked)])[0]
                    for name in turns([STOCK, *names], turn)
                }
                turn += 1
                busy = {name: running[name].processor[0] for name in answers}
                base = answers[STOCK], busy[STOCK]
                stock[headed].add(asked, answers[STOCK], base[0], (base[1], base[1]))
                for name in names:
                    found[name].add(asked, answers[name], base[0], (busy[name], base[1]))
                medians = ", ".join(f"{n} {statistics.median(found[n].ratio):.1f}x" for n in names)
                say(f"request {number} of {sizes.requests}{' with headings' * headed}: {medians}")
        for asked in work.plain:
            if asked.kind == "continuation":
                (answer,) = running[STOCK].ask([request_of(without_documents(asked))])
                bare += answer.logprobs or []
        for engine in running.values():
            engine.finish()
        counters = {name: engine.counters for name, engine in running.items() if name != STOCK}
    return RagFigures(
        sizes,
        [measured for measured in stock.values() if measured.ttft],
        list(found.values()),
        perplexity(bare),
        counters,
        Spread.of([len(a.prompt) for a in work.plain]),
    )
