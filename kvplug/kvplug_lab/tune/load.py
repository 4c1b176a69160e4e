"""The requests that a deployment is chosen for, read from a file.

A line is the body of a request to vLLM's server, ``/v1/completions`` or ``/v1/chat/completions``,
or an object with it as its ``body``: a line of what ``kvplug record --prompts`` wrote, or of the
file that ``vllm run-batch`` takes. Read are the
prompt or the messages, the most tokens of the answer, and what the request asks of kvplug; answers
are greedy and of full length, whatever the request says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular
from kvplug_lab.engine.trial import TrialRequest

MAX_FILE = 256 << 20
"""Largest file that is read, in bytes."""

MAX_REQUESTS = 100_000
LONGEST = 4096
"""Tokens of a prompt of a trace at most."""

ANSWER = 64
"""Tokens of an answer where the request does not limit them."""

Encode = Callable[[Any, Any], list[int]]
"""Text, or messages and the tools that go with them, to tokens."""


class InvalidLoad(KVPlugError, ValueError):
    """A file of requests that cannot be used; the message names the line and the fix."""

    exit_code = 2


@dataclass(frozen=True)
class Load:
    """Requests in the order they came.

    Attributes:
        name: Of the file.
        requests: Their prompts in tokens. A session's request waits for the one before it.
        sessions: Name of each request's session; empty for none.
        real: False if the text was made up, so that its answers mean nothing.
    """

    name: str
    requests: tuple[TrialRequest, ...]
    sessions: tuple[str, ...]
    real: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer."""
        return max(len(r.prompt) + r.max_tokens for r in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(r.prompt) for r in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(r.max_tokens for r in self.requests)

    @property
    def names_segments(self) -> bool:
        """True if requests say where their documents begin and end."""
        return any((r.kvplug or {}).get("segments") for r in self.requests)

    def before(self) -> list[int | None]:
        """Index of the request that each one waits for, or None."""
        latest: dict[str, int] = {}
        found: list[int | None] = []
        for i, session in enumerate(self.sessions):
            found.append(latest.get(session) if session else None)
            if session:
                latest[session] = i
        return found

    def says(self) -> str:
        """One line about it."""
        lengths = [len(r.prompt) for r in self.requests]
        own = len({s for s in self.sessions if s})
        named = f" of {own} sessions" if own else ""
        return (
            f"{len(self.requests)} requests{named}, prompts of {min(lengths):,} to "
            f"{max(lengths):,} tokens, {self.output_tokens:,} tokens of answers"
        )


def read(path: Path, encode: Encode, most: int = MAX_REQUESTS) -> Load:
    """Read a file of requests.

    Args:
        path: The file, JSON lines.
        encode: Turns a prompt, or a list of messages, into tokens.
        most: Requests to take from its start.

    Raises:
        InvalidLoad: It cannot be read, or a line is no request.
    """
    try:
        data = read_regular(path, MAX_FILE)
    except UnreadableFile as error:
        raise InvalidLoad(f"--prompts: cannot read {path}: {error.problem}") from error
    requests: list[TrialRequest] = []
    sessions: list[str] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        if len(requests) >= most:
            break
        try:
            for request, session in _requests(json.loads(line), encode):
                requests.append(request)
                sessions.append(session)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidLoad(f"{path}, line {number}: {error}") from error
    if not requests:
        raise InvalidLoad(f"{path}: holds no request; write one body of a request a line")
    return Load(path.name, tuple(requests[:most]), tuple(sessions[:most]))


def _requests(line: object, encode: Encode) -> Iterator[tuple[TrialRequest, str]]:
    body = line.get("body", line) if isinstance(line, dict) else None
    if not isinstance(body, dict):
        raise ValueError("is no JSON object; write the body of a request to vLLM's server")
    prompts = body.get("prompt")
    if isinstance(prompts, list) and prompts and all(isinstance(p, str | list) for p in prompts):
        # vLLM's server takes several prompts in one body.
        for prompt in prompts:
            yield _request({**body, "prompt": prompt}, encode)
    else:
        yield _request(body, encode)


def _request(body: Mapping[str, Any], encode: Encode) -> tuple[TrialRequest, str]:
    tokens = _prompt(body, encode)
    if not tokens:
        raise ValueError("its prompt is empty")
    limit = body.get("max_tokens", body.get("max_completion_tokens"))
    limit = ANSWER if limit is None else limit
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"max_tokens must be a whole number above 0, not {limit!r}")
    params = body.get("kv_transfer_params") or {}
    own = params.get("kvplug") if isinstance(params, dict) else None
    options = dict(own) if isinstance(own, dict) else {}
    salt = body.get("cache_salt")
    session = options.get("session_id") or body.get("user") or ""
    if not isinstance(session, str) or not isinstance(salt, str | None):
        raise ValueError("session_id, user and cache_salt must be texts")
    return TrialRequest(tokens, limit, kvplug=options or None, salt=salt), session


