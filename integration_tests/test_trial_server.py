"""The server of the other tests' engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from trial_server import TrialServer

from kvplug_lab.engine.trial import TrialFailed, TrialRequest, TrialSpec


def test_a_trial_that_takes_too_long_says_where_it_stands(
    trials: TrialServer, tiny: Path, tmp_path: Path
) -> None:
    spec = TrialSpec(str(tiny), [TrialRequest([5] * 8, 2)], {"max_model_len": 64})
    with pytest.raises(TrialFailed, match=r"(?s)Timeout.*most recent call first.*run_trial"):
        trials.run(spec, log=tmp_path / "engine.log", seconds=0.2)
    assert trials.run(spec, log=tmp_path / "again.log").answers[0].token_ids
