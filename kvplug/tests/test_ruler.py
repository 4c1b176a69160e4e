"""RULER's tasks: their parameters, their length, and that the right answer is in the text."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvplug_lab.fidelity import ruler
from kvplug_lab.fidelity.asked import LATER, WITH, Asked, BadQuestion, Reader
from kvplug_lab.fidelity.lm_eval_tasks import NoTasks, save
from kvplug_lab.fidelity.ruler import GENERATED, BadQuestions, build
from kvplug_lab.fidelity.tasks import BadText, Prompt

TEXT = "".join(f"In year {i} a ship left the harbour for the sea. " for i in range(4000))


class Bytes:
    """A tokenizer with a token a byte, and two special ones."""

    eos_token_id = 2
    all_special_ids = (1, 2)
    chat_template: str | None = None

    def __call__(self, text: str, split_special_tokens: bool = False, **_: Any) -> Any:
        if not split_special_tokens:
            parts = re.split("(<s>|</s>)", text)
            special = {"<s>": [1], "</s>": [2]}
            ids = [i for part in parts for i in special.get(part) or self._plain(part)]
        else:
            ids = self._plain(text)
        return type("Encoded", (), {"input_ids": ids})

    def _plain(self, text: str) -> list[int]:
        return [8 + byte for byte in text.encode()]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        special = {1: "<s>", 2: "</s>"}
        parts = ["" if skip_special_tokens and i < 8 else special.get(i) or chr(i - 8) for i in ids]
        return "".join(parts)

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return f"<s>user\n{messages[0]['content']}</s>\n<s>assistant\n"


class Pieces(Bytes):
    """A tokenizer with a token for every few letters."""

    def _plain(self, text: str) -> list[int]:
        return [8] * len(re.findall(r"\s?\w{1,4}|\W", text))


class Chats(Bytes):
    chat_template = "any"


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(Pieces())


@pytest.fixture(scope="module")
def asked(reader: Reader) -> dict[str, list[Asked]]:
    found = build(reader, TEXT, GENERATED, 4200, 3, seed=5)
    return {task: [one for one in found if one.task == task] for task in GENERATED}


def test_questions_are_the_same_for_the_same_arguments(
    reader: Reader, asked: dict[str, list[Asked]]
) -> None:
    again = build(reader, TEXT, ["vt", "niah_multikey_1"], 4200, 3, seed=5)
    assert again[::2] == asked["vt"] and again[1::2] == asked["niah_multikey_1"]
    other = build(reader, TEXT, ["vt"], 4200, 3, seed=6)
    assert all(a.answers != b.answers for a, b in zip(asked["vt"], other, strict=True))


@pytest.mark.parametrize("task", GENERATED)
def test_a_question_fills_its_tokens_and_holds_its_answers(
    task: str, reader: Reader, asked: dict[str, list[Asked]]
) -> None:
    for one in asked[task]:
        assert 4200 - 150 < reader.length(one) <= 4200
        assert all(answer in one.context for answer in one.answers)
        assert one.group == "ruler" and one.score == "match_all"
    assert len({one.answers for one in asked[task]}) == 3


@pytest.mark.parametrize(
    ("task", "answers", "facts", "value"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f-]{36}"),
        ("niah_multikey_1", 1, 4, r"\d{7}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_have_the_papers_numbers(
    task: str, answers: int, facts: int, value: str, asked: dict[str, list[Asked]]
) -> None:
    depths = []
    for one in asked[task]:
        found = re.findall(r"One of the secret \w+ for ([\w-]+) is: (\S+)\.", one.context)
        assert len(found) == facts and len(one.answers) == answers
        assert all(re.fullmatch(value, own) for _, own in found)
        keys = {key for key, own in found if own in one.answers}
        assert all(key in one.question and key in one.lead for key in keys)
        assert len(keys) == (4 if task == "niah_multiquery" else 1)
        depths.append(one.context.index(one.answers[0]) / len(one.context))
    assert max(depths) - min(depths) > 0.05


def test_a_haystack_of_needles_has_the_one_asked_for_once(asked: dict[str, list[Asked]]) -> None:
    for task in ("niah_multikey_2", "niah_multikey_3"):
        for one in asked[task]:
            facts = re.findall(r"for ([\w-]+) is: (\S+)\.", one.context)
            assert len(facts) > 20
            (own,) = (key for key, value in facts if value == one.answers[0])
            assert own in one.question and len({key for key, _ in facts}) == len(facts)


def test_variables_are_one_chain_in_order(asked: dict[str, list[Asked]]) -> None:
    for one in asked["vt"]:
        text = one.context.rsplit("Follow the chain", 1)[1]
        lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
        names = [name for name, _ in lines]
        assert names == list(one.answers) and len(names) == 5
        assert [source for _, source in lines[1:]] == names[:-1]
        assert lines[0][1] in one.question


def test_the_words_asked_for_are_the_most_frequent(asked: dict[str, list[Asked]]) -> None:
    for one in asked["cwe"]:
        shown = one.context.rsplit("remember those.\n", 1)[1]
        counts = Counter(re.findall(r"\d+\. (\w+)", shown))
        assert {counts[word] for word in one.answers} == {30}
        assert {n for word, n in counts.items() if word not in one.answers} == {3}
    for one in asked["fwe"]:
        counts = Counter(one.context.split("\n", 1)[1].split())
        assert [word for word, _ in counts.most_common(4)] == ["...", *one.answers]


def test_short_contexts_take_the_shorter_lists(reader: Reader) -> None:
    (one,) = build(reader, TEXT, ["cwe"], 2000, 1)
    shown = one.context.rsplit("remember those.\n", 1)[1]
    assert {Counter(re.findall(r"\d+\. (\w+)", shown))[word] for word in one.answers} == {6}


def test_what_does_not_fit_is_refused(reader: Reader) -> None:
    with pytest.raises(BadText, match="at least 512"):
        build(reader, TEXT, ["vt"], 500, 1)
    with pytest.raises(BadText, match=r"cwe: a context of 512 tokens is too short"):
        build(reader, TEXT, ["cwe"], 512, 1)
    with pytest.raises(BadText, match="no sentence"):
        build(reader, "no end", ["niah_single_2"], 4200, 1)


# -- where the cache is cut ------------------------------------------------------------------------


def plain(prompt: Prompt, part: str) -> str:
    return Bytes().decode(list(getattr(prompt, part)))


def one_of(**what: Any) -> Asked:
    return Asked("t", "ruler", "t-0", **({"context": "text", "question": "\nwhat?", "lead": " It",
                 "answers": ("a",), "score": "match_all", "new_tokens": 4} | what))  # fmt: skip


def test_the_question_comes_after_the_cut_or_before_it() -> None:
    later, before = (Reader(Bytes(), [1]).prompt(one_of(), ask) for ask in (LATER, WITH))
    assert (plain(later, "context"), plain(later, "then")) == ("<s>text", "\nwhat? It")
    assert (plain(before, "context"), plain(before, "then")) == ("<s>text\nwhat?", " It")
    # Without a lead the last token makes the first one of the answer.
    bare = Reader(Bytes()).prompt(one_of(lead=""), WITH)
    assert (plain(bare, "context"), plain(bare, "then")) == ("text\nwhat", "?")


def test_a_chat_template_goes_around_and_nothing_in_the_text_is_special() -> None:
    reader = Reader(Chats(), [1])
    prompt = reader.prompt(one_of(context="a</s>b"))
    assert plain(prompt, "context") == "<s>user\na</s>b"
    assert prompt.context.count(2) == 0 and prompt.then.count(2) == 1
    assert plain(prompt, "then") == "\nwhat?</s>\n<s>assistant\nIt"
    assert reader.ends == (2,)
    assert plain(Reader(Chats(), [1], chat=False).prompt(one_of()), "context") == "<s>text"
    assert plain(reader.prompt(one_of(chat=False)), "context") == "<s>text"
    with pytest.raises(BadQuestion, match="no chat template: use --no-chat"):
        Reader(Bytes(), chat=True)


def test_what_is_too_long_loses_its_middle() -> None:
    reader = Reader(Bytes())
    prompt = reader.prompt(one_of(context="abcdefghijklmnop", lead=""), LATER, 14)
    # 14 tokens: the first seven, and the last seven with the question among them.
    assert (plain(prompt, "context"), plain(prompt, "then")) == ("abcdefgp", "\nwhat?")
    with pytest.raises(BadQuestion, match="t-0: the question takes 6 tokens: more than half of"):
        reader.prompt(one_of(context="abcdefghij", lead=""), LATER, 10)
    assert Prompt.of(json.loads(json.dumps(prompt.plain()))) == prompt


# -- questions from files --------------------------------------------------------------------------

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The capital of land {i} is town {i}.",
                    "qas": [
                        {"question": f"Capital of {i}?", "answers": [{"text": f"town {i}"}] * 2},
                        {"question": "None?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(60)
            ]
        }
    ]
}
HOTPOT = [
    {
        "question": f"Who met {i}?",
        "answer": f"Ann {i}",
        "context": [[f"A{i}", ["One. ", "Two."]], [f"B{i}", [f"Ann {i} met {i}."]]],
        "supporting_facts": [[f"B{i}", 0]],
    }
    for i in range(60)
]


def test_questions_come_from_squad_and_hotpotqa(tmp_path: Path, reader: Reader) -> None:
    files = [tmp_path / "h.json", tmp_path / "s.json"]
    for path, data in zip(files, (HOTPOT, SQUAD), strict=True):
        path.write_text(json.dumps(data))
    questions = ruler.questions(files)
    assert len(questions["qa_1"].asked) == 60 and len(questions["qa_2"].documents) == 120
    found = build(reader, TEXT, ["qa_1", "qa_2"], 900, 2, questions=questions)
    for one in found:
        assert one.score == "match_part" and one.answers[0] in one.context
        assert 900 - 60 < reader.length(one) <= 900
        assert one.context.count("Document ") > 8
    assert len({one.question for one in found}) == 4
    # As many documents as there are, where more would fit.
    (whole,) = build(reader, TEXT, ["qa_1"], 6000, 1, questions=questions)
    assert whole.context.count("Document ") == 60


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no question with an answer"),
        ('{"data": [{"paragraphs": [{"context": 3, "qas": []}]}]}', "neither SQuAD's nor Hotpot"),
        ('[{"question": "a"}]', "neither SQuAD's nor HotpotQA's"),
        ('"text"', "neither SQuAD's nor HotpotQA's"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_of_questions_is_named(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "qa.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadQuestions, match=says) as caught:
        ruler.questions([path])
    assert str(path) in str(caught.value)


def test_questions_without_a_file_are_refused(reader: Reader) -> None:
    with pytest.raises(BadQuestions, match=r"qa_2 needs --qa FILE, a file of HotpotQA"):
        build(reader, TEXT, ["vt", "qa_2"], 4200, 1)


# -- for lm_eval -----------------------------------------------------------------------------------


def test_tasks_for_lm_eval_score_as_here(tmp_path: Path) -> None:
    reader = Reader(Chats(), [1])
    prompts = [reader.prompt(one) for one in build(reader, TEXT, ["vt", "fwe"], 1500, 2)]
    assert save(tmp_path / "new", reader, prompts) == "kvplug_ruler"
    lines = [json.loads(x) for x in (tmp_path / "new" / "vt.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["vt-0", "vt-1"]
    assert lines[0]["prompt"] == plain(prompts[0], "context") + plain(prompts[0], "then")
    text = (tmp_path / "new" / "kvplug_vt.yaml").read_text()
    assert "process_results: !function score.match_all" in text and "max_gen_toks: 30" in text
    scope: dict[str, Any] = {}
    exec((tmp_path / "new" / "score.py").read_text(), scope)
    doc = {"answers": ["AB", "cd"]}
    assert scope["match_all"](doc, ["It is ab."]) == {"score": 0.5}
    assert scope["match_part"](doc, ["It is ab."]) == {"score": 1.0}
    with pytest.raises(NoTasks, match="add --task ruler"):
        save(tmp_path, reader, [Prompt("greedy", "g", (1,), new_tokens=2)])
