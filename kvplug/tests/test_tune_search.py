"""The search of `kvplug tune` with engines that are made up: what stays, what leaves and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvplug.cli.check import read_checked
from kvplug.hosts.vllm.flags import EXTENSION
from kvplug.planning.prices import prices
from kvplug_lab.engine.rounds import Round, RoundStep, Served
from kvplug_lab.engine.trial import TrialFailed, TrialRequest
from kvplug_lab.tune import search as searching
from kvplug_lab.tune.load import Load
from kvplug_lab.tune.proposals import Means, Proposal, combined, proposals, simulated, stock
from kvplug_lab.tune.search import Bound, Found, Question, Refused, Search, asked, compared, plain
from kvplug_lab.tune.written import Where, deployment_text, evidence

HEAD = list(range(1, 65))
ARGUMENTS = {
    "dtype": "bfloat16",
    "block_size": 32,
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 2,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": True,
    "enforce_eager": True,
}


@dataclass
class Made:
    """How an engine behaves.

    Attributes:
        seconds: Of a round.
        lost: Nats that it loses for each of stock's tokens.
        answer: Its answers.
        refuses: Why it does not start.
    """

    seconds: float = 10.0
    lost: float = 0.0
    answer: int = 7
    refuses: str = ""


@dataclass
class Clock:
    """Time that engines take."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngines:
    """Engines by the name of their proposal."""

    clock: Clock
    made: Callable[[str, int], Made]
    starts: list[str] = field(default_factory=list)
    living: set[str] = field(default_factory=set)
    served: list[str] = field(default_factory=list)

    def get(self, proposal: Proposal) -> FakeServer:
        own = self.made(proposal.name, len(self.served))
        if own.refuses:
            raise Refused(own.refuses)
        if proposal.name not in self.living:
            self.living.add(proposal.name)
            self.starts.append(proposal.name)
            self.clock.now += 5.0
        return FakeServer(self, proposal.name)

    def end(self, *names: str) -> None:
        self.living -= set(names) or set(self.living)


@dataclass
class FakeServer:
    engines: FakeEngines
    name: str

    def serve(
        self, requests: Sequence[TrialRequest], before: Sequence[int | None], most: int
    ) -> Round:
        own = self.engines.made(self.name, len(self.engines.served))
        self.engines.served.append(self.name)
        self.engines.clock.now += own.seconds
        answers = [
            Served(
                prompt=len(r.prompt),
                cached=0,
                loaded=0,
                tokens=r.force or [own.answer] * r.max_tokens,
                ttft=own.seconds / 2,
                waited=0.0,
                tpot=0.1,
                logprobs=[-1.0 - own.lost] * len(r.force) if r.force else [],
            )
            for r in requests
        ]
        steps = [RoundStep(own.seconds, 2, 0, 4, 64, 0, 64, False)]
        return Round(answers, steps, own.seconds, own.seconds, 64, 32, 1000, 0, 0, [])


def load(n: int = 6) -> Load:
    """Prompts that begin alike, of which the fake engines hit nothing: recomputation."""
    requests = tuple(TrialRequest([*HEAD, 100 + i], 4) for i in range(n))
    return Load("made.jsonl", requests, ("",) * n)


def question(minutes: float = 60.0, rise: float = 0.01, same: float = 0.0) -> Question:
    means = Means(host=1 << 30, block_size=32, exact_only=rise == 0)
    return Question("throughput", Bound(rise, same), means, 2, minutes, rounds=4, copy_seconds=1.0)


def searched(
    made: Callable[[str, int], Made], asked: Question | None = None, of: Load | None = None
) -> tuple[Found, FakeEngines, list[str]]:
    clock = Clock()
    engines = FakeEngines(clock, made)
    said: list[str] = []
    found = Search(of or load(), asked or question(), engines, said.append, clock).run()
    return found, engines, said


def jitter(name: str, served: int) -> float:
    return 0.01 * ((served * 7919) % 11)


