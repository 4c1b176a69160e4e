"""The built site: what the code states is on its pages, and it needs no other host."""

from __future__ import annotations

import html
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel

from kvplug.contract import ALL_FEATURES, Kind, Policy
from kvplug.hosts.vllm import compat
from kvplug.registry import plugins

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
TAG = re.compile(r"<[^>]+>")


def shipped() -> list[type[Policy]]:
    """Policies of this repository's packages; the environment may have others."""
    registry = plugins().registry
    found = [registry.get(kind, name) for kind in Kind for name in registry.names(kind)]
    folder = REPO / "policies"
    return [
        policy
        for policy in found
        if policy is not None
        and folder in Path(str(sys.modules[policy.__module__].__file__)).resolve().parents
        and not policy.__module__.startswith("kvplug_test")
    ]


def stem(policy: type[Policy]) -> str:
    """Name of a policy's page: its kind stands before it if an earlier kind has the name."""
    earlier = list(Kind)[: list(Kind).index(policy.kind)]
    taken = any(plugins().registry.get(kind, policy.name) for kind in earlier)
    return f"{policy.kind}_{policy.name}" if taken else policy.name


@pytest.fixture(scope="module")
def macros() -> ModuleType:
    pytest.importorskip("mkdocs")
    path = str(DOCS)
    sys.path.insert(0, path)
    try:
        return importlib.import_module("macros")
    finally:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once; a broken link, reference or macro fails here."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def words(page: str) -> str:
    """A page's text, without tags."""
    return " ".join(html.unescape(TAG.sub("", page)).split())


