"""Record: writes down which blocks requests refer to, while another policy decides.

What a prefix-cache order is worth depends on the traffic, and traffic can be replayed through an
order only if somebody wrote it down. This policy hands every decision to the one it wraps and
keeps a trace of the requests that ended: which blocks each one referred to, as numbers, and when.

A block's number says only "the same text up to here as the other blocks with this number": the
engine's content hashes are hashed again under a random key that lives as long as the process, and
numbered in the order they were first seen. Session names are treated alike. Neither text nor
token ids nor a hash that could be looked up elsewhere reaches the file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, field_validator

from kvplug.contract import (
    BlockFact,
    EngineView,
    Kind,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
    RequestView,
)
from kvplug.registry import plugins

# vLLM shows what is logged below its own name.
logger = logging.getLogger("vllm.kvplug")

REQUEST_BYTES = 36
REFERENCE_BYTES = 4
DISTINCT_BYTES = 200
"""Memory of one request, one block it refers to, and one block never seen before (a digest of 16
bytes, its number and their place in a dict)."""


class Record(PrefixCachePolicy):
    """Records a trace around another prefix-cache policy.

    Memory: 36 bytes per request, 4 per block it refers to, and about 200 per distinct block, up
    to `Options.memory`; then recording ends and the policy inside goes on. Time: about 1 us per
    block of a request, when it ends. A file that cannot be written is counted and logged once.
    """

    name = "record"
    changes = "nothing: another policy decides, and the blocks requests refer to are recorded"
    needs = frozenset({BlockFact.FINISHED})
    paper = "the trace format of kvplug simulate; after Mooncake (FAST'25), arXiv 2407.00079"

    class Options(PolicyOptions):
        """Options of `Record`."""

        path: str = Field(
            "kvplug-trace.npz",
            description="trace file, .npz; an existing file is kept, and -1, -2, ... is "
            "added to the name",
        )
        of: str | dict[str, Any] = Field(
            "lru",
            description="policy that decides: a name, or {use: NAME, option: value}",
        )
        every: int = Field(
            30, ge=1, le=86_400, description="seconds between two writes while requests end"
        )
        memory: int = Field(
            256,
            ge=1,
            le=1 << 20,
            description="MiB of memory for the trace, after which recording ends",
        )

        @field_validator("path")
        @classmethod
        def _is_an_npz(cls, value: str) -> str:
            if not value.endswith(".npz") or value == ".npz":
                raise ValueError("path must name an .npz file")
            return value

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.inner = _inner(self.options.of, engine)
        self.needs = self.inner.needs | {BlockFact.FINISHED}
        self._asks_inner = BlockFact.FINISHED in self.inner.needs
        self._trace = _Trace(engine.block_size, self.options.memory << 20)
        self._writer = _Writer(Path(self.options.path), self.options.every, self._trace.snapshot)
        self._failed = 0

    # -- the policy inside decides -------------------------------------------------------------

    def on_release(self, released: Released) -> None:
        self.inner.on_release(released)

    def on_hit(self, ids: Sequence[int]) -> None:
        self.inner.on_hit(ids)

    def on_remove(self, ids: Sequence[int]) -> None:
        self.inner.on_remove(ids)

    def victims(self, n: int) -> Sequence[int]:
        return self.inner.victims(n)

    # -- recording -----------------------------------------------------------------------------

    def on_finished(
        self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int
    ) -> None:
        if self._asks_inner:
            self.inner.on_finished(request, keys, num_output_tokens)
        try:
            self._record(request, keys, num_output_tokens)
        except Exception:  # an observer must not cost the engine its eviction order
            self._failed += 1
            if self._failed == 1:
                logger.exception("record: a request could not be recorded; others are tried")

    def _record(self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int) -> None:
        trace = self._trace
        if not trace.add(request, keys, num_output_tokens):
            if trace.skipped == 1:
                logger.warning(
                    "record: the trace has reached %d MiB; recording ends with request %d",
                    trace.limit >> 20,
                    len(trace),
                )
            return
        self._writer.start()

    def on_stop(self) -> None:
        self._writer.finish()
        self.inner.on_stop()

    def counters(self) -> dict[str, float]:
        trace, writer = self._trace, self._writer
        return self.inner.counters() | {
            "recorded_requests": len(trace),
            "recorded_blocks": len(trace.ids),
            "distinct_blocks": trace.distinct,
            "skipped_requests": trace.skipped + self._failed,
            "trace_writes": writer.written,
            "failed_writes": writer.failed,
        }


def _inner(of: str | dict[str, Any], engine: EngineView) -> PrefixCachePolicy:
    """Build the policy that decides. Raises ValueError if it is unknown or unusable."""
    if isinstance(of, str):
        name, rest = of, {}
    else:
        rest = dict(of)
        name = rest.pop("use", None)
        if not isinstance(name, str):
            raise ValueError("of does not name a policy: write `of: {use: NAME, ...}`")
    registry = plugins().registry
    policy = registry.get(Kind.PREFIX_CACHE, name)
    if policy is None or policy is Record:
        near = [n for n in registry.nearest(Kind.PREFIX_CACHE, name) if n != Record.name]
        known = near or [n for n in registry.names(Kind.PREFIX_CACHE) if n != Record.name]
        what = "record cannot wrap itself" if policy is Record else f"there is no policy {name!r}"
        raise ValueError(f"of: {what}; use {' or '.join(known)}")
    if unfit := sorted(engine.features - policy.supports):
        raise ValueError(f"of: {name} does not support {', '.join(unfit)}, which must be disabled")
    try:
        options = policy.Options.model_validate(rest)
    except ValidationError as error:
        problems = [
            f"of.{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else f"of: {e['msg']}"
            for e in error.errors(include_url=False)
        ]
        raise ValueError(f"{'; '.join(problems)} ({name})") from None
    built = policy(options, engine)
    assert isinstance(built, PrefixCachePolicy)
    return built


Arrays = dict[str, Any]


class _Trace:
    """The requests so far, as flat arrays; an id per block, numbered as first seen."""

    def __init__(self, block_size: int, limit: int):
        self.block_size = block_size
        self.limit = limit
        self.skipped = 0
        self.ids = array("i")
        self._ends = array("q")
        self._arrival = array("d")
        self._prompt = array("q")
        self._output = array("q")
        self._session = array("i")
        self._salt = os.urandom(32)
        self._number: dict[bytes, int] = {}
        self._sessions: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def distinct(self) -> int:
        """Distinct blocks."""
        return len(self._number)

    def size(self) -> int:
        """Bytes in use, about."""
        return (
            REQUEST_BYTES * len(self)
            + REFERENCE_BYTES * len(self.ids)
            + DISTINCT_BYTES * (len(self._number) + len(self._sessions))
        )

    def add(self, request: RequestView, keys: Sequence[bytes], num_output_tokens: int) -> bool:
        """Take in a request, or skip it where it might not fit; ids number all or none of it."""
        most = REQUEST_BYTES + DISTINCT_BYTES + (REFERENCE_BYTES + DISTINCT_BYTES) * len(keys)
        # Once one was skipped all are: a trace with gaps would be of another workload.
        if self.skipped or self.size() + most > self.limit:
            self.skipped += 1
            return False
        # All that can fail comes first: the arrays must not get out of step.
        arrival, prompt = float(request.arrival), int(request.num_prompt_tokens)
        session = 0
        if request.session_id is not None:
            named = self._digest(request.session_id.encode("utf-8", "surrogatepass"))
            session = self._sessions.setdefault(named, len(self._sessions) + 1)
        number = self._number
        digests = [self._digest(key) for key in keys]
        ids = [number.setdefault(digest, len(number)) for digest in digests]
        self.ids.extend(ids)
        self._arrival.append(arrival)
        self._prompt.append(prompt)
        self._output.append(num_output_tokens)
        self._session.append(session)
        self._ends.append(len(self.ids))
        return True

    def _digest(self, what: bytes) -> bytes:
        return blake2b(what, digest_size=16, key=self._salt).digest()

    def snapshot(self) -> Callable[[], Arrays] | None:
        """Copy the requests so far; returns a function that builds the file's arrays.

        Runs in another thread than `add`: each slice is taken in one piece, and `_ends`, which
        `add` extends last, is taken first.
        """
        whole = self._ends[:]
        if not whole:
            return None
        ends = np.array(whole, dtype=np.int64)
        requests, references = len(whole), whole[-1]
        arrival = np.array(self._arrival[:requests], dtype=np.float64)
        prompt = np.array(self._prompt[:requests], dtype=np.int64)
        output = np.array(self._output[:requests], dtype=np.int64)
        session = np.array(self._session[:requests], dtype=np.int32)
        ids = np.array(self.ids[:references], dtype=np.int32)
        block_size = self.block_size

        def arrays() -> Arrays:
            order = np.argsort(arrival, kind="stable")
            lengths = np.diff(ends, prepend=0)
            off = np.concatenate([[0], np.cumsum(lengths[order])])
            shift = np.repeat((ends - lengths)[order] - off[:-1], lengths[order])
            return {
                "off": off,
                "ids": ids[shift + np.arange(len(ids))],
                # Seconds since the first one: the trace does not reveal wall-clock time.
                "t": arrival[order] - arrival.min(),
                "inp": prompt[order],
                "outp": output[order],
                "sess": session[order],
                "bs": np.array(block_size, dtype=np.int64),
                "nblk": np.array(ids.max(initial=-1) + 1, dtype=np.int64),
            }

        return arrays


class _Writer:
    """Writes the trace beside the engine's steps, each file in place of the one before.

    Raises:
        ValueError: The folder is not there or takes no files.
    """

    def __init__(
        self, path: Path, every: float, snapshot: Callable[[], Callable[[], Arrays] | None]
    ):
        self.path = path
        self.written = 0
        self.failed = 0
        self._pause = self._every = every
        self._snapshot = snapshot
        self._claimed: Path | None = None
        self._thread: threading.Thread | None = None
        self._news = threading.Event()
        self._stop = threading.Event()
        if not path.parent.is_dir():
            raise ValueError(f"path {path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise ValueError(f"path {path} is a folder")
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ValueError(
                f"path {path}: the folder cannot be written to ({error.strerror or error})"
            ) from None

    def start(self) -> None:
        """There is something new; it is written within the pause."""
        self._news.set()
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._run, name="kvplug-record", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Write what is new and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._write()

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            began = time.monotonic()
            self._write()
            # A large trace takes long to write: no more than a twentieth of the time goes there.
            self._pause = max(self._every, 20 * (time.monotonic() - began))

    def _write(self) -> None:
        if not self._news.is_set():
            return
        self._news.clear()
        try:
            if (arrays := self._snapshot()) is not None:
                self._replace(arrays())
                self.written += 1
        except Exception as error:
            self._news.set()
            self.failed += 1
            if self.failed == 1:
                logger.error("record: the trace cannot be written to %s: %s", self.path, error)

    def _replace(self, arrays: Arrays) -> None:
        target = self._target()
        handle, scratch = tempfile.mkstemp(
            prefix=f".{target.stem}.", suffix=".tmp", dir=target.parent
        )
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            Path(scratch).chmod(stat.S_IMODE(target.stat().st_mode))
            Path(scratch).replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(scratch).unlink()
            raise

    def _target(self) -> Path:
        """Open the first file name that is not taken."""
        if self._claimed is None:
            for i in count():
                path = self.path.with_stem(f"{self.path.stem}-{i}") if i else self.path
                with contextlib.suppress(FileExistsError):
                    path.open("xb").close()
                    self._claimed = path
                    logger.info("record: the trace goes to %s", path)
                    break
            assert self._claimed is not None
        return self._claimed
