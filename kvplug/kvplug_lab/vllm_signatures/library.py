"""Names, bases and signatures of a vLLM release, read from its source without importing it.

A release is read from a wheel, from an installed package, or from the JSON that an earlier reading
left. A module's part of the JSON has its imports, its functions and its classes; a signature is
written as in source, with defaults left out: ``(self, request, num_tokens=..., *, flag)``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError

ROOT = "vllm"

Record = dict[str, Any]
"""A module as JSON: ``parts`` of a package, imported ``names``, modules imported whole as
``stars``, ``functions``, ``classes`` and ``values``."""


class SignaturesError(KVPlugError, RuntimeError):
    """Signatures of a release cannot be read; the message says what to do."""


@dataclass(frozen=True)
class Found:
    """Something that a name in a module stands for.

    Attributes:
        kind: ``class``, ``function``, ``module`` or ``value``.
        module: The module that defines it.
        name: Its name there; empty for a module.
        text: A function's signature, or a value's annotation.
    """

    kind: str
    module: str
    name: str
    text: str = ""

    @property
    def point(self) -> str:
        """``module:name``, as `compat` writes it."""
        return f"{self.module}:{self.name}" if self.name else self.module


@dataclass(frozen=True)
class Member:
    """A method or an attribute, with the class that defines it.

    Attributes:
        owner: The class.
        name: Its name.
        text: A method's decorators and signature, or an attribute's annotation.
        is_method: Whether it is a method; a property is none.
    """

    owner: Found
    name: str
    text: str
    is_method: bool

    @property
    def point(self) -> str:
        """``module:Class.name``."""
        return f"{self.owner.point}.{self.name}"


class Library:
    """A release of vLLM.

    Args:
        version: Its version.
        load: Returns a module's record, or None for a module that does not exist.
        wheel: Name and SHA-256 of the wheel it was read from, where it was.

    Attributes:
        touched: Every module looked at so far, with its record.
    """

    def __init__(
        self,
        version: str,
        load: Callable[[str], Record | None],
        wheel: dict[str, str] | None = None,
    ):
        self.version = version
        self.wheel = wheel or {}
        self.touched: dict[str, Record | None] = {}
        self._load = load

    # -- where from ----------------------------------------------------------------------------

    @classmethod
    def of_wheel(cls, path: Path) -> Library:
        """Read a wheel.

        Raises:
            SignaturesError: It is no wheel of vLLM.
        """
        try:
            archive = zipfile.ZipFile(path)
            files = set(archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise SignaturesError(f"{path} is no wheel ({error})") from error
        if f"{ROOT}/__init__.py" not in files:
            raise SignaturesError(f"{path} holds no package {ROOT}; give a wheel of vllm")

        def load(module: str) -> Record | None:
            for file in _files(module):
                if file in files:
                    record = read(archive.read(file).decode("utf-8"), module, file)
                    record["parts"] = _parts(file, files)
                    return record
            return None

        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        version = path.name.split("-")[1]
        return cls(version, load, {"name": path.name, "sha256": digest})

    @classmethod
    def installed(cls, version: str) -> Library:
        """Read the installed package; its version is given by the caller.

        Raises:
            SignaturesError: vLLM is not installed.
        """
        spec = importlib.util.find_spec(ROOT)
        if spec is None or not spec.submodule_search_locations:
            raise SignaturesError("vLLM is not installed; install kvplug[cpu] or kvplug[vllm]")
        folder = Path(next(iter(spec.submodule_search_locations))).parent

        def load(module: str) -> Record | None:
            for file in _files(module):
                if (folder / file).is_file():
                    record = read((folder / file).read_text("utf-8"), module, file)
                    beside = (folder / file).parent
                    found = [*beside.glob("*.py"), *beside.glob("*/__init__.py")]
                    record["parts"] = _parts(file, {str(f.relative_to(folder)) for f in found})
                    return record
            return None

        return cls(version, load)

    @classmethod
    def of_json(cls, path: Path) -> Library:
        """Read what `write` wrote.

        Raises:
            SignaturesError: The file is missing or no such JSON. A module that it does not cover
                raises it too, once it is asked for.
        """
        try:
            data = json.loads(path.read_text("utf-8"))
            version, wheel, modules = data["version"], data["wheel"], data["modules"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SignaturesError(f"{path} holds no signatures ({error})") from error

        def load(module: str) -> Record | None:
            if module not in modules:
                raise SignaturesError(
                    f"kvplug uses {module}, which {path.name} does not cover; run "
                    f"`python -m kvplug_lab.vllm_signatures {wheel.get('name', 'WHEEL')}`"
                )
            record: Record | None = modules[module]
            return record

        return cls(version, load, wheel)

    def write(self, path: Path) -> None:
        """Write every module looked at so far as JSON."""
        data = {
            "version": self.version,
            "wheel": self.wheel,
            "modules": {name: self.touched[name] for name in sorted(self.touched)},
        }
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")

    # -- looking up ----------------------------------------------------------------------------

    def module(self, name: str) -> Record | None:
        """Return a module's record, or None where there is none."""
        if name not in self.touched:
            self.touched[name] = self._load(name)
        return self.touched[name]

    def find(self, module: str, name: str, seen: frozenset[str] = frozenset()) -> Found | None:
        """Return what a name in a module stands for, following imports inside vLLM."""
        record = self.module(module)
        if record is None or f"{module}:{name}" in seen:
            return None
        seen |= {f"{module}:{name}"}
        if name in record["classes"]:
            return Found("class", module, name)
        if name in record["functions"]:
            return Found("function", module, name, record["functions"][name])
        if name in record["values"]:
            return Found("value", module, name, record["values"][name])
        if name in record["names"]:
            source, _, attribute = record["names"][name].partition(":")
            if source.split(".")[0] != ROOT:
                return Found("value", source, attribute)
            if not attribute:
                return Found("module", source, "")
            return self.find(source, attribute, seen)
        for source in record["stars"]:
            if source.split(".")[0] == ROOT and (found := self.find(source, name, seen)):
                return found
        if name in record["parts"]:
            return Found("module", f"{module}.{name}", "")
        return None

    def point(self, target: str) -> Found | Member | None:
        """Return what ``module:qualified.name`` stands for."""
        module, _, qualified = target.partition(":")
        first, *rest = qualified.split(".")
        found = self.find(module, first)
        if not rest or found is None or found.kind != "class":
            return found if not rest else None
        return self.member(found, rest[0])

    def record(self, cls: Found) -> Record:
        """Return a class's own record."""
        record = self.module(cls.module)
        assert record is not None
        own: Record = record["classes"][cls.name]
        return own

    def bases(self, cls: Found) -> Iterator[Found]:
        """Yield a class and those it derives from inside vLLM, nearest first."""
        seen: list[Found] = []
        todo = [cls]
        while todo:
            one = todo.pop(0)
            if one in seen:
                continue
            seen.append(one)
            yield one
            todo += [f for base in self.record(one)["bases"] for f in self.types(one.module, base)]

    def member(self, cls: Found, name: str) -> Member | None:
        """Return a class's method or attribute, its own or inherited."""
        for owner in self.bases(cls):
            record = self.record(owner)
            if name in record["methods"]:
                text = record["methods"][name]
                return Member(owner, name, text, not _is_property(text))
            if name in record["attributes"]:
                return Member(owner, name, record["attributes"][name], False)
        return None

    def members(self, cls: Found) -> dict[str, Member]:
        """Return every method and attribute of a class by name."""
        found: dict[str, Member] = {}
        for owner in self.bases(cls):
            record = self.record(owner)
            for name in [*record["methods"], *record["attributes"]]:
                if name not in found and (member := self.member(cls, name)):
                    found[name] = member
        return found

    def types(self, module: str, annotation: str) -> list[Found]:
        """Return the classes of vLLM that an annotation, or the call that made a value, names."""
        try:
            tree = ast.parse(annotation, mode="eval").body
        except SyntaxError:
            return []
        return list(self._types(module, tree))

    def _types(self, module: str, tree: ast.expr) -> Iterator[Found]:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
            yield from self.types(module, tree.value)
        elif isinstance(tree, ast.BinOp):
            yield from self._types(module, tree.left)
            yield from self._types(module, tree.right)
        elif isinstance(tree, ast.Subscript):
            outer = ast.unparse(tree.value).split(".")[-1]
            if outer in ("Optional", "ClassVar", "Final", "Annotated", "SkipValidation"):
                inner = tree.slice
                first = inner.elts[0] if isinstance(inner, ast.Tuple) else inner
                yield from self._types(module, first)
            else:
                yield from self._types(module, tree.value)
        elif isinstance(tree, ast.Call):
            found = self._named(module, tree.func)
            if found is not None and found.kind == "class":
                yield found
            elif found is not None and found.kind == "function":
                yield from self.types(found.module, returned(found.text))
        else:
            found = self._named(module, tree)
            if found is not None and found.kind == "class":
                yield found

    def _named(self, module: str, tree: ast.expr) -> Found | None:
        if isinstance(tree, ast.Name):
            return self.find(module, tree.id)
        if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name):
            found = self.find(module, tree.value.id)
            if found is not None and found.kind == "module":
                return self.find(found.module, tree.attr)
        return None


