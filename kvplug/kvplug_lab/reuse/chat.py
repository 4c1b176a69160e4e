"""A chat over its window: the client drops the oldest turns, and the others move to the front.

The system prompt stays, so stock finds it in its prefix cache and recomputes everything behind it
at every turn that drops one. kvplug re-rotates the keys of the stored turns to their new positions.
User and assistant speak a play in turns. Every engine serves each turn twice: freely, for the time
to first token and the greedy reply, and with the reply forced to be the play's own next lines, for
their perplexity. The chat goes on with the play, so all engines read the same text, and no reply is
a copy of the one before it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    reported,
    turns,
)
from kvplug_lab.spread import Spread

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import Answer

SYSTEM = (
    "<|im_start|>system\nYou and the reader speak an old play together. The reader says some of "
    "it, and you go on with the words that follow.<|im_end|>\n"
)
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


@dataclass(frozen=True)
class ChatSizes:
    """Sizes of the experiment.

    Attributes:
        turns: Turns of the chat.
        window: Tokens of a prompt and its answer at most: the client drops the oldest turns beyond.
        spoken: Tokens of the play that the user speaks per turn.
        reply: Tokens of a reply.
        seed: Seed of where in the plays the chat begins.
    """

    turns: int = 30
    window: int = 1024
    spoken: int = 64
    reply: int = 24
    seed: int = 0


QUICK = ChatSizes(turns=6, window=256, spoken=32, reply=4)


@dataclass
class History:
    """The turns of a chat in tokens, and what of them is still sent.

    Attributes:
        system: Tokens of the system prompt.
        window: Tokens of a prompt and its answer at most.
        past: Tokens of each past turn: of the user, and of the reply.
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
        """Add a turn: tokens of the user, and of the reply."""
        self.past.append(list(turn))


