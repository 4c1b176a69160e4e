"""The pages say what the code says: every claim that can be checked is, against the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import kvplug
import kvplug_policies.builtin
from kvplug import deployment, hookspecs
from kvplug.contract import (
    ALL_FEATURES,
    Kind,
    Policy,
    PolicyOptions,
    PolicyReport,
    PrefixCachePolicy,
    Window,
)
from kvplug.errors import DeploymentError, PluginError
from kvplug.observe.summary import summary_lines
from kvplug.registry import Plugins, PolicyRegistry
from kvplug_policies.builtin import BUILTIN

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
EXAMPLE = DOCS / "examples" / "kvplug-mru"
PAGES = sorted([REPO / "README.md", *(p for p in DOCS.rglob("*.md") if "examples" not in p.parts)])
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
YAML_BLOCK = re.compile(
    r"(?P<mark><!-- refused -->\n)?```yaml\n(?P<yaml>.*?)```\n(?:\n```text\n(?P<says>.*?)```)?",
    re.DOTALL,
)
SOURCES = {
    path: path.read_text(encoding="utf-8")
    for root in ("kvplug/kvplug", "policies/kvplug_policies", "kernels/kvplug_kernels")
    for path in sorted((REPO / root).rglob("*.py"))
}


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def page_id(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced YAML block of a page, and what the page says that kvplug says about it."""

    yaml: str
    says: str | None
    where: str


def yaml_blocks() -> list[Block]:
    found = []
    for page in PAGES:
        content = text(page)
        for match in YAML_BLOCK.finditer(content):
            line = content[: match.start("yaml")].count("\n") + 1
            yaml = SNIPPET.sub(lambda m: text(REPO / m[1]), match["yaml"])
            refused = match["mark"] is not None
            found.append(Block(yaml, match["says"] if refused else None, f"{page_id(page)}:{line}"))
    return found


BLOCKS = yaml_blocks()


@pytest.fixture
def builtin_only(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """The plugins of a fresh install, whatever else is installed here."""
    found = Plugins(entry_points=False)
    found.register(kvplug_policies.builtin, "builtin")
    monkeypatch.setattr(deployment, "plugins", lambda: found)
    return found


def check_file(yaml: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from kvplug.cli.check import read_checked

    monkeypatch.chdir(folder)
    elsewhere = folder / "elsewhere.yaml"
    elsewhere.write_text("prefix_cache: lru\n", encoding="utf-8")
    file = Path("deployment.yaml")
    file.write_text(yaml.replace("/etc/kvplug/policies.yaml", str(elsewhere)), encoding="utf-8")
    return read_checked(file)


# -- YAML ------------------------------------------------------------------------------------------


def test_pages_show_good_and_bad_deployments() -> None:
    assert sum(b.says is None for b in BLOCKS) >= 8
    assert sum(b.says is not None for b in BLOCKS) >= 8


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.says is None], ids=lambda b: b.where)
def test_a_deployment_on_a_page_is_accepted(
    block: Block, builtin_only: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvplug_mru

    builtin_only.register(kvplug_mru, "mru")
    config = check_file(block.yaml, tmp_path, monkeypatch)
    assert config.deployment.all(), "an example that shows no policy"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.says is not None], ids=lambda b: b.where)
def test_a_refusal_on_a_page_is_what_kvplug_says(
    block: Block, builtin_only: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeploymentError) as refused:
        check_file(block.yaml, tmp_path, monkeypatch)
    assert str(refused.value) == (block.says or "").rstrip("\n")


def test_every_refusal_mark_stands_before_a_block_and_its_message() -> None:
    marks = sum(text(p).count("<!-- refused -->") for p in PAGES)
    assert marks == sum(b.says is not None for b in BLOCKS)


# -- Hooks -----------------------------------------------------------------------------------------


def hook_signatures() -> dict[str, str]:
    assert hookspecs.__file__ is not None
    tree = ast.parse(text(Path(hookspecs.__file__)))
    return {
        node.name: f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}:"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    }


def test_hooks_page_has_every_signature_and_no_other_hook() -> None:
    page, signatures = text(DOCS / "hooks.md"), hook_signatures()
    assert signatures, "no hooks found"
    for name, signature in signatures.items():
        assert f"## {name}\n\n```python\n{signature}\n```" in page
        assert f"| `{name}` |" in page
    assert set(re.findall(r"\bkvplug_[a-z_]+\b", page)) == set(signatures)


