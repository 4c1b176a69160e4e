"""What every test of the repository runs under."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes tells how busy the machine is, not whether the code is right.
settings.register_profile("kvplug", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvplug")

TERMINAL = (
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "COLUMNS",
    "FORCE_COLOR",
    "GITHUB_ACTIONS",
    "LINES",
    "NO_COLOR",
    "PY_COLORS",
    "TERMINAL_WIDTH",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
)
"""Environment variables that say what a command's output is shown on. Whoever runs the tests may
have them; what the tests read is what a pipe gets, unless a test says otherwise."""

LONGEST = (
    "test_demo.py",
    "test_formats_in_the_engine.py",
    "test_windows_in_the_engine.py",
    "test_pruning_in_the_engine.py",
    "test_exact.py",
    "test_reuse_with_others.py",
    "test_reuse_exact.py",
    "test_serve.py",
    "test_request_check.py",
    "test_refusals.py",
    "test_recording.py",
    "test_reuse_store.py",
    "test_failing_policy.py",
    "test_failed_load.py",
    "test_scheduler_fuzz.py",
    "test_block_managers.py",
    "test_recorded_run.py",
    "test_paged_attend_quant.py",
    "test_quant_write.py",
    "test_attend_exact.py",
    "test_other_models.py",
    "test_reuse_in_the_engine.py",
    "test_isolation.py",
    "test_testing_laws.py",
    "test_new.py",
)
"""Files that take a minute or so, in the order in which they start where files run side by side: a
long one that starts last would keep one worker while the others have nothing left."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pool-steps",
        type=int,
        default=100_000,
        help="things that the block managers' test does in all (100000)",
    )


@pytest.fixture(scope="module", autouse=True)
def restored_environment() -> Iterator[None]:
    """Take back what a file's tests change in the environment: an engine in the tests' own process
    sets variables that the engines of later files would inherit, LD_PRELOAD among them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def pool_steps(request: pytest.FixtureRequest) -> int:
    steps: int = request.config.getoption("--pool-steps")
    return steps


def pytest_configure(config: pytest.Config) -> None:
    for name in TERMINAL:
        os.environ.pop(name, None)
        # readline, which pytest imports where it runs alone, sets COLUMNS behind Python's back, and
        # what a test starts inherits it.
        os.unsetenv(name)
    # pytest-xdist would start with the files of the most tests; engines take long and are few.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        rank = {name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