@dataclass
class Turn:
    """One turn as one engine served it.

    Attributes:
        number: From 1.
        dropped: Turns no longer sent.
        prompt: Tokens of the prompt.
        reused: Tokens of it that were not computed, by kvplug and the engine's cache together.
        computed: Tokens of it recomputed inside a reused run.
        ttft: Seconds to the first token.
        ratio: Stock's seconds by its own.
        busy: Processor seconds to the first token.
        busy_ratio: Stock's processor seconds by its own.
        before: Tokens of the reply before it differs from stock's.
        reply: Tokens of the reply.
        nll: Mean negative log-likelihood of the play's own words, nats a token.
        approximate: Whether the answer reports approximate reuse.
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
    nll: float
    approximate: bool

    @classmethod
    def of(
        cls,
        number: int,
        dropped: int,
        answer: Answer,
        stock: Answer,
        busy: tuple[float, float],
        forced: Answer,
    ) -> Turn:
        """Compare an answer with stock's answer to the same prompt.

        Args:
            number: From 1.
            dropped: Turns no longer sent.
            answer: The answer.
            stock: Stock's answer.
            busy: Processor seconds of both.
            forced: The answer whose tokens were forced to be the play's.
        """
        assert answer.ttft is not None and stock.ttft is not None
        same = Agreement()
        same.add(answer.token_ids, stock.token_ids)
        reuse = reported(answer)
        return cls(
            number,
            dropped,
            answer.prompt_tokens,
            answer.cached_tokens - reuse.computed,
            reuse.computed,
            answer.ttft,
            stock.ttft / answer.ttft,
            busy[0],
            busy[1] / busy[0],
            same.before[0],
            len(stock.token_ids),
            -statistics.fmean(forced.logprobs or [math.nan]),
            reuse.approximate,
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
            "perplexity": math.exp(statistics.fmean(t.nll for t in own)) if own else math.nan,
            "approximate_turns": sum(t.approximate for t in own),
            **same.plain(),
        }
    return found


@dataclass
class ChatFigures:
    """Figures of the chat.

    Attributes:
        sizes: How much was measured.
        turns: Per engine, stock among them, every turn.
        replies: Stock's replies.
        counters: Per variant, kvplug's own counters of reuse.
    """

    sizes: ChatSizes
    turns: dict[str, list[Turn]]
    counters: dict[str, dict[str, float]]
    replies: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {
            "sizes": asdict(self.sizes),
            "summary": {name: summary(own) for name, own in self.turns.items()},
            "turns": {name: [asdict(t) for t in own] for name, own in self.turns.items()},
            "counters": self.counters,
            "replies": self.replies,
            "different_replies": len(set(self.replies)),
        }


def speeches(encode: Encode, text: str, sizes: ChatSizes) -> list[tuple[list[int], list[int]]]:
    """The user's part of each turn, framed, and the play's own words after it."""
    opens, closes = list(encode(USER)), list(encode(END + ASSISTANT))
    turn = sizes.spoken + sizes.reply
    ((play, _),) = passages_of(encode, text, 1, sizes.turns * turn, sizes.seed)
    return [
        ([*opens, *play[at : at + sizes.spoken], *closes], play[at + sizes.spoken : at + turn])
        for at in range(0, sizes.turns * turn, turn)
    ]


def measure(
    model: Path,
    text: str,
    sizes: ChatSizes,
    variants: Sequence[ReuseVariant],
    logs: Path,
    say: Callable[[str], None],
    *,
    dtype: str = "bfloat16",
) -> ChatFigures:
    """Hold the chat with stock and with every variant in turn.

    Args:
        model: Model directory.
        text: Long plain text, the play.
        sizes: Sizes of the experiment.
        variants: Ways to reuse, each in an engine of its own, all running at once.
        logs: Folder for the engines' logs.
        say: Called with a line about each step.
        dtype: Of the model.
    """
    from kvplug_lab.engine.trial import TrialRequest

    encode, _ = encoder(model)
    asked = speeches(encode, text, sizes)
    end = list(encode(END))
    history = History(list(encode(SYSTEM)), sizes.window)
    arguments = engine_arguments(sizes.window, dtype)
    length = arguments["max_model_len"]
    arguments |= {
        "max_num_batched_tokens": max(length, 2048),
        "num_gpu_blocks_override": min(sizes.turns * length // BLOCK + 64, 1600),
    }
    sections = {STOCK: None} | {v.name: v.section for v in variants}
    served: dict[str, list[Turn]] = {name: [] for name in sections}
    replies: list[str] = []
    with engines(model, sections, logs, say, **arguments) as running:
        for engine in running.values():
            # The first forced answer of an engine sets up log-probabilities.
            engine.ask([TrialRequest(list(history.system), 2, force=[0, 0])])
        for number, (user, follows) in enumerate(asked, 1):
            prompt, lengths = history.prompt(user, sizes.reply)
            options = {"reuse": "approximate", "segments": lengths, "session_id": "chat"}
            request = TrialRequest(prompt, sizes.reply, kvplug=options)
            scored = replace(request, force=follows)
            answers, busy, forced = {}, {}, {}
            for name in turns([*running], number):
                (answers[name],) = running[name].ask([request])
                (busy[name],) = running[name].processor
                (forced[name],) = running[name].ask([scored])
            stock = answers[STOCK]
            for name, answer in answers.items():
                both = busy[name], busy[STOCK]
                turn = Turn.of(number, history.first, answer, stock, both, forced[name])
                served[name].append(turn)
            replies.append(stock.text)
            history.add([*user, *follows, *end])
            say(
                f"turn {number} of {sizes.turns}, {len(prompt)} tokens, {history.first} dropped: "
                + ", ".join(f"{n} {own[-1].ttft:.2f} s" for n, own in served.items())
            )
        for engine in running.values():
            engine.finish()
        counters = {name: engine.counters for name, engine in running.items() if name != STOCK}
    return ChatFigures(sizes, served, counters, replies)
