"""A question about a long text, and how it becomes the tokens of a prompt.

RULER's and LongBench's tasks are made as text (`Asked`). A `Reader` writes them in the form that
the model was trained on, its chat template if it has one, and cuts them where the cache is to be
pruned: before the question, as a policy meets a document in service, or behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.fidelity.tasks import Prompt, Wanted

LATER, WITH = "later", "with"

ASK = (LATER, WITH)
"""Whether a question follows what is pruned, or is read before."""

SLOT = "\x02KVPLUG\x02"
"""Stands for a message while a chat template is written out."""


class BadQuestion(KVPlugError, ValueError):
    """A question cannot be asked in the tokens there are; the message says of which task."""


@dataclass(frozen=True)
class Asked:
    """A question as text.

    Attributes:
        task: The task's name, e.g. ``niah_single_1``.
        group: What it is averaged with: ``ruler`` or ``longbench``.
        name: Unique among the questions.
        context: The text to read.
        question: What is asked, behind the text.
        lead: The beginning of the answer, given to the model.
        answers: What is right.
        score: Name of a function in `kvplug_lab.fidelity.scores.SCORES`.
        new_tokens: Most tokens of an answer.
        classes: All classes of a classification.
        first_line: Whether the answer ends with its first line.
        chat: Whether the model's chat template is used, if it has one.
    """

    task: str
    group: str
    name: str
    context: str
    question: str
    lead: str
    answers: tuple[str, ...]
    score: str
    new_tokens: int
    classes: tuple[str, ...] = ()
    first_line: bool = False
    chat: bool = True

    @property
    def wanted(self) -> Wanted:
        """How an answer is scored."""
        return Wanted(self.group, self.answers, self.score, self.classes, self.first_line)


class Reader:
    """Writes questions in a model's tokens.

    Args:
        tokenizer: A tokenizer of transformers.
        bos: Tokens that a text without a chat template begins with.
        chat: Whether to use the chat template; None for whether there is one.

    Raises:
        BadQuestion: A chat template is asked for and there is none, or it leaves the message out.
    """

    def __init__(self, tokenizer: Any, bos: Sequence[int] = (), chat: bool | None = None):
        self.tokenizer = tokenizer
        self.bos = tuple(bos)
        has = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has:
            raise BadQuestion("--chat: the model's tokenizer has no chat template: use --no-chat")
        self.chat = has if chat is None else chat
        self._before: tuple[int, ...] = ()
        self._after: tuple[int, ...] = ()
        if self.chat:
            written = tokenizer.apply_chat_template(
                [{"role": "user", "content": SLOT}], tokenize=False, add_generation_prompt=True
            )
            before, slot, after = written.partition(SLOT)
            if not slot:
                raise BadQuestion("--chat: the chat template leaves the message out: use --no-chat")
            self._before, self._after = tuple(self._own(before)), tuple(self._own(after))

    def _own(self, text: str) -> list[int]:
        """Tokens of the template's own text, special ones among them."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Tokens of text that may hold anything: nothing in it is read as a special token."""
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        found = {self.tokenizer.eos_token_id}
        if self.chat and self._after:
            # A turn's end, where the template names another than the end of the text.
            found |= {i for i in self._after[:1] if i in set(self.tokenizer.all_special_ids)}
        return tuple(sorted(i for i in found if i is not None))

    def prompt(self, asked: Asked, ask: str = LATER, most: int | None = None) -> Prompt:
        """A question in tokens.

        Args:
            asked: The question.
            ask: `LATER` or `WITH`.
            most: Most tokens of context and question; what is longer loses its middle.

        Raises:
            BadQuestion: The question alone is longer, or the context is empty.
        """
        chat = self.chat and asked.chat
        context = [*(self._before if chat else self.bos), *self.encode(asked.context)]
        question = [*self.encode(asked.question), *(self._after if chat else ())]
        # Behind a template's own line break the answer begins without a space.
        lead = self.encode(asked.lead.lstrip() if chat else asked.lead)
        over = 0 if most is None else len(context) + len(question) + len(lead) - most
        if over > 0:
            assert most is not None
            half = most // 2
            back = most - half - len(question) - len(lead)
            if half < 1 or back < 0:
                raise BadQuestion(
                    f"{asked.name}: the question takes {len(question) + len(lead)} tokens: more "
                    f"than half of the {most} there are"
                )
            context = context[:half] + context[len(context) - back :]
        if ask == WITH:
            context, question = context + question, []
        then = [*question, *lead]
        if not then:
            # The first token of the answer must come from what was kept.
            context, then = context[:-1], context[-1:]
        if not context:
            raise BadQuestion(f"{asked.name}: the context is empty")
        return Prompt(
            asked.task,
            asked.name,
            tuple(context),
            tuple(then),
            new_tokens=asked.new_tokens,
            wanted=asked.wanted,
        )

    def length(self, asked: Asked) -> int:
        """Tokens of a question and of the longest answer to it."""
        prompt = self.prompt(asked)
        return len(prompt.context) + len(prompt.then) + asked.new_tokens

    def text(self, prompt: Prompt) -> str:
        """A prompt as text, as a server takes it: without what its tokenizer adds by itself."""
        ids = [*prompt.context, *prompt.then]
        added = self._added()
        if added and tuple(ids[: len(added)]) == added:
            ids = ids[len(added) :]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _added(self) -> tuple[int, ...]:
        with_ends: list[int] = self.tokenizer("", verbose=False).input_ids
        return tuple(with_ends[:1])