def test_the_best_is_verified_in_new_engines_that_start_the_other_way_round() -> None:
    def made(name: str, served: int) -> Made:
        seconds = {"host tier": 4.0}.get(name, 10.0)
        return Made(seconds + jitter(name, served), lost=0.5 if "int8" in name else 0.0)

    found, engines, _ = searched(made)
    assert found.verified and found.winner is not None
    assert found.winner.proposal.name == "host tier"
    gain = found.winner.ratio("throughput")
    assert gain.low > 1.0 and gain.value == pytest.approx(2.5, rel=0.05) and gain.n == 4
    assert engines.starts[0] == "stock" and engines.starts[-2:] == ["host tier", "stock"]
    assert engines.living == set(), "no engine outlives the search"
    assert {b.name for b in found.held} == {"recomputation", "transfer"}


def test_who_loses_too_much_leaves_before_a_round() -> None:
    def made(name: str, served: int) -> Made:
        return Made(5.0 if "int8" in name else 10.0, lost=0.02 if "int8" in name else 0.0)

    found, engines, _ = searched(made)
    (lossy,) = [m for m in found.tried if m.proposal.name == "host tier, int8"]
    assert lossy.out == "loses more than the bound" and not lossy.own
    assert engines.served.count("host tier, int8") == 2, "warmed up, and asked for stock's answers"
    assert not found.verified and "is better than stock" in found.says
    # The same is taken where as much may be lost.
    found, _, _ = searched(made, question(rise=0.05))
    assert found.verified and found.winner is not None
    assert found.winner.proposal.name == "host tier, int8"
    assert found.winner.quality is not None
    assert found.winner.quality.rise.value == pytest.approx(0.0202, abs=1e-4)


def test_answers_may_be_bounded_too() -> None:
    def made(name: str, served: int) -> Made:
        return Made(10.0, answer=7) if name == "stock" else Made(5.0, answer=8)

    found, _, _ = searched(made, question(same=0.5))
    assert not found.verified and found.winner is None
    assert all("loses more" in m.out for m in found.tried if m.own)
    found, _, _ = searched(made, question())
    assert found.verified and found.winner is not None and found.winner.quality is not None
    assert found.winner.quality.same == 0.0 and found.winner.quality.stock_same == 1.0


def test_what_wins_once_and_not_in_the_verification_is_not_written() -> None:
    verifying = False

    def made(name: str, served: int) -> Made:
        if name == "stock" or (verifying and served % 2):
            return Made(10.0)
        return Made(9.0)

    class Watched(FakeEngines):
        def end(self, *names: str) -> None:
            nonlocal verifying
            verifying |= not names
            super().end(*names)

    clock = Clock()
    engines = Watched(clock, made)
    found = Search(load(), question(), engines, lambda _: None, clock).run()
    assert found.winner is not None and not found.verified
    assert "its interval reaches stock" in found.says
    assert found.winner.out.startswith("not verified")


def test_an_engine_that_does_not_start_is_left_out_with_its_sentence() -> None:
    def made(name: str, served: int) -> Made:
        if name == "host tier":
            return Made(refuses="tiers: not with this model.")
        return Made(10.0 if name == "stock" else 5.0, lost=0.0)

    found, _, said = searched(made)
    (refused,) = [m for m in found.tried if m.proposal.name == "host tier"]
    assert refused.out == "refused: tiers: not with this model."
    assert any("not with this model" in line for line in said)
    assert found.verified


@pytest.mark.parametrize("verifying", [False, True])
def test_an_engine_that_ends_takes_nothing_with_it(verifying: bool) -> None:
    log = "an engine exited with code 1:\nINFO loading\nRuntimeError: no memory left: 3 MiB\n"

    class Ending(FakeEngines):
        ended = False

        def end(self, *names: str) -> None:
            self.ended |= not names
            super().end(*names)

        def get(self, proposal: Proposal) -> FakeServer:
            if proposal.name == "host tier" and self.ended is verifying:
                raise TrialFailed(log)
            return super().get(proposal)

    clock = Clock()
    times = {"stock": 10.0, "host tier": 5.0}
    engines = Ending(clock, lambda name, n: Made(times.get(name, 12.0)))
    found = Search(load(), question(), engines, lambda _: None, clock).run()
    out = {m.proposal.name: m.out for m in found.tried}["host tier"]
    before = "not verified" if verifying else "failed"
    assert out == f"{before}: RuntimeError: no memory left: 3 MiB"
    assert not found.verified and found.winner is None and found.says