def test_hook_examples_are_hooks() -> None:
    """Each example parses, and pluggy accepts it as an implementation of its hook."""
    page = text(DOCS / "hooks.md")
    examples = re.findall(
        r"```python\n((?:from kvplug import hookimpl\n+)?@hookimpl\n.*?)```", page, re.S
    )
    assert len(examples) == len(hook_signatures())
    for example in examples:
        space: dict[str, Any] = {"hookimpl": kvplug.hookimpl}
        exec(compile(example, "hooks.md", "exec"), space)
        (name,) = (n for n in space if n.startswith("kvplug_"))
        found = Plugins(entry_points=False)
        plugin = type("Plugin", (), {name: staticmethod(space[name])})
        found.manager.register(plugin)
        found.manager.check_pending()
        assert getattr(found.manager.hook, name).get_hookimpls()


# -- Policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BUILTIN, ids=lambda p: p.name)
def test_a_built_in_policy_has_a_page_that_lists_its_options(policy: type[Policy]) -> None:
    page = text(DOCS / "policies" / f"{policy.name}.md")
    assert page.startswith(f"# {policy.name}\n")
    assert f"`{policy.kind}`" in page
    assert ("**exact**" if policy.exact else "**approximate**") in page
    if policy.name == "sink_window":
        assert policy.paper in page
    section = page.split("## Options\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section, re.MULTILINE))
    fields = policy.Options.model_fields
    assert rows == {n: str(f.get_default(call_default_factory=True)) for n, f in fields.items()}
    for name, info in fields.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", section, re.MULTILINE)
        assert (info.description or "").replace("'", "") in row.replace("'", "").replace("`", "")
        for bound in info.metadata:
            limit = getattr(bound, "ge", getattr(bound, "le", None))
            assert limit is None or str(limit) in row
    if not fields:
        assert section.strip() == "None."


@pytest.mark.parametrize("policy", BUILTIN, ids=lambda p: p.name)
def test_the_page_lists_the_features_a_policy_refuses(policy: type[Policy]) -> None:
    page = text(DOCS / "policies" / f"{policy.name}.md")
    section = page.split("## Lives with\n")[1].split("\n## ")[0]
    refused = re.findall(r"^\| ([^|]+?) \| +\|$", section, re.MULTILINE)
    assert sorted(set(refused) - {"feature"}) == sorted(ALL_FEATURES - policy.supports)
    if policy.supports == ALL_FEATURES:
        assert section.strip().startswith("Every engine feature.")


def test_every_page_of_a_policy_belongs_to_one_and_readme_lists_them() -> None:
    names = {policy.name for policy in BUILTIN}
    assert {p.stem for p in (DOCS / "policies").glob("*.md")} == names
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", text(REPO / "README.md"), re.MULTILINE))
    assert set(rows) == {str(kind) for kind in Kind}
    for kind in Kind:
        of_kind = {p.name for p in BUILTIN if p.kind is kind}
        assert set(re.findall(r"\[`(\w+)`\]", rows[str(kind)])) == of_kind
        assert bool(of_kind) != rows[str(kind)].startswith("contract only")


# -- Commands, files and names ---------------------------------------------------------------------


def test_every_command_on_a_page_exists() -> None:
    import typer.main

    from kvplug.cli import app

    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    said = {
        name
        for page in PAGES
        for name in re.findall(r"(?:`|^\s*\$ )kvplug ([a-z]+)\b", text(page), re.MULTILINE)
    }
    assert len(said) >= 4
    assert said <= commands


def test_every_make_target_on_a_page_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(REPO / "Makefile"), re.MULTILINE))
    said = {
        name
        for page in PAGES
        for name in re.findall(r"(?:`|^\s*\$ )make ([a-z-]+)", text(page), re.MULTILINE)
    }
    assert {"demo", "test"} <= said <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_on_a_page_exist(page: Path) -> None:
    content = text(page)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", content)
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link
    for path in re.findall(r"[`\s]((?:[\w-]+/)+[\w-]+\.(?:py|yaml|md|toml))\b", content):
        roots = (REPO, REPO / "kvplug" / "kvplug")
        assert any((root / path).exists() for root in roots) or path.startswith("etc/"), path


