"""What kvplug's code uses of vLLM, held against a release's signatures.

Read from kvplug's source: imports from vLLM, calls of what was imported, classes that derive from
vLLM's with the methods they override, and attributes and methods of vLLM's objects. An object is
known by the annotation of a parameter, by the parameter's name (`NAMES`), or by what it was
assigned from; vLLM's own annotations lead on from there. Where the type is not known, nothing is
said: the tests with a real engine cover that.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvplug_lab.vllm_signatures.library import (
    ROOT,
    Found,
    Library,
    Member,
    is_abstract,
    is_static,
    parameters,
    returned,
)

Types = Mapping[str, Sequence[Found]]
Function = ast.FunctionDef | ast.AsyncFunctionDef

BACKEND = "vllm.v1.attention.backend"
CONFIG = "vllm.config:VllmConfig"

NAMES: dict[str, str] = {
    "common": f"{BACKEND}:CommonAttentionMetadata",
    "common_attn_metadata": f"{BACKEND}:CommonAttentionMetadata",
    "connector_output": "vllm.v1.outputs:KVConnectorOutput",
    "kv_cache_config": "vllm.v1.kv_cache_interface:KVCacheConfig",
    "kv_cache_manager": "vllm.v1.core.kv_cache_manager:KVCacheManager",
    "kv_cache_spec": "vllm.v1.kv_cache_interface:FullAttentionSpec",
    "layer": "vllm.model_executor.layers.attention:Attention",
    "manager": "vllm.v1.core.kv_cache_manager:KVCacheManager",
    "output": "vllm.v1.core.sched.output:SchedulerOutput",
    "pool": "vllm.v1.core.block_pool:BlockPool",
    "request": "vllm.v1.request:Request",
    "sampling_params": "vllm.sampling_params:SamplingParams",
    "scheduler_output": "vllm.v1.core.sched.output:SchedulerOutput",
    "spec": "vllm.v1.kv_cache_interface:FullAttentionSpec",
    "vllm_config": CONFIG,
    "engine.py:config": CONFIG,
    "extension.py:worker": "vllm.v1.worker.gpu_worker:Worker",
    "features.py:c": CONFIG,
    "features.py:config": CONFIG,
    "trial.py:output": "vllm.outputs:RequestOutput",
}
"""What parameters without a type of their own stand for, by their names; ``FILE:NAME`` for one
file."""

STOCK = {
    "Backend": (
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend",
        "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend",
    ),
    "Builder": (
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder",
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder",
    ),
    "Impl": (
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl",
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl",
    ),
}
"""Classes that kvplug makes from the backend at hand, which it calls ``stock``."""

OWN = frozenset({"__dict__", "kvplug_pages", "kvplug_rules", "limits", "window"})
"""Attributes that every object has, or that kvplug's own subclasses add to one of `NAMES`."""


@dataclass(frozen=True)
class Use:
    """A use of something in vLLM: its point, and the file and line."""

    point: str
    where: str