def test_without_time_nothing_is_measured_and_nothing_written() -> None:
    # Stock alone takes 5 + 3 * 10 s; a verification would take longer than what is left.
    found, engines, _ = searched(
        lambda name, n: Made(10.0 if name == "stock" else 5.0), question(minutes=2.0)
    )
    assert not found.verified and found.winner is None
    assert {m.out for m in found.tried} == {"not measured: --minutes"}
    assert set(engines.starts) == {"stock"}
    assert found.says.startswith("Nothing was measured beside stock: 2 minutes")


def test_no_bottleneck_means_no_proposal() -> None:
    one = Load("x", (TrialRequest([1, 2, 3], 4),), ("",))
    found, _, _ = searched(lambda name, n: Made(), of=one)
    assert not found.tried and found.says.startswith("No rule names a bottleneck")


def test_the_best_two_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [
        Proposal("a", {"prefix_cache": {"use": "lfu"}}),
        Proposal("b", {"tiers": [{"host": {"size": 1}}]}),
        Proposal("c", {"tiers": [{"host": {"size": 2}}]}),
    ]
    monkeypatch.setattr(searching, "proposals", lambda *_: two)
    times = {"a": 6.0, "b": 8.0, "c": 9.0, "a + b": 3.0}
    found, engines, _ = searched(lambda name, n: Made(times.get(name, 10.0) + jitter(name, n)))
    assert found.winner is not None and found.winner.proposal.name == "a + b"
    assert found.winner.proposal.section == {**(two[0].section or {}), **(two[1].section or {})}
    assert {m.proposal.name: m.out for m in found.tried}["c"] == "behind others after 1 rounds"
    # Two rounds for those that stayed, one for those that did not, and the verification's.
    assert engines.served.count("c") == 3


def test_made_up_text_gets_exact_deployments_only() -> None:
    from dataclasses import replace

    found, _, _ = searched(
        lambda name, n: Made(10.0 if name == "stock" else 5.0), of=replace(load(), real=False)
    )
    assert found.tried and all(m.proposal.exact for m in found.tried)


def test_options_that_a_deployment_has_nothing_for_are_not_sent() -> None:
    own = {"reuse": "off", "segments": [3], "session_id": "s", "sequence": "off"}
    one = Load("x", (TrialRequest([1], 1, kvplug=own),), ("s",))
    assert asked(one, stock())[0].kvplug is None
    tier = Proposal("t", {"tiers": []})
    assert asked(one, tier)[0].kvplug == {"session_id": "s"}
    reuse = Proposal("r", {"reuse": {}}, asks={"reuse": "approximate"})
    # What the request says itself comes first.
    assert asked(one, reuse)[0].kvplug == {
        "reuse": "off", "segments": [3], "session_id": "s"
    }  # fmt: skip
    bare = Load("x", (TrialRequest([1], 1),), ("",))
    assert asked(bare, reuse)[0].kvplug == {"reuse": "approximate"}


