"""Compiled operations: where their libraries lie, who may write them, and what happens without."""

from __future__ import annotations

import importlib
import itertools
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_paged_attend_quant import LAYOUTS, make_case
from test_quant_write import CODINGS, empty_pages, vectors

from kvplug_kernels.attend_exact.cpu import attend_exact_cpu
from kvplug_kernels.cpu import library
from kvplug_kernels.paged_attend_quant.cpu import paged_attend_quant_cpu
from kvplug_kernels.paged_attend_quant.naive import paged_attend_quant_naive
from kvplug_kernels.quant_write.cpu import has_code, quant_write_cpu
from kvplug_kernels.quant_write.naive import quant_write_naive

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, library.COMPILERS)), reason="needs a C++ compiler"
)
SOURCE = library._ROOT / "quant_write" / "cpu.cpp"
CPU = torch.device("cpu")
SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An operation that takes no time to compile."""
    made = tmp_path / "operation" / "cpu.cpp"
    made.parent.mkdir()
    made.write_text(SMALL)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    return tmp_path / "cache" / "kvplug" / "cpu"


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has loaded nothing."""
    monkeypatch.setattr(library, "_causes", [])
    library.compiled.cache_clear()
    yield
    library.compiled.cache_clear()


@needs_compiler
def test_a_library_is_compiled_once(cache: Path, source: Path) -> None:
    first = library._compiled(source, ())
    again = library._compiled(source, ())
    assert first.library.answer() == again.library.answer() == 42
    assert (first.fresh, again.fresh) == (True, False)
    assert cache.stat().st_mode & 0o777 == 0o700
    (made,) = cache.glob("*.so")
    assert made.stat().st_mode & 0o777 == 0o700
    assert not [path for path in cache.iterdir() if path.suffix not in (".so", ".lock")]


@needs_compiler
def test_processes_wait_for_one_that_compiles(cache: Path, source: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: library._compiled(source, ()).fresh, range(4)))
    assert sorted(found) == [False, False, False, True]


@needs_compiler
def test_other_sources_and_options_are_other_libraries(cache: Path, source: Path) -> None:
    library._compiled(source, ())
    assert library._compiled(source, ("-DX",)).fresh
    source.write_text(SMALL.replace("42", "43"))
    assert library._compiled(source, ()).library.answer() == 43
    assert len(list(cache.glob("*.so"))) == 3


@pytest.mark.parametrize("what", ["folder", "library", "link"])
@needs_compiler
def test_nothing_is_loaded_that_others_may_have_written(
    cache: Path, source: Path, what: str
) -> None:
    library._compiled(source, ())
    (made,) = cache.glob("*.so")
    if what == "link":
        other = made.rename(cache / "other")
        made.symlink_to(other)
    else:
        (cache if what == "folder" else made).chmod(0o777)
    with pytest.raises(library.NotCompiled, match=r"be written by others|not what it should be"):
        library._compiled(source, ())


@needs_compiler
def test_a_broken_library_is_compiled_again(cache: Path, source: Path) -> None:
    library._compiled(source, ())
    (made,) = cache.glob("*.so")
    made.unlink()
    made.write_bytes(b"half of")
    made.chmod(0o700)
    assert library._compiled(source, ()).library.answer() == 42


@needs_compiler
def test_a_home_that_cannot_be_written_to_costs_a_compilation(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert all(library._compiled(source, ()).fresh for _ in range(2))


@needs_compiler
def test_what_the_compiler_says_is_the_cause(cache: Path, source: Path) -> None:
    source.write_text("int answer( {\n")
    with pytest.raises(library.NotCompiled, match=r"g\+\+ failed: .*error: expected"):
        library._compiled(source, ())
    assert not list(cache.glob("*.so"))


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("CXX", "no-such-compiler", "there is no compiler 'no-such-compiler', which CXX names"),
        ("CXX", "false", "false failed: no message"),
        (library.SWITCH, "0", "KVPLUG_COMPILE=0 is set"),
    ],
)
def test_without_a_compiler_torch_attends_and_the_cause_is_logged_once(
    cache: Path,
    forgotten: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: str,
    cause: str,
) -> None:
    monkeypatch.setenv(name, value)
    case = make_case(LAYOUTS["int4"], [40], [2], device=CPU)
    with caplog.at_level(logging.INFO, "kvplug"):
        assert not library.prepare()
        found, _ = paged_attend_quant_cpu(**case)
    torch.testing.assert_close(found, paged_attend_quant_naive(**case)[0])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("kvplug: coded pages are attended by torch") and cause in line
    if value != "false":
        assert library.state()["cause"] == cause


