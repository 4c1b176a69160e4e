"""Build-time parts of the pages: what the code states is written into them by the code.

mkdocs runs this file as a hook. A line of a page that is ``{{ name("argument", ...) }}`` becomes
what the function of that name returns:

* ``policy(kind, name)`` and ``options(kind, name)``: a policy's facts and its options;
* ``settings("module:Model")``: the fields of a pydantic model;
* ``metrics()``, ``metrics_cost()`` and ``alerts()``: the catalogue of metrics, what they cost, and
  the alert rules;
* ``extension_points()``, ``attributes()``, ``subclasses()``: what kvplug uses of vLLM;
* ``releases()``, ``moved()``: the releases of vLLM that kvplug knows, and what differs;
* ``bytes_of(format, *options)``: bytes of a token under a format's own layout;
* ``rows(file, path, *columns)``, ``hit_rates``, ``ways``, ``scale``, ``workloads``,
  ``format_error``, ``decoded_formats``, ``transfer_codecs``, ``calibrated``, ``beyond_noise``,
  ``fidelity_formats``, ``ruler`` and ``near``: tables of figures in ``docs/figures``;
* ``tier_speed()``: what each tier stored and read a second;
* ``gpu_machine()``, ``gpu_speed()``, ``gpu_checks()`` and ``gpu_kernels()``: the last results of
  ``gpu-check`` in ``docs/figures/gpu.json``, or that nothing was measured yet;
* ``tier_sessions("name")`` and ``tier_restart()``: what ``kvplug sessions`` measured, of
  ``docs/figures/NAME.json`` and ``tier_restart.json``;
* ``kernel_code()`` and ``kernel_bytes()``: what kernels' machine code and addresses show, of
  ``docs/figures/kernel_code.json`` and ``kernel_bytes.json``;
* ``composition()``, ``composition_features()`` and ``composition_refusals()``: what goes together,
  of ``docs/figures/composition.json``;
* ``planned(model, memory, context, *deployments)``: what `kvplug plan` says of a model whose config
  is in ``kvplug/tests/model_configs``;
* ``presets()``, ``hardware()`` and ``hardware_reasons()``: the presets, and what cards suggest;
* ``presets()`` and ``hardware()``: the presets, and what cards suggest;
* ``tune_rules()``: the rules by which ``kvplug tune`` names a bottleneck;
* ``tuned(name)``: what ``kvplug tune`` found, of ``docs/figures/NAME.json``;
* ``figure(name)``: a drawing of ``docs/figures``, inline, so that it follows the page's colours.
"""

from __future__ import annotations

import ast
import html
import importlib
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args, get_origin

import yaml
from mkdocs.exceptions import PluginError
from pydantic import BaseModel
from pydantic.fields import FieldInfo

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
FIGURES = DOCS / "figures"
REPOSITORY = "https://github.com/kvplug/kvplug"
VLLM_HOST = ROOT / "kvplug" / "kvplug" / "hosts" / "vllm"

CALL = re.compile(r"^\{\{ (\w+)\((.*)\) \}\}$", re.MULTILINE)
FIGURE = re.compile(r'<div data-figure="([\w-]+)"></div>')
BRACKET = re.compile(r"\{(?=[^`]*(?:`[^`]*`[^`]*)*$)")
"""A bracket outside code."""
BULLET = re.compile(r"^\* (.+?)(?=^\* |^\S|\Z)", re.MULTILINE | re.DOTALL)


class MacroError(PluginError):
    """A macro of a page cannot be expanded; the message says which and why."""


