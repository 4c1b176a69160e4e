"""Where segments begin and end, with a real tokenizer and with a made one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.errors import KVPlugError
from kvplug.reuse.settings import Splitting
from kvplug.reuse.splitting import Splitter, line_ends


class Words:
    """A vocabulary of a few pieces of text, as byte-level BPE and SentencePiece write them."""

    PIECES = (
        ("a", "a"),
        ("b", "b"),
        ("\u010a", "\n"),
        ("\u010a\u010a", "\n\n"),
        (".\u010a\u010a", ".\n\n"),
        (".\u010a", ".\n"),
        ("\u0120\u0120", "  "),
        ("<0x0A>", "\n"),
        ("\u0120c", " c"),
        ("#", "#"),
    )
    A, B, FEED, FEEDS, DOT2, DOT1, SPACES, BYTE, C, MARK = range(10)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, (piece, _) in enumerate(self.PIECES)}

    def decode(self, ids: list[int], **options: Any) -> str:
        assert options == {"clean_up_tokenization_spaces": False}
        return "".join(self.PIECES[i][1] for i in ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return {"##": [self.MARK, self.MARK], "#": [self.MARK]}.get(text, [])


W = Words


def ids(*tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def splitter(**options: Any) -> Splitter:
    return Splitter(Splitting.model_validate(options), Words())


def test_what_a_vocabulary_says_of_lines() -> None:
    feeds, blank = line_ends(Words())
    assert feeds.tolist() == [0, 0, 1, 2, 2, 1, 0, 1, 0, 0]
    assert blank.tolist() == [False, False, True, True, False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("ending", "cut"),
    [
        ((W.FEEDS,), 1),
        ((W.DOT2,), 1),
        ((W.FEED, W.FEED), 2),
        ((W.BYTE, W.BYTE), 2),
        ((W.DOT1, W.FEED), 2),
        ((W.FEED, W.SPACES, W.FEED), 3),
        ((W.FEEDS, W.FEED, W.FEEDS), 3),
        ((W.FEEDS, W.SPACES), 1),
    ],
)
def test_an_empty_line_ends_a_paragraph(ending: tuple[int, ...], cut: int) -> None:
    text = ids(*[W.A] * 16, *ending, *[W.B] * 16)
    assert splitter(min_tokens=16).split(text) == [(0, 16 + cut), (16 + cut, len(text))]


@pytest.mark.parametrize("between", [(W.FEED,), (W.DOT1,), (W.DOT1, W.A, W.FEED), (W.SPACES,)])
def test_one_line_feed_ends_none(between: tuple[int, ...]) -> None:
    text = ids(*[W.A] * 16, *between, *[W.B] * 16)
    assert splitter(min_tokens=16).split(text) == [(0, len(text))]


def test_short_paragraphs_join_the_next() -> None:
    text = ids(*[W.A, W.FEEDS] * 20)
    assert splitter(min_tokens=16).split(text) == [(0, 16), (16, 32), (32, 40)]


def test_long_paragraphs_are_cut() -> None:
    text = ids(*[W.A] * 50, W.FEEDS, *[W.B] * 40)
    runs = splitter(min_tokens=16, max_tokens=20).split(text)
    # What the cuts leave of the first paragraph is too short for a segment.
    assert runs == [(0, 20), (20, 40), (40, 60), (60, 80), (80, 91)]


def test_a_separator_ends_a_segment_wherever_it_stands() -> None:
    text = ids(*[W.A] * 16, W.MARK, W.MARK, *[W.B] * 20, W.MARK, *[W.C] * 3)
    assert splitter(by="separator", separator="##", min_tokens=16).split(text) == [
        (0, 18),
        (18, 42),
    ]
    single = splitter(by="separator", separator="#", min_tokens=16)
    assert single.split(text) == [(0, 17), (17, 39), (39, 42)]
    assert single.split(text[:0]) == []


def test_fixed_size_counts_from_where_the_request_stops_saying() -> None:
    text = ids(*[W.A] * 100)
    fixed = splitter(by="fixed", size=32)
    assert fixed.split(text) == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert fixed.split(text, [5, 11]) == [(0, 5), (5, 16), (16, 48), (48, 80), (80, 100)]


def test_what_a_request_says_holds_and_what_makes_no_sense_is_passed_over() -> None:
    text = ids(*[W.A] * 100)
    request = splitter(by="request")
    assert request.split(text) == [(0, 100)]
    wrong: Any = [0, -3, True, "7", None, 2.0, 60, 1 << 70]
    assert request.split(text, wrong) == [(0, 60), (60, 100)]
    assert splitter(by="request", min_tokens=16, max_tokens=24).split(text, [60])[:3] == [
        (0, 24),
        (24, 48),
        (48, 60),
    ]


def test_tokens_outside_the_vocabulary_are_text() -> None:
    text = ids(*[W.A] * 16, 10, -1, 1 << 30, W.FEEDS, *[W.A] * 16)
    assert splitter(min_tokens=16).split(text) == [(0, 20), (20, 36)]


@pytest.mark.parametrize("by", [{"by": "paragraph"}, {"by": "separator", "separator": "#"}])
def test_without_a_tokenizer_only_counting_is_left(by: dict[str, str]) -> None:
    with pytest.raises(KVPlugError, match="by: fixed"):
        Splitter(Splitting.model_validate(by), None)
    assert Splitter(Splitting(by="fixed"), None).split(ids(*[W.A] * 300))[0] == (0, 256)


def test_a_separator_without_tokens_is_refused() -> None:
    with pytest.raises(KVPlugError, match="has no tokens"):
        splitter(by="separator", separator="?")


rules = st.sampled_from(
    [
        {"by": "paragraph"},
        {"by": "separator", "separator": "##"},
        {"by": "fixed", "size": 24},
        {"by": "request"},
    ]
)


@given(
    rules,
    st.lists(st.integers(-1, 11), max_size=300),
    st.lists(st.integers(1, 60), max_size=4),
    st.integers(16, 40),
    st.integers(0, 40),
    st.integers(0, 300),
)
def test_runs_cover_the_text_and_stay_as_it_grows(
    rule: dict[str, Any], text: list[int], lengths: list[int], min_tokens: int, more: int, cut: int
) -> None:
    made = splitter(**rule, min_tokens=min_tokens, max_tokens=min_tokens + more)
    tokens = ids(*text)
    runs = made.split(tokens, lengths)
    assert [a for a, _ in runs] == [0, *(b for _, b in runs)][: len(runs)]
    assert not runs or runs[-1][1] == len(text)
    assert all(0 < b - a <= min_tokens + more for a, b in runs)
    own = sum(lengths)
    assert all(b - a >= min_tokens for a, b in runs[:-1] if a >= own)
    bounds = {b for _, b in runs}
    assert {sum(lengths[: i + 1]) for i in range(len(lengths))} & set(range(len(text))) <= bounds
    earlier = made.split(tokens[:cut], lengths)
    # An empty line may still grow by a line feed, so the last but one may too.
    assert earlier[:-2] == runs[: len(earlier[:-2])]


def test_paragraphs_of_a_real_text() -> None:
    from kvplug_lab.models import ModelUnavailable, smollm2
    from kvplug_lab.texts import TextUnavailable, shakespeare

    try:
        model, text = smollm2(), shakespeare()[:40_000]
    except (ModelUnavailable, TextUnavailable) as error:
        pytest.skip(str(error))
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = ids(*tokenizer.encode(text, add_special_tokens=False))
    runs = Splitter(Splitting(min_tokens=16, max_tokens=2048), tokenizer).split(tokens)
    pieces = [tokenizer.decode(tokens[a:b].tolist()) for a, b in runs]
    assert "".join(pieces) == text
    assert len(pieces) > 100
    # None is cut in the middle of a line, and none begins with an empty one.
    assert all(piece.rstrip(" ").endswith("\n\n") for piece in pieces[:-1])
    assert not any(piece.startswith("\n") for piece in pieces[1:])
