"""What an eviction between steps costs in launches, in all layers, on the second runner.

Kernels run interpreted on the stand-in for an accelerator; every operation of torch that a real one
would launch is counted too. Copies from the host are named apart: a decision has one.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_after_step
from no_sync import Accelerator
from test_after_step import LAYERS, Runner, common_of, some_texts
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

import kvplug_kernels
from kvplug.hosts.pruning import FLUSH
from kvplug.hosts.vllm.worker import phases
from kvplug_policies.sequence.h2o import H2O
from kvplug_policies.sequence.keydiff import KeyDiff
from kvplug_policies.sequence.knorm import Knorm
from kvplug_policies.sequence.morph_kv import MorphKV
from kvplug_policies.sequence.snapkv import SnapKV

MOST = 6
"""Launches of an eviction, what the policy itself launches among them."""
PROMPT, LAST = 60, 112
FREE = {
    "empty.memory_format",
    "empty_strided.default",
    "new_empty.default",
    "empty_like.default",
    "detach.default",
    "alias.default",
    "lift_fresh.default",
}
"""Operations that allocate, or give another name, and launch nothing."""
SCORED = {
    "knorm": ["resident_tokens_kernel", "split_scores_kernel", "neg.default"],
    "keydiff": [
        "resident_tokens_kernel",
        "split_scores_kernel",
        "key_to_mean_kernel",
        "neg.default",
    ],
    "snapkv": [
        "resident_tokens_kernel",
        "split_lse_kernel",
        "mass_kernel",
        "pool_mass_kernel",
    ],
    "morph_kv": [
        "resident_tokens_kernel",
        "split_lse_kernel",
        "mass_kernel",
        "pool_mass_kernel",
    ],
    "h2o": ["resident_tokens_kernel", "pool_mass_kernel"],
}
"""What is launched until the policy has scored; a plan and a move follow."""
FLUSHED = ["resident_tokens_kernel", "split_lse_kernel", "mass_kernel", "add_mass_kernel"]
"""What cumulative attention takes, every so many steps, whether tokens are evicted or not."""
POLICIES: dict[str, Any] = {
    "knorm": (Knorm, {}),
    "keydiff": (KeyDiff, {}),
    "snapkv": (SnapKV, {"window": 8}),
    "morph_kv": (MorphKV, {"window": 8}),
    "h2o": (H2O, {"recent_part": 0.125}),
}


class Counted(TorchDispatchMode):
    """Notes what works on an accelerator while it is active, in order.

    Attributes:
        seen: Names of kernels and of torch's operations; "copy" for what is brought from the host.
        on: Whether it is active.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.on = False

    def note(self, name: str) -> None:
        if self.on:
            self.seen.append(name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing within."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.__name__ not in FREE:
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))


def count_launches(monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    """Run kernels instead of their vectorized forms, and note each launch and each copy."""
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    for module in pkgutil.iter_modules(kvplug_kernels.__path__, "kvplug_kernels."):
        operation = importlib.import_module(module.name)
        for name in [n for n in vars(operation) if n.endswith("_vectorized")]:
            kernel = importlib.import_module(f"{module.name}.kernel")
            launched = getattr(kernel, name.removesuffix("_vectorized") + "_triton", None)
            if launched is not None:
                monkeypatch.setattr(operation, name, launched)
    run, to_device = InterpretedFunction.run, phases.to_device

    def launched_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.note(self.fn.__name__)
        with counted.paused(), _disable_current_modes():
            return run(self, *args, **kwargs)

    def copied_once(*args: Any) -> Any:
        counted.note("copy")
        with counted.paused():
            return to_device(*args)

    monkeypatch.setattr(InterpretedFunction, "run", launched_once)
    monkeypatch.setattr(phases, "to_device", copied_once)


def ends_of_steps(policy: str, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """What the end of each step of one generating request launched, by the tokens computed."""
    monkeypatch.setitem(test_after_step.POLICIES, policy, POLICIES[policy])
    accelerator, counted = Accelerator(), Counted()
    with accelerator.faked():
        runner = Runner(policy, "LBNHC", accelerator)
    assert [group.fold.num_layers for group in runner.kind._folded[0]] == [LAYERS]
    count_launches(monkeypatch, counted)
    text = some_texts(random.Random(1))[0]
    text.prompt = PROMPT
    text.__post_init__()
    found: dict[int, list[str]] = {}
    end = runner.kind.end

    def ending(directives: Any) -> None:
        counted.seen, counted.on = [], True
        with counted:
            end(directives)
        counted.on = False

    monkeypatch.setattr(runner.kind, "end", ending)
    while text.done < LAST:
        count = 1 if text.done else PROMPT
        common = common_of([text], [count], [2])
        for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
            accelerator.put(getattr(common, name))
        with accelerator.no_sync():
            runner.step(common, [text], [count])
        text.done += count
        found[text.done] = counted.seen
    assert runner.kind.log.failed is None
    evicted = [e.at for e in text.plan.evictions if PROMPT < e.at <= LAST]
    assert len(evicted) >= 2
    due = {at for at in found if at % FLUSH == 0 and at > PROMPT} if policy == "h2o" else set()
    assert {at for at, seen in found.items() if seen} == {*evicted, *due}
    return {at: found[at] for at in evicted}


@pytest.fixture(scope="module")
def launched() -> dict[str, dict[str, list[str]]]:
    """Policy to what the end of each step with an eviction launched, from a process that has not
    imported Triton before it was to be interpreted."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_an_eviction_takes_few_launches_in_all_layers(
    policy: str, launched: dict[str, dict[str, list[str]]]
) -> None:
    cumulative = ["copy", *FLUSHED] if policy == "h2o" else []
    eviction = [*SCORED[policy], "plan_survivors_kernel", "move_tokens_kernel"]
    assert len(eviction) <= MOST
    assert launched[policy]
    for at, seen in launched[policy].items():
        assert seen == [*cumulative, "copy", *eviction], at


def _main() -> None:
    """A child: print what evictions launch, by policy and tokens computed."""
    found = {}
    for policy in POLICIES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            found[policy] = ends_of_steps(policy, monkeypatch)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