class Fit:
    """Compares source files of kvplug with a release.

    Args:
        library: The release.

    Attributes:
        uses: Everything found to be used, by its point.
        bases: Classes of vLLM that kvplug derives from.
        overrides: Methods that kvplug's classes define for a base, by ``module:Class.method`` of
            the base that they name; the file and line.
        sets: Attributes of vLLM's objects that are assigned to, with files and lines.
        problems: What the release lacks or has otherwise, one sentence each.
    """

    def __init__(self, library: Library):
        self.library = library
        self.uses: dict[str, Use] = {}
        self.bases: dict[str, Found] = {}
        self.overrides: dict[str, str] = {}
        self.sets: dict[str, set[str]] = {}
        self.problems: list[str] = []

    def declared(
        self,
        points: Sequence[tuple[str, Sequence[str]]],
        attributes: Sequence[tuple[str, Sequence[str]]],
    ) -> None:
        """Compare the tables ``EXTENSION_POINTS`` and ``ATTRIBUTES`` of `compat`."""
        for target, names in points:
            found = self.library.point(target)
            self._use(target, "compat.py")
            if found is None:
                self._problem(f"{target} is gone", "compat.py")
                continue
            if isinstance(found, Found) and found.kind == "class":
                have = self._constructor(found)
            else:
                have = _names(found.text) if found.text.count("(") else set()
            if lost := [n for n in names if n not in have]:
                self._problem(f"{target} no longer takes {', '.join(lost)}", "compat.py")
        for target, names in attributes:
            found = self.library.point(target)
            self._use(target, "compat.py")
            if not isinstance(found, Found) or found.kind != "class":
                self._problem(f"{target} is gone", "compat.py")
                continue
            if lost := [n for n in names if self.library.member(found, n) is None]:
                self._problem(f"{target} no longer has {', '.join(lost)}", "compat.py")

    def values(self, targets: Sequence[tuple[str, str | None]]) -> None:
        """Compare values of modules and members of classes with what they must be; None where
        being there is enough."""
        for target, value in targets:
            found = self.library.point(target)
            self._use(target, "plugin.py")
            if found is None:
                self._problem(f"{target} is gone", "plugin.py")
            elif value is not None and found.text != value:
                self._problem(f"{target} is no longer {value}", "plugin.py")

    def expect(self, overrides: Mapping[str, str]) -> None:
        """Compare with what is overridden in another release: nothing else tells that a method
        which kvplug defines is one that vLLM no longer calls.

        Args:
            overrides: Those of the other release that this one must have as well.
        """
        for point, where in overrides.items():
            target, _, name = point.rpartition(".")
            base = self.library.point(target)
            if isinstance(base, Found) and self.library.member(base, name) is None:
                self._problem(f"{point} is gone, which is overridden", where)

    def files(self, paths: Sequence[Path]) -> None:
        """Compare source files."""
        for path in paths:
            _File(self, path).visit()

    def _constructor(self, cls: Found) -> set[str]:
        init = self.library.member(cls, "__init__")
        fields = self.library.members(cls)
        return (_names(init.text) if init is not None else set()) | set(fields)

    def _use(self, point: str, where: str) -> None:
        self.uses.setdefault(point, Use(point, where))

    def _problem(self, what: str, where: str) -> None:
        sentence = f"vLLM {self.library.version}: {what} ({where})"
        if sentence not in self.problems:
            self.problems.append(sentence)