@needs_compiler
def test_the_runtime_of_openmp_is_torchs(cache: Path) -> None:
    """Other packages may bring their own; ours brings none."""

    def runtimes() -> set[str]:
        return set(re.findall(r"/\S*/libgomp\S*", Path("/proc/self/maps").read_text()))

    before = runtimes()
    runtime = library.openmp_runtime()
    assert runtime is not None and str(runtime) in before
    library._compiled(SOURCE, library.OPERATIONS["quant_write"])
    assert runtimes() == before


def test_every_source_is_an_operation() -> None:
    found = {path.parent.name for path in library._ROOT.glob("*/cpu.cpp")}
    assert found == set(library.OPERATIONS)


# -- what is compiled ------------------------------------------------------------------------------


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("torch was asked")


@needs_compiler
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_layout_is_attended_by_compiled_code(
    monkeypatch: pytest.MonkeyPatch, name: str, threads: int
) -> None:
    """Also where rows are cut for threads."""
    module = importlib.import_module(paged_attend_quant_cpu.__module__)
    monkeypatch.setattr(module, "paged_attend_quant_vectorized", _refuse)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = make_case(LAYOUTS[name], [700, 0, 33], [1, 2, 3], causal=True, device=CPU)
    found, want = paged_attend_quant_cpu(**case), paged_attend_quant_naive(**case)
    torch.testing.assert_close(found[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], want[1], rtol=1e-5, atol=1e-5)


@needs_compiler
def test_integers_and_plain_vectors_are_written_by_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module(quant_write_cpu.__module__)
    monkeypatch.setattr(module, "quant_write_vectorized", _refuse)
    written = 0
    for layout in CODINGS.values():
        if not (has_code(layout.key) and has_code(layout.value)):
            continue
        key, value = vectors(layout, 40, CPU)
        pages, want = (empty_pages(layout, CPU) for _ in range(2))
        slots = torch.randperm(96)[:40]
        quant_write_cpu(key, value, pages, slots, layout)
        quant_write_naive(key, value, want, slots, layout)
        assert torch.equal(pages, want)
        written += 1
    assert written >= 10


@needs_compiler
def test_what_does_not_exist_is_an_error_and_no_crash() -> None:
    case = make_case(LAYOUTS["int4"], [40], [2], device=CPU)
    for wrong in (-1, case["pages"].shape[0]):
        table = case["block_table"].clone()
        table[0, 1] = wrong
        with pytest.raises(IndexError, match="block_table names a block"):
            paged_attend_quant_cpu(**case | {"block_table": table})
    for starts in ([0, 3], [1, 0], [-1, 1]):
        start = torch.tensor(starts, dtype=torch.int32)
        with pytest.raises(IndexError, match="query_start must be ascending"):
            paged_attend_quant_cpu(**case | {"query_start": start})
        x = torch.zeros(2, 2, 8)
        with pytest.raises(IndexError, match="query_start must be ascending"):
            attend_exact_cpu(x, x, x, start, 1.0, max_query_len=3)
    layout = CODINGS["int4"]
    key, value = vectors(layout, 2, CPU)
    pages = empty_pages(layout, CPU)
    before = pages.clone()
    with pytest.raises(IndexError, match="slots names a slot"):
        quant_write_cpu(key, value, pages, torch.tensor([0, 96]), layout)
    assert torch.equal(pages, before)


@needs_compiler
@pytest.mark.parametrize(
    ("heads", "group", "width"), [*itertools.product([1, 2], [1, 4, 7], [8, 80])]
)
def test_exact_attention_of_any_shape(heads: int, group: int, width: int) -> None:
    from kvplug_kernels.attend_exact.naive import attend_exact_naive

    rng = torch.Generator().manual_seed(0)
    query = torch.randn(130, heads * group, width, generator=rng)
    key, value = (torch.randn(130, heads, width, generator=rng) for _ in range(2))
    start = torch.tensor([0, 1, 1, 130], dtype=torch.int32)
    found = attend_exact_cpu(query, key, value, start, width**-0.5, max_query_len=129)
    want = attend_exact_naive(query, key, value, start, width**-0.5, max_query_len=129)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
