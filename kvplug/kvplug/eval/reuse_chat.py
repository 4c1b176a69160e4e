"""A chat over its window: the client drops the oldest turns, and what is left moves to the front.

The system prompt stays, so stock finds it in its prefix cache and computes everything behind it
again at every turn that drops one. kvplug turns the keys of the stored turns to where they now
stand. Both engines are asked the same prompt in turn; the history goes on with what stock answered,
so that both read the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplug.eval.reuse_runs import (
    BLOCK,
    STOCK,
    Agreement,
    Encode,
    Spread,
    TooFew,
    Variant,
    encoder,
    engines,
    said,
    stretches,
    turns,
)

if TYPE_CHECKING:
    from kvplug.hosts.vllm.trial import Answer

SYSTEM = (
    "<|im_start|>system\nYou are a helpful assistant who talks with a reader about old plays and "
    "answers in a few plain words. Stay with what the reader quotes.<|im_end|>\n"
)
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


@dataclass(frozen=True)
class Sizes:
    """How much of what.

    Attributes:
        turns: Turns of the chat.
        window: Tokens of a prompt and its answer at most: the client drops the oldest turns beyond.
        said: Tokens of what the user quotes in a turn.
        reply: Tokens of a reply.
        seed: Seed of what is quoted.
    """

    turns: int = 30
    window: int = 1024
    said: int = 64
    reply: int = 24
    seed: int = 0


QUICK = Sizes(turns=6, window=256, said=32, reply=4)


@dataclass
class History:
    """The turns of a chat in tokens, and what of them is still sent.

    Attributes:
        system: Tokens of the system prompt.
        window: Tokens of a prompt and its answer at most.
        past: Tokens of each past turn: what the user said, and the reply.
        first: The oldest turn still sent.
    """

    system: Sequence[int]
    window: int
    past: list[list[int]] = field(default_factory=list)
    first: int = 0

    def prompt(self, user: Sequence[int], reply: int) -> tuple[list[int], list[int]]:
        """The prompt of the next turn and the lengths of its segments: the system prompt and each
        past turn; the oldest turns are dropped until prompt and reply fit the window.

        Raises:
            TooFew: The window does not hold even the new turn.
        """
        new = len(self.system) + len(user) + reply
        if new > self.window:
            raise TooFew(f"a turn takes {new} tokens; the window has {self.window}")
        while new + sum(map(len, self.past[self.first :])) > self.window:
            self.first += 1
        kept = self.past[self.first :]
        prompt = [*self.system, *(t for turn in kept for t in turn), *user]
        return prompt, [len(self.system), *map(len, kept)]

    def add(self, turn: Sequence[int]) -> None:
        """Note a turn: what the user said and the reply."""
        self.past.append(list(turn))


@dataclass
class Turn:
    """One turn as one engine served it.

    Attributes:
        number: From 1.
        dropped: Turns no longer sent.
        prompt: Tokens of the prompt.
        reused: Tokens of it not prefilled, by its own and the engine's cache together.
        computed: Tokens of them computed anew inside a reused run.
        ttft: Seconds to the first token.
        ratio: Stock's seconds by its own.
        busy: Processor seconds to the first token.
        busy_ratio: Stock's processor seconds by its own.
        before: Tokens of the reply before it differs from stock's.
        reply: Tokens of the reply.
        approximate: Whether the answer says that reuse was approximate.
    """

    number: int
    dropped: int
    prompt: int
    reused: int
    computed: int
    ttft: float
    ratio: float
    busy: float
    busy_ratio: float
    before: int
    reply: int
    approximate: bool

    @classmethod
    def of(
        cls, number: int, dropped: int, answer: Answer, stock: Answer, busy: tuple[float, float]
    ) -> Turn:
        """Of an answer and stock's answer to the same prompt, with both processor seconds."""
        assert answer.ttft is not None and stock.ttft is not None
        same = Agreement()
        same.add(answer.token_ids, stock.token_ids)
        told = said(answer)
        return cls(
            number,
            dropped,
            answer.prompt_tokens,
            answer.cached_tokens,
            told.computed,
            answer.ttft,
            stock.ttft / answer.ttft,
            busy[0],
            busy[1] / busy[0],
            same.before[0],
            len(stock.token_ids),
            told.approximate,
        )


