"""Policies that fail, each in its own way. Until then they are LRU."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from kvplug import hookimpl
from kvplug.contract import (
    AttendBatch,
    Candidate,
    EngineView,
    FormatOptions,
    LayerView,
    Placement,
    PolicyOptions,
    Released,
    ResidentView,
    ReuseCheck,
    ReuseRequest,
    ScoringPolicy,
    SequencePolicy,
    Verdict,
    WriteBatch,
)
from kvplug.registry import PolicyRegistry
from kvplug_policies.format.plain import Plain
from kvplug_policies.prefix_cache.lru import Lru


class FailsLater(Lru):
    """Raises in `victims` once it has answered a number of times."""

    name = "fails_later"

    class Options(PolicyOptions):
        """Options of `FailsLater`."""

        answers: int = Field(3, ge=0, description="calls of victims() that it answers")

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._left = self.options.answers

    def victims(self, n: int) -> list[int]:
        if not self._left:
            raise RuntimeError("no more answers")
        self._left -= 1
        return super().victims(n)


class FailsAtOnce(Lru):
    """Raises when the first blocks are released."""

    name = "fails_at_once"

    def on_release(self, released: Released) -> None:
        raise RuntimeError("releases are not wanted")


class NamesStrangers(Lru):
    """Names blocks that are no candidates."""

    name = "names_strangers"

    def victims(self, n: int) -> Sequence[int]:
        return [1_000_000 + i for i in range(n)]


class Speechless(Lru):
    """Works, and raises where its counters are asked for."""

    name = "speechless"

    def counters(self) -> dict[str, float]:
        raise RuntimeError("nothing was counted")


class Decides(SequencePolicy):
    """Gives no window and no scores."""

    name = "decides"
    changes = "what a request sees"

    def window(self, layer: LayerView) -> None:
        return None


class FailsToScore(ScoringPolicy):
    """Scores nothing."""

    name = "fails_to_score"
    changes = "what a request sees"

    def score(self, held: ResidentView) -> Tensor:
        raise RuntimeError("scores are not wanted")


class FailsToAttend(Plain):
    """Stores K and V as they are, and cannot attend."""

    name = "fails_to_attend"

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        raise RuntimeError("attention is not wanted")


class FailsToWrite(Plain):
    """Stores K and V as they are, but for a number of writes on the way."""

    name = "fails_to_write"

    class Options(FormatOptions):
        """Options of `FailsToWrite`."""

        after: int = Field(0, ge=0, description="writes that go well first")
        times: int = Field(1, ge=0, description="writes that fail then")

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._writes = 0

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        self._writes += 1
        if 0 < self._writes - self.options.after <= self.options.times:
            raise RuntimeError("the pen is dry")
        super().write(layer, batch, cache)


class FailsToLoad(ReuseCheck):
    """Finds no fault with stored KV, and cannot write the first runs into pages."""

    name = "fails_to_load"
    changes = "nothing"

    class Options(PolicyOptions):
        """Options of `FailsToLoad`."""

        times: int = Field(1, ge=0, description="runs that cannot be written")
        rank: int = Field(-1, ge=-1, description="rank on which they cannot; -1 for all")

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._left = self.options.times

    def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
        return Verdict(True)

    def adapts(self, placement: Placement) -> bool:
        return True

    def adapt(
        self, layer: LayerView, placement: Placement, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        from vllm.distributed import get_tensor_model_parallel_rank

        if self._left and self.options.rank in (-1, get_tensor_model_parallel_rank()):
            self._left -= 1
            raise OSError("the page is torn")
        return key, value


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    for policy in (
        *(FailsLater, FailsAtOnce, NamesStrangers, Speechless, Decides, FailsToScore),
        *(FailsToAttend, FailsToWrite, FailsToLoad),
    ):
        registry.add(policy)