def test_names_in_the_architecture_page_exist_in_the_code() -> None:
    code = "\n".join(SOURCES.values())
    names = re.findall(r"`([A-Za-z_][A-Za-z0-9_.]*)(?:\(\w*\))?`", text(DOCS / "architecture.md"))
    assert len(names) > 30
    known_to_vllm = {"allocate_slots"}
    for name in {part for n in names if "/" not in n for part in n.split(".")} - known_to_vllm:
        assert re.search(rf"\b{name}\b", code), name


def test_refusals_that_need_a_model_are_in_the_code() -> None:
    page = text(DOCS / "deployment.md").split("### Policy against model")[1].split("###")[0]
    host = "\n".join(s for p, s in SOURCES.items() if "vllm" in p.parts)
    joined = re.sub(r'"\s*\n\s*f?"', "", host)
    for begins in re.findall(r"\| `(.+?)` …", page):
        fixed = re.sub(r"^(sink_window|NAME)[: ]|version X ", "", begins).strip()
        if fixed.startswith("layers"):
            fixed = "is outside the model's 0-"
            joined += "\n".join(s for p, s in SOURCES.items() if p.stem == "sink_window")
        assert fixed in joined, begins


# -- What one sees ---------------------------------------------------------------------------------


def dataclass_fields(path: str, name: str) -> list[str]:
    tree = ast.parse(text(REPO / path))
    (cls,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return [n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]


def test_the_summary_on_the_first_page_has_the_counters_that_exist() -> None:
    host = "kvplug/kvplug/hosts/vllm"
    queue = dataclass_fields(f"{host}/queue.py", "QueueCounters")
    sequence = dataclass_fields(f"{host}/scheduler.py", "SequenceCounters")
    reports = [
        PolicyReport("prefix_cache", "lru", True, 1, 0, {n: 1 for n in queue if n != "errors"}),
        PolicyReport("sequence", "sink_window", False, 1, 0, dict.fromkeys(sequence, 1.0)),
    ]
    shown = "\n".join(re.sub(r"\b1\b", "N", line) for line in summary_lines(reports, 1))
    assert f"```text\n{shown}\n```" in text(DOCS / "index.md")
    window = Window(sink_blocks=2, window_blocks=14)
    assert f"the first {window.exact_blocks * 32} tokens are exact" in text(DOCS / "index.md")


def test_plugin_errors_on_the_page_are_what_the_registry_says() -> None:
    page = text(DOCS / "deployment.md")

    class Unstated(Policy):
        kind = Kind.PREFIX_CACHE
        name = "bad"

    class Abstract(PrefixCachePolicy):
        name = "bad"
        changes = ""

    def complete(policy_name: str) -> type[Policy]:
        body: dict[str, Any] = {
            verb: lambda self, *a: [] for verb in ("on_release", "on_hit", "on_remove", "victims")
        }
        return type("Complete", (PrefixCachePolicy,), {"name": policy_name, "changes": "", **body})

    registry = PolicyRegistry()
    kvplug_policies.builtin.kvplug_register_policies(registry)
    for policy in (Unstated, Abstract, complete("Bad-Name"), complete("lru")):
        policy.__module__, policy.__qualname__ = "my_plugin", "Bad"
        with pytest.raises(PluginError) as refused:
            registry.add(policy)
        assert f"\nPluginError: {refused.value}\n" in page


# -- The example -----------------------------------------------------------------------------------


def test_the_first_policy_page_includes_the_example() -> None:
    included = set(SNIPPET.findall(text(DOCS / "first_policy.md")))
    folder = EXAMPLE.relative_to(REPO).as_posix()
    assert f"{folder}/kvplug_mru.py" in included
    for path in included:
        assert (REPO / path).is_file(), path


def test_the_example_is_short_and_has_a_knob_that_does_something() -> None:
    import kvplug_mru

    assert len(text(EXAMPLE / "kvplug_mru.py").splitlines()) < 60
    assert Path(kvplug_mru.__file__).resolve() == (EXAMPLE / "kvplug_mru.py").resolve()
    assert issubclass(kvplug_mru.Mru.Options, PolicyOptions)
    assert set(kvplug_mru.Mru.Options.model_fields) == {"protect"}


def test_the_examples_own_tests_pass() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
