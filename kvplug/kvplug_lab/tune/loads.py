"""Two loads of real text to try ``kvplug tune`` on, written as bodies of requests.

``rag``: retrieved documents in any order before a question, from a collection that is much smaller
than what is asked of it. ``chat``: long conversations that take turns, so that each returns when
all the others have been served meanwhile::

    python -m kvplug_lab.tune.loads rag rag.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvplug_lab import texts

PREFIX = (
    "You answer questions about old plays from the passages below, in one sentence, and name who "
    "speaks. If they do not say, answer that they do not say.\n\n"
)
QUESTIONS = (
    "What do the people in these passages want?",
    "Who is in danger, and from whom?",
    "What is asked, and what is answered?",
    "Which of them speaks of the night?",
)


def rag(
    requests: int = 6,
    documents: int = 5,
    taken: int = 3,
    words: int = 36,
    output_tokens: int = 6,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Questions behind some documents of a collection, in any order.

    Args:
        requests: Requests.
        documents: Documents of the collection.
        taken: Documents of a request.
        words: Words of a document.
        output_tokens: Tokens of an answer.
        seed: Seed of documents and orders.
    """
    choose = random.Random(seed)
    passages = [
        _paragraph(one) for one in texts.passages(texts.shakespeare(), documents, words, seed)
    ]
    found = []
    for i in range(requests):
        chosen = choose.sample(passages, taken)
        text = PREFIX + "".join(f"{one}\n\n" for one in chosen)
        prompt = f"{text}Question: {QUESTIONS[i % len(QUESTIONS)]} Answer:"
        found.append({"prompt": prompt, "max_tokens": output_tokens})
    return found


def chat(
    sessions: int = 3,
    turns: int = 3,
    words: int = 30,
    output_tokens: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Conversations about a play that take turns.

    The assistant's words are the play's own, as if an earlier deployment had answered them.

    Args:
        sessions: Conversations.
        turns: Turns of each.
        words: Words that a turn of the user brings.
        output_tokens: Tokens of an answer.
        seed: Seed of the texts.
    """
    said = texts.passages(texts.shakespeare(), sessions * turns, words, seed)
    answered = texts.passages(texts.shakespeare(), sessions * turns, 12, seed + 1)
    system = {"role": "system", "content": PREFIX.strip()}
    past: list[list[dict[str, str]]] = [[system] for _ in range(sessions)]
    found = []
    choose = random.Random(seed)
    for turn in range(turns):
        for session in choose.sample(range(sessions), sessions):
            number = turn * sessions + session
            content = f"{said[number]}\n\n{QUESTIONS[number % len(QUESTIONS)]}"
            past[session].append({"role": "user", "content": content})
            found.append(
                {
                    "messages": [*past[session]],
                    "max_tokens": output_tokens,
                    "user": f"session-{session}",
                }
            )
            past[session].append({"role": "assistant", "content": answered[number]})
    return found


def _paragraph(text: str) -> str:
    """Without empty lines: a document is one paragraph."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


LOADS = {"rag": rag, "chat": chat}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m kvplug_lab.tune.loads``."""
    parser = argparse.ArgumentParser(prog="python -m kvplug_lab.tune.loads")
    parser.add_argument("load", choices=sorted(LOADS))
    parser.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    bodies: list[dict[str, Any]] = LOADS[given.load]()  # type: ignore[operator]
    text = "".join(json.dumps(body, ensure_ascii=False) + "\n" for body in bodies)
    given.out.write_text(text, encoding="utf-8")
    print(f"{len(bodies)} requests: {given.out}")


if __name__ == "__main__":
    main()