class _File:
    """One source file."""

    def __init__(self, fit: Fit, path: Path):
        self.fit, self.library = fit, fit.library
        self.path = path
        self.tree = ast.parse(path.read_text("utf-8"))
        self.imported: dict[str, Found] = {}
        self.own: dict[str, dict[str, Sequence[Found]]] = {}

    def visit(self) -> None:
        others = self._alternatives()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT:
                self._import(node, others.get(node, ()))
        for node in self.tree.body:
            self._scope(node, {}, {})

    def _alternatives(self) -> dict[ast.ImportFrom, list[ast.ImportFrom]]:
        """Imports that another stands in for where it fails: ``try`` and ``except ImportError``."""
        found: dict[ast.ImportFrom, list[ast.ImportFrom]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Try) and any(
                handler.type is not None and "ImportError" in ast.unparse(handler.type)
                for handler in node.handlers
            ):
                both = [*node.body, *(one for handler in node.handlers for one in handler.body)]
                imports = [one for one in both if isinstance(one, ast.ImportFrom)]
                for one in imports:
                    found[one] = [other for other in imports if other is not one]
        return found

    def _where(self, node: ast.AST) -> str:
        return f"{self.path.name}:{getattr(node, 'lineno', 0)}"

    def _import(self, node: ast.ImportFrom, others: Sequence[ast.ImportFrom]) -> None:
        module = node.module or ""
        for one in node.names:
            found = self.library.find(module, one.name)
            known_as = one.asname or one.name
            if found is None and any(
                known_as == (name.asname or name.name)
                and self.library.find(other.module or "", name.name) is not None
                for other in others
                for name in other.names
            ):
                continue
            if found is None:
                self.fit._problem(f"{module}:{one.name} is gone", self._where(node))
                continue
            self.fit._use(f"{module}:{one.name}", self._where(node))
            self.imported[known_as] = found

    # -- scopes --------------------------------------------------------------------------------

    def _scope(self, node: ast.AST, types: Types, own: dict[str, Sequence[Found]]) -> None:
        """Visit a statement: classes and functions open scopes of their own."""
        if isinstance(node, ast.ClassDef):
            self._class(node, types)
        elif isinstance(node, Function):
            self._function(node, types, own)
        elif isinstance(node, ast.Lambda):
            self._scope(node.body, self._parameters(node, types), own)
        else:
            for child in ast.iter_child_nodes(node):
                self._scope(child, types, own)
            if isinstance(node, ast.expr):
                self._expression(node, types, own)

    def _class(self, node: ast.ClassDef, types: Types) -> None:
        where = self._where(node)
        known = [*self._known_bases(node)]
        methods = [one for one in node.body if isinstance(one, Function)]
        for base in known:
            self.fit.bases[base.point] = base
            for one in methods:
                self._override(base, one)
            defined = {one.name for one in methods} | {
                target.id
                for one in node.body
                if isinstance(one, ast.Assign | ast.AnnAssign)
                for target in (one.targets if isinstance(one, ast.Assign) else [one.target])
                if isinstance(target, ast.Name)
            }
            for name, member in self.library.members(base).items():
                if is_abstract(member.text) and name not in defined:
                    self.fit._problem(f"{member.point} must be defined by {node.name}", where)
        own: dict[str, Sequence[Found]] = {}
        for one in methods:
            scope = self._parameters(one, types)
            for statement in ast.walk(one):
                if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                    target = statement.targets[0]
                    if (
                        isinstance(target, ast.Attribute)
                        and isinstance(target.value, ast.Name)
                        and target.value.id == "self"
                        and (found := self._typed(statement.value, scope, {}))
                    ):
                        own[target.attr] = found
        supers = {"super()": known}
        for child in node.body:
            self._scope(child, {**types, **supers}, own)

    def _known_bases(self, node: ast.ClassDef) -> Iterator[Found]:
        for base in node.bases:
            if not isinstance(base, ast.Name):
                continue
            if base.id == "stock":
                for target in STOCK.get(node.name, ()):
                    found = self.library.point(target)
                    if isinstance(found, Found):
                        self.fit._use(target, self._where(node))
                        yield found
                    else:
                        self.fit._problem(f"{target} is gone", self._where(node))
            elif (one := self.imported.get(base.id)) is not None and one.kind == "class":
                yield one
            else:
                for other in ast.walk(self.tree):
                    if isinstance(other, ast.ClassDef) and other.name == base.id:
                        yield from self._known_bases(other)

    def _parameters(self, node: Function | ast.Lambda, types: Types) -> Types:
        scope = dict(types)
        for one in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            scope.pop(one.arg, None)
            named = None
            if isinstance(one.annotation, ast.Name):
                named = self.imported.get(one.annotation.id)
            if named is not None and named.kind == "class":
                scope[one.arg] = [named]
            elif one.annotation is None or ast.unparse(one.annotation) in ("Any", "Any | None"):
                target = NAMES.get(f"{self.path.name}:{one.arg}") or NAMES.get(one.arg)
                found = self.library.point(target) if target else None
                if isinstance(found, Found):
                    scope[one.arg] = [found]
                elif target:
                    self.fit._problem(f"{target} is gone", self._where(one))
        return scope

    def _function(
        self,
        node: Function,
        types: Types,
        own: dict[str, Sequence[Found]],
    ) -> None:
        scope = dict(self._parameters(node, types))
        for statement in ast.walk(node):
            pairs: list[tuple[ast.expr, ast.expr]] = []
            if isinstance(statement, ast.Assign):
                for target in statement.targets:
                    if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                        pairs += zip(target.elts, statement.value.elts, strict=False)
                    else:
                        pairs.append((target, statement.value))
            elif isinstance(statement, ast.NamedExpr):
                pairs.append((statement.target, statement.value))
            for target, value in pairs:
                if isinstance(target, ast.Name):
                    found = self._typed(value, scope, own)
                    if found:
                        scope[target.id] = found
                    else:
                        scope.pop(target.id, None)
        for child in node.body:
            self._scope(child, scope, own)

    # -- expressions ---------------------------------------------------------------------------

    def _typed(
        self, node: ast.expr, types: Types, own: Mapping[str, Sequence[Found]]
    ) -> Sequence[Found]:
        """Classes that a value may have; empty where nothing is known."""
        if isinstance(node, ast.Name):
            return types.get(node.id, ())
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return own.get(node.attr, ())
            found: list[Found] = []
            for cls in self._typed(node.value, types, own):
                member = self.library.member(cls, node.attr)
                if member is not None and not member.is_method:
                    text = returned(member.text) if "(" in member.text else member.text
                    # What a call made has its type from the call.
                    text = member.text if member.text.endswith("()") else text
                    found += self.library.types(member.owner.module, text)
            return found
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                one = self.imported.get(node.func.id)
                if one is not None and one.kind == "class":
                    return [one]
                if one is not None and one.kind == "function":
                    return self.library.types(one.module, returned(one.text))
            if isinstance(node.func, ast.Attribute):
                found = []
                for cls in self._typed(node.func.value, types, own):
                    member = self.library.member(cls, node.func.attr)
                    if member is not None and member.is_method:
                        found += self.library.types(member.owner.module, returned(member.text))
                return found
        return ()

    def _expression(self, node: ast.expr, types: Types, own: Mapping[str, Sequence[Found]]) -> None:
        where = self._where(node)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in self.imported:
                self._of_imported(self.imported[node.value.id], node, where)
                return
            classes = self._typed(node.value, types, own)
            found = [m for c in classes if (m := self.library.member(c, node.attr)) is not None]
            for member in found:
                self.fit._use(member.point, where)
                if not isinstance(node.ctx, ast.Load):
                    self.fit.sets.setdefault(member.point, set()).add(where)
            if classes and not found and node.attr not in OWN and not self._open(classes):
                self.fit._problem(f"{classes[0].point} has no {node.attr}", where)
        elif isinstance(node, ast.Call):
            for what, text, skip in self._callees(node, types, own):
                if problem := unbound(node, text, skip):
                    self.fit._problem(f"{what} {problem}", where)

    def _open(self, classes: Sequence[Found]) -> bool:
        return any(self.library.member(cls, "__getattr__") is not None for cls in classes)

    def _of_imported(self, found: Found, node: ast.Attribute, where: str) -> None:
        if found.kind == "class":
            member = self.library.member(found, node.attr)
            if member is None and not node.attr.startswith("__"):
                self.fit._problem(f"{found.point} has no {node.attr}", where)
            elif member is not None:
                self.fit._use(member.point, where)
        elif found.kind == "module":
            one = self.library.find(found.module, node.attr)
            if one is None:
                self.fit._problem(f"{found.module}:{node.attr} is gone", where)
            else:
                self.fit._use(f"{found.module}:{node.attr}", where)

    def _callees(
        self, node: ast.Call, types: Types, own: Mapping[str, Sequence[Found]]
    ) -> Iterator[tuple[str, str, int]]:
        """Signatures that a call must fit, with the parameters Python fills in itself."""
        func = node.func
        if isinstance(func, ast.Name) and func.id in self.imported:
            found = self.imported[func.id]
            if found.kind == "function":
                yield found.point, found.text, 0
        elif isinstance(func, ast.Attribute):
            value = func.value
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "super":
                classes: Sequence[Found] = types.get("super()", ())
            elif isinstance(value, ast.Name) and value.id in self.imported:
                found = self.imported[value.id]
                if found.kind == "module":
                    one = self.library.find(found.module, func.attr)
                    if one is not None and one.kind == "function":
                        yield one.point, one.text, 0
                    return
                member = self.library.member(found, func.attr) if found.kind == "class" else None
                if member is not None and "@classmethod" in member.text:
                    yield member.point, member.text, 1
                return
            else:
                classes = self._typed(value, types, own)
            found_in = [m for c in classes if (m := self.library.member(c, func.attr)) is not None]
            if classes and not found_in and classes is types.get("super()"):
                self.fit._problem(f"{classes[0].point} has no {func.attr}", self._where(node))
            for member in found_in:
                if member.is_method:
                    self.fit._use(member.point, self._where(node))
                    yield member.point, member.text, 0 if is_static(member.text) else 1

    def _override(self, base: Found, node: Function) -> None:
        member = self.library.member(base, node.name)
        if member is None:
            return
        self.fit._use(member.point, self._where(node))
        self.fit.overrides[f"{base.point}.{node.name}"] = self._where(node)
        if node.name == "__init__" or not member.is_method:
            return
        for problem in refused(node, member):
            self.fit._problem(f"{member.point} {problem}", self._where(node))