# -- Markdown --------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped, columns of numbers are aligned right."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    number = re.compile(r"[-+±]?[\d.,]+ ?(%|x|s|µs)?( [\[(].*[\])])?")
    right = [
        any(row[i] for row in cells)
        and all(not row[i] or number.fullmatch(row[i].strip("*")) for row in cells)
        for i in range(len(heads))
    ]
    lines = [heads, ["--:" if one else "---" for one in right], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(value: object) -> str:
    """A value as code; nothing for an empty text."""
    return f"`{value}`" if str(value) else "empty"


# -- options ---------------------------------------------------------------------------------------


def default_of(info: FieldInfo) -> str:
    """Default of a field as a page shows it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, bool):
        return code(str(value).lower())
    return "none" if value is None else code(value)


def range_of(info: FieldInfo) -> str:
    """Range of a field as a page shows it: bounds, or the values it can have."""
    if info.annotation is bool:
        return "`true`, `false`"
    choices = _choices(info.annotation)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = {
        name: getattr(bound, name)
        for bound in info.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(bound, name, None) is not None
    }
    if "ge" in bounds and "le" in bounds:
        return f"{bounds['ge']} to {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(f"{words[name]} {value}" for name, value in bounds.items())


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    inner = [one for one in get_args(annotation) if one is not type(None)]
    if len(inner) == 1 and len(get_args(annotation)) == 2:
        return _choices(inner[0])
    return ()


def field_table(fields: Mapping[str, FieldInfo], key: str = "option") -> str:
    """A table of fields: name, default, range and description."""
    rows = [
        # Brackets in prose would be attributes of the cell.
        (
            f"`{name}`",
            default_of(info),
            range_of(info),
            BRACKET.sub("&#123;", info.description or ""),
        )
        for name, info in fields.items()
    ]
    return table((key, "default", "range", "meaning"), rows)


def _find(kind: str, name: str) -> Any:
    from kvplug.contract import Kind
    from kvplug.registry import plugins

    policy = plugins().registry.get(Kind(kind), name)
    if policy is None:
        raise MacroError(f"no {kind} policy {name!r} is installed")
    return policy


def _stem(policy: Any) -> str:
    """Name of a policy's files: its kind stands before it if an earlier kind has the name."""
    from kvplug.contract import Kind
    from kvplug.registry import plugins

    earlier = list(Kind)[: list(Kind).index(policy.kind)]
    taken = any(plugins().registry.get(kind, policy.name) for kind in earlier)
    return f"{policy.kind}_{policy.name}" if taken else str(policy.name)


def _shared(policy: Any) -> tuple[type[BaseModel], str] | None:
    """The options a policy shares with its family, and the page that explains them."""
    from kvplug.contract import FormatOptions, ScoringOptions

    if issubclass(policy.Options, ScoringOptions):
        return ScoringOptions, "../sequence_policies.md#shared-options"
    if issubclass(policy.Options, FormatOptions):
        return FormatOptions, "../formats.md#the-tokens-of-one-step-exact_chunk"
    return None


def policy(kind: str, name: str) -> str:
    """Facts of a policy: exactness, features it needs and does not support, source, paper."""
    from kvplug.contract import ALL_FEATURES

    found = _find(kind, name)
    module = found.__module__
    source = Path(str(importlib.import_module(module).__file__)).resolve().relative_to(ROOT)
    exact = "**exact**" if found.exact else "**approximate**"
    stem = _stem(found)
    files = [source, *(Path("configs") / of / f"{stem}.yaml" for of in ("cpu", "gpu"))]
    links = [
        f"[`{file}`]({REPOSITORY}/blob/main/{file})" for file in files if (ROOT / file).exists()
    ]
    facts = [
        " · ".join((f"Kind `{kind}`", exact, *links)),
        found.changes[:1].upper() + found.changes[1:].rstrip(".") + ".",
    ]
    if found.paper:
        facts.append(f"**Paper**: {found.paper.rstrip('.')}.")
    if found.requires:
        facts.append(f"**Requires**: {', '.join(sorted(map(str, found.requires)))}.")
    missing = sorted(map(str, ALL_FEATURES - found.supports))
    facts.append(
        f"**Does not support**: {', '.join(missing)}."
        if missing
        else "**Supports** every engine feature."
    )
    return "\n\n".join(facts)


def options(kind: str, name: str) -> str:
    """Options of a policy; those its family shares are in a fold of their own."""
    found = _find(kind, name)
    fields = found.Options.model_fields
    if not fields:
        return "None."
    shared = _shared(found)
    common = shared[0].model_fields if shared else {}
    # An option whose meaning the policy changed is its own.
    own = {n: f for n, f in fields.items() if n not in common or _differs(f, common[n])}
    rest = {n: f for n, f in fields.items() if n not in own}
    parts = [field_table(own)] if own else []
    if rest and shared:
        lines = field_table(rest).splitlines()
        fold = "\n".join(f"    {line}" for line in lines)
        parts.append(
            f'??? note "Options shared by every policy of this family"\n\n'
            f"    [What they do]({shared[1]}).\n\n{fold}"
        )
    return "\n\n".join(parts)


def _differs(mine: FieldInfo, common: FieldInfo) -> bool:
    return (mine.description, default_of(mine)) != (common.description, default_of(common))


def settings(target: str) -> str:
    """Fields of a pydantic model, given as ``module:Model``."""
    module, _, name = target.partition(":")
    model = getattr(importlib.import_module(module), name)
    return field_table(model.model_fields, "key")


# -- metrics ---------------------------------------------------------------------------------------


def metrics() -> str:
    """Every metric of the catalogue, by its group."""
    from kvplug.observe.catalogue import catalogue

    groups: dict[str, list[tuple[str, ...]]] = {}
    for one in catalogue().values():
        where = [f"`{kind}`" for kind in one.kinds]
        only = [f"Only with {' or '.join(where)}."] if where else []
        only += [f"Only with {one.only.where.removeprefix('with ')}."] if one.only else []
        said = " ".join([one.help, one.formula and f"*{one.formula}*", *only]).replace("  ", " ")
        row = (f"`{one.name}`", str(one.type), _metric_labels(one), said)
        groups.setdefault(one.group, []).append(row)
    heads = ("metric", "type", "labels", "what it is")
    return "\n\n".join(f"### {name}\n\n{table(heads, rows)}" for name, rows in groups.items())


def _metric_labels(metric: Any) -> str:
    from kvplug.observe.metric import Values

    said = []
    for name, values in metric.labels.items():
        if not isinstance(values, Values):
            said.append(f"`{name}`: {', '.join(f'`{value}`' for value in values)}")
        else:
            said.append(f"`{name}`")
    return "; ".join(said)


def metrics_cost() -> str:
    """What `kvplug_lab.engine.metrics_cost` measured, of ``docs/figures/metrics_cost.json``."""
    found = json.loads((FIGURES / "metrics_cost.json").read_text(encoding="utf-8"))
    return table(("what", "µs"), [(name, f"{value:,.2f}") for name, value in found.items()])


def alerts() -> str:
    """The alert rules of ``configs/prometheus``: when each fires, and what it says."""
    file = ROOT / "configs" / "prometheus" / "kvplug.rules.yaml"
    rules = yaml.safe_load(file.read_text(encoding="utf-8"))["groups"][0]["rules"]
    rows = []
    for rule in rules:
        said = re.sub(
            r"\{\{ *\$(?:labels\.)?(\w+)[^}]*\}\}", r"*\1*", rule["annotations"]["summary"]
        )
        after = f" for {rule['for']}" if "for" in rule else ""
        rows.append((f"`{rule['alert']}`", rule["labels"]["severity"], said + after))
    return table(("alert", "severity", "fires when"), rows)


# -- vLLM ------------------------------------------------------------------------------------------


def extension_points() -> str:
    """Every function and class of vLLM that kvplug relies on, from ``compat.EXTENSION_POINTS``."""
    from kvplug.hosts.vllm.compat import EXTENSION_POINTS

    rows = []
    for target, parameters, *_ in EXTENSION_POINTS:
        module, _, name = target.partition(":")
        rows.append((f"`{name}`", f"`{module}`", ", ".join(f"`{p}`" for p in parameters)))
    return table(("name", "module", "parameters or fields relied on"), rows)


def attributes() -> str:
    """Every attribute of vLLM that kvplug sets or reads without a hook, from ``compat``."""
    compat = importlib.import_module("kvplug.hosts.vllm.compat")
    found = [" ".join(one.split()) for one in BULLET.findall(compat.__doc__ or "")]
    if not found:
        raise MacroError("compat.py documents no attributes")
    said = "Set:\n\n" + "\n".join(f"* {one.replace('``', '`')}" for one in found)
    if not hasattr(compat, "ATTRIBUTES"):
        return said
    rows = []
    for target, names in compat.ATTRIBUTES:
        module, _, name = target.partition(":")
        rows.append((f"`{name}`", f"`{module}`", ", ".join(f"`{one}`" for one in names)))
    return f"{said}\n\nRead:\n\n{table(('of', 'module', 'attributes'), rows)}"


def releases() -> str:
    """Every release series of vLLM that kvplug knows, from ``compat.RELEASES``."""
    from kvplug.hosts.vllm import compat

    rows = []
    for release in compat.RELEASES:
        checked = "engines ran, the whole test suite"
        if not release.ran:
            checked = f"signatures compared, no engine ran: off unless `{compat.ACCEPT}=" + (
                f"{release.series}` is set"
            )
        rows.append((release.series, checked, " ".join(release.differs)))
    return table(("vLLM", "checked how", "what differs from the first"), rows)


def _signature(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def moved() -> str:
    """What the releases of record write otherwise than the installed one, of what kvplug uses."""
    from kvplug.hosts.vllm import compat
    from kvplug_lab import vllm_signatures
    from kvplug_lab.vllm_signatures import Library

    fit = vllm_signatures.compare(Library.installed(compat.version()))
    parts = [f"kvplug's code uses {len(fit.uses)} names, methods and attributes of vLLM."]
    for version, path in vllm_signatures.recorded().items():
        other = Library.of_json(path)
        rows = [
            (code(point.partition(":")[2]), *(_signature(text) for text in (here, there)))
            for point, here, there in vllm_signatures.moved(fit, other)
        ]
        new = [f"`{one.point.partition(':')[2]}`" for one in vllm_signatures.added(fit, other)]
        parts.append(
            f"In {version} ({other.wheel['name']}, SHA-256 `{other.wheel['sha256'][:16]}…`) these "
            "are written otherwise, and each use still fits:"
        )
        parts.append(table(("what", fit.library.version, version), rows))
        parts.append(f"New on classes that kvplug extends: {', '.join(new) or 'nothing'}.")
    return "\n\n".join(parts)


def subclasses() -> str:
    """Every class of the host that extends one of vLLM's, read from its source."""
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(VLLM_HOST.rglob("*.py"))
    }
    imported: dict[Path, dict[str, str]] = {}
    classes: dict[str, tuple[Path, ast.ClassDef]] = {}
    for path, tree in trees.items():
        names = imported.setdefault(path, {})
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                names |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                classes[node.name] = (path, node)
            elif isinstance(node, ast.FunctionDef) and any(
                a.arg == "stock" for a in node.args.args
            ):
                # Classes made of whichever backend vLLM chose.
                names["stock"] = "chosen backend's own"

    def bases(name: str) -> list[str]:
        path, node = classes[name]
        found: list[str] = []
        for base in node.bases:
            text = ast.unparse(base)
            if text in imported[path]:
                found.append(imported[path][text])
            elif text in classes and text != name:
                found += bases(text)
        return list(dict.fromkeys(found))

    rows = []
    for name, (path, node) in classes.items():
        extended = bases(name)
        if not extended:
            continue
        methods = [
            one.name
            for one in node.body
            if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")
        ]
        rows.append(
            (
                f"`{name}`",
                f"`{path.relative_to(VLLM_HOST)}`",
                ", ".join(f"`{base}`" for base in extended),
                ", ".join(f"`{method}`" for method in methods),
            )
        )
    return table(("class", "file", "extends vLLM's", "public methods"), rows)


# -- figures ---------------------------------------------------------------------------------------


def load(name: str) -> Any:
    """What ``docs/figures/NAME.json`` holds."""
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


class _Blanks(string.Formatter):
    """Formats rows; what a row lacks, or has none of, is left blank."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except (KeyError, IndexError, TypeError):
            return None, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        return "" if value is None else str(super().format_field(value, format_spec))


def rows(file: str, path: str, *columns: tuple[str, str]) -> str:
    """A table of ``docs/figures/FILE.json``: the rows at a dotted path, a template per column.

    Rows may be a list, or a mapping, whose keys are then the rows' ``key``.
    """
    data = load(file)
    for part in filter(None, path.split(".")):
        data = data[part]
    if isinstance(data, dict):
        data = [{"key": key} | (row if isinstance(row, dict) else {}) for key, row in data.items()]
    form = _Blanks()
    cells = []
    for row in data:
        line = [form.vformat(template, (), row).strip() for _, template in columns]
        cells.append(["" if one.strip(" []%x,") == "" else one for one in line])
    return table([head for head, _ in columns], cells)


def hit_rates(*policies: str) -> str:
    """Hit rates of some orders beside LRU and MIN, and how much of the way to MIN each goes."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in load("prefix_cache"):
        found.setdefault((row["trace"], row["policy"]), []).append(100 * row["hit_rate"])
    traces = list(dict.fromkeys(trace for trace, _ in found))
    lines = []
    for trace in traces:
        lru, best = sum(found[trace, "lru"]), sum(found[trace, "min"])
        for name in ("lru", *policies, "min"):
            shown = {"lru": "`lru`, as stock", "min": "MIN"}.get(name, f"`{name}`")
            way = (sum(found[trace, name]) - lru) / (best - lru)
            rates = [f"{rate:.1f}" for rate in found[trace, name]]
            moved = "" if name in ("lru", "min") else f"{way:.0%}"
            lines.append((trace if name == "lru" else "", shown, *rates, moved))
    said = []
    for name in policies:
        apart = [
            a - b for t in traces for a, b in zip(found[t, name], found[t, "lru"], strict=True)
        ]
        better, worse = sum(d > 0.05 for d in apart), sum(d < -0.05 for d in apart)
        said.append(
            f"`{name}` is better than `lru` in {better} of {len(apart)} cells and worse in {worse}."
        )
    heads = ("trace", "order", "1%", "2%", "5%", "10%", "of the way to MIN")
    return (
        "Hit rates in percent, by capacity as a part of a trace's distinct blocks "
        f"([traces and method](../simulate.md#what-was-measured)).\n\n{table(heads, lines)}\n\n"
        + " ".join(said)
    )


def ways() -> str:
    """How much of the way from LRU to MIN every order goes, by trace."""
    total: dict[tuple[str, str], float] = {}
    for row in load("prefix_cache"):
        key = row["trace"], row["policy"]
        total[key] = total.get(key, 0.0) + row["hit_rate"]
    traces = list(dict.fromkeys(trace for trace, _ in total))
    lines = []
    for name in dict.fromkeys(name for _, name in total if name not in ("lru", "min")):
        ends = [(total[t, "lru"], total[t, "min"], total[t, name]) for t in traces]
        lines.append(
            (f"`{name}`", *(f"{(own - lru) / (best - lru):.0%}" for lru, best, own in ends))
        )
    return table(("order", *traces), lines)


def tier_speed() -> str:
    """MiB a second that each tier stored and read, by the size of a chunk."""
    found = load("tier_speed")["tiers"]
    lines = []
    for i, row in enumerate(next(iter(found.values()))):
        kib = row["kib"]
        size = f"{kib} KiB" if kib < 1024 else f"{kib // 1024} MiB"
        cells = (f"{each[i]['put']:,.0f} / {each[i]['get']:,.0f}" for each in found.values())
        lines.append((size, *cells))
    return table(("chunk", *(code(name) for name in found)), lines)


def tier_sessions(name: str) -> str:
    """What ``kvplug sessions`` measured: a row for each deployment."""
    found = load(name)
    lines = []
    for row in found["rows"]:
        first, last = row["ttft_median"], row["ttft_p95"]
        stored, useful = row["stored"], row["useful"]
        lines.append(
            (
                row["variant"],
                f"{1e3 * first['median']:,.0f}",
                f"{1e3 * last['median']:,.0f}",
                f"{100 * row['hit_rate']['median']:.1f}",
                f"{100 * row['from_tiers']['median']:.1f}",
                f"{row['prompt_tokens_per_second']['median']:,.0f}",
                f"{row['stored_bytes'] / 2**20:,.0f}" if stored > 0 else "",
                f"{100 * (stored - useful) / stored:.0f}" if stored > 0 else "",
            )
        )
    heads = ("deployment", "TTFT of returns, ms", "its p95", "hit rate, %", "from tiers, %")
    return table((*heads, "prompt tokens/s", "MiB stored", "never read, %"), lines)


def tier_restart() -> str:
    """Times to first token after a restart, as ``kvplug sessions --restart`` measured them."""
    (found,) = load("tier_restart")["restart"]
    lines = []
    for row in found["rows"]:
        computed, restored = (sorted(row[name]) for name in ("computed", "restored"))
        lines.append(
            (
                f"{row['length']:,}",
                f"{median(computed):.2f} ({computed[0]:.2f} to {computed[-1]:.2f})",
                f"{median(restored):.3f} ({restored[0]:.3f} to {restored[-1]:.3f})",
                f"{median(computed) / median(restored):.1f}",
                f"{row['cached']:,}",
            )
        )
    return table(("tokens", "computed, s", "restored, s", "ratio", "not computed"), lines)


def scale(name: str) -> str:
    """Cost of an eviction order at a million blocks, as ``kvplug_lab.engine.scale`` measured it."""
    found = load("scale")["policies"]
    texts = []
    for one in (name, "vLLM's queue"):
        each = 1e6 / found[one]["operations_per_second"]
        texts.append(f"{each:.2f} µs and {found[one]['bytes_per_block']:,.0f} bytes per block")
    return (
        f"At a million blocks, per block released, hit or evicted: {texts[0]}; vLLM's own queue "
        f"takes {texts[1]} ([how](../simulate.md#at-a-million-blocks))."
    )


def workloads() -> str:
    """Hit rates of LRU, `foresight` and MIN on made-up workloads."""
    cells: dict[str, list[str]] = {}
    for row in load("foresight_workloads")["rows"]:
        three = [f"{100 * row[name]:.1f}" for name in ("lru", "foresight", "min")]
        cells.setdefault(row["workload"], []).append(f"{three[0]} / **{three[1]}** / {three[2]}")
    return table(("workload", "1%", "2%", "5%", "10%"), [(n, *c) for n, c in cells.items()])


def _parsed(label: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``NAME:OPTION=VALUE...``."""
    name, *given = label.split(":")
    options = {}
    for one in given:
        key, _, value = one.partition("=")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def bytes_of(name: str, *variants: str) -> str:
    """Bytes of K and V of one token and KV head under a format, from its own layout."""
    from kvplug.contract import EngineView, LayerView

    found = _find("format", name)
    lines = []
    for variant in variants:
        options = found.Options.model_validate(_parsed(f"{name}:{variant}" if variant else name)[1])
        cells = []
        for head in (64, 128):
            layer = LayerView(0, 1, 1, 1, head, "bfloat16")
            built = found(options, EngineView(64, layers=(layer,)))
            size = built.layout(layer).token_bytes(layer)
            cells += [f"{size:,}", f"{4 * head / size:.2f}"]
        lines.append((f"`{variant}`" if variant else "default", *cells))
    heads = ("options", "64 a head", "ratio", "128 a head", "ratio")
    said = "Bytes of K and V per token and KV head, and the ratio to bfloat16."
    return f"{said}\n\n{table(heads, lines)}"


def format_error(*labels: str) -> str:
    """Relative errors of some formats, as ``kvplug_lab.fidelity.format_error`` measured them."""
    found = {row["format"]: row for row in load("format_error")}
    lines = []
    for label in labels or tuple(found):
        row = found[label]
        errors = [f"{100 * row[key]:.2f}%" for key in ("keys", "values", "output", "worst")]
        lines.append((f"`{label}`", f"{row['bytes']:,.0f}", *errors))
    heads = ("format", "bytes", "keys", "values", "output", "worst layer")
    return table(heads, lines)


def decoded_formats(*names: str) -> str:
    """What ``kvplug_lab.fidelity.decoded`` measured: of some formats, or all."""
    lines = []
    for model, name in (("smollm2", "SmolLM2 135M"), ("gemma3", "Gemma 3 270M")):
        for row in load("decoded_formats")[model]["rows"]:
            if names and row["format"].split(":")[0] not in names:
                continue
            ppl, agree = ([f"{100 * x:.{d}f}" for x in row[k]] for k, d in SHOWN_DECODED)
            lines.append(
                (
                    name,
                    f"`{row['format']}`",
                    f"{row['bytes_of_64']:g}",
                    f"{row['exact']:,}",
                    f"{row['tokens']:,}",
                    f"{float(ppl[0]):+.2f}% ({float(ppl[1]):+.2f} to {float(ppl[2]):+.2f})",
                    f"{agree[0]}% ({agree[1]} to {agree[2]})",
                    f"{row['kl'][0]:.4f}",
                )
            )
    heads = ("model", "format", "bytes", "exact", "tokens", "added perplexity", "first choice")
    return table((*heads, "divergence"), lines)


def transfer_codecs() -> str:
    """What ``kvplug codecs`` measured."""
    data = load("codecs")
    lines = []
    for row in data["rows"]:
        if row["codec"] == "none":
            continue
        ppl, agree = row["perplexity"], row["agree"]
        found = [
            f"{row['retrieved'][task]} of {row['asked'][task]}"
            for task in ("passkey_later", "multikey_later")
        ]
        lines.append(
            (
                f"`{re.sub(':transform=[^:]+', '', row['codec'])}`",
                f"{1 / row['ratio']:.1%}",
                f"{row['ratio']:.2f}",
                *("{:.2f} [{:.2f}, {:.2f}]".format(*row[way]) for way in ("encode", "decode")),
                "{:+.2f}% ({:+.2f} to {:+.2f})".format(*(100 * x for x in ppl)),
                f"{agree[0]:.1%}",
                f"{row['kl']:.4f}",
                *found,
            )
        )
    heads = ("codec", "of bf16", "ratio", "encode GB/s", "decode GB/s", "added perplexity")
    return table((*heads, "first choice", "divergence", "passkey", "multikey"), lines)


SHOWN_DECODED = (("perplexity", 2), ("agree", 1))
"""Columns of percentages and their digits."""


def calibrated(*names: str) -> str:
    """What formats with a calibration lose in all layers, beside those without."""
    form = "{format}", "{bytes:,}", "{ratio:.2f}", "{error:.1%}", "{divergence:.4f}"
    lines = [
        tuple(one.format(**row) for one in (*form, "{perplexity:+.2f}"))
        for row in load("calibrated_formats")["rows"]
        if row["format"].split(":")[0] in names
    ]
    heads = ("format in all layers", "bytes per token", "ratio", "output error", "divergence")
    return table((*heads, "perplexity"), [(f"`{line[0]}`", *line[1:]) for line in lines])


def beyond_noise(file: str) -> str:
    """Differences between two programs that are not noise, losses first."""
    cells = [
        (
            f"{row['ours_variant']} / {row['theirs_variant']}",
            f"{row['budget']:.0%}",
            row["metric"].replace("_", " ").replace("kl", "divergence"),
            f"{row['ours']:g} / {row['theirs']:g}",
            f"**{row['verdict']}**",
        )
        for row in sorted(load(file), key=lambda row: row["verdict"] == "better")
        if row["verdict"] != "within noise"
    ]
    return table(("ours / theirs", "kept", "metric", "values", "ours is"), cells)


def fidelity_formats() -> str:
    """Every format against the full cache, one row each."""
    found: dict[str, dict[str, Any]] = {}
    for row in load("fidelity_formats")["summary"]:
        cell = found.setdefault(row["variant"], {"bytes": f"{256 * row['budget']:.1f}"})
        form = ".0%" if row["metric"] in ("prefix", "passkey", "top1") else ".3f"
        cell[row["metric"]] = f"{row['value']:{form}}"
    columns = ("bytes", "added", "kl", "top1", "prefix", "passkey")
    heads = ("bytes", "added", "divergence", "same likeliest token", "greedy prefix", "passkey")
    lines = [(f"`{n}`", *(row.get(c, "") for c in columns)) for n, row in found.items()]
    return table(("format", *heads), lines)


def ruler() -> str:
    """RULER's tasks under every policy and budget, and their mean beside the full cache's."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for row in load("ruler_smollm2")["summary"]:
        found.setdefault((row["variant"], row["budget"]), {})[row["metric"]] = row
    tasks = [name for name in next(iter(found.values())) if name != "ruler"]
    lines = []
    for (name, budget), own in found.items():
        mean = own["ruler"]
        against = "" if mean["difference"] is None else (
            "{:+.0f} ({:+.0f} to {:+.0f})".format(
                *(100 * mean[f"difference{end}"] for end in ("", "_low", "_high"))
            )
        )  # fmt: skip
        cells = [f"{100 * own[task]['value']:.0f}" for task in tasks]
        p = "" if mean["p"] is None else f"{mean['p']:.2g}"
        label = name if name == "full cache" else f"`{name}`"
        lines.append((label, f"{budget:.0%}", *cells, f"{100 * mean['value']:.0f}", against, p))
    heads = [task.replace("_", " ").replace("niah ", "") for task in tasks]
    return table(("policy", "kept", *heads, "mean", "from the full cache", "p"), lines)


def near(replaced: str) -> str:
    """Searches for near-equal text, at one share of replaced tokens."""
    lines = [
        (
            f"{row['segments']:,}",
            row["search"],
            "{median:,} [{low:,}, {high:,}]".format(**row["near_us"]),
            f"{row['add_us']:,}",
            f"{row['source_1']:.0%}",
        )
        for row in load("reuse_index")["near"]
        if row["replaced"] == float(replaced)
    ]
    return table(("segments", "search", "near, µs", "add, µs", "source found first"), lines)


GPU = "gpu"
NOT_MEASURED = "Not measured yet: `docs/figures/gpu.json` holds no results."


def gpu_part(name: str) -> dict[str, Any] | None:
    """A part of the last ``gpu-check``, or None where it was not run."""
    if not (FIGURES / f"{GPU}.json").is_file():
        return None
    found: dict[str, Any] | None = load(GPU)["parts"].get(name)
    return found


def gpu_machine() -> str:
    """Card, versions and date of the last ``gpu-check``."""
    if not (FIGURES / f"{GPU}.json").is_file():
        return NOT_MEASURED
    data = load(GPU)
    machine = data["machine"]
    versions = ", ".join(
        f"{label} {machine[key]}"
        for key, label in (
            ("vllm", "vLLM"),
            ("torch", "torch"),
            ("triton", "Triton"),
            ("python", "Python"),
            ("driver", "driver"),
        )
        if machine.get(key)
    )
    return (
        f"**{machine['gpu']}**, {machine['cores']} CPU cores; {versions}; kvplug at "
        f"`{data['commit']}`, {data['date'][:10]}."
    )


def gpu_speed() -> str:
    """Deployments against stock in the same KV memory."""
    from kvplug_lab.gpu_check.report import speed_cells, speed_heads

    part = gpu_part("speed")
    if part is None:
        return NOT_MEASURED
    lines = [[code(row[0]), *row[1:]] for row in speed_cells(part["rows"])]
    load_ = load(GPU)["load"]
    said = (
        f"{load_['requests']} requests of {load_['prompt']:,} + {load_['output']:,} tokens in KV "
        f"memory for {load_['kv_tokens']:,} tokens of stock's."
    )
    return f"{said}\n\n{table(speed_heads(), lines)}"


def gpu_checks() -> str:
    """What the parts of the last ``gpu-check`` found, failures named."""
    lines = []
    for name in ("kernels", "exact", "policies"):
        part = gpu_part(name)
        if part is None:
            lines.append((name, "not run", "", ""))
            continue
        bad = [row for row in part["rows"] if not row["ok"] and row["name"] != "all"]
        total = [row for row in part["rows"] if row["name"] == "all"]
        count = f"{total[0]['passed']:,} tests" if total else f"{len(part['rows'])} engines"
        why = "; ".join(f"{row['name']}: {row.get('problem') or row.get('message')}" for row in bad)
        lines.append((name, "ok" if part["ok"] else "**failed**", count, part["error"] or why))
    return table(("part", "result", "ran", "what failed"), lines)


def gpu_kernels() -> str:
    """Kernels against a copy of the bytes that they must move, on the GPU."""
    part = gpu_part("bench")
    if part is None:
        return NOT_MEASURED
    lines = [
        (
            code(row["op"]),
            row["shape"],
            f"{row['op_us_median']:,.1f}",
            f"{row['ratio_median']:.2f} of {row['baseline']}",
        )
        for row in part["rows"]
        if row["ok"] and not row.get("left_out")
    ]
    return table(("operation", "size", "microseconds", "ratio"), lines)


def widths(*of: Mapping[str, int]) -> str:
    """Loads or stores by their bytes a thread, the widest first: ``16 x 8, 4 x 2``."""
    found: dict[int, int] = {}
    for counts in of:
        for width, n in counts.items():
            found[int(width)] = found.get(int(width), 0) + n
    return ", ".join(f"{width} x {found[width]}" for width in sorted(found, reverse=True)) or "none"


def kernel_code() -> str:
    """What the machine code of each launch of serving shows; one that several cases launch once."""
    lines, seen = [], set()
    for row in load("kernel_code"):
        made = row["code"]
        key = json.dumps([row["kernel"], made])
        if key in seen:
            continue
        seen.add(key)
        hot = made["loops"] if any(made["loops"][n] for n in ("loads", "copies")) else made["whole"]
        products = ", ".join(f"{name} x {n}" for name, n in hot["tensor_cores"].items())
        lines.append(
            (
                row["case"],
                code(row["kernel"]),
                str(made["registers"]),
                f"{made['shared_bytes']:,}",
                str(made["whole"]["spills"]),
                widths(hot["loads"], hot["copies"]),
                widths(made["whole"]["stores"]),
                products or "none",
            )
        )
    heads = ("case", "kernel", "registers", "shared bytes", "spills", "loads", "stores")
    return table((*heads, "matrix instructions"), lines)


def kernel_bytes() -> str:
    """Bytes that kernels move against the least possible."""
    lines = [
        (
            row["case"],
            f"{row['read']:,.1f}",
            f"{row['written']:,.1f}",
            f"{row['least']:,.1f}",
            f"{row['ratio']:.2f}",
        )
        for row in load("kernel_bytes")
    ]
    return table(("case", "read", "written", "least", "ratio"), lines)


def figure(name: str) -> str:
    """A drawing, put in once the page is HTML."""
    return f'<div data-figure="{name}"></div>'


def inline(name: str) -> str:
    """A drawing as HTML, with its title for those who cannot see it."""
    folder = FIGURES if (FIGURES / f"{name}.svg").is_file() else DOCS / "assets"
    source = (folder / f"{name}.svg").read_text(encoding="utf-8")
    svg = source[source.index("<svg") :]
    title = re.search(r"<title>(.*?)</title>", svg, re.DOTALL)
    label = html.escape(title[1].strip() if title else name, quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f'<figure class="drawing" data-search-exclude>{svg}</figure>'


# -- what goes together ----------------------------------------------------------------------------

COMPOSITION = "composition"


def composition() -> str:
    """How many engines were right, by deployment and feature; what is refused is said so."""
    data = load(COMPOSITION)
    lines = []
    for row in data["rows"]:
        if row["alone"]:
            continue
        cells = [
            str(one["right"] or "") if one["refused"] is None else "refused"
            for one in row["switches"].values()
        ]
        done, every = row["pairs"]
        lines.append([row["deployment"], str(row["right"]), *cells, f"{done / every:.0%}"])
    return table(["", "all", *data["switches"], "pairs"], lines)


def composition_features() -> str:
    """What the columns of `composition` mean."""
    return "\n".join(f"* *{name}*: {what}" for name, what in load(COMPOSITION)["switches"].items())


def composition_refusals() -> str:
    """Pairs of kinds that are refused, and features that kinds are refused with, each with what
    kvplug says."""
    pairs, features = [], {}
    for row in load(COMPOSITION)["rows"]:
        if row["alone"]:
            pairs.append([row["deployment"], sentence(row["alone"])])
            continue
        for name, one in row["switches"].items():
            if one["refused"] and " + " not in row["deployment"]:
                features[row["deployment"], name] = sentence(one["refused"])
    lines = [[f"{kind} with {name}", said] for (kind, name), said in features.items()]
    return table(["together", "what kvplug says"], pairs + lines)


def sentence(refusal: str) -> str:
    """The first refusal of a text, without where the deployment is and what would mend it."""
    return refusal.splitlines()[0].split("kvplug.", 1)[-1].split(" Fix: ")[0]


# -- plans -----------------------------------------------------------------------------------------


def planned(model: str, memory: int, context: int, *names: str) -> str:
    """Tokens in the pool and users at once of a model, for some deployments.

    Args:
        model: Stem of a config in ``kvplug/tests/model_configs``.
        memory: GiB of the GPU.
        context: Tokens of a request.
        names: Deployments; without any, all that ship with kvplug and can run.
    """
    from kvplug.planning.candidates import candidates
    from kvplug.planning.model import read_model
    from kvplug.planning.plan import GIB, Question, plan
    from kvplug.planning.weights import weights_of
    from kvplug_policies.builtin import BUILTIN

    found = read_model(str(ROOT / "kvplug" / "tests" / "model_configs" / f"{model}.json"))
    question = Question(memory=memory * GIB, context=context, weights=weights_of(found))
    shipped = {policy.name for policy in BUILTIN}
    these = [
        one
        for one in candidates(2048)
        if (one.name in names if names else {c["use"] for c in one.section.values()} <= shipped)
    ]
    return table(
        ["deployment", "answers", "tokens in the pool", "users at once", "CUDA graphs", "prefix"],
        [
            [
                code(row.candidate.name),
                "exact" if row.exact else "approximate",
                f"{row.pool.tokens:,}",
                f"{row.users:,}",
                row.needs.graphs,
                row.needs.prefix_cache,
            ]
            for row in plan(found, question, these)
            if row.pool is not None
        ],
    )


def presets() -> str:
    """The presets: what each is for, and what it costs."""
    from kvplug import configs

    rows = [[code(one.name), one.what, one.cost] for one in configs.presets()]
    return table(["preset", "for", "what it costs"], rows)


def hardware() -> str:
    """What each card of the table suggests, and how that is known."""
    from kvplug.planning.hardware import GB, SETTINGS
    from kvplug.planning.hardware import table as suggested

    lines = []
    for name, card, suggestions in suggested():
        facts = f"{card.memory // GB} GB, {card.bandwidth / GB / 1000:g} TB/s" if card else ""
        said = {one.setting: f"{one.value} ({one.evidence})" for one in suggestions}
        lines.append([name, facts, *(said[setting] for setting in SETTINGS)])
    return table(
        ["card", "data sheet", *(setting.replace("-", " ") for setting in SETTINGS)], lines
    )


def hardware_reasons() -> str:
    """Why: every reason once, with the cards that it is given for."""
    from kvplug.planning.hardware import table as suggested

    cards: dict[tuple[str, str], list[str]] = {}
    for name, _, suggestions in suggested():
        for one in suggestions:
            cards.setdefault((one.setting, one.reason), []).append(name)
    return table(
        ["setting", "cards", "why"],
        [
            [setting.replace("-", " "), ", ".join(names), reason]
            for (setting, reason), names in sorted(cards.items())
        ],
    )


def tune_rules() -> str:
    """The rules by which `kvplug tune` names a bottleneck."""
    from kvplug_lab.tune.bottleneck import RULES

    lines = [[rule.name, rule.figure, f"{rule.limit:.0%}"] for rule in RULES]
    return table(["bottleneck", "figure that is read", "from"], lines)


def tuned(name: str) -> str:
    """What `kvplug tune` measured of a load: stock, the bottlenecks, what was tried, the end."""
    found = load(name)
    seen, objective = found["profile"], found["objective"]
    parts = [
        f"{found['load']['says']}, {found['concurrency']} in flight; "
        f"{found['engine']['kv_cache_memory_bytes'] / 2**20:g} MiB of KV are "
        f"{seen['pool_tokens']:,} tokens of stock; {found['model']} in "
        f"{found['engine']['dtype']}. Stock: "
        f"{seen['ttft']:.2f} s to the first token, {seen['tokens_per_second']:.1f} tokens/s, "
        f"{seen['hit']:.0%} of prompt tokens from the prefix cache."
    ]
    parts.append(
        "\n".join(
            f"* **{one['name']}**, {one['value']:.0%}: {one['figure']}."
            for one in found["bottlenecks"]
        )
    )
    lines = []
    rows = [(row, row["name"]) for row in found["tried"]]
    if found["winner"]:
        rows.append((found["winner"], f"**{found['winner']['name']}, verification**"))
    for row, label in rows:
        gain, quality = row.get("gain", {}).get(objective), row["quality"] or {}
        ratio, rise = "", quality.get("rise")
        if gain:
            spread = f" [{gain['low']:.2f}, {gain['high']:.2f}]" if gain["n"] > 1 else ""
            ratio = f"{gain['value']:.2f}{spread}"
        same = quality.get("same")
        said = row["out"] or ("better than stock" if row is found["winner"] else "went on")
        lines.append(
            (
                label,
                ratio,
                str(gain["n"]) if gain else "",
                f"{rise['value']:+.2%}" if rise else "",
                f"{same:.0%}" if same is not None else "",
                said,
            )
        )
    heads = (
        "deployment",
        f"{objective}, times as good as stock",
        "rounds",
        "perplexity",
        "same answers",
        "",
    )
    parts += [table(heads, lines), found["says"]]
    return "\n\n".join(parts)


# -- mkdocs ----------------------------------------------------------------------------------------

MACROS: dict[str, Callable[..., str]] = {
    one.__name__: one
    for one in (
        policy,
        options,
        settings,
        metrics,
        metrics_cost,
        alerts,
        extension_points,
        attributes,
        subclasses,
        releases,
        moved,
        rows,
        hit_rates,
        ways,
        scale,
        tier_restart,
        tier_sessions,
        tier_speed,
        workloads,
        bytes_of,
        format_error,
        decoded_formats,
        transfer_codecs,
        calibrated,
        beyond_noise,
        fidelity_formats,
        ruler,
        near,
        gpu_machine,
        gpu_speed,
        gpu_checks,
        gpu_kernels,
        kernel_code,
        kernel_bytes,
        composition,
        composition_features,
        composition_refusals,
        planned,
        presets,
        hardware,
        hardware_reasons,
        tune_rules,
        tuned,
        figure,
    )
}


def expand(markdown: str, where: str) -> str:
    """Replace every macro of a page.

    Raises:
        MacroError: A macro is unknown or fails.
    """

    def one(match: re.Match[str]) -> str:
        name, text = match.groups()
        if name not in MACROS:
            raise MacroError(f"{where}: unknown macro {name!r}")
        arguments = ast.literal_eval(f"({text},)") if text else ()
        try:
            return MACROS[name](*arguments)
        except Exception as error:
            raise MacroError(f"{where}: {match[0]}: {type(error).__name__}: {error}") from error

    return CALL.sub(one, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Expand the macros of a page."""
    return expand(markdown, page.file.src_path)


def on_page_content(content: str, **_: Any) -> str:
    """Put drawings into a page."""
    return FIGURE.sub(lambda match: inline(match[1]), content)
