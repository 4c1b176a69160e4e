"""Every law of `kvplug.testing` can be broken: one bad policy for each, and none is left out."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

import kvplug.contract
import kvplug.registry
from kvplug.contract import (
    Action,
    AttentionPolicy,
    CorruptPayload,
    DecodeRows,
    EngineView,
    FormatPolicy,
    LayerView,
    Move,
    PageField,
    PageLayout,
    PolicyOptions,
    ResidentView,
    ScoringPolicy,
    SequencePolicy,
    TierUsage,
    Verdict,
    Window,
)
from kvplug.hosts import dense
from kvplug.testing import (
    AttentionLaws,
    BrokenLaw,
    CodecLaws,
    FormatLaws,
    LifecycleLaws,
    PolicyLaws,
    PrefixCacheLaws,
    ReuseLaws,
    ScoringLaws,
    Shape,
    TierLaws,
    WindowLaws,
    each,
)
from kvplug.testing.attention import full_attention
from kvplug_lab.engine import session
from kvplug_policies.lifecycle.everything import Everything
from kvplug_policies.prefix_cache.lru import Lru
from kvplug_policies.reuse.position import Position
from kvplug_policies.tiers.host import HostMemory
from kvplug_policies.transfer.raw import Raw

KINDS: tuple[type[PolicyLaws], ...] = (
    PolicyLaws,
    PrefixCacheLaws,
    WindowLaws,
    ScoringLaws,
    FormatLaws,
    CodecLaws,
    TierLaws,
    LifecycleLaws,
    ReuseLaws,
    AttentionLaws,
)
BAD: dict[tuple[type[PolicyLaws], str], tuple[type, dict[str, Any]]] = {}
"""A policy for each law, and what else its test class says."""


def breaks(laws: type[PolicyLaws], test: str, **attributes: Any) -> Callable[[type], type]:
    """Enter a policy as one that breaks a law."""

    def enter(policy: type) -> type:
        assert (laws, test) not in BAD
        BAD[laws, test] = (policy, attributes)
        return policy

    return enter


# -- every policy ----------------------------------------------------------------------------------


@breaks(PolicyLaws, "test_it_can_be_registered")
class BadName(Lru):
    name = "Bad Name"


@breaks(PolicyLaws, "test_an_unknown_option_is_refused")
class TakesAnything(Lru):
    class Options(PolicyOptions):
        model_config = ConfigDict(extra="allow")


@breaks(PolicyLaws, "test_every_option_is_described")
class SaysNothing(Lru):
    class Options(PolicyOptions):
        size: int = 3


@breaks(PolicyLaws, "test_what_it_excludes_are_kinds")
class ExcludesNoKind(Lru):
    excludes: ClassVar[Mapping[str, str]] = {"sequences": "a word that is no kind"}


@breaks(PolicyLaws, "test_counters_are_numbers")
class CountsNothing(Lru):
    def counters(self) -> dict[str, float]:
        return {"share": float("nan")}


# -- prefix_cache ----------------------------------------------------------------------------------


@breaks(PrefixCacheLaws, "test_victims_are_distinct_candidates")
class NamesOneTwice(Lru):
    def victims(self, n: int) -> list[int]:
        found = super().victims(n)
        return [*found[:-1], found[0]] if n > 1 else found


@breaks(PrefixCacheLaws, "test_victims_changes_nothing")
class TurnsWhenAsked(Lru):
    def victims(self, n: int) -> list[int]:
        found = super().victims(n)
        if found:
            self._order.move_to_end(found[0])
        return found


@breaks(PrefixCacheLaws, "test_asking_for_one_at_a_time_gives_the_same_order")
class NewestIfOne(Lru):
    def victims(self, n: int) -> list[int]:
        return super().victims(n) if n != 1 else [next(reversed(self._order))]


@breaks(PrefixCacheLaws, "test_unknown_blocks_may_be_hit_and_removed")
class KnowsThemAll(Lru):
    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            del self._order[block]


@breaks(PrefixCacheLaws, "test_content_that_comes_back_starts_anew")
class NeverForgets(Lru):
    def on_remove(self, ids: Sequence[int]) -> None:
        super().on_remove(ids)
        self.gone = {*getattr(self, "gone", ()), *ids}

    def victims(self, n: int) -> list[int]:
        return [b for b in self._order if b not in getattr(self, "gone", ())][:n]


@breaks(PrefixCacheLaws, "test_a_life_with_every_fact")
class WantsAParent(Lru):
    def on_release(self, released: Any) -> None:
        if released.parents is not None:
            assert min(released.parents) >= 0
        super().on_release(released)


@breaks(PrefixCacheLaws, "test_a_life_with_every_fact_has_one_order")
class TurnsWhenRemoved(Lru):
    def on_remove(self, ids: Sequence[int]) -> None:
        super().on_remove(ids)
        if self._order:
            self._order.move_to_end(next(iter(self._order)))


@breaks(PrefixCacheLaws, "test_removing_in_another_order_than_named_is_survived")
class EvictsTheFirst(Lru):
    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            if block in self._order:
                self._order.popitem(last=False)


@breaks(PrefixCacheLaws, "test_state_stays_bounded")
class KeepsEveryKey(Lru):
    def on_release(self, released: Any) -> None:
        super().on_release(released)
        self.keys = getattr(self, "keys", [])
        self.keys += released.keys or ()


# -- sequence --------------------------------------------------------------------------------------


class Rule(SequencePolicy):
    name, changes = "rule", "keeps a window"

    def window(self, layer: LayerView) -> Window | None:
        return Window(1, 4)


@breaks(WindowLaws, "test_a_layers_rule_is_a_window")
class NoRule(Rule):
    def window(self, layer: LayerView) -> Window | None:
        return None


@breaks(WindowLaws, "test_two_objects_of_one_deployment_have_one_rule")
class AnotherRuleEachTime(Rule):
    made = 0

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        type(self).made += 1
        self.sink = self.made

    def window(self, layer: LayerView) -> Window | None:
        return Window(self.sink, 4)


class Norms(ScoringPolicy):
    name, changes = "norms", "keeps small keys"

    def score(self, resident: ResidentView) -> Tensor:
        return -resident.keys.float().norm(dim=-1)


@breaks(ScoringLaws, "test_scores_are_finite_float32_of_the_held_shape")
class HalfScores(Norms):
    def score(self, resident: ResidentView) -> Tensor:
        return super().score(resident).to(resident.keys.dtype)


@breaks(ScoringLaws, "test_scores_tell_tokens_apart")
class AllAlike(Norms):
    def score(self, resident: ResidentView) -> Tensor:
        return super().score(resident) * 0


@breaks(ScoringLaws, "test_a_row_scores_alone_as_it_does_beside_others")
class LessTheMean(Norms):
    def score(self, resident: ResidentView) -> Tensor:
        found = super().score(resident)
        return found - found.mean(0, keepdim=True)


@breaks(ScoringLaws, "test_slots_do_not_matter")
class ByTheSlot(Norms):
    def score(self, resident: ResidentView) -> Tensor:
        found = super().score(resident)
        return found + torch.arange(resident.count)


@breaks(ScoringLaws, "test_scores_are_the_same_twice")
class ByChance(Norms):
    def score(self, resident: ResidentView) -> Tensor:
        return torch.rand(resident.positions.shape)


@breaks(ScoringLaws, "test_inputs_stay")
class WritesPositions(Norms):
    def score(self, resident: ResidentView) -> Tensor:
        resident.positions.add_(1)
        return super().score(resident)


@breaks(ScoringLaws, "test_few_tokens_are_scored")
class WantsTen(Norms):
    def score(self, resident: ResidentView) -> Tensor:
        return super().score(resident) + resident.keys[:, :, 9, 0].mean()


@breaks(ScoringLaws, "test_measurements_are_rows_of_finite_numbers")
class MeasuresNothing(Norms):
    def measure(self, resident: ResidentView, scores: Tensor) -> Tensor | None:
        return scores[..., 0] * float("nan")


@breaks(ScoringLaws, "test_shares_are_positive")
class NoShare(Norms):
    def share(self, layer: LayerView) -> float:
        return float(layer.index)


@breaks(ScoringLaws, "test_a_budget_below_what_is_always_kept_is_refused")
class AnyBudget(Norms):
    class Options(PolicyOptions):  # type: ignore[assignment]
        budget: int = 8
        sink: int = 8
        recent: int = 8
        layers: dict[str, float] = Field(default_factory=dict)


# -- format ----------------------------------------------------------------------------------------


class Half(FormatPolicy):
    name, changes = "half", "stores K and V as float16"

    def layout(self, layer: LayerView) -> PageLayout:
        return PageLayout(4 * layer.head_size, key_bits=16, value_bits=16)

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([key, value], -1).half().view(torch.uint8)

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        both = cells.contiguous().view(torch.float16).float()
        return both[..., : layer.head_size], both[..., layer.head_size :]


SMALL: dict[str, Any] = {"shapes": (Shape(64, 4, 2, 16),), "errors": (1e-3, 1e-3)}
COARSE: dict[str, Any] = SMALL | {"errors": (0.3, 0.3), "tolerance": 0.3}


@breaks(FormatLaws, "test_what_is_written_is_read_back_within_the_formats_error", **SMALL)
class KeysGrow(Half):
    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().decode(layer, cells)
        return key * 1.5, value


@breaks(FormatLaws, "test_the_size_of_the_elements_does_not_matter", **SMALL)
class Clamps(Half):
    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return super().encode(layer, key.clamp(-100, 100), value)


@breaks(FormatLaws, "test_half_precision_goes_in_and_comes_out", **SMALL)
class WantsFloats(Half):
    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return super().encode(layer, torch.from_numpy(key.numpy()), value)


@breaks(FormatLaws, "test_a_write_touches_the_named_slots_and_nothing_else", **SMALL)
class WritesBlockNought(Half):
    def write(self, layer: LayerView, batch: Any, cache: Tensor) -> None:
        super().write(layer, batch, cache)
        cache[9] = 0


class OfTheBatch(Half):
    """Scales by the largest number of a batch."""

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        most = key.abs().amax()
        return super().encode(layer, (key / most * 16).round() * most / 16, value)


breaks(
    FormatLaws,
    "test_written_one_by_one_a_token_has_the_bytes_it_has_in_a_prompt",
    **COARSE,
)(OfTheBatch)
breaks(FormatLaws, "test_a_number_that_is_none_stays_where_it_is", **COARSE)(OfTheBatch)


@breaks(FormatLaws, "test_a_token_can_be_moved_with_its_bytes", **SMALL)
class ByItsSlot(Half):
    def read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        key, value = super().read(layer, cache, blocks)
        return key * (1 + 1e-4 * torch.arange(cache.shape[2])[:, None]), value


class Attends(Half):
    def attend(self, layer: LayerView, batch: Any, cache: Tensor, out: Tensor) -> None:
        dense.attend_dense(self, layer, batch, cache, out)


@breaks(FormatLaws, "test_attention_is_that_over_what_the_pages_hold", **SMALL)
class ForgetsTheCap(Attends):
    def attend(self, layer: LayerView, batch: Any, cache: Tensor, out: Tensor) -> None:
        super().attend(layer, replace(batch, softcap=0.0), cache, out)


@breaks(FormatLaws, "test_attention_is_near_that_over_the_exact_keys_and_values", **SMALL)
class ReadsAllBack(Attends):
    def attend(self, layer: LayerView, batch: Any, cache: Tensor, out: Tensor) -> None:
        super().attend(layer, replace(batch, key=None, value=None), cache, out)


@breaks(FormatLaws, "test_chunks_do_not_matter_where_all_is_read_back", **SMALL)
class ByTheChunk(Attends):
    def attend(self, layer: LayerView, batch: Any, cache: Tensor, out: Tensor) -> None:
        scale = batch.scale * (1 + 0.01 * batch.max_query_len)
        super().attend(layer, replace(batch, scale=scale), cache, out)


@breaks(FormatLaws, "test_decoding_token_by_token", **SMALL)
class BadAtDecoding(Attends):
    def attend(self, layer: LayerView, batch: Any, cache: Tensor, out: Tensor) -> None:
        super().attend(layer, batch, cache, out)
        if batch.max_query_len == 1:
            out.mul_(1.01)


@breaks(FormatLaws, "test_the_same_steps_give_the_same_bytes_and_outputs", **COARSE)
class AnotherObject(Half):
    made = 0

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        type(self).made += 1
        self.by = 1 + self.made / 1000

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return super().encode(layer, key * self.by, value)


@breaks(FormatLaws, "test_the_fields_of_the_layout_fill_its_bytes", **SMALL)
class WastesBytes(Half):
    def layout(self, layer: LayerView) -> PageLayout:
        size = 4 * layer.head_size
        return PageLayout(size + 8, 16, 16, fields=(PageField("both", 0, size, "float16"),))


@breaks(FormatLaws, "test_the_fingerprint_tells_options_apart", **SMALL)
class NamedAlone(Half):
    def fingerprint(self) -> str:
        return self.name


# -- transfer --------------------------------------------------------------------------------------


@breaks(CodecLaws, "test_an_exact_codec_says_so")
class NotSoExact(Raw):
    exact = False


@breaks(CodecLaws, "test_chunks_come_back")
class AlwaysFloats(Raw):
    def decode(self, coded: Any, shapes: Any, start: int) -> dict[str, Tensor]:
        return {name: plane.float() for name, plane in super().decode(coded, shapes, start).items()}


@breaks(CodecLaws, "test_cells_come_back_to_the_bit")
class LosesABit(Raw):
    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        cells = {n: p & 254 for n, p in planes.items() if p.dtype == torch.uint8}
        return super().encode({**planes, **cells}, start)


@breaks(CodecLaws, "test_every_bfloat16_comes_back")
class NoNaN(Raw):
    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        return super().encode({n: p.nan_to_num() for n, p in planes.items()}, start)


@breaks(CodecLaws, "test_the_error_is_bounded", error=1e-3)
class Rounds(Raw):
    exact = False

    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        return super().encode({n: p.round() for n, p in planes.items()}, start)


@breaks(CodecLaws, "test_hostile_tensors_are_refused")
class ChecksNothing(Raw):
    def decode(self, coded: Any, shapes: Any, start: int) -> dict[str, Tensor]:
        return dict(coded)


@breaks(CodecLaws, "test_noise_is_refused_or_decoded_to_the_shape_asked_for")
class SaysAnotherError(Raw):
    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        found = super().encode(planes, start)
        return found | {"end": torch.tensor([7], dtype=torch.uint8)}

    def decode(self, coded: Any, shapes: Any, start: int) -> dict[str, Tensor]:
        if coded["end"].tolist() != [7]:
            raise RuntimeError("the end is another")
        return super().decode({n: t for n, t in coded.items() if n != "end"}, shapes, start)


@breaks(CodecLaws, "test_planes_of_other_shapes_are_refused")
class GivesWhatThereIs(Raw):
    def decode(self, coded: Any, shapes: Any, start: int) -> dict[str, Tensor]:
        if list(coded) != list(shapes):
            raise CorruptPayload("other names")
        return dict(coded)


@breaks(CodecLaws, "test_views_are_coded_as_copies")
class TakesTheStorage(Raw):
    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        return {n: torch.as_strided(p, p.shape, p.clone().stride()) for n, p in planes.items()}


@breaks(CodecLaws, "test_threads_do_not_meet")
class KeepsThePlanes(Raw):
    def encode(self, planes: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        self.planes = planes
        time.sleep(0.001)
        return super().encode(self.planes, start)


# -- tiers -----------------------------------------------------------------------------------------

ROOM: dict[str, Any] = {"options": {"size": "64MiB"}, "many": 400}


class Memory(HostMemory):
    """Memory that a bad tier can get at."""

    def open(self, place: Any) -> None:
        super().open(place)
        self.place = place


@breaks(TierLaws, "test_what_is_put_is_read_bit_for_bit", **ROOM)
class CutsLongOnes(Memory):
    def get(self, keys: Sequence[bytes]) -> list[Any]:
        return [None if p is None else p[:4096] for p in super().get(keys)]


@breaks(TierLaws, "test_payloads_are_any_bytes_like", **ROOM)
class WantsBytes(Memory):
    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        return super().put([(key, b"" + payload) for key, payload in items if payload + b""])


@breaks(TierLaws, "test_what_changes_after_put_is_not_stored_changed", **ROOM)
class KeepsTheirs(Memory):
    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        self._held.update((key, memoryview(payload)) for key, payload in items)
        return [""] * len(items)


@breaks(TierLaws, "test_what_is_absent_is_a_miss", **ROOM)
class HasItAll(Memory):
    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys)


@breaks(TierLaws, "test_what_is_there_is_left_alone", **ROOM)
class TakesTheLatest(Memory):
    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        self.remove([key for key, _ in items])
        return super().put(items)


@breaks(TierLaws, "test_what_is_removed_is_gone_and_may_come_back", **ROOM)
class RemovesWhatIsThere(Memory):
    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._used -= len(self._held.pop(key))


class OfAll(Memory):
    shared = True
    all: ClassVar[dict[Any, memoryview]] = {}

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        for key, payload in items:
            self.all.setdefault(self.named(key), memoryview(bytes(payload)))
        return [""] * len(items)

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        return [self.all.get(self.named(key)) for key in keys]

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return [self.named(key) in self.all for key in keys]

    def named(self, key: bytes) -> object:
        return key


@breaks(TierLaws, "test_ranks_have_parts_of_their_own", **ROOM)
class WithoutRanks(OfAll):
    pass


@breaks(TierLaws, "test_another_identity_sees_nothing", **ROOM)
class WithoutIdentity(OfAll):
    def named(self, key: bytes) -> object:
        return key, self.place.rank


@breaks(TierLaws, "test_what_is_durable_is_there_after_closing", **ROOM)
class NotSoDurable(Memory):
    durable = True


@breaks(TierLaws, "test_usage_counts_what_was_put", **ROOM)
class WeighsNothing(Memory):
    def usage(self) -> TierUsage:
        return replace(super().usage(), size=0)


@breaks(TierLaws, "test_closing_twice_is_closing_once", **ROOM)
class ClosesOnce(Memory):
    def close(self) -> None:
        super().close()
        del self._held


@breaks(TierLaws, "test_threads_do_not_disturb_each_other", **ROOM)
class OneDesk(Memory):
    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        self.desk = items
        time.sleep(0.001)
        return super().put(self.desk)


@breaks(TierLaws, "test_two_writers_of_one_key_leave_one_whole_payload", **ROOM)
class BusyForTwo(Memory):
    busy = threading.Lock()

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        if not self.busy.acquire(blocking=False):
            return ["busy"] * len(items)
        time.sleep(0.05)
        try:
            return super().put(items)
        finally:
            self.busy.release()


@breaks(TierLaws, "test_many_small_chunks", **ROOM)
class HoldsAHundred(Memory):
    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        return [
            "full" if len(self._held) >= 100 else super(HoldsAHundred, self).put([item])[0]
            for item in items
        ]


@breaks(TierLaws, "test_memory_does_not_grow_with_transfers", **(ROOM | {"many": 8000}))
class KeepsThemAll(Memory):
    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        self.kept = getattr(self, "kept", [])
        self.kept += [bytearray(payload) for _, payload in items]
        return super().put(items)


# -- lifecycle -------------------------------------------------------------------------------------


@breaks(LifecycleLaws, "test_each_chunk_goes_to_a_tier_that_is_there_or_to_none")
class NamesNoTier(Everything):
    def store(self, leaving: Any, tiers: Any) -> list[str | None]:
        return ["memory"] * len(leaving)


@breaks(LifecycleLaws, "test_a_tier_that_is_down_is_given_nothing")
class AlwaysTheFirst(Everything):
    def store(self, leaving: Any, tiers: Any) -> list[str | None]:
        return [tiers[0].name] * len(leaving)


@breaks(LifecycleLaws, "test_moves_lead_from_a_tier_to_another")
class DemotesUpwards(Everything):
    def plan(self, pressure: Any) -> list[Move]:
        last, first = pressure.tiers[-1].name, pressure.tiers[0].name
        return [Move(Action.DEMOTE, pressure.candidates[last][:1], last, first)]


@breaks(LifecycleLaws, "test_what_moves_was_shown")
class DropsAnything(Everything):
    def plan(self, pressure: Any) -> list[Move]:
        return [Move(Action.DROP, [b"?" * 32], pressure.tiers[0].name)]


@breaks(LifecycleLaws, "test_a_number_of_the_chunks_found_is_loaded")
class LoadsOneMore(Everything):
    def load(self, found: Any, tiers: Any) -> int:
        return len(found.tokens) + 1


@breaks(LifecycleLaws, "test_what_it_wants_is_a_number_of_bytes")
class WantsAHalf(Everything):
    def wants(self, tier: Any) -> int:
        return tier.used / 2  # type: ignore[no-any-return]


@breaks(LifecycleLaws, "test_unknown_chunks_may_be_used")
class KnowsItsChunks(Everything):
    def on_used(self, keys: Sequence[bytes]) -> None:
        known: dict[bytes, int] = {}
        for key in keys:
            known[key] += 1


# -- reuse -----------------------------------------------------------------------------------------


@breaks(ReuseLaws, "test_every_answer_is_a_verdict")
class SaysYes(Position):
    def check(self, candidate: Any, request: Any) -> Verdict:
        return True  # type: ignore[return-value]


@breaks(ReuseLaws, "test_a_refusal_has_a_cause")
class NoCause(Position):
    def check(self, candidate: Any, request: Any) -> Verdict:
        return Verdict(False, exact=False)


@breaks(ReuseLaws, "test_the_same_question_has_the_same_answer")
class EverySecond(Position):
    def check(self, candidate: Any, request: Any) -> Verdict:
        self.asked = getattr(self, "asked", 0) + 1
        return Verdict(self.asked % 2 == 0, "odd", exact=False)


@breaks(ReuseLaws, "test_what_moves_is_not_exact")
class MovesExactly(Position):
    def check(self, candidate: Any, request: Any) -> Verdict:
        return replace(super().check(candidate, request), exact=True)


@breaks(ReuseLaws, "test_what_is_adapted_keeps_its_shape")
class AdaptsInFloats(Position):
    def adapt(self, layer: Any, placement: Any, key: Any, value: Any) -> tuple[Tensor, Tensor]:
        return key.double(), value


@breaks(ReuseLaws, "test_what_it_does_not_adapt_stays")
class AdaptsUnasked(Position):
    def adapts(self, placement: Any) -> bool:
        return False


# -- attention -------------------------------------------------------------------------------------


class Full(AttentionPolicy):
    name = "full"

    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor | None:
        return full_attention(rows)


@breaks(AttentionLaws, "test_the_output_is_float32_of_the_rows")
class ReadsBeyond(Full):
    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor | None:
        longest = [max(rows.lens)] * len(rows.lens)
        return full_attention(replace(rows, lens=longest))


@breaks(AttentionLaws, "test_what_has_seen_nothing_is_near_full_attention")
class ForgetsTheScale(Full):
    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor | None:
        return full_attention(replace(rows, scale=1.0))


@breaks(AttentionLaws, "test_a_row_is_attended_alone_as_it_is_beside_others")
class ByTheNumberOfRows(Full):
    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor | None:
        return full_attention(rows) * len(rows.lens)


@breaks(AttentionLaws, "test_another_request_in_the_slot_is_attended_anew")
class RemembersSlots(Full):
    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor | None:
        self.known: dict[Any, Tensor] = getattr(self, "known", {})
        return self.known.setdefault((layer.index, *rows.slots), full_attention(rows))


@breaks(AttentionLaws, "test_a_layer_is_attended_apart_from_another")
class RemembersNoLayer(Full):
    def attend(self, layer: LayerView, rows: DecodeRows) -> Tensor | None:
        self.known: dict[Any, Tensor] = getattr(self, "known", {})
        return self.known.setdefault(tuple(rows.owners), full_attention(rows))


@breaks(AttentionLaws, "test_it_says_which_rows_it_serves")
class ServesSome(Full):
    def serves(self, num_tokens: int) -> bool:
        return num_tokens - 1  # type: ignore[return-value]


# -- the tests -------------------------------------------------------------------------------------

GOOD: dict[type[PolicyLaws], tuple[type, dict[str, Any]]] = {
    PrefixCacheLaws: (Lru, {}),
    WindowLaws: (Rule, {}),
    ScoringLaws: (Norms, {}),
    FormatLaws: (Half, SMALL),
    CodecLaws: (Raw, {}),
    TierLaws: (HostMemory, ROOM),
    LifecycleLaws: (Everything, {}),
    ReuseLaws: (Position, {}),
    AttentionLaws: (Full, {}),
}
"""What the bad ones are made from; it keeps every law."""


def laws_of(kind: type[PolicyLaws]) -> Iterator[str]:
    yield from (name for name in vars(kind) if name.startswith("test_"))


def test_each_law_has_a_policy_that_breaks_it() -> None:
    assert set(BAD) == {(kind, name) for kind in KINDS for name in laws_of(kind)}


def run(kind: type[PolicyLaws], policy: type, name: str, more: dict[str, Any], at: Path) -> None:
    test = type("TestIt", (kind,), {"policy": policy, **more})()
    law = getattr(test, name)
    law(**({"tmp_path": at} if "tmp_path" in inspect.signature(law).parameters else {}))


@pytest.mark.parametrize(("kind", "name"), BAD, ids=lambda x: getattr(x, "__name__", x))
def test_a_bad_policy_breaks_the_law(kind: type[PolicyLaws], name: str, tmp_path: Path) -> None:
    policy, more = BAD[kind, name]
    where, _ = getattr(kind, name).law
    with pytest.raises(BrokenLaw) as broken:
        run(kind, policy, name, more, tmp_path)
    said = str(broken.value)
    assert said.startswith(f"{where} says: "), said
    assert "\n  broken by: " in said


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_what_the_bad_ones_are_made_from_keeps_every_law(
    kind: type[PolicyLaws], tmp_path: Path
) -> None:
    policy, more = GOOD[kind]
    for name in laws_of(kind):
        try:
            run(kind, policy, name, more, tmp_path)
        except Exception as error:
            assert type(error).__name__ == "SkipTest", f"{name}: {error}"


def test_each_law_quotes_its_contract() -> None:
    for kind in KINDS:
        for name in laws_of(kind):
            where, line = getattr(kind, name).law
            owner, _, method = where.partition(".")
            found = getattr(kvplug.contract, owner, None) or getattr(kvplug.registry, owner)
            text = inspect.getsource(getattr(found, method) if method else found)
            assert " ".join(line.split()) in " ".join(text.split()), f"{name} quotes {line!r}"


def test_two_cases_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two cases are called a"):
        each(PolicyLaws, [("a", {"policy": Lru}), ("a", {"policy": Lru})])


# -- the pytest plugin -----------------------------------------------------------------------------


def test_the_plugin_loads_nothing_heavy() -> None:
    code = (
        "import sys, kvplug.testing.plugin, kvplug.testing\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_lab_a_test_of_an_engine_skips_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "test_served.py").write_text(
        "import importlib.metadata\n"
        "importlib.metadata.entry_points = lambda **_: ()\n"
        "def test_served(engine_trial): raise AssertionError\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "kvplug.testing.plugin"]
    done = subprocess.run(
        [*command, "--rootdir", ".", "-p", "no:cacheprovider", "test_served.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine_trial needs kvplug-lab: pip install 'kvplug[lab]'" in done.stdout


def test_a_session_runs_what_is_new_and_makes_its_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(session, "tiny_llama", lambda folder, dtype: folder)
    monkeypatch.setattr(session, "run_fresh", lambda spec, log: ran.append(spec) or len(ran))
    start = session.EngineSession(tmp_path)
    section = {"prefix_cache": "lru"}
    assert [start(section, [[1, 2]]), start(section, [[1, 2]]), start(None, [[1, 2]])] == [1, 1, 2]
    assert start(section, [[1, 2], [3]], max_tokens=3, one_by_one=True, seed=7) == 3
    assert [request.wave for request in ran[2].requests] == [0, 1]
    assert ran[2].requests[0].max_tokens == 3 and ran[2].engine["seed"] == 7
    assert {spec.model for spec in ran} == {str(tmp_path / "model")}
    assert ran[1].section is None