# -- signatures ------------------------------------------------------------------------------------


@functools.cache
def parameters(text: str) -> ast.arguments:
    """The parameters of a signature's text."""
    function = ast.parse(f"def f{text[text.index('(') :]}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def returned(text: str) -> str:
    """The annotation of what a signature's text returns; empty where it has none."""
    return text.rpartition(" -> ")[2] if ") -> " in text else ""


def _is_property(text: str) -> bool:
    return any(f"@{name}" in text.partition("(")[0] for name in ("property", "cached_property"))


def is_static(text: str) -> bool:
    """True if a method's text says that it takes no instance or class."""
    return "@staticmethod" in text.partition("(")[0]


def is_abstract(text: str) -> bool:
    """True if a method's text says that a subclass must define it."""
    return "@abstractmethod" in text.partition("(")[0]


# -- reading source --------------------------------------------------------------------------------

_DECORATORS = ("abstractmethod", "cached_property", "classmethod", "property", "staticmethod")


def _files(module: str) -> tuple[str, str]:
    path = module.replace(".", "/")
    return f"{path}.py", f"{path}/__init__.py"


def _parts(file: str, files: set[str]) -> list[str]:
    """Modules inside a package; none for a module that is no package."""
    folder, _, name = file.rpartition("/")
    if name != "__init__.py":
        return []
    found = set()
    for other in files:
        first, _, rest = other.removeprefix(f"{folder}/").partition("/")
        if other != file and other.startswith(f"{folder}/") and rest in ("", "__init__.py"):
            found.add(first.removesuffix(".py"))
    return sorted(found)


def read(source: str, module: str, file: str) -> Record:
    """Read one module's source into its record."""
    package = module if file.endswith("/__init__.py") else module.rpartition(".")[0]
    record: Record = {"parts": [], "names": {}, "stars": []}
    record |= {"functions": {}, "classes": {}, "values": {}}
    for node in _top(ast.parse(source).body):
        if isinstance(node, ast.Import):
            for one in node.names:
                record["names"][one.asname or one.name.split(".")[0]] = (
                    one.name if one.asname else one.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            where = _absolute(node, package)
            for one in node.names:
                if one.name == "*":
                    record["stars"].append(where)
                else:
                    record["names"][one.asname or one.name] = f"{where}:{one.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            record["functions"].setdefault(node.name, _signature(node))
        elif isinstance(node, ast.ClassDef):
            record["classes"][node.name] = _class(node)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            record["values"][node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    record["values"][target.id] = _made(node.value)
                    if target.id == "MODULE_ATTRS":
                        record["names"] |= _lazy(node.value, package)
    return record


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under its conditions too."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _top(node.body)
            yield from _top(node.orelse)
        elif isinstance(node, ast.Try):
            yield from _top([*node.body, *node.orelse])
        else:
            yield node


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    above = parts[: len(parts) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _lazy(value: ast.expr, package: str) -> dict[str, str]:
    """Names that a package resolves on first use: ``MODULE_ATTRS = {"LLM": ".llm:LLM"}``."""
    if not isinstance(value, ast.Dict):
        return {}
    found = {}
    for key, at in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(at, ast.Constant):
            module, _, name = str(at.value).partition(":")
            found[str(key.value)] = f"{package}{module}:{name}"
    return found


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function's decorators, parameters without annotations and defaults, and result."""
    args = node.args
    words: list[str] = []
    plain = [*args.posonlyargs, *args.args]
    first_default = len(plain) - len(args.defaults)
    for i, one in enumerate(plain):
        words.append(one.arg + ("=..." if i >= first_default else ""))
        if args.posonlyargs and i + 1 == len(args.posonlyargs):
            words.append("/")
    if args.vararg:
        words.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        words.append("*")
    for one, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        words.append(one.arg + ("=..." if default is not None else ""))
    if args.kwarg:
        words.append(f"**{args.kwarg.arg}")
    names = [ast.unparse(d).split(".")[-1] for d in node.decorator_list]
    marks = "".join(f"@{name} " for name in names if name in _DECORATORS)
    end = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{marks}({', '.join(words)}){end}"


def _class(node: ast.ClassDef) -> Record:
    methods: dict[str, str] = {}
    attributes: dict[str, str] = {}
    assigned: dict[str, str] = {}
    for one in _top(node.body):
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
            methods.setdefault(one.name, _signature(one))
            for name, made in _assigned(one):
                assigned[name] = assigned.get(name) or made
        elif isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            attributes[one.target.id] = ast.unparse(one.annotation)
        elif isinstance(one, ast.Assign):
            for target in one.targets:
                if isinstance(target, ast.Name):
                    attributes.setdefault(target.id, "")
    # What methods assign comes after what the class declares.
    attributes = {**assigned, **attributes}
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": methods,
        "attributes": {name: attributes[name] for name in sorted(attributes)},
    }


def _assigned(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, str]]:
    """Attributes that a method assigns to ``self``, with what is known of their types."""
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    given = {a.arg: ast.unparse(a.annotation) for a in args if a.annotation is not None}
    for one in ast.walk(node):
        if isinstance(one, ast.AnnAssign) and (name := _own(one.target)):
            yield name, ast.unparse(one.annotation)
        elif isinstance(one, ast.Assign):
            for target in one.targets:
                elements = target.elts if isinstance(target, ast.Tuple) else [target]
                for element in elements:
                    if name := _own(element):
                        value = one.value
                        known = given.get(value.id, "") if isinstance(value, ast.Name) else ""
                        yield name, known or _made(value)


def _own(target: ast.expr) -> str:
    if (
        isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    ):
        return target.attr
    return ""


def _made(value: ast.expr) -> str:
    """The call that makes a value, without its arguments, or a string; empty for others."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return repr(value.value)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name | ast.Attribute):
        return f"{ast.unparse(value.func)}()"
    return ""
