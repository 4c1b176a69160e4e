"""What a deployment file is told: file, line, key, problem and fix, for everything refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

import kvplug
from kvplug import parser as parser_module
from kvplug.contract import (
    EngineView,
    Feature,
    Fingerprint,
    Kind,
    LayerView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
    ReuseCheck,
    ReuseRequest,
    SequencePolicy,
    Verdict,
    Window,
)
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, change_options
from kvplug.hosts.vllm.flags import RUNS, read_config
from kvplug.parser import load_deployment
from kvplug.registry import Plugins
from kvplug.yaml_file import read_yaml

Load = Callable[[str], Deployment]


class Oldest(PrefixCachePolicy):
    name = "oldest"
    changes = "the order"
    requires = frozenset({Feature.PREFIX_CACHING})

    def on_release(self, released: Released) -> None: ...

    def on_hit(self, ids: Sequence[int]) -> None: ...

    def on_remove(self, ids: Sequence[int]) -> None: ...

    def victims(self, n: int) -> Sequence[int]:
        return []


class Newest(Oldest):
    name = "newest"
    excludes: ClassVar[dict[str, str]] = {"sequence:window": "they were never tried together"}


class Windowed(SequencePolicy):
    name = "window"
    changes = "what is seen"
    supports = frozenset({Feature.PREEMPTION, Feature.PREFIX_CACHING, Feature.CHUNKED_PREFILL})

    class Options(PolicyOptions):
        window: int = Field(448, ge=1, le=4096, description="latest tokens kept")
        sink: int = Field(64, ge=0, description="first tokens kept")

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        window = options.model_dump()["window"]
        if window % engine.block_size:
            raise ValueError(
                f"window {window} is no multiple of the block size {engine.block_size}"
            )

    def window(self, layer: LayerView) -> Window:
        return Window(1, 1)


class Strict(ReuseCheck):
    name = "strict"
    exact = True
    changes = "nothing"

    class Options(PolicyOptions):
        shift: int = Field(description="tokens a segment may move")

    def check(self, candidate: Fingerprint, request: ReuseRequest) -> Verdict:
        return Verdict(True)


class Plain(Strict):
    name = "plain"
    Options = PolicyOptions  # type: ignore[assignment, misc]


class TinyPlugin:
    @kvplug.hookimpl
    def kvplug_register_policies(self, registry: Any) -> None:
        for policy in (Oldest, Newest, Windowed, Strict, Plain):
            registry.add(policy)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """The tiny policies above are all that is installed."""
    found = Plugins(entry_points=False)
    found.register(TinyPlugin(), "tiny")
    monkeypatch.setattr(parser_module, "plugins", lambda: found)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "section.yaml"


@pytest.fixture
def load(file: Path) -> Load:
    """Load a section from a file of its own."""

    def load_text(text: str) -> Deployment:
        file.write_text(text, encoding="utf-8")
        return load_deployment(file)

    return load_text


def refused(load: Load, text: str) -> list[str]:
    with pytest.raises(DeploymentError) as caught:
        load(text)
    return str(caught.value).splitlines()


ENGINE = EngineView(
    block_size=16,
    features=frozenset({Feature.PREEMPTION, Feature.PREFIX_CACHING, Feature.CHUNKED_PREFILL}),
)


def told(deployment: Deployment, engine: EngineView = ENGINE) -> list[str]:
    found = deployment.incompatible(engine, runs=RUNS, host="vllm")
    return [refusal.text(deployment.source) for refusal in found]


# Section, line, then key, problem and fix as they are printed.
REFUSALS = {
    "unknown key": (
        "prefix_cache: oldest\nsequense: window\n",
        "2: sequense: unknown key. Fix: did you mean sequence? Otherwise use one of prefix_cache, "
        "sequence, format, reuse, attention, tiers, transfer, lifecycle, guard, observe, "
        "on_bad_request.",
    ),
    "unknown key like no other": (
        "zzz: 1\n",
        "1: zzz: unknown key. Fix: use one of prefix_cache, sequence, format, reuse, attention, "
        "tiers, transfer, lifecycle, guard, observe, on_bad_request.",
    ),
    "kind of a wrong type": (
        "\nsequence: 7\n",
        "2: sequence: must name a policy, got int. Fix: write `sequence: {use: NAME}`.",
    ),
    "no use": (
        "sequence:\n  window: 32\n",
        "1: sequence: does not name a policy. Fix: add `use:` to sequence.",
    ),
    "use of a wrong type": (
        "prefix_cache:\n  use: 3\n",
        "2: prefix_cache.use: must be a policy name, got int. Fix: use one of newest, oldest.",
    ),
    "policy of an extra that is not installed": (
        "reuse:\n  use: [credibility]\n",
        "2: reuse.use[0]: unknown reuse policy 'credibility'. "
        "Fix: pip install 'kvplug[reuse-learned]'. Otherwise choose from plain, strict.",
    ),
    "unknown policy": (
        "prefix_cache:\n  use: oldset\n",
        "2: prefix_cache.use: unknown prefix_cache policy 'oldset'. "
        "Fix: did you mean oldest? Otherwise choose from newest, oldest.",
    ),
    "policy of a kind with none installed": (
        "format: fp8\n",
        "1: format: unknown format policy 'fp8'. Fix: install a plugin with format policies.",
    ),
    "policy of another kind": (
        "sequence:\n  use: oldest\n",
        "2: sequence.use: unknown sequence policy 'oldest'. "
        "Fix: choose from window. 'oldest' is a prefix_cache policy.",
    ),
    "nobody chooses for auto": (
        "prefix_cache: auto\n",
        "1: prefix_cache: no plugin chooses a policy for `auto`. Fix: name a policy.",
    ),
    "value below its range": (
        "sequence:\n  use: window\n  window: 0\n",
        "3: sequence.window: must be greater than or equal to 1, got 0. "
        "Fix: use a value in range (latest tokens kept).",
    ),
    "value above its range": (
        "sequence: {use: window,\n  window: 5000}\n",
        "2: sequence.window: must be less than or equal to 4096, got 5000. "
        "Fix: use a value in range (latest tokens kept).",
    ),
    "value of a wrong type": (
        "sequence:\n  use: window\n  sink: '64'\n",
        "3: sequence.sink: must be a valid integer, got '64'. "
        "Fix: use a valid value (first tokens kept).",
    ),
    "unknown option": (
        "sequence:\n  use: window\n  windows: 32\n",
        "3: sequence.windows: window has no option 'windows'. "
        "Fix: did you mean window? Otherwise use one of window, sink.",
    ),
    "unknown option like no other": (
        "sequence:\n  use: window\n  zzz: 32\n",
        "3: sequence.zzz: window has no option 'zzz'. Fix: use one of window, sink.",
    ),
    "option of a policy without any": (
        "prefix_cache:\n  use: oldest\n  size: 3\n",
        "3: prefix_cache.size: oldest has no option 'size'. Fix: remove it.",
    ),
    "required option left out": (
        "reuse:\n  use: [strict]\n",
        "2: reuse.use[0].shift: is missing. Fix: add it (tokens a segment may move).",
    ),
    "list where one is taken": (
        "prefix_cache:\n  use: [oldest, newest]\n",
        "2: prefix_cache.use: must be a policy name, got list. Fix: use one of newest, oldest.",
    ),
    "list of nothing": (
        "reuse:\n  use: []\n",
        "2: reuse.use: must be a policy name or a list of policy names, got an empty list. "
        "Fix: use one of plain, strict.",
    ),
    "list in place of a kind": (
        "prefix_cache: [oldest]\n",
        "1: prefix_cache: must name a policy, got list. Fix: write `prefix_cache: {use: NAME}`.",
    ),
    "options beside a list": (
        "reuse:\n  use: [plain]\n  shift: 3\n",
        "3: reuse.shift: reuse has no option 'shift'. "
        "Fix: use one of approximate, segments, store, recompute, prefetch.",
    ),
    "option of a key beside a list": (
        "reuse:\n  use: [plain]\n  store: {memory: 0}\n",
        "3: reuse.store.memory: must be greater than or equal to 1, got 0. Fix: use a "
        "value in range (MiB of host memory for segments and their text, of all processes "
        "together).",
    ),
    "value of on_bad_request": (
        "on_bad_request: refused\n",
        "1: on_bad_request: must be report or refuse, got 'refused'. Fix: report answers the "
        "request and names the refused options; refuse answers HTTP 400.",
    ),
    "on_bad_request that is a list": (
        "on_bad_request: [refuse]\n",
        "1: on_bad_request: must be report or refuse, got ['refuse']. Fix: report answers the "
        "request and names the refused options; refuse answers HTTP 400.",
    ),
    "guard of nothing": (
        "guard: {}\n",
        "1: guard: watches reuse, but nothing is reused. "
        "Fix: add a reuse section, or guard.shadow for other policies, or remove guard.",
    ),
    "key of guard beside shadow alone": (
        "sequence: window\nguard:\n  shadow: {}\n  history: 3\n",
        "4: guard.history: is about reuse, but nothing is reused. "
        "Fix: add a reuse section, or remove history.",
    ),
    "shadow of what is exact": (
        "reuse: {use: [plain]}\nguard:\n  shadow: {}\n",
        "3: guard.shadow: answers approximate answers again, but nothing here approximates. "
        "Fix: add a sequence or attention policy or reuse with approximate: true, or remove "
        "guard.shadow.",
    ),
    "option of shadow": (
        "sequence: window\nguard:\n  shadow: {alpha: 0.5}\n",
        "3: guard.shadow.alpha: must be less than 0.5, got 0.5. Fix: use a value in range "
        "(probability of going back to exact although the mean is within the bound).",
    ),
    "option of guard": (
        "reuse:\n  use: [plain]\nguard:\n  breaker: {threshold: 0}\n",
        "4: guard.breaker.threshold: must be greater than or equal to 1, got 0. Fix: use a "
        "value in range (drifting answers of a family after which its reuse stops).",
    ),
    "list item that is no policy": (
        "reuse:\n  use:\n    - plain\n    - 4\n",
        "4: reuse.use[1]: is not a policy. Fix: write a name, or `{name: {option: value}}`.",
    ),
    "bad option in a list": (
        "reuse:\n  use:\n    - plain\n    - strict:\n        shift: far\n",
        "4: reuse.use[1].shift: must be a valid integer, got 'far'. "
        "Fix: use a valid value (tokens a segment may move).",
    ),
    "key written twice": (
        "prefix_cache: oldest\nsequence: window\nprefix_cache: newest\n",
        "3: YAML: duplicate key 'prefix_cache'. Fix: correct the syntax at that line.",
    ),
    "nested key written twice": (
        "sequence:\n  use: window\n  use: window\n",
        "3: YAML: duplicate key 'use'. Fix: correct the syntax at that line.",
    ),
    "bad syntax": (
        "prefix_cache: {use: oldest\nsequence: window\n",
        "2: YAML: expected ',' or '}', but got ':'. Fix: correct the syntax at that line.",
    ),
    "a key that is no text": (
        "? [a, b]\n: c\n",
        "1: YAML: found unhashable key. Fix: correct the syntax at that line.",
    ),
    "a tag": (
        "prefix_cache: !!python/name:os.system x\n",
        "1: YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/name:os.system'. Fix: correct the syntax at that line.",
    ),
}


@pytest.mark.parametrize(
    ("key", "lossy", "exact"),
    [("format", "int8", "plain"), ("transfer", "cachegen", "lossless")],
)
def test_a_shadow_is_refused_where_no_request_is_exact(key: str, lossy: str, exact: str) -> None:
    section = {"sequence": "sink_window", "guard": {"shadow": {}}}
    if key == "transfer":
        section |= {"tiers": [{"host": {"size": "1GiB"}}]}
    built_in = Plugins()
    load_deployment(section | {key: exact}, using=built_in)
    with pytest.raises(DeploymentError, match=f"{lossy} changes the KV of every request"):
        load_deployment(section | {key: lossy}, using=built_in)


def test_a_shadow_is_refused_where_one_tier_changes_what_it_stores() -> None:
    tiers = [{"host": {"size": "1GiB"}}, {"disk": {"path": "/x", "size": "1GiB"}}]
    section = {"sequence": "sink_window", "guard": {"shadow": {}}, "tiers": tiers}
    load_deployment(section, using=Plugins())
    tiers[1]["disk"]["transfer"] = "cachegen"
    with pytest.raises(DeploymentError, match="choose another transfer"):
        load_deployment(section, using=Plugins())


RENAMED = {
    "reuse.segments.least": "min_tokens",
    "reuse.segments.most": "max_tokens",
    "reuse.recompute.share": "fraction",
    "reuse.recompute.most": "max_fraction",
    "reuse.near": "prefetch",
    "guard.breaker.errors": "threshold",
    "guard.breaker.per": "window",
    "guard.breaker.rest": "cooldown",
}


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name(old: str, load: Load, file: Path) -> None:
    section: dict[str, Any] = {"reuse": {"use": ["plain"]}}
    *above, last = old.split(".")
    at = section
    for key in above:
        at = at.setdefault(key, {})
    at[last] = 1
    line = f"{file}:1: {old}: `{last}` was renamed. Fix: use {RENAMED[old]}."
    assert refused(load, json.dumps(section)) == [line]
    at[RENAMED[old]] = {"min_tokens": 64, "prefetch": True}.get(RENAMED[old], at.pop(last))
    if RENAMED[old] == "max_tokens":
        at["max_tokens"] = 64
    load(json.dumps(section))


def test_the_attention_memory_is_refused_with_its_new_kind(load: Load, file: Path) -> None:
    text = json.dumps({"reuse": {"use": ["plain"], "memo": {"near": 64}}})
    assert refused(load, text) == [
        f"{file}:1: reuse.memo: `memo` was renamed. Fix: use the kind attention: {{use: memo}}."
    ]


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_line_key_and_fix(name: str, load: Load, file: Path) -> None:
    text, expected = REFUSALS[name]
    assert refused(load, text) == [f"{file}:{expected}"]


def test_every_wrong_thing_is_told_at_once(load: Load, file: Path) -> None:
    lines = refused(load, "prefix_cache: oldset\nsequence: {use: window, sink: -1, zzz: 0}\nx: 1\n")
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{file}:1", "prefix_cache"],
        [f"{file}:2", "sequence.sink"],
        [f"{file}:2", "sequence.zzz"],
        [f"{file}:3", "x"],
    ]


@pytest.mark.parametrize(("text", "kind"), [("- a\n", "list"), ("7\n", "int"), ("a\n", "str")])
def test_section_that_is_no_mapping(text: str, kind: str, load: Load, file: Path) -> None:
    assert refused(load, text) == [
        f"{file}: file: must map kinds to policies, got {kind}. "
        "Fix: write e.g. `prefix_cache: {use: lru}`, or `{}` for none."
    ]


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError) as caught:
        load_deployment(str(tmp_path / "gone.yaml"))
    assert str(caught.value) == (
        f"{tmp_path}/gone.yaml: file: cannot be read: No such file or directory. "
        "Fix: check the path."
    )


def test_file_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"is a folder, not a regular file\. Fix: check"):
        load_deployment(tmp_path)


def test_file_that_is_no_text(file: Path) -> None:
    file.write_bytes(b"prefix_cache: \xff\xfe\n")
    with pytest.raises(DeploymentError, match="file: cannot be read: 'utf-8' codec"):
        load_deployment(file)


@pytest.mark.parametrize("text", ["prefix_cache: a\0b\n", "prefix_cache: 2020-13-45\n"])
def test_yaml_errors_without_a_mark_take_one_line_too(text: str, load: Load, file: Path) -> None:
    (line,) = refused(load, text)
    assert line.startswith(f"{file}: YAML: ")
    assert line.endswith("Fix: correct the syntax at that line.")


def test_broken_plugins_are_named_beside_an_unknown_policy(installed: Plugins, load: Load) -> None:
    installed.registry.broken["acme"] = "ImportError: no acme"
    (line,) = refused(load, "prefix_cache: acme\n")
    assert line.endswith("Plugin acme failed to load: ImportError: no acme.")


def test_a_plugin_refuses(installed: Plugins, load: Load, file: Path) -> None:
    class House:
        @kvplug.hookimpl
        def kvplug_deployment_loaded(self, deployment: Deployment) -> None:
            if deployment.choice(Kind.SEQUENCE):
                raise ValueError("approximate policies are not allowed in this house")

    installed.register(House(), "house")
    load("prefix_cache: oldest\n")
    assert refused(load, "sequence: window\n") == [
        f"{file}: file: approximate policies are not allowed in this house. "
        "Fix: change the section as the message says; a plugin refused it."
    ]


def test_a_plugin_chooses_for_auto(installed: Plugins, load: Load) -> None:
    class Chooser:
        @kvplug.hookimpl
        def kvplug_choose_policy(self, kind: Kind) -> str | None:
            return "newest" if kind is Kind.PREFIX_CACHE else None

    installed.register(Chooser(), "chooser")
    choice = load("prefix_cache: auto\n").choice(Kind.PREFIX_CACHE)
    assert choice is not None and choice.policy is Newest


# -- against an engine -------------------------------------------------------------------------


def test_feature_that_is_on_and_not_supported(load: Load, file: Path) -> None:
    deployment = load("prefix_cache: oldest\nsequence:\n  use: window\n")
    on = ENGINE.features | {Feature.TENSOR_PARALLEL}
    assert told(deployment, EngineView(block_size=16, features=on)) == [
        f"{file}:3: sequence.use: window does not support tensor parallel, which is enabled. "
        "Fix: disable it (--tensor-parallel-size 1) or choose another sequence policy."
    ]


def test_feature_nobody_can_switch_off(load: Load, file: Path) -> None:
    on = ENGINE.features | {Feature.MULTIMODAL}
    assert told(load("sequence: window\n"), EngineView(block_size=16, features=on)) == [
        f"{file}:1: sequence: window cannot run on a model with multimodal inputs. "
        "Fix: choose another sequence policy."
    ]


def test_feature_required_and_off(load: Load, file: Path) -> None:
    engine = EngineView(block_size=16, features=frozenset({Feature.PREEMPTION}))
    assert told(load("prefix_cache: oldest\n"), engine) == [
        f"{file}:1: prefix_cache: oldest has no effect without prefix caching, which is disabled. "
        "Fix: enable it (--enable-prefix-caching) or remove prefix_cache."
    ]


def test_two_that_exclude_each_other(load: Load, file: Path) -> None:
    deployment = load("prefix_cache: newest\nsequence:\n  use: window\n")
    assert told(deployment) == [
        f"{file}:1: prefix_cache: newest does not support sequence policy window: they were "
        "never tried together. Fix: remove one of prefix_cache and sequence.use."
    ]
    assert told(load("prefix_cache: oldest\nsequence: window\n")) == []


def test_exclusion_of_a_whole_kind(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Newest, "excludes", {"sequence": "it wants blocks to stay"})
    (line,) = told(load("prefix_cache: newest\nsequence: window\n"))
    assert "newest does not support sequence policy window: it wants blocks to stay." in line


def test_kind_the_host_does_not_run(load: Load, file: Path) -> None:
    others = RUNS - {Kind.REUSE}
    found = load("reuse:\n  use: [plain]\n").incompatible(ENGINE, runs=others, host="vllm")
    assert [refusal.text(str(file)) for refusal in found] == [
        f"{file}:2: reuse.use[0]: the vllm host does not run reuse policies in this release. "
        "Fix: remove reuse; the host runs attention, format, lifecycle, prefix_cache, sequence, "
        "tiers, transfer."
    ]


def test_a_chain_of_checks_begins_with_those_it_cannot_do_without(load: Load, file: Path) -> None:
    assert told(load("reuse:\n  use: [plain]\n")) == [
        f"{file}:2: reuse.use[0]: the chain of checks must begin with structure and position, "
        "got plain. "
        "Fix: write `use: [structure, position, plain]`."
    ]


def test_valid_option_the_policy_itself_refuses(load: Load, file: Path) -> None:
    deployment = load("sequence:\n  use: window\n  window: 40\n")
    assert told(deployment) == [
        f"{file}:1: sequence: window: window 40 is no multiple of the block size 16. "
        "Fix: change window."
    ]
    assert told(deployment, EngineView(block_size=8, features=ENGINE.features)) == []


def test_require_compatible_raises_what_incompatible_finds(load: Load) -> None:
    deployment = load("sequence: {use: window, window: 40}\n")
    with pytest.raises(DeploymentError) as caught:
        deployment.require_compatible(ENGINE, runs=RUNS, host="vllm")
    assert str(caught.value).splitlines() == told(deployment)
    load("sequence: window\n").require_compatible(ENGINE, runs=RUNS, host="vllm")


# -- where a section stands --------------------------------------------------------------------


def test_valid_section_in_a_file_of_its_own(load: Load, file: Path) -> None:
    deployment = load(
        "prefix_cache: oldest\nsequence: {use: window, window: 32}\n"
        "reuse: {use: [plain, {strict: {shift: 4096}}]}\n"
    )
    assert deployment.source == str(file)
    assert [c.policy for c in deployment.all()] == [Oldest, Windowed, Plain, Strict]
    sequence = deployment.choice(Kind.SEQUENCE)
    assert sequence is not None
    assert sequence.options.model_dump() == {"window": 32, "sink": 64}
    assert deployment.choices[Kind.REUSE][1].options.model_dump() == {"shift": 4096}
    assert isinstance(sequence.build(ENGINE), Windowed)
    assert deployment.choice(Kind.FORMAT) is None


@pytest.mark.parametrize("text", ["", "{}\n", "# nothing\n"])
def test_an_empty_section_chooses_nothing(text: str, load: Load) -> None:
    assert load(text).all() == []


def test_anchors_and_merged_keys_are_yaml_too(load: Load) -> None:
    deployment = load("sequence:\n  <<: &base {use: window, sink: 0}\n  window: 32\n")
    choice = deployment.choice(Kind.SEQUENCE)
    assert choice is not None and choice.options.model_dump() == {"window": 32, "sink": 0}


def test_an_anchor_inside_itself_ends(load: Load) -> None:
    (line,) = refused(load, "sequence: &x\n  use: window\n  window: *x\n")
    assert ":3: YAML: anchor 'x' contains itself" in line


def test_inline_section_has_no_lines() -> None:
    assert load_deployment({"prefix_cache": "oldest"}).source == "inline"
    with pytest.raises(DeploymentError) as caught:
        load_deployment({"prefix_cache": "oldset"}, key="kv_transfer_config.kvplug")
    assert str(caught.value).startswith(
        "inline: kv_transfer_config.kvplug.prefix_cache: unknown prefix_cache policy 'oldset'. "
    )


CONFIG = """\
max-model-len: 4096
kv-transfer-config:
  kv_connector: KVPlugConnector
  kv_connector_module_path: kvplug.hosts.vllm.connector
  kv_role: kv_both
  kv_connector_extra_config:
    kvplug:
      prefix_cache: oldest
      sequence:
        use: window
        window: 0