def summary(served: Sequence[Turn]) -> dict[str, dict[str, Any]]:
    """Turns that fit the window, and turns after the first was dropped, each summed up."""
    found = {}
    parts = {
        "within the window": [t for t in served if not t.dropped],
        "over the window": [t for t in served if t.dropped],
    }
    for name, own in parts.items():
        same = Agreement([t.before for t in own], [t.reply for t in own])
        prompt = sum(t.prompt for t in own)
        found[name] = {
            "turns": len(own),
            "ttft_s": asdict(Spread.of([t.ttft for t in own])),
            "ttft_ratio": asdict(Spread.of([t.ratio for t in own])),
            "processor_ratio": asdict(Spread.of([t.busy_ratio for t in own])),
            "reused_share": sum(t.reused for t in own) / prompt if prompt else 0.0,
            "computed_share": sum(t.computed for t in own) / prompt if prompt else 0.0,
            "approximate_turns": sum(t.approximate for t in own),
            **same.plain(),
        }
    return found


@dataclass
class Result:
    """What the chat showed.

    Attributes:
        sizes: How much was measured.
        turns: Per engine, stock among them, every turn.
        counters: Per variant, kvplug's own counters of reuse.
    """

    sizes: Sizes
    turns: dict[str, list[Turn]]
    counters: dict[str, dict[str, float]]

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "sizes": asdict(self.sizes),
            "summary": {name: summary(own) for name, own in self.turns.items()},
            "turns": {name: [asdict(t) for t in own] for name, own in self.turns.items()},
            "counters": self.counters,
        }


def users(encode: Encode, text: str, sizes: Sizes) -> list[list[int]]:
    """What the user says in each turn: a quotation and the beginning of the reply's frame."""
    asks = list(encode("\n\nWhat do you make of this?"))
    opens, closes = list(encode(USER)), list(encode(END + ASSISTANT))
    quoted = stretches(encode, text, sizes.turns, sizes.said, sizes.seed)
    return [[*opens, *tokens, *asks, *closes] for tokens, _ in quoted]


def measure(
    model: Path,
    text: str,
    sizes: Sizes,
    variants: Sequence[Variant],
    logs: Path,
    say: Callable[[str], None],
) -> Result:
    """Hold the chat with stock and with every variant in turn.

    Args:
        model: Model directory.
        text: Long plain text that the user quotes from.
        sizes: How much.
        variants: Ways to reuse, each an engine of its own that lives beside the others.
        logs: Folder for the engines' logs.
        say: Told what happens.
    """
    from kvplug.hosts.vllm.trial import TrialRequest

    encode, _ = encoder(model)
    asked = users(encode, text, sizes)
    end = list(encode(END))
    history = History(list(encode(SYSTEM)), sizes.window)
    length = -(-(sizes.window + 1) // BLOCK) * BLOCK
    arguments = {
        "block_size": BLOCK,
        "max_model_len": length,
        "max_num_batched_tokens": max(length, 2048),
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": min(sizes.turns * length // BLOCK + 64, 1600),
    }
    sections = {STOCK: None} | {v.name: v.section for v in variants}
    served: dict[str, list[Turn]] = {name: [] for name in sections}
    with engines(model, sections, logs, say, **arguments) as living:
        for engine in living.values():
            engine.ask([TrialRequest(list(history.system), 2)])
        for number, user in enumerate(asked, 1):
            prompt, lengths = history.prompt(user, sizes.reply)
            wish = {"reuse": "approximate", "segments": lengths, "session_id": "chat"}
            request = TrialRequest(prompt, sizes.reply, kvplug=wish)
            answers = {name: living[name].ask([request])[0] for name in turns([*living], number)}
            stock, base = answers[STOCK], living[STOCK].processor[0]
            for name, answer in answers.items():
                busy = living[name].processor[0], base
                served[name].append(Turn.of(number, history.first, answer, stock, busy))
            history.add([*user, *answers[STOCK].token_ids, *end])
            say(
                f"turn {number} of {sizes.turns}, {len(prompt)} tokens, {history.first} dropped: "
                + ", ".join(f"{n} {own[-1].ttft:.2f} s" for n, own in served.items())
            )
        for engine in living.values():
            engine.finish()
        counters = {name: engine.counters for name, engine in living.items() if name != STOCK}
    return Result(sizes, served, counters)