def rows_of(page: str) -> list[list[str]]:
    """Cells of every row of every table of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    cell = re.compile(r"<t[dh][^>]*>(.*?)</t[dh]>", re.DOTALL)
    return [[words(one) for one in cell.findall(row)] for row in rows]


def check_fields(page: str, model: type[BaseModel]) -> None:
    """Every field has a row with its default, its bounds and its description."""
    rows = rows_of(page)
    for name, info in model.model_fields.items():
        meaning = " ".join((info.description or "").replace("`", "").split())
        own = [row for row in rows if len(row) == 4 and (row[0], row[3]) == (name, meaning)]
        assert own, f"{model.__name__}.{name}"
        _, default, span, _ = own[0]
        value = None if info.is_required() else info.get_default(call_default_factory=True)
        if isinstance(value, bool):
            assert default == str(value).lower(), name
        elif value not in (None, "") and not isinstance(value, BaseModel):
            assert default == str(value), name
        for bound in info.metadata:
            for key in ("ge", "gt", "le", "lt"):
                if (limit := getattr(bound, key, None)) is not None:
                    assert re.search(rf"(?<![\d.]){re.escape(str(limit))}(?![\d.])", span), name


# -- policies --------------------------------------------------------------------------------------


def test_every_policy_has_its_options_features_and_paper_on_its_page(site: Path) -> None:
    policies = shipped()
    assert len(policies) >= 41
    for policy in policies:
        page = (site / "policies" / stem(policy) / "index.html").read_text(encoding="utf-8")
        check_fields(page, policy.Options)
        text = words(page)
        assert f"Kind {policy.kind} · {'exact' if policy.exact else 'approximate'}" in text
        assert not policy.paper or policy.paper in text
        if missing := sorted(map(str, ALL_FEATURES - policy.supports)):
            assert f"Does not support: {', '.join(missing)}." in text, policy.name
        else:
            assert "Supports every engine feature." in text


@pytest.mark.parametrize(
    ("page", "module", "name"),
    [
        ("sequence_policies", "kvplug.contract", "ScoringOptions"),
        ("segments", "kvplug.reuse.settings", "ReuseSettings"),
        ("segments", "kvplug.reuse.settings", "Splitting"),
        ("segments", "kvplug.reuse.settings", "Store"),
        ("reuse", "kvplug.reuse.settings", "Recompute"),
        ("guard", "kvplug.reuse.settings", "GuardSettings"),
        ("guard", "kvplug.reuse.settings", "Breaker"),
        ("requests", "kvplug.request_options", "RequestOptions"),
    ],
)
def test_settings_are_on_their_page(site: Path, page: str, module: str, name: str) -> None:
    model = getattr(importlib.import_module(module), name)
    check_fields((site / page / "index.html").read_text(encoding="utf-8"), model)


# -- vLLM ------------------------------------------------------------------------------------------


def test_everything_that_is_used_of_vllm_is_named(site: Path) -> None:
    page = words((site / "vllm" / "index.html").read_text(encoding="utf-8"))
    assert len(compat.EXTENSION_POINTS) > 30
    for target, parameters, *_ in compat.EXTENSION_POINTS:
        module, _, name = target.partition(":")
        assert f"{name} {module}" in page or f"{name}{module}" in page, target
        for parameter in parameters:
            assert parameter in page
    attributes = re.findall(r"``([A-Z]\w+\.\w+)``", compat.__doc__ or "")
    assert len(attributes) >= 5
    for attribute in attributes:
        assert attribute in page
    for target, names in getattr(compat, "ATTRIBUTES", ()):
        assert target.partition(":")[2] in page
        assert all(name in page for name in names)


def test_every_class_that_extends_vllms_is_named(macros: ModuleType) -> None:
    """The table is read from source; the classes themselves say the same."""
    pytest.importorskip("vllm")
    listed = set(re.findall(r"^\| `(\w+)` \|", macros.subclasses(), re.MULTILINE))
    host = REPO / "kvplug" / "kvplug"
    found = set()
    for path in (host / "hosts" / "vllm").rglob("*.py"):
        name = ".".join(path.relative_to(host.parent).with_suffix("").parts)
        module = importlib.import_module(name.removesuffix(".__init__"))
        for one in vars(module).values():
            if isinstance(one, type) and one.__module__ == module.__name__:
                bases = {base.__module__.split(".")[0] for base in one.__mro__[1:]}
                if "vllm" in bases:
                    found.add(one.__name__)
    assert listed == found | {
        "Backend",
        "Builder",
        "Door",
        "Impl",
    }  # made of the backend vLLM chose


# -- the site itself -------------------------------------------------------------------------------


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    loaded = re.compile(
        r"<(?:script|img|iframe|source|audio|video)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
        r"|<link\b(?![^>]*rel=[\"']?(?:canonical|edit))[^>]*href=[\"']?(?:https?:)?//",
    )
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not loaded.search(text), page
        # The theme's scripts fetch a diagram library and GitHub's stars for these.
        assert 'class="mermaid"' not in text and 'data-md-component="source"' not in text, page


def test_there_are_two_schemes_and_edit_links(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert page.count('data-md-color-scheme="') >= 3
    assert "Switch to dark mode" in page and "Switch to light mode" in page
    assert 'href="https://github.com/kvplug/kvplug/edit/main/docs/index.md"' in page


def test_drawings_take_the_colour_of_the_page(site: Path) -> None:
    page = (site / "fidelity" / "index.html").read_text(encoding="utf-8")
    drawn = (DOCS / "fidelity.md").read_text(encoding="utf-8").count("{{ figure(")
    assert page.count('<figure class="drawing"') == drawn > 1
    assert "currentColor" in page and "data-figure" not in page


# -- macros ----------------------------------------------------------------------------------------


def test_a_bad_macro_is_named(macros: ModuleType) -> None:
    for text, says in (
        ('{{ optoins("sequence", "snapkv") }}', "unknown macro 'optoins'"),
        ('{{ options("sequence", "snapvk") }}', "no sequence policy 'snapvk'"),
        ('{{ figure("x", }}', None),
        ('{{ rows("nothing", "rows") }}', "FileNotFoundError"),
    ):
        if says is None:
            assert macros.expand(text, "page.md") == text
            continue
        with pytest.raises(macros.MacroError, match=r"^page\.md: ") as raised:
            macros.expand(text, "page.md")
        assert says in str(raised.value)


def test_a_table_escapes_bars_and_leaves_blank_what_a_row_lacks(macros: ModuleType) -> None:
    assert macros.table(("a", "b"), [("x|y", "1.5")]).splitlines()[1:] == [
        "| --- | --: |",
        "| x\\|y | 1.5 |",
    ]
    shown = macros.rows(
        "reuse_rag", "rows", ("", "{variant}"), ("faster", "{speedup[median]:.1f}x")
    )
    assert "| stock |  |" in shown.splitlines()[2] and "13.3x" in shown


def test_the_theme_keeps_its_form() -> None:
    """The overridden partial is the theme's own, without the script's mark."""
    material = pytest.importorskip("material")
    partial = Path("partials") / "source.html"
    theirs = (Path(material.__file__).parent / "templates" / partial).read_text(encoding="utf-8")
    ours = (DOCS / "theme" / partial).read_text(encoding="utf-8")
    comment = re.compile(r"\{#-.*?-#\}\s*", re.DOTALL)
    assert comment.sub("", ours) == comment.sub("", theirs).replace(
        ' data-md-component="source"', ""
    )


def test_every_page_is_in_one_of_four_parts() -> None:
    nav = text_of_nav()
    assert [next(iter(part)) for part in nav] == ["Use", "Choose", "Write", "Internals"]


def text_of_nav() -> list[dict[str, object]]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    found = yaml.load((REPO / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    nav: list[dict[str, object]] = found["nav"]
    return nav