# -- arguments -------------------------------------------------------------------------------------


def _names(text: str) -> set[str]:
    """Names of a signature's parameters."""
    args = parameters(text)
    return {a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs]}


def unbound(call: ast.Call, text: str, skip: int) -> str:
    """Say why a call's arguments do not fit a signature; empty where they do.

    Args:
        call: The call.
        text: The signature.
        skip: Leading parameters that Python fills in itself.
    """
    args = parameters(text)
    plain = [*args.posonlyargs, *args.args][skip:]
    required = len(args.posonlyargs) + len(args.args) - len(args.defaults) - skip
    starred = any(isinstance(one, ast.Starred) for one in call.args)
    keywords = [one.arg for one in call.keywords]
    named = {a.arg for a in [*args.args, *args.kwonlyargs]}
    if not args.kwarg and (extra := [k for k in keywords if k is not None and k not in named]):
        return f"does not take {', '.join(extra)}"
    if starred or None in keywords:
        return ""
    if not args.vararg and len(call.args) > len(plain):
        return f"takes {len(plain)} positional arguments, not {len(call.args)}"
    needed = [a.arg for a in plain[:required]][len(call.args) :]
    needed += [
        a.arg
        for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
        if default is None
    ]
    lost = [name for name in needed if name not in keywords]
    return f"needs {', '.join(lost)}" if lost else ""


