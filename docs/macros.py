"""Build-time parts of the pages: what the code states is written into them by the code.

mkdocs runs this file as a hook. A line of a page that is ``{{ name("argument", ...) }}`` becomes
what the function of that name returns:

* ``policy(kind, name)`` and ``options(kind, name)``: a policy's facts and its options;
* ``settings("module:Model")``: the fields of a pydantic model;
* ``extension_points()``, ``attributes()``, ``subclasses()``: what kvplug uses of vLLM;
* ``bytes_of(format, *options)``: bytes of a token under a format's own layout;
* ``rows(file, path, *columns)``, ``hit_rates``, ``ways``, ``scale``, ``workloads``,
  ``format_error``, ``calibrated``, ``beyond_noise``, ``fidelity_formats`` and ``near``: tables of
  figures in ``docs/figures``;
* ``gpu_machine()``, ``gpu_speed()``, ``gpu_checks()`` and ``gpu_kernels()``: the last results of
  ``gpu-check`` in ``docs/figures/gpu.json``, or that nothing was measured yet;
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
from typing import Any, Literal, get_args, get_origin

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
    files = [source, *(Path("configs") / of / f"{name}.yaml" for of in ("cpu", "gpu"))]
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
        if row["ok"]
    ]
    return table(("operation", "size", "microseconds", "ratio"), lines)


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


# -- mkdocs ----------------------------------------------------------------------------------------

MACROS: dict[str, Callable[..., str]] = {
    one.__name__: one
    for one in (
        policy,
        options,
        settings,
        extension_points,
        attributes,
        subclasses,
        rows,
        hit_rates,
        ways,
        scale,
        workloads,
        bytes_of,
        format_error,
        calibrated,
        beyond_noise,
        fidelity_formats,
        near,
        gpu_machine,
        gpu_speed,
        gpu_checks,
        gpu_kernels,
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
