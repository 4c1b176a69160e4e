"""The figures of the pages: drawn from the data that lies beside them, with where it is from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

figures = pytest.importorskip("kvplug_lab.figures")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
DATA = sorted(p.stem for p in FOLDER.glob("*.json") if p.stem != "sources")


def drawn(svg: str, name: str) -> dict[str, list[tuple[float, float]]]:
    """Places of the points of every series of a drawing, by the series' id."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        gid = group.get("id", "")
        if not re.fullmatch(rf"{name}-\d+", gid):
            continue
        uses = [(float(u.get("x", "0")), float(u.get("y", "0"))) for u in group.iter(f"{SVG}use")]
        if not uses:
            path = next(iter(group.iter(f"{SVG}path"))).get("d", "")
            numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", path)]
            uses = list(zip(numbers[::2], numbers[1::2], strict=True))
        found[gid] = uses
    return found


@pytest.mark.parametrize("name", sorted(figures.DRAWINGS))
def test_a_drawing_shows_its_data(name: str) -> None:
    drawing = figures.DRAWINGS[name](json.loads((FOLDER / f"{name}.json").read_text("utf-8")))
    kept = drawn((FOLDER / f"{name}.svg").read_text(encoding="utf-8"), name)
    again = drawn(figures.draw(drawing, name), name)
    assert set(kept) == set(again) == {f"{name}-{i}" for i in range(len(drawing.series))}
    for i, series in enumerate(drawing.series):
        own, fresh = kept[f"{name}-{i}"], again[f"{name}-{i}"]
        # matplotlib leaves out points that a line passes through anyway.
        assert len(own) == len(fresh) <= len(series.x)
        assert series.line or len(own) == len(series.x)
        assert own == [pytest.approx(place, abs=0.5) for place in fresh]


def test_a_drawing_of_other_data_is_another() -> None:
    data = json.loads((FOLDER / "gain_formats.json").read_text(encoding="utf-8"))
    data["runs"][1]["requests"] += 0.4
    changed = drawn(
        figures.draw(figures.DRAWINGS["gain_formats"](data), "gain_formats"), "gain_formats"
    )
    kept = drawn((FOLDER / "gain_formats.svg").read_text(encoding="utf-8"), "gain_formats")
    assert changed["gain_formats-0"] != [
        pytest.approx(place, abs=0.5) for place in kept["gain_formats-0"]
    ]


def test_text_and_axes_have_no_colour_of_their_own() -> None:
    for name in figures.DRAWINGS:
        svg = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
        assert "currentColor" in svg and figures.INK not in svg
        assert "<title>" in svg and "http://" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", svg)


def test_every_file_says_where_it_is_from() -> None:
    sources = json.loads((FOLDER / "sources.json").read_text(encoding="utf-8"))
    assert sorted(sources) == DATA
    for name, source in sources.items():
        assert {"command", "kind", "commit", "date", "machine", "note"} <= set(source), name
        assert source["kind"] in {"measured", "converted from a published table"}
        assert re.fullmatch(r"[0-9a-f]{7,40}", source["commit"])
        assert re.match(r"kvplug |python ", source["command"])


def test_the_command_draws_all_or_names_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert figures.main([str(tmp_path)]) == 0
    assert {p.stem for p in tmp_path.glob("*.svg")} == set(figures.DRAWINGS)
    (tmp_path / "bench.json").write_text("[]", encoding="utf-8")
    assert figures.main([str(tmp_path)]) == 2
    assert f"{tmp_path / 'bench.json'}: TypeError" in capsys.readouterr().err
