"""What policies return and leave behind on a worker, below the layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvplug.containment import ContainedPolicy, PolicyFailure
from kvplug.contract import (
    Candidate,
    EngineView,
    Fingerprint,
    Kind,
    LayerView,
    Placement,
    ReuseCheck,
    ReuseRequest,
    Verdict,
)
from kvplug.hosts.torch_state import TorchPolicy, state
from kvplug.hosts.vllm.messages import ReuseReport, TiersReport
from kvplug.hosts.vllm.worker import kind as worker_kind
from kvplug.hosts.vllm.worker.kind import KindWorker
from kvplug.hosts.vllm.worker.pages import CodedPages
from kvplug.hosts.vllm.worker.reuse_loading import _adapted, _adapts
from kvplug.hosts.vllm.worker.stored_format import StoredFormat
from kvplug_policies.format.plain import Plain

LAYER = LayerView(0, 1, num_kv_heads=2, num_heads=4, head_size=8, dtype="float32")
ENGINE = EngineView(block_size=16, num_blocks=4, layers=(LAYER,))
PRINT = Fingerprint(
    *("m", "t", "", "float32", "", "none"), (1, 2, 8), "", "causal", 0, 32, b"c", b"t", 0.0, "r"
)
PLACED = Placement(PRINT, 0, 32, 0, Verdict(True))


# -- what a kind reports ---------------------------------------------------------------------------


class Failing(KindWorker):
    kind = Kind.TIERS


@pytest.mark.parametrize("report", [ReuseReport, TiersReport])
def test_a_report_has_the_first_failure_and_the_log_one_of_each_part(
    report: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(
        worker_kind.logger, "error", lambda text, *a, exc_info: logged.append(text % a)
    )
    worker, first, second = Failing(("file", "tiers")), report(), report()
    worker._caught(first, "store", PolicyFailure("OSError: full", "put()"))
    worker._caught(first, "load", ValueError("no"))
    worker._caught(second, "load", ValueError("still no"))
    assert (first.errors, first.error) == (2, "store: OSError: full")
    assert (second.errors, second.error) == (1, "load: ValueError: still no")
    assert logged == [
        "tiers failed to store; the engine computes instead",
        "tiers failed to load; the engine computes instead",
    ]


# -- corrections of reuse --------------------------------------------------------------------------


class Adapting(ReuseCheck):
    name, changes = "adapting", ""
    answer: Any = None

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        return Verdict(True)

    def adapts(self, placement: Placement) -> bool:
        return True

    def adapt(
        self, layer: LayerView, placement: Placement, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.answer(key, value)
        return found


def adapted(answer: Callable[[Tensor, Tensor], Any]) -> tuple[Tensor, Tensor]:
    check = Adapting(Adapting.Options(), ENGINE)
    check.answer = answer
    key, value = torch.ones(32, 2, 8), torch.ones(32, 2, 8)
    try:
        contained = ContainedPolicy(check)
        assert contained.run(_adapts, check, PLACED)
        made: tuple[Tensor, Tensor] = contained.run(_adapted, check, LAYER, PLACED, key, value)
    finally:
        # They may be the stored segment's own.
        assert torch.equal(key, torch.ones_like(key)) and torch.equal(value, key)
    return made


@pytest.mark.parametrize(
    "answer",
    [
        lambda k, v: None,
        lambda k, v: k,
        lambda k, v: (k, v, v),
        lambda k, v: (k[:1], v),
        lambda k, v: (k, v.numpy()),
        lambda k, v: (k.to_sparse(), v),
        lambda k, v: (k, v.to(torch.complex64)),
        lambda k, v: (k, v.to("meta")),
        lambda k, v: (k.fill_(float("nan")), v),
        lambda k, v: (k.zero_(), sys.exit(1)),
    ],
)
def test_what_is_no_correction_is_a_failure(answer: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(PolicyFailure):
        adapted(answer)


def test_a_correction_is_taken_in_the_dtype_of_the_pages() -> None:
    key, value = adapted(lambda k, v: (k.mul_(2).double().requires_grad_(), v.half()))
    assert key.dtype == value.dtype == torch.float32 and not key.requires_grad
    assert torch.equal(key, torch.full_like(key, 2.0))


# -- formats that others read through --------------------------------------------------------------


class Unreadable(Plain):
    name = "unreadable"
    answer: Any = None

    def read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.answer()
        return found

    def write(self, *arguments: Any) -> None:
        raise SystemExit


@pytest.mark.parametrize(
    "answer",
    [
        lambda: sys.exit(1),
        lambda: None,
        lambda: (torch.ones(1), torch.ones(1)),
        lambda: (torch.ones(2, 2, 16, 8), torch.ones(2, 2, 16, 8, device="meta")),
    ],
)
def test_pages_that_cannot_be_read_are_a_failure(answer: Callable[[], Any]) -> None:
    policy = Unreadable(Unreadable.Options(), ENGINE)
    policy.answer = answer
    layout, noted, lost = policy.layout(LAYER), [], set[int]()
    cache = layout.pages(LAYER, 4, 16)
    stored = StoredFormat(policy, None, lambda method, failure: noted.append(method), lost)
    pages = CodedPages(stored, LAYER, layout, cache)
    with pytest.raises(PolicyFailure):
        pages.gather(0, torch.tensor([[1, 2]]))
    some = torch.zeros(1, dtype=torch.int64)
    pages.write(some, some + 3, some, torch.ones(1, 8), torch.ones(1, 8))
    assert noted == ["read", "write"] and lost == {3}
    assert not cache.any(), "zeros, rather than what another token left there"


# -- torch's settings ------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[], Any]] = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "algorithms": lambda: torch.use_deterministic_algorithms(True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_no_setting_of_torch_outlives_a_call(what: str, fails: bool) -> None:
    policy = TorchPolicy(Plain(Plain.Options(), ENGINE))
    before = state()

    def change() -> None:
        CHANGES[what]()
        assert state() != before
        if fails:
            raise RuntimeError

    for _ in range(2):
        if fails:
            with pytest.raises(PolicyFailure):
                policy.run(change)
        else:
            policy.run(change)
        assert state() == before