def refused(own: Function, member: Member) -> Iterator[str]:
    """Say what a caller may pass to vLLM's method that kvplug's override does not take."""
    theirs, ours = parameters(member.text), own.args
    positions = [a.arg for a in [*ours.posonlyargs, *ours.args]]
    takes = {*positions, *(a.arg for a in ours.kwonlyargs)}
    for i, one in enumerate([*theirs.posonlyargs, *theirs.args]):
        if i == 0 and not is_static(member.text):
            continue
        placed = positions[i : i + 1] == [one.arg] or (
            i < len(positions) and one in theirs.posonlyargs
        )
        if not placed and not (ours.vararg and i >= len(positions)):
            yield f"takes {one.arg} as its argument {i}, which the override does not"
        if one.arg not in takes and not ours.kwarg and one not in theirs.posonlyargs:
            yield f"takes {one.arg} by name, which the override does not"
    for one in theirs.kwonlyargs:
        if one.arg not in takes and not ours.kwarg:
            yield f"takes {one.arg} by name, which the override does not"
    if theirs.kwarg and not ours.kwarg:
        yield f"takes **{theirs.kwarg.arg}, which the override does not"
    may = _names(member.text)
    plain = [*ours.posonlyargs, *ours.args]
    needed = [a.arg for a in plain[: len(plain) - len(ours.defaults)]]
    needed = needed[0 if is_static(member.text) else 1 :]
    needed += [
        a.arg
        for a, default in zip(ours.kwonlyargs, ours.kw_defaults, strict=True)
        if default is None
    ]
    if lost := [name for name in needed if name not in may]:
        yield f"no longer passes {', '.join(lost)}, which the override needs"


# -- two releases ----------------------------------------------------------------------------------


def moved(fit: Fit, other: Library) -> list[tuple[str, str, str]]:
    """What kvplug uses and two releases write differently: point, signature here, there."""
    found = []
    for point in sorted(fit.uses):
        here, there = fit.library.point(point), other.point(point)
        before = here.text if here is not None else "none"
        after = there.text if there is not None else "none"
        if isinstance(here, Found) and here.kind == "class":
            continue
        if before != after:
            found.append((point, before, after))
    return found


def added(fit: Fit, other: Library) -> list[Member]:
    """Methods that another release adds to the classes which kvplug derives from."""
    found: dict[str, Member] = {}
    for point, base in sorted(fit.bases.items()):
        there = other.point(point)
        if isinstance(there, Found):
            have = fit.library.members(base)
            for name, member in other.members(there).items():
                if name not in have and not name.startswith("_"):
                    found.setdefault(member.point, member)
    return list(found.values())
