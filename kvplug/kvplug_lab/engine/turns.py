"""Engines that live at the same time and take turns at requests.

What two engines need for the same request is compared seconds apart, so that a machine that is
slower now than a minute ago is slower for both. Each engine lives in a process of its own::

    python -m kvplug_lab.engine.turns SPEC.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from kvplug_lab.engine.stepped import index_of
from kvplug_lab.engine.trial import (
    FORCING,
    Answer,
    TrialFailed,
    TrialRequest,
    TrialSpec,
    environment_of,
    run_trial,
)

READY, ANSWERED, DONE = "kvplug ready", "kvplug answers ", "kvplug result "


class Engine:
    """An engine in a process of its own that answers when asked; a context manager.

    Attributes:
        counters: kvplug's own counters of reuse, once it has finished.
        processor: Of each request of the last call, processor seconds of all threads until its
            first token; the like of time to first token where others use the machine, too.

    Args:
        spec: The model, the engine and the section; its requests are not run.
        log: Where the engine's log goes.
    """

    def __init__(self, spec: TrialSpec, log: Path):
        self.log = log
        self.counters: dict[str, float] = {}
        self.processor: list[float] = []
        self._file: IO[str] = log.open("w", encoding="utf-8")
        engine = spec.engine | {"logits_processors": [FORCING]}
        description = log.with_suffix(".json")
        description.write_text(replace(spec, requests=[], engine=engine).to_json(), "utf-8")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "kvplug_lab.engine.turns", str(description)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            env=environment_of(spec, {}),
            text=True,
        )

    def wait(self) -> None:
        """Until it has started.

        Raises:
            TrialFailed: It ended instead.
        """
        self._read(READY)

    def ask(self, requests: Sequence[TrialRequest]) -> list[Answer]:
        """Serve requests, all at once, and return when all have finished.

        Raises:
            TrialFailed: The engine ended.
        """
        self.send(requests)
        answered = json.loads(self._read(ANSWERED))
        self.processor = [seconds for _, seconds in answered]
        return [Answer(**answer) for answer, _ in answered]

    def send(self, requests: Sequence[TrialRequest]) -> None:
        """Have requests served without waiting for them.

        Raises:
            TrialFailed: The engine ended.
        """
        self._write(json.dumps([asdict(request) for request in requests]))

    def kill(self) -> None:
        """End the engine's process at once, as a crash does."""
        self._child.kill()
        self._child.wait()

    def finish(self) -> None:
        """Stop the engine in good order; `counters` are then those of kvplug's reuse.

        Raises:
            TrialFailed: The engine ended without them.
        """
        assert self._child.stdin is not None
        self._child.stdin.close()
        reports = json.loads(self._read(DONE))
        for report in reports:
            if report["kind"] == "reuse":
                self.counters |= report["counters"]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self._file.close()

    def _write(self, line: str) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _read(self, begins: str) -> str:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(begins):
                return line[len(begins) :]
            self._file.write(line)
            self._file.flush()
        raise self._ended()

    def _ended(self) -> TrialFailed:
        code = self._child.wait()
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        return TrialFailed(f"an engine exited with code {code}:\n{tail}")


def _serve(llm: Any) -> None:
    """Answer lines of standard input until it ends."""
    engine = llm.llm_engine
    served = 0
    print(READY, flush=True)
    for line in sys.stdin:
        requests = [TrialRequest(**request) for request in json.loads(line)]
        answers = _answers(engine, requests, served)
        served += len(requests)
        answered = [(asdict(answer), seconds) for answer, seconds in answers]
        print(ANSWERED + json.dumps(answered), flush=True)


def _answers(
    engine: Any, requests: Sequence[TrialRequest], served: int
) -> list[tuple[Answer, float]]:
    """Answers, and processor seconds until the first token of each."""
    from kvplug_lab.engine.trial import _answer, _prompt, _sampling

    added: dict[int, tuple[float, float]] = {}
    first: dict[int, tuple[float, float]] = {}
    answers: dict[int, Answer] = {}
    for i, request in enumerate(requests):
        added[i] = time.perf_counter(), time.process_time()
        engine.add_request(f"{served + i}", _prompt(request, {}), _sampling(request))
    while engine.has_unfinished_requests():
        for output in engine.step():
            index = index_of(output) - served
            if output.outputs[0].token_ids and index not in first:
                now = time.perf_counter(), time.process_time()
                first[index] = now[0] - added[index][0], now[1] - added[index][1]
            if output.finished:
                answers[index] = _answer(output, first[index][0])
    return [(answers[i], first[i][1]) for i in range(len(requests))]


def main() -> None:
    """Entry point of ``python -m kvplug_lab.engine.turns``."""
    spec = TrialSpec.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = run_trial(spec, lambda _: None, prepare=_serve)
    print(DONE + json.dumps(result.reports), flush=True)


if __name__ == "__main__":
    main()