def test_answers_are_compared_word_for_word_and_until_they_differ() -> None:
    assert compared([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (0.5, 0.75)
    assert compared([[1], [3]], [[1, 2], [3, 5]]) == (0.0, 0.5)


def test_deployments_that_decide_the_same_are_not_joined() -> None:
    tier, order = Proposal("t", {"tiers": [1]}), Proposal("o", {"prefix_cache": "lfu"})
    assert combined(tier, Proposal("u", {"tiers": [2]})) is None
    small = Proposal("s", {}, flags={"block-size": 16})
    assert combined(small, Proposal("k", {"format": 1}, flags={"block-size": 64})) is None
    both = combined(tier, order)
    assert both is not None and both.section == {"tiers": [1], "prefix_cache": "lfu"}


# -- proposals -------------------------------------------------------------------------------------


def named(*bottlenecks: str, exact: bool = False, host: int = 1 << 30) -> dict[str, Proposal]:
    from kvplug_lab.tune.bottleneck import Bottleneck

    found, _, _ = searched(lambda name, n: Made())
    held = [Bottleneck(name, "", 1.0, 0.5, 0.0) for name in bottlenecks]
    means = Means(host, 32, exact)
    return {p.name: p for p in proposals(load(), found.profile, held, means)}


def test_each_bottleneck_has_its_deployments_with_their_shipped_prices() -> None:
    memory = named("memory")
    assert list(memory)[:4] == ["int8", "rotated", "kivi:bits=4", "int4"]
    assert memory["int4"].prices == tuple(prices("int4")) and memory["int4"].prices
    assert memory["kivi:bits=4"].flags == {"block-size": 64}
    budgets = {p.budget for p in memory["snapkv, 128 tokens"].prices}
    assert budgets == {0.5, 512}
    assert named("memory", exact=True) == {}
    assert list(named("fragmentation")) == ["blocks of 16"]
    assert list(named("recomputation", host=0)) == []
    assert list(named("recomputation")) == ["host tier"]
    assert list(named("recomputation", "transfer")) == [
        "host tier", "host tier, lossless", "host tier, int8"
    ]  # fmt: skip
    reuse = named("recomputation elsewhere")
    assert [p.asks for p in reuse.values()] == [{"reuse": "approximate"}] * 2
    assert reuse["reuse, 16 tokens again"].flags == {"worker-extension-cls": EXTENSION}


def test_orders_are_proposed_that_hit_more_in_simulation() -> None:
    # Two texts are asked for in turn among texts that never return.
    often, requests = list(range(64)), []
    for i in range(12):
        requests.append(TrialRequest([*often, 9], 1))
        requests += [
            TrialRequest([1000 + 200 * i + 100 * k + j for j in range(65)], 1) for k in (0, 1)
        ]
    many = Load("x", tuple(requests), ("",) * len(requests))
    rates = simulated(many, 32, 4)
    assert rates["lru"] == 0.0 and rates["lfu"] > 0.2
    assert "record" not in rates, "it orders nothing itself"


# -- the file --------------------------------------------------------------------------------------


def every() -> Iterable[Proposal]:
    names = ("recomputation", "transfer", "recomputation elsewhere", "memory", "fragmentation")
    return named(*names, "long context").values()


def test_every_proposal_is_a_file_that_passes_the_check(tmp_path: Path) -> None:
    made = list(every())
    assert len(made) >= 12
    for proposal in made:
        own = {k.replace("-", "_"): v for k, v in proposal.flags.items()}
        text = deployment_text(tmp_path, {**ARGUMENTS, **own}, proposal, ["why"])
        file = tmp_path / "deployment.yaml"
        file.write_text(text, encoding="utf-8")
        config = read_checked(file)
        kinds = {str(choice.policy.kind) for choice in config.deployment.all()}
        assert set(proposal.section or {}) - {"transfer"} <= kinds, proposal.name
        written = yaml.safe_load(text)
        assert written["block-size"] == own.get("block_size", 32)
        assert written["kv-cache-memory-bytes"] == 1 << 30


def test_the_file_says_what_it_was_chosen_on(tmp_path: Path) -> None:
    def made(name: str, served: int) -> Made:
        return Made({"host tier": 4.0}.get(name, 10.0), lost=0.5 if "int8" in name else 0.0)

    found, _, _ = searched(made)
    assert found.winner is not None
    where = Where("SmolLM2\n!!evil: 1", "a machine", "kvplug tune --prompts x", "2026-11-27")
    comments = evidence(found, "made.jsonl, 6 requests", where)
    text = deployment_text(tmp_path, ARGUMENTS, found.winner.proposal, comments)
    head = text[: text.index("\nmodel:")]
    assert all(line.startswith("#") for line in head.splitlines() if line)
    assert all(len(line) <= 100 for line in head.splitlines())
    flat = " ".join(head.replace("#", " ").split())
    for part in (
        "host tier, chosen by kvplug tune for throughput: 2.50 [2.50, 2.50] times as good as stock",
        "SmolLM2?!!evil: 1",
        "kvplug tune --prompts x",
        "2026-11-27",
        "recomputation: ",
        "100% of answers are stock's word for word",
        "host tier, int8: perplexity +64.87%, loses more than the bound.",
        "1 GiB of host memory",
    ):
        assert part in flat, part
    assert yaml.safe_load(text)["kv-transfer-config"]["kv_load_failure_policy"] == "recompute"


def test_a_search_is_json() -> None:
    found, _, _ = searched(lambda name, n: Made(10.0 if name == "stock" else 4.0))
    data: dict[str, Any] = json.loads(json.dumps(plain(found), allow_nan=False))
    assert data["verified"] and data["winner"]["gain"]["throughput"]["n"] == 4
    assert data["bottlenecks"][0]["name"] == "recomputation"
    assert all(m["out"] or m["rounds"] for m in data["tried"])
