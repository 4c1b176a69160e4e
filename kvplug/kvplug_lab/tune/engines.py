"""Engines of proposals, each in a process of its own, in the same KV memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kvplug.errors import DeploymentError, KVPlugError
from kvplug_lab.engine.rounds import Round, RoundEngine
from kvplug_lab.engine.trial import TrialFailed, TrialSpec
from kvplug_lab.tune.proposals import STOCK, Proposal
from kvplug_lab.tune.search import Refused, Say, cause_of
from kvplug_lab.tune.written import deployment_text

LEAST = 2
"""Engines that live at once at least: stock, and the one that is compared with it."""


class LiveEngines:
    """Starts engines when they are asked for, and ends the longest unused one where too many live.

    What a policy holds beside its pages is taken off its pool, so that every engine has the same
    memory for KV.

    Args:
        model: Model directory.
        arguments: Arguments of ``vllm.LLM``, the memory among them.
        most: Engines that live at once at most, stock among them.
        say: Told what goes on.
    """

    def __init__(self, model: Path, arguments: Mapping[str, Any], most: int, say: Say):
        self.model = model
        self.arguments = dict(arguments)
        self.most = max(most, LEAST)
        self.say = say
        self._folder = tempfile.TemporaryDirectory(prefix="kvplug-tune-")
        self._living: dict[str, RoundEngine] = {}
        self._memory: dict[str, int] = {}
        self._number = 0

    def __enter__(self) -> LiveEngines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        self._folder.cleanup()

    def get(self, proposal: Proposal) -> RoundEngine:
        """The engine of a proposal, started if it does not live.

        Raises:
            Refused: It does not start.
        """
        name = proposal.name
        if name in self._living:
            self._living[name] = self._living.pop(name)
            return self._living[name]
        if proposal.section is not None:
            self._check(proposal)
        while len(self._living) >= self.most:
            self.end(next(other for other in self._living if other != STOCK))
        memory = self.arguments["kv_cache_memory_bytes"]
        room = self._memory.get(name, memory)
        engine, empty = self._start(proposal, room)
        if room == memory and empty.held_bytes:
            self._close(engine)
            room = memory - empty.held_bytes
            if room <= 0:
                raise Refused(
                    f"it holds {empty.held_bytes / 2**20:.0f} MiB beside pages, and all of the "
                    f"memory is {memory / 2**20:.0f} MiB"
                )
            engine, _ = self._start(proposal, room)
        self._memory[name] = room
        self._living[name] = engine
        return engine

    def end(self, *names: str) -> None:
        """End the engines of proposals; of all, without names."""
        for name in names or list(self._living):
            engine = self._living.pop(name, None)
            if engine is not None:
                self._close(engine)

    def arguments_of(self, proposal: Proposal) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` for a proposal."""
        own = {key.replace("-", "_"): value for key, value in proposal.flags.items()}
        return {**self.arguments, **own}

    def _check(self, proposal: Proposal) -> None:
        """Refuse what ``kvplug check`` refuses."""
        from kvplug.cli.check import read_checked

        file = Path(self._folder.name) / "checked.yaml"
        file.write_text(
            deployment_text(self.model, self.arguments_of(proposal), proposal, []), encoding="utf-8"
        )
        try:
            read_checked(file)
        except DeploymentError as error:
            refusal = error.refusals[0]
            raise Refused(f"{refusal.key}: {refusal.problem}") from error
        except KVPlugError as error:
            raise Refused(str(error).splitlines()[0]) from error

    def _start(self, proposal: Proposal, memory: int) -> tuple[RoundEngine, Round]:
        self._number += 1
        arguments = self.arguments_of(proposal) | {"kv_cache_memory_bytes": memory}
        # Stock has no connector; a section without policies is one.
        section = dict(proposal.section) if proposal.section else None
        spec = TrialSpec(str(self.model), [], arguments, section)
        engine = RoundEngine(spec, Path(self._folder.name) / f"engine-{self._number}.log")
        try:
            engine.wait()
            return engine, engine.serve([], [], 1)
        except TrialFailed as error:
            self._close(engine)
            raise Refused(cause_of(str(error))) from error
        except BaseException:
            self._close(engine)
            raise

    def _close(self, engine: RoundEngine) -> None:
        engine.__exit__(None, None, None)
