"""What every test of the repository runs under."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes tells how busy the machine is, not whether the code is right.
settings.register_profile("kvplug", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvplug")

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
    "test_recorded_run.py",
    "test_paged_attend_quant.py",
    "test_quant_write.py",
    "test_attend_exact.py",
    "test_other_models.py",
    "test_reuse_in_the_engine.py",
    "test_isolation.py",
)
"""Files that take a minute or so, in the order in which they start where files run side by side: a
long one that starts last would keep one worker while the others have nothing left."""


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would start with the files of the most tests; engines take long and are few.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        rank = {name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
