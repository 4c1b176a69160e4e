"""The pytest plugin: says what failed in an assertion of the laws, and brings an engine.

It changes nothing of a run that does not ask for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from kvplug.contract import Kind

ENGINES = "kvplug.testing"
"""Entry-point group of what runs engines for tests."""

# The laws are imported later, by the first test module that uses them.
pytest.register_assert_rewrite(*(f"kvplug.testing.{name}" for name in ("laws", *Kind)))


@pytest.fixture(scope="session")
def engine_trial(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Serve requests on a real vLLM engine: ``engine_trial(section, requests, **engine)``.

    ``section`` is the ``kvplug`` section as data, or None for stock vLLM; ``requests`` are prompts
    of token ids, with ``max_tokens``. It returns a `kvplug_lab.engine.trial.TrialResult`: answers,
    and what each policy reported. An engine starts in a process of its own, with a small random
    model; what was asked before in the session is not run again. Skips where kvplug-lab or vLLM
    is not installed.
    """
    entries = importlib.metadata.entry_points(group=ENGINES, name="engine")
    if not entries:
        pytest.skip("engine_trial needs kvplug-lab: pip install 'kvplug[lab]'")
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("engine_trial needs vLLM: pip install 'kvplug[vllm]', or 'kvplug[cpu]'")
    (entry,) = entries
    made: Callable[..., Any] = entry.load()(tmp_path_factory.mktemp("kvplug-engine"))
    return made
