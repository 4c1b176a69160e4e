"""The demo's page and its table, without an engine; the sizes of what it compares."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvplug import configs
from kvplug.cli import app
from kvplug.hosts.vllm.flags import read_config
from kvplug.model_source import ModelNotFound
from kvplug_lab.cli.demo import pair_text, table_of, where
from kvplug_lab.cpu_dtype import fast_dtype
from kvplug_lab.demo.compare import Cell, Figures, Row, rows_of
from kvplug_lab.demo.deployments import (
    STOCK,
    Deployment,
    DoesNotFit,
    Room,
    in_the_same_memory,
)
from kvplug_lab.demo.estimate import Speed, said, seconds_of, speed
from kvplug_lab.demo.machine import Measured, versions
from kvplug_lab.demo.page import page, plot, ticks
from kvplug_lab.demo.questions import Question, Work
from kvplug_lab.demo.sides import pairs_of
from kvplug_lab.engine.rounds import Round, RoundStep
from kvplug_lab.models import tiny_llama

HOSTILE = "<script>alert(1)</script> &amp; <b onclick='x'>\"q\"</b>"
WORK = Work(
    tuple(Question(0, 300 * i, f"{HOSTILE} {i}", "12345", (7,) * 900) for i in range(3)),
    (None, 0, 1),
    documents=1,
    output_tokens=4,
)
NAMES = (STOCK, "int8", HOSTILE)
DEPLOYMENTS = [Deployment(n, None, {}, HOSTILE, False, 20, 32, 1 << 20, 0, 640) for n in NAMES]
MEASURED = Measured(
    {"kvplug": "0.1", "vLLM": "0.32"},
    "2 cores of <b>",
    8,
    [1.0, 9.0],
    2,
    "kvplug demo",
    "2026-01-01",
    "float32",
    "m",
)


def rendered(rounds: int = 3) -> str:
    figures = Figures(2, 3.0, 180, 20, 0, (1, 1, 1), 3, 10.0, 8.0, 1.0)
    rows = rows_of(DEPLOYMENTS, WORK, [[figures] * 3] * rounds)
    steps = [RoundStep(0.1, i % 3, 0, i, 0, 0, 0, False) for i in range(12)]
    last = [Round([], steps, 1.0, 1.0, 20, 32, 1 << 20, 0, 0, [])] * 3
    answers = [" 12345.", HOSTILE, " 12345."]
    pairs = pairs_of(HOSTILE, WORK.questions, [" 12345."] * 3, answers)
    return page(DEPLOYMENTS, last, rows, pairs, [HOSTILE], [HOSTILE], [HOSTILE], MEASURED)


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_hostile_answer_stays_text(rounds: int) -> None:
    text = rendered(rounds)
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert "script" not in reader.tags
    assert not {name for name in reader.names if name.startswith("on")}
    assert "alert(1)" in text and "<script" not in text and "<b onclick" not in text


def test_the_page_stands_alone_and_says_who_measured() -> None:
    text = rendered()
    assert text.startswith("<!doctype html>")
    assert "src=" not in text and "href=" not in text and "url(" not in text
    assert text.count("<polyline") == 6
    assert text.count("<title>") == 1 + 2 + 6
    for shown in ("kvplug 0.1, vLLM 0.32", "2 cores of &lt;b&gt;, 8 GiB", "2026-01-01", "float32"):
        assert shown in text
    assert "Other work ran on this machine" in text
    assert "<mark>" in text and "Counted" in text
    assert text.index("right answers") < text.index("Timed: median") < text.index("a minute")
    assert "Timed" not in rendered(1)


def test_the_widest_table_fits_eighty_columns() -> None:
    figures = Figures(12, 123.4, 15_789, 15_789, 0, (5, 5, 5), 15, 123.4, 456.0, 99.5)
    other = Figures(10, 99.9, 15_789, 15_789, 0, (5, 5, 4), 14, 23.4, 444.0, 9.5)
    names = (STOCK, "int8", "quickstart")
    own = [Deployment(n, None, {}, "", True, 20, 32, 1 << 20, 0, 3_456) for n in names]
    rows = rows_of(own, WORK, [[figures, other, figures], [other, figures, other]])
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(table_of(own, rows))
    lines = buffer.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(rows) < len(lines)


def test_what_differs_is_in_brackets_without_colour() -> None:
    (pair,) = pairs_of("own", WORK.questions[:1], [" 12345."], [" 1.\n\n2"])
    shown = pair_text(pair).plain
    assert "own differs from stock" in shown
    assert "[12345]." in shown and "   right" in shown
    assert "[1]." in shown and "[\\n\\n2]" in shown and "   wrong" in shown


def test_ticks_are_round_and_points_inside() -> None:
    assert ticks(10) == [0, 2, 4, 6, 8, 10]
    assert ticks(230) == [0, 50, 100, 150, 200]
    drawn = plot("t", "x", [("a", [0.0, 5.0, 10.0]), ("b", [])], (12.0, "all"))
    points = [tuple(map(float, p.split(","))) for p in drawn.lines[0].points.split()]
    assert len(points) == 3
    assert all(drawn.left <= x <= drawn.right and drawn.top <= y <= drawn.bottom for x, y in points)
    assert drawn.cap is not None and drawn.cap.at < points[-1][1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"), layers=4)


def sized(model: Path, *names: str, sessions: int = 5) -> list[Deployment]:
    files = [read_config(configs.shipped(name)) for name in names]
    return in_the_same_memory(Room(model, 1000, 24, sessions, 3, 1 + len(names)), files)


def test_every_deployment_has_the_same_memory(model: Path) -> None:
    stock, int8, kivi, window = sized(model, "cpu/int8", "cpu/kivi", "cpu/quickstart")
    assert stock.blocks == 3 * 32
    memory = (stock.blocks + 1) * stock.block_bytes
    for own in (int8, kivi, window):
        total = (own.blocks + 1) * own.block_bytes + own.beside
        assert memory - own.block_bytes < total <= memory
        assert own.engine["num_gpu_blocks_override"] == own.blocks + 1
        assert own.engine["max_model_len"] == 1024
        assert own.engine["max_num_seqs"] == 5
    assert int8.pool_tokens > 1.7 * stock.pool_tokens
    assert window.pool_tokens == stock.pool_tokens
    assert kivi.beside > 0 and kivi.block_size == 128
    assert [d.exact for d in (stock, int8, window)] == [True, False, False]
    assert int8.says == "format int8"
    assert window.says == "sequence sink_window (sink 64, window 448)"


def test_blocks_are_those_of_sixteen_bits_whatever_is_computed_in(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr("kvplug_lab.demo.deployments.fast_dtype", lambda _, own=dtype: own)
        found.append(sized(model, "cpu/int8"))
    assert [d.engine["dtype"] for d in found[0]] == ["float32"] * 2
    assert [d.blocks for d in found[0]] == [d.blocks for d in found[1]]


def test_one_session_has_room_for_the_longest_request(model: Path) -> None:
    files = [read_config(configs.shipped("cpu/int8"))]
    (stock, _) = in_the_same_memory(Room(model, 1030, 24, 1, 1, 2), files)
    assert stock.blocks * stock.block_size >= stock.engine["max_model_len"] == 1152


@pytest.mark.parametrize(
    ("asked", "found"), [("half", "float16"), ("auto", "bfloat16"), ("float16", "float16")]
)
def test_types_have_the_names_that_products_are_measured_in(
    asked: str, found: str, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    text = configs.shipped("cpu/int8").read_text(encoding="utf-8")
    file.write_text(text.replace("dtype: bfloat16", f"dtype: {asked}"), encoding="utf-8")
    own = in_the_same_memory(Room(model, 500, 24, 2, 2, 2), [read_config(file)])
    assert own[0].engine["dtype"] == fast_dtype(found)


def test_what_does_not_fit_is_refused_before_an_engine_starts(model: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"kivi: \d+ MiB hold"):
        sized(model, "cpu/kivi", sessions=400)
    with pytest.raises(DoesNotFit, match="int8 is given twice"):
        sized(model, "cpu/int8", "cpu/int8")


def test_a_machine_is_no_slower_alone_than_it_is_now(model: Path) -> None:
    alone, now = speed(model, "float32", 3)
    assert alone.prompt >= now.prompt > 0
    assert 0 < alone.step <= now.step


def test_the_estimate_grows_with_the_work() -> None:
    own = Speed(prompt=1000.0, step=0.05)
    one, three = (seconds_of(WORK, own, own, 3, rounds) for rounds in (1, 3))
    assert one[0] < one[1] and three[0] > one[0] and three[1] > one[1]
    slow = seconds_of(WORK, own, Speed(100.0, 0.5), 3, 3)
    assert slow[0] == three[0] and slow[1] > three[1]
    assert said((28.0, 61.0)) == "30 to 60 seconds"
    assert said((200.0, 610.0)) == "3 to 10 minutes"
    assert said((95.0, 100.0)) == "about 2 minutes"


def test_it_says_what_is_made_or_downloaded_and_where(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tmp_path / "kvplug/models/smollm2-135m-instruct"
    assert where("smollm2").endswith(f"is made now, once, which takes about 20 s: {made}")
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}", encoding="utf-8")
    assert where("smollm2").endswith(f"is there already: {made}")
    assert where(str(model)) == f"Nothing is downloaded: the model is in {model}"
    assert where("acme/never-was").startswith("acme/never-was is downloaded from the Hugging Face")
    with pytest.raises(ModelNotFound, match="--model: "):
        where("./never/was/there")


def test_versions_are_those_installed() -> None:
    assert re.match(r"\d", versions()["torch"])
    assert set(versions()) == {"kvplug", "vLLM", "torch", "Python"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--config", "no_such_deployment"], "kvplug ships no deployment of that name"),
        (["--html", "/no/such/folder/a.html"], "--html: cannot write"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(given: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["demo", *given])
    assert result.exit_code == 2
    assert says in result.output


def test_cells_without_ratio_take_no_line() -> None:
    row = Row("a", "b", (Cell("1"), Cell("2")))
    assert not row.ratios
    assert Row("a", "b", (Cell("1"), Cell("2", "2.00x (2.00..2.00)"))).ratios
