"""`kvplug reuse` before any engine starts: what it asks, how answers are scored, what is shown."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.hosts.vllm.flags import EXTENSION
from kvplug.parser import load_deployment
from kvplug_lab.engine.trial import Answer, TrialResult
from kvplug_lab.reuse import chat as reuse_chat
from kvplug_lab.reuse import mixed as reuse_mixed
from kvplug_lab.reuse import rag as reuse_rag
from kvplug_lab.reuse.checks import MATCH, CheckCosts
from kvplug_lab.reuse.runs import (
    CHECKS,
    STOCK,
    Agreement,
    TooFew,
    agreement,
    named,
    passages_of,
    perplexity,
    reported,
    turns,
    without_file,
    worker_extension,
)
from kvplug_lab.spread import Spread

cli: Any = importlib.import_module("kvplug_lab.cli.reuse")

TEXT = "\n".join(f"line {i} has words, and number {i * 7919 % 1000}." for i in range(4000))


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def words(tokens: Any) -> str:
    return "".join(map(chr, tokens))


def answer(tokens: list[int], **told: Any) -> Answer:
    rest: dict[str, Any] = {"text": "", "kvplug": None, "ttft": 1.0} | told
    return Answer(prompt_tokens=100, cached_tokens=20, token_ids=tokens, **rest)


SMALL = reuse_rag.RagSizes(
    documents=8, shortest=120, longest=150, taken=3, requests=9, generated=4, scored=6, keys=3
)


@pytest.fixture
def work() -> reuse_rag.Workload:
    return reuse_rag.workload(encode, [7], TEXT, SMALL)


# -- documents -------------------------------------------------------------------------------------


def test_documents_are_read_behind_the_prefix_of_every_request(work: reuse_rag.Workload) -> None:
    prefix = [7, *encode(reuse_rag.PREFIX)]
    assert len(work.warm) == 8
    for asked in [*work.warm, *work.plain, *work.headed]:
        assert list(asked.prompt[: len(prefix)]) == prefix
        assert asked.lengths[0] == len(prefix)
    for warm in work.warm:
        assert 120 <= warm.lengths[1] <= 150
        assert sum(warm.lengths) == len(warm.prompt)


def test_a_request_is_made_of_whole_documents_in_an_order_of_its_own(
    work: reuse_rag.Workload,
) -> None:
    stored = {a.prompt[a.lengths[0] :] for a in work.warm}
    orders = set()
    for asked in work.plain:
        assert len(asked.lengths) == 1 + SMALL.taken
        at, taken = asked.lengths[0], []
        for length in asked.lengths[1:]:
            taken.append(asked.prompt[at : at + length])
            at += length
        assert len(set(taken)) == SMALL.taken and set(taken) <= stored
        assert at < len(asked.prompt), "no question behind the documents"
        orders.add(tuple(taken))
    assert len(orders) == len(work.plain)


def test_headings_stand_before_documents_that_are_stored_without(
    work: reuse_rag.Workload,
) -> None:
    for plain, headed in zip(work.plain, work.headed, strict=True):
        assert len(headed.lengths) == 1 + 2 * SMALL.taken
        assert words(headed.prompt).count("Text 2 of 3:\n\n") == 1
        assert (plain.kind, plain.force, plain.key) == (headed.kind, headed.force, headed.key)


def test_requests_are_of_three_kinds_in_turn(work: reuse_rag.Workload) -> None:
    assert [a.kind for a in work.plain] == ["greedy", "continuation", "passkey"] * 3
    for asked in work.plain:
        assert (asked.force is not None) == (asked.kind == "continuation")
        assert bool(asked.key) == (asked.kind == "passkey")


def test_a_passkey_request_holds_exactly_one_key_and_the_right_one(
    work: reuse_rag.Workload,
) -> None:
    asked = [a for a in work.plain if a.kind == "passkey"]
    for one in asked:
        assert words(one.prompt).count("\nThe pass key is ") == 1
        assert f"{one.key} is the pass key" in words(one.prompt)
        assert one.max_tokens == len(one.key) + 1
    assert len({a.key for a in asked}) == 3


def test_a_continuation_is_what_follows_a_document_in_the_book(
    work: reuse_rag.Workload,
) -> None:
    for asked in work.plain:
        if asked.kind == "continuation":
            assert asked.force is not None and asked.max_tokens == len(asked.force) == 6
            shown = words(asked.prompt[-reuse_rag.REPEATED :])
            assert shown + words(asked.force) in TEXT
            assert words(asked.prompt).count(shown) == 2


def test_the_same_seed_asks_the_same(work: reuse_rag.Workload) -> None:
    assert reuse_rag.workload(encode, [7], TEXT, SMALL) == work
    other = reuse_rag.RagSizes(**(SMALL.__dict__ | {"seed": 1}))
    assert reuse_rag.workload(encode, [7], TEXT, other) != work


def test_too_many_keys_and_too_little_text_are_refused() -> None:
    sizes = reuse_rag.RagSizes(**(SMALL.__dict__ | {"keys": 7}))
    with pytest.raises(TooFew, match="7 pass keys leave fewer than 2 without"):
        reuse_rag.workload(encode, [], TEXT, sizes)
    with pytest.raises(TooFew, match="8 are needed"):
        reuse_rag.workload(encode, [], TEXT[:3000], SMALL)


def test_a_request_without_its_documents_keeps_prefix_and_question(
    work: reuse_rag.Workload,
) -> None:
    bare = reuse_rag.without_documents(work.plain[0])
    assert words(bare.prompt[1:]) == reuse_rag.PREFIX + reuse_rag.QUESTIONS["greedy"]


def test_a_request_sets_the_option_that_its_engine_is_asked(work: reuse_rag.Workload) -> None:
    asked = work.plain[0]
    assert reuse_rag.request_of(asked).kvplug == {
        "reuse": "approximate",
        "segments": list(asked.lengths),
    }
    assert reuse_rag.request_of(asked, reuse=None).kvplug == {"segments": list(asked.lengths)}


def test_answers_are_scored_by_kind(work: reuse_rag.Workload) -> None:
    greedy, continuation, passkey = work.plain[:3]
    measured = reuse_rag.Measured("x")
    stock = answer([1, 2, 3, 4], ttft=3.0)
    measured.add(greedy, answer([1, 2, 9, 4], ttft=0.5, kvplug={"exact": False}), stock, (0.5, 4.0))
    measured.add(
        continuation,
        answer([5], logprobs=[-1.0, -3.0], kvplug={"exact": False, "recomputed": 16, "reused": 9}),
        answer([5], logprobs=[-9.0]),
        (1.0, 1.0),
    )
    measured.add(passkey, answer([8, 8], text=f" {passkey.key}"), answer([8, 8]), (1.0, 1.0))
    measured.add(passkey, answer([8, 7], text=" 1"), answer([8, 8]), (1.0, 1.0))
    plain = measured.plain()
    assert plain["ttft_ratio"]["n"] == 4 and measured.ratio[0] == 6.0
    assert measured.busy_ratio[0] == 8.0
    assert (plain["greedy"]["identical"], plain["greedy"]["tokens_share"]) == (0.0, 0.5)
    assert plain["passkey_agreement"]["identical"] == 0.5
    assert plain["passkeys"] == {"found": 1, "asked": 2}
    assert plain["perplexity"] == pytest.approx(math.exp(2))
    assert (plain["approximate_requests"], plain["computed_share"]) == (2, 0.04)
    assert plain["reused_share"] == 0.16


# -- chat ------------------------------------------------------------------------------------------


def test_a_chat_drops_its_oldest_turns_and_keeps_the_system_prompt() -> None:
    history = reuse_chat.History([0] * 10, window=100)
    seen = []
    for number in range(1, 7):
        prompt, lengths = history.prompt([number] * 20, 5)
        seen.append((history.first, len(prompt)))
        assert prompt[:10] == [0] * 10 and prompt[-20:] == [number] * 20
        assert sum(lengths) + 20 == len(prompt) and len(prompt) + 5 <= 100
        history.add([number] * 30)
    assert seen == [(0, 30), (0, 60), (0, 90), (1, 90), (2, 90), (3, 90)]


def test_a_turn_that_does_not_fit_the_window_is_refused() -> None:
    with pytest.raises(TooFew, match="a turn takes 115 tokens; the window has 100"):
        reuse_chat.History([0] * 10, window=100).prompt([1] * 100, 5)


def test_user_and_assistant_speak_the_text_in_turns() -> None:
    sizes = reuse_chat.ChatSizes(turns=3, spoken=40, reply=10)
    spoken = ""
    for user, follows in reuse_chat.speeches(encode, TEXT, sizes):
        one = words(user)
        assert one.startswith(reuse_chat.USER)
        assert one.endswith(reuse_chat.END + reuse_chat.ASSISTANT)
        spoken += one[len(reuse_chat.USER) :][:40] + words(follows)
    assert len(spoken) == 150 and spoken in TEXT


def test_turns_over_the_window_are_summed_up_apart() -> None:
    served = [
        reuse_chat.Turn(1, 0, 100, 50, 0, 1.0, 1.0, 1.0, 1.0, 4, 4, 1.0, False),
        reuse_chat.Turn(2, 1, 100, 90, 8, 0.5, 4.0, 0.5, 5.0, 2, 4, 1.0, True),
        reuse_chat.Turn(3, 2, 100, 80, 0, 0.5, 2.0, 0.5, 6.0, 4, 4, 3.0, True),
    ]
    found = reuse_chat.summary(served)
    assert found["within the window"]["turns"] == 1
    over = found["over the window"]
    assert (over["turns"], over["approximate_turns"], over["reused_share"]) == (2, 2, 0.85)
    assert (over["computed_share"], over["identical"], over["tokens_share"]) == (0.04, 0.5, 0.75)
    assert over["ttft_ratio"]["median"] == 3.0 and over["processor_ratio"]["median"] == 5.5
    assert over["perplexity"] == pytest.approx(math.exp(2))


# -- mixed -----------------------------------------------------------------------------------------


def mixed_work(requests: int = 200) -> reuse_mixed.Workload:
    sizes = reuse_mixed.MixedSizes(requests=requests, exact=12, at_once=8, pieces=10)
    return reuse_mixed.workload(encode, [], TEXT, sizes)


def test_mixed_requests_are_of_all_kinds_tenants_and_sessions() -> None:
    work = mixed_work()
    assert set(work.modes) == set(reuse_mixed.KINDS) and sum(work.modes.values()) == 200
    options = [r.kvplug or {} for r in work.mixed]
    assert {w.get("reuse") for w in options} == {"approximate", "exact", "off", None}
    assert {r.salt for r in work.mixed} == set(reuse_mixed.TENANTS)
    assert any("session_id" in w for w in options)
    assert {r.max_tokens for r in work.mixed} == set(range(1, 9))
    assert max(r.wave for r in work.mixed) == 199 // 8


def test_exact_requests_follow_one_by_one_and_repeat_what_was_answered_approximately() -> None:
    work = mixed_work()
    together = work.together()
    assert together[:200] == work.mixed
    assert [r.wave for r in together[200:]] == list(range(25, 37))
    assert all((r.kvplug or {}).get("reuse") in (None, "exact") for r in work.exact)
    loose = [
        (r.prompt, r.salt) for r in work.mixed if (r.kvplug or {}).get("reuse") == "approximate"
    ]
    assert sum((r.prompt, r.salt) in loose for r in work.exact) >= 9


def result_of(answers: list[Answer], reports: list[dict[str, Any]]) -> TrialResult:
    return TrialResult(answers, [], 1, 32, 1, 1.0, 3, 0, reports, [], {})


def test_a_difference_from_the_fresh_engine_is_a_mismatch() -> None:
    work = mixed_work(2)
    loose = answer([1], kvplug={"exact": False, "reused": 64})
    exact = answer([1], kvplug={"exact": True, "reused": 32})
    right = [answer([i, i + 1]) for i in range(12)]
    wrong = [answer([0, 9]), *right[1:11], answer([11])]
    report = {"kind": "reuse", "counters": {"tokens": 96.0}}
    sizes = reuse_mixed.MixedSizes(requests=2, exact=12)
    ours, fresh = result_of([loose, exact, *wrong], [report]), result_of(right, [])
    found = reuse_mixed.judge(work, ours, fresh, sizes)
    assert [(m.index, m.at, m.cached) for m in found.mismatches] == [(0, 1, 20), (11, 1, 20)]
    assert (found.approximate, found.exact, found.reused) == (1, 1, 96)
    assert (found.compared, found.preemptions) == (12, 3)
    assert found.counters == {"tokens": 96.0} and found.served_as == {"none": 12}
    json.dumps(found.plain())
    cli.mixed_table(found)


def test_how_sure_the_fresh_engine_was_is_asked_for_at_the_first_difference() -> None:
    work = mixed_work(2)
    differing = reuse_mixed.Mismatch(3, 2, [5, 6, 9, 9], [5, 6, 7, 8], 0, 0, False)
    right, other = reuse_mixed.either(work.exact[3], differing)
    assert (right.force, other.force) == ([5, 6, 7], [5, 6, 9])
    assert right.prompt == work.exact[3].prompt and right.max_tokens == 3
    answers = [answer([5, 6, 7], logprobs=[0, 0, -0.5]), answer([5, 6, 9], logprobs=[0, 0, -0.75])]
    assert reuse_mixed.margin(answers, differing, 0) == 0.25
    short = reuse_mixed.Mismatch(3, 2, [5, 6], [5, 6, 7], 0, 0, False)
    assert reuse_mixed.margin(answers, short, 0) is None


# -- what they share -------------------------------------------------------------------------------


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreement([1, 2, 3], [1, 2, 3]) == 3
    assert agreement([1, 9, 3], [1, 2, 3]) == 1
    assert agreement([1], [1, 2]) == 1
    same = Agreement()
    same.add([1, 2], [1, 2])
    same.add([1, 2], [1, 3])
    same.add([9], [1, 2])
    assert (same.share, same.identical) == (0.5, pytest.approx(1 / 3))
    assert math.isnan(Agreement().share) and math.isnan(Agreement().identical)


def test_perplexity_and_spread_of_nothing_are_no_numbers() -> None:
    assert math.isnan(perplexity([])) and perplexity([-1.0]) == pytest.approx(math.e)
    assert cli._finite({"a": math.nan, "b": [1.0, math.inf], 3: "x"}) == {
        "a": None,
        "b": [1.0, None],
        "3": "x",
    }


def test_engines_take_turns_forwards_and_backwards() -> None:
    assert turns([STOCK, "a"], 0) == [STOCK, "a"] and turns([STOCK, "a"], 1) == ["a", STOCK]


def test_passages_do_not_overlap_and_begin_at_lines() -> None:
    found = passages_of(encode, TEXT, 20, 100, 3)
    assert len({words(t) for t, _ in found}) == 20
    for tokens, _ in found:
        assert len(tokens) == 100 and words(tokens).startswith("line ")


def test_an_answer_without_reuse_says_nothing() -> None:
    none = reported(answer([1]))
    assert not (none.any or none.approximate or none.reused or none.computed)
    refused = reported(answer([1], kvplug={"exact": True, "not_reused": {"other model": 1}}))
    assert not refused.any and not refused.approximate


# -- ways to reuse ---------------------------------------------------------------------------------


def test_ways_to_reuse_are_sections_that_load(tmp_path: Path) -> None:
    files: dict[str, Path | None] = {"credibility": None, "compensate": None}
    for name in ("nothing", "boundary=16", "fraction=0.15", "gaps", "gaps=8+boundary=4"):
        variant = named(name, files)
        assert [c.policy.name for c in load_deployment(dict(variant.section)).all()] == list(CHECKS)
    recompute = named("gaps=8+boundary=4", files).section["reuse"]["recompute"]
    assert recompute == {"boundary": 4, "fraction": 0.0, "gaps": 8}
    assert named("gaps", files).headed and not named("boundary=16", files).headed
    file = tmp_path / "reuse.safetensors"
    learnt = named("compensate+credibility", {"credibility": file, "compensate": file})
    assert [next(iter(c)) for c in learnt.section["reuse"]["use"][3:]] == [
        "credibility",
        "compensate",
    ]


def test_only_what_computes_inside_a_run_needs_the_workers_model() -> None:
    files: dict[str, Path | None] = {}
    assert worker_extension(named("nothing", files).section) == {}
    for name in ("boundary=16", "fraction=0.15", "gaps"):
        extra = worker_extension(named(name, files).section)
        assert extra == {"worker_extension_cls": EXTENSION}
    assert worker_extension({}) == {} and worker_extension({"reuse": list(CHECKS)}) == {}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("bondary=16", "'bondary' is not a way to reuse"),
        ("nothing,boundary=x", "invalid literal"),
        ("gaps+credibility", "credibility needs its file, --credibility FILE"),
    ],
)
def test_a_way_to_reuse_that_is_none_is_refused_before_anything_runs(
    asked: str, message: str
) -> None:
    result = CliRunner().invoke(app, ["reuse", "rag", "--variants", asked])
    assert result.exit_code == 2
    assert message in result.output


def test_what_lacks_its_file_is_left_out_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    found = cli._variants(",".join(cli.VARIANTS), None, None, None, Console(width=150))
    assert [v.name for v in found] == [
        "nothing",
        "boundary=16",
        "boundary=32",
        "fraction=0.15",
        "gaps",
    ]
    assert "compensate: skipped, it needs --compensate FILE" in capsys.readouterr().out
    assert without_file("nothing+credibility", {"compensate": Path("x")}) == "credibility"


def test_a_deployment_without_reuse_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lru.yaml"
    file.write_text("prefix_cache: lru\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["reuse", "mixed", "--deployment", str(file)])
    assert result.exit_code == 2
    assert f"{file}: kvplug.reuse: is not set." in result.output


@pytest.mark.parametrize("value", ["", "10", "100,x"])
def test_segments_that_are_not_numbers_are_refused(value: str) -> None:
    result = CliRunner().invoke(app, ["reuse", "checks", "--segments", value])
    assert result.exit_code == 2
    assert "--segments: must be integers of at least 20" in result.output


def test_times_to_first_token_come_from_the_figures_of_rag(tmp_path: Path) -> None:
    file = tmp_path / "rag.json"
    row = {"variant": "nothing", "ttft_s": {"median": 0.1}}
    data = {"stock": [{"variant": STOCK, "ttft_s": {"median": 0.9}}], "variants": [row, row]}
    file.write_text(json.dumps(data), encoding="utf-8")
    assert cli._ttft(file) == {STOCK: 0.9, "nothing": 0.1}
    file.write_text("{}", encoding="utf-8")
    result = CliRunner().invoke(app, ["reuse", "checks", "--rag", str(file)])
    assert (
        result.exit_code == 2
        and "does not hold figures of `kvplug reuse rag --json`" in result.output
    )


# -- tables ----------------------------------------------------------------------------------------


def shown(table: Any) -> str:
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(table)
    return console.export_text()


def test_the_rag_table_has_every_variant_and_what_was_published(
    work: reuse_rag.Workload,
) -> None:
    stock, ours = reuse_rag.Measured(STOCK), reuse_rag.Measured("boundary=16")
    for asked in work.plain[:3]:
        slow = answer([1, 2], ttft=2.0, logprobs=[-1.0], text=f" {asked.key}")
        stock.add(asked, slow, slow, (1.0, 1.0))
        own = answer([1, 3], ttft=0.5, logprobs=[-1.5], text=" no")
        ours.add(asked, own, slow, (0.5, 1.0))
    found = reuse_rag.RagFigures(SMALL, [stock], [ours], 31.0, {}, Spread.of([500.0]))
    (table,) = cli.rag_tables(found)
    text = shown(table)
    assert "median [quartiles]; goal 3x" in text
    assert "4.00x [4.00, 4.00]" in text and "0 of 1" in text and "50%" in text
    assert "CacheBlend, as published" in text and "2.2x to 3.3x" in text and "2405.16444" in text
    assert "31.00" in text
    json.dumps(cli._finite(found.plain()))


def test_the_chat_table_leaves_out_what_never_happened() -> None:
    turn = reuse_chat.Turn(1, 0, 100, 50, 0, 1.0, 1.0, 1.0, 1.0, 4, 4, 1.0, False)
    found = reuse_chat.ChatFigures(reuse_chat.ChatSizes(), {STOCK: [turn]}, {})
    text = shown(cli.chat_table(found))
    assert "stock, within the window" in text and "over the window" not in text


def test_the_checks_table_gives_shares_of_requests_only() -> None:
    costs = {100: {"mask": Spread.of([1.0]), MATCH: Spread.of([90.0])}}
    text = shown(
        cli.checks_table(CheckCosts([100], ["mask", MATCH], ["mask"], costs), {STOCK: 0.9})
    )
    rows = [line for line in text.splitlines() if "mask" in line or MATCH in line]
    assert "%" not in rows[0] and "0.010%" in rows[1]


# -- the page --------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reuse.md"


def test_the_commands_on_the_page_are_what_they_print() -> None:
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^\$ kvplug reuse (\w+)", page, re.MULTILINE)
    assert set(commands) == {"rag", "chat", "mixed", "checks"}