"""


def test_section_inside_a_vllm_config(file: Path) -> None:
    file.write_text(CONFIG, encoding="utf-8")
    with pytest.raises(DeploymentError) as caught:
        read_config(file)
    assert str(caught.value) == (
        f"{file}:11: kv-transfer-config.kv_connector_extra_config.kvplug.sequence.window: "
        "must be greater than or equal to 1, got 0. "
        "Fix: use a value in range (latest tokens kept)."
    )


def test_lines_survive_until_the_engine_is_known(file: Path) -> None:
    file.write_text(CONFIG.replace("window: 0", "window: 40"), encoding="utf-8")
    config = read_config(file)
    assert config.flags == {"max-model-len": 4096}
    assert told(config.deployment) == [
        f"{file}:9: kv-transfer-config.kv_connector_extra_config.kvplug.sequence: window: window "
        "40 is no multiple of the block size 16. Fix: change window."
    ]


def test_section_named_by_its_path_in_a_vllm_config(file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("sequence:\n  use: windw\n", encoding="utf-8")
    file.write_text(CONFIG.split("    kvplug:")[0] + "    kvplug: own.yaml\n", encoding="utf-8")
    with pytest.raises(DeploymentError) as caught:
        read_config(file)
    assert str(caught.value) == (
        f"{own}:2: sequence.use: unknown sequence policy 'windw'. "
        "Fix: did you mean window? Otherwise choose from window."
    )


def test_read_yaml_knows_every_line(file: Path) -> None:
    file.write_text("a:\n  b: 1\n  c:\n    - d: 2\n    - 3\n", encoding="utf-8")
    data, lines = read_yaml(file)
    assert data == {"a": {"b": 1, "c": [{"d": 2}, 3]}}
    assert lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c[0]": 4, "a.c[0].d": 4, "a.c[1]": 5}


def test_what_an_alias_repeats_has_the_lines_of_its_anchor(file: Path) -> None:
    file.write_text("a: &x\n  b: 1\nc: *x\n", encoding="utf-8")
    assert read_yaml(file)[1] == {"a": 1, "a.b": 2, "c": 3, "c.b": 2}


def test_the_error_survives_a_process_boundary(load: Load) -> None:
    with pytest.raises(DeploymentError) as caught:
        load("x: 1\n")
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value)
    assert error.refusals == caught.value.refusals


def test_a_plugin_that_fails_is_a_refusal_too(installed: Plugins, load: Load, file: Path) -> None:
    class Broken:
        @kvplug.hookimpl
        def kvplug_deployment_loaded(self, deployment: Deployment) -> None:
            raise RuntimeError("no time")

        @kvplug.hookimpl
        def kvplug_choose_policy(self, kind: Kind) -> str:
            raise RuntimeError("no idea")

    installed.register(Broken(), "broken")
    (loaded,) = refused(load, "prefix_cache: oldest\n")
    assert loaded.startswith(f"{file}: file: RuntimeError: no time.")
    (chosen,) = refused(load, "prefix_cache: auto\n")
    assert "the plugin that chooses for `auto` failed: RuntimeError: no idea." in chosen


def test_bad_requests_are_reported_unless_the_section_says_otherwise(load: Load) -> None:
    assert load("{}").on_bad_request == "report"
    assert load("on_bad_request: report\n").on_bad_request == "report"
    assert load("on_bad_request: refuse\n").on_bad_request == "refuse"


@pytest.mark.parametrize(
    ("problem", "fix"),
    [
        ("budget 32 is smaller than sink + recent = 36", "change budget, sink or recent."),
        ("groups of 24 do not divide 64", "change group."),
        ("the moon is full", "change its options."),
    ],
)
def test_the_fix_names_the_options_that_a_problem_mentions(problem: str, fix: str) -> None:
    assert change_options(problem, ["budget", "sink", "recent", "group", "full_size"]) == fix