def _prompt(body: Mapping[str, Any], encode: Encode) -> list[int]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError("messages must be a list of objects")
        return encode(messages, body.get("tools"))
    if isinstance(prompt, str):
        return encode(prompt, None)
    if isinstance(prompt, list) and prompt and all(type(t) is int and t >= 0 for t in prompt):
        return list(prompt)
    raise ValueError("has neither `prompt`, a text or a list of token ids, nor `messages`")


def encoder(model: Path) -> Encode:
    """Tokens of prompts and of messages, by a model's tokenizer and chat template."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def encode(text: Any, tools: Any) -> list[int]:
        if isinstance(text, str):
            return list(tokenizer(text).input_ids)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{model} has no chat template; write `prompt` instead of `messages`")
        try:
            written = tokenizer.apply_chat_template(
                text, tools=tools, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # Templates raise what they like.
            raise ValueError(f"the chat template refuses its messages: {error}") from error
        return list(tokenizer(written, add_special_tokens=False).input_ids)

    return encode


def from_trace(path: Path, model: Path, block_size: int, longest: int, most: int) -> Load:
    """The first requests of a trace of ``kvplug record``, with made-up text of the same sharing.

    Raises:
        TraceError: The file is no trace.
    """
    from kvplug.hosts.trace import traces
    from kvplug_lab.engine.against_simulator import from_trace

    trace = traces.read(path)
    made = from_trace(
        trace, model, block_size=block_size, requests=most, longest=longest, output_tokens=1
    )
    requests = []
    for request, tokens in zip(made.requests, trace.output_tokens.tolist(), strict=False):
        requests.append(replace(request, max_tokens=max(1, min(int(tokens), ANSWER)), wave=0))
    names = trace.session.tolist() if trace.names_sessions else [0] * trace.num_requests
    sessions = [f"s{name}" if name else "" for name in names[: len(requests)]]
    return Load(path.name, tuple(requests), tuple(sessions), real=False)


@dataclass(frozen=True)
class Repeated:
    """How much of the prompts was there before, in a cache without end.

    Attributes:
        prefix: Tokens of whole blocks that an earlier request began with as well.
        elsewhere: Tokens of other runs of a block's length that stood in an earlier request
            anywhere.
        tokens: Tokens of all prompts.
    """

    prefix: int
    elsewhere: int
    tokens: int


def repeated(load: Load, block_size: int) -> Repeated:
    """Count what prompts repeat; answers count as text that was there, once their request came."""
    known: set[tuple[str | None, int]] = set()
    runs: set[tuple[str | None, int]] = set()
    prefix = elsewhere = 0
    for request in load.requests:
        tokens = list(request.prompt)
        assert all(isinstance(t, int) for t in tokens)
        salt = request.salt
        shared = 0
        chain = list(chained(tokens, block_size))
        for key in chain:
            if (salt, key) not in known:
                break
            shared += block_size
        # As in vLLM, the last token is always computed.
        shared = min(shared, (len(tokens) - 1) // block_size * block_size)
        prefix += shared
        at = shared
        while at + block_size <= len(tokens):
            if (salt, hash(tuple(tokens[at : at + block_size]))) in runs:
                elsewhere += block_size
                at += block_size
            else:
                at += 1
        known |= {(salt, key) for key in chain}
        runs |= {
            (salt, hash(tuple(tokens[i : i + block_size])))
            for i in range(len(tokens) - block_size + 1)
        }
    return Repeated(prefix, elsewhere, load.prompt_tokens)


def chained(tokens: Sequence[Any] | str, block_size: int) -> Iterator[int]:
    """A number for each whole block, of what it and all before it hold."""
    key = 0
    for at in range(0, len(tokens) - block_size + 1, block_size):
        key = hash((key, *tokens[at : at + block_size]))
        yield key
