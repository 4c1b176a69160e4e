"""Fixtures of the engine tests. Every engine starts in a process of its own: vLLM caches the
choice of attention backend per process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from trial_server import AHEAD, BACKEND, TrialServer

from kvplug_lab import models, texts
from kvplug_lab.engine.trial import TrialRequest, TrialResult, TrialSpec


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return models.smollm2()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Oracle:
    return Oracle(tiny)


@pytest.fixture(scope="session")
def passages() -> Callable[..., list[str]]:
    def some(n: int, words: int, seed: int = 0) -> list[str]:
        return texts.passages(texts.shakespeare(), n, words, seed)

    return some


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialServer]:
    server = TrialServer(tmp_path_factory.mktemp("trials") / "server.log")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def second_runner_trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialServer]:
    server = TrialServer(tmp_path_factory.mktemp("trials") / "server.log", second_runner=True)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def run(
    trials: TrialServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrialResult]:
    """Run requests on an engine in a fresh process."""
    return runner(trials, tmp_path_factory)


@pytest.fixture(scope="session")
def run_second(
    second_runner_trials: TrialServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrialResult]:
    """Run requests on an engine with vLLM's second model runner, in a fresh process.

    ``backend="TRITON_ATTN"`` takes vLLM's Triton attention, interpreted, and with it a GPU's page
    layout; it needs short prompts. ``ahead=True`` schedules a step while the one before it runs.
    """
    return runner(second_runner_trials, tmp_path_factory)


def runner(
    trials: TrialServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., TrialResult]:
    """Return a function that runs requests on an engine in a fresh process of a server."""

    def trial(
        model: Path,
        requests: list[TrialRequest],
        section: Any = None,
        *,
        env: dict[str, str] | None = None,
        backend: str | None = None,
        ahead: bool = False,
        watched: bool = True,
        reset_running_at: int | None = None,
        **engine: Any,
    ) -> TrialResult:
        spec = TrialSpec(
            str(model),
            requests,
            engine,
            section,
            reset_running_at=reset_running_at,
            watched=watched,
        )
        if backend is not None:
            env = {BACKEND: backend} | (env or {})
        if ahead:
            env = {AHEAD: "1"} | (env or {})
        log = tmp_path_factory.mktemp("engine") / "engine.log"
        result = trials.run(spec, env=env, log=log)
        result.log = log.read_text(encoding="utf-8", errors="replace")  # type: ignore[attr-defined]
        return result

    return trial
