"""Parses the ``kvplug`` section into a deployment; refuses each key that is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kvplug.contract import EngineView, Kind, PolicyOptions
from kvplug.deployment import ON_BAD_REQUEST_VALUES, Choice, Deployment
from kvplug.errors import DeploymentError, Refusal, change_options
from kvplug.registry import Plugins, plugins
from kvplug.reuse.settings import GuardSettings, ReuseSettings

KINDS = [str(k) for k in Kind]


MANY = frozenset({Kind.REUSE})


GUARD = "guard"
ON_BAD_REQUEST = "on_bad_request"
SECTION_KEYS = frozenset({*KINDS, GUARD, ON_BAD_REQUEST})
"""Keys of a section."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # SafeLoader raises its own error
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[Any, dict[str, int]]:
    """Parse a YAML file and note the line of every key path.

    Returns:
        The data, and ``{"a.b.c": line}`` with 1-based lines.

    Raises:
        DeploymentError: The file cannot be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DeploymentError(
            str(path), [Refusal("file", f"cannot be read: {reason}.", "check the path.")]
        ) from error
    try:
        data = yaml.load(text, _Loader)
        node = yaml.compose(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DeploymentError(
            str(path),
            [
                Refusal(
                    "YAML",
                    f"{problem}.",
                    "correct the syntax at that line.",
                    mark.line + 1 if mark is not None else None,
                )
            ],
        ) from error
    lines: dict[str, int] = {}
    above: list[yaml.Node] = []  # an anchor may contain itself

    def walk(node: yaml.Node | None, path: str) -> None:
        if node is None or any(node is n for n in above):
            return
        above.append(node)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                below = f"{path}.{key.value}" if path else str(key.value)
                lines[below] = key.start_mark.line + 1
                walk(value, below)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines[f"{path}[{i}]"] = item.start_mark.line + 1
                walk(item, f"{path}[{i}]")
        above.pop()

    walk(node, "")
    return data, lines


def load_deployment(
    section: Any,
    *,
    source: str = "inline",
    key: str = "kvplug",
    lines: Mapping[str, int] | None = None,
    using: Plugins | None = None,
    engine: EngineView | None = None,
) -> Deployment:
    """Parse a ``kvplug`` section.

    Args:
        section: The section as data, or a path to a YAML file that holds it.
        source: Where it came from, for messages.
        key: Key path of the section in that source.
        lines: Line of each key path in the source.
        using: Plugins to find policies in; the process's own by default.
        engine: The engine it is for, as far as it is known; ``use: auto`` is decided by it.

    Raises:
        DeploymentError: With one refusal for each thing that is wrong.
    """
    if isinstance(section, str | Path):
        path = Path(section)
        section, own = read_yaml(path)
        source, lines, key = str(path), own, ""
        if section is None:
            section = {}
    parser = _Parser(
        source, key, lines or {}, using or plugins(), engine or EngineView(block_size=16)
    )
    return parser.parse(section)


class _Parser:
    def __init__(
        self,
        source: str,
        key: str,
        lines: Mapping[str, int],
        using: Plugins,
        engine: EngineView,
    ):
        self.source, self.key, self.lines, self.plugins = source, key, lines, using
        self.engine = engine
        self.refusals: list[Refusal] = []

    def path(self, *parts: str) -> str:
        return ".".join(p for p in (self.key, *parts) if p)

    def refuse(self, key: str, problem: str, fix: str) -> None:
        above = key
        while above not in self.lines and "." in above:
            above = above.rsplit(".", 1)[0]
        self.refusals.append(Refusal(key, problem, fix, self.lines.get(above)))

    def parse(self, section: Any) -> Deployment:
        choices: dict[Kind, tuple[Choice, ...]] = {}
        beside: dict[str, Any] = {}
        if not isinstance(section, Mapping):
            self.refuse(
                self.path() or "file",
                f"must map kinds to policies, got {type(section).__name__}.",
                "write e.g. `prefix_cache: {use: lru}`, or `{}` for none.",
            )
        else:
            for name, value in section.items():
                if name == GUARD:
                    self.settings(GuardSettings, value, GUARD, beside)
                    continue
                if name == ON_BAD_REQUEST:
                    self.on_bad_request(value, beside)
                    continue
                if name not in KINDS:
                    known = [*KINDS, GUARD, ON_BAD_REQUEST]
                    near = difflib.get_close_matches(str(name), known, n=1)
                    self.refuse(
                        self.path(str(name)),
                        "unknown key.",
                        f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}.",
                    )
                    continue
                if name == Kind.REUSE and isinstance(value, Mapping):
                    own = {k: v for k, v in value.items() if k != "use"}
                    self.settings(ReuseSettings, own, str(name), beside)
                    value = {k: v for k, v in value.items() if k == "use"}
                chosen = self.kind(Kind(name), value)
                if chosen:
                    choices[Kind(name)] = tuple(chosen)
            self.together(choices, beside)
        if self.refusals:
            raise DeploymentError(self.source, self.refusals)
        deployment = Deployment(self.source, choices, self.lines, section, **beside)
        try:
            self.plugins.manager.hook.kvplug_deployment_loaded(deployment=deployment)
        except Exception as error:
            text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise DeploymentError(
                self.source,
                [
                    Refusal(
                        self.path() or "file",
                        f"{text}.",
                        "change the section as the message says; a plugin refused it.",
                    )
                ],
            ) from error
        return deployment

    def on_bad_request(self, value: Any, into: dict[str, Any]) -> None:
        """Validate what is done with a request whose options are invalid."""
        if value in ON_BAD_REQUEST_VALUES:
            into[ON_BAD_REQUEST] = value
            return
        self.refuse(
            self.path(ON_BAD_REQUEST),
            f"must be {' or '.join(ON_BAD_REQUEST_VALUES)}, got {value!r}.",
            "report answers the request and names the refused options; refuse answers HTTP 400.",
        )

    def settings(
        self, model: type[PolicyOptions], value: Any, name: str, into: dict[str, Any]
    ) -> None:
        """Validate keys that belong to no policy."""
        if not isinstance(value, Mapping):
            self.refuse(
                self.path(name),
                f"must be a mapping, got {type(value).__name__}.",
                f"write `{name}: {{key: value}}`.",
            )
            return
        try:
            into[name] = model.model_validate(value)
        except ValidationError as error:
            self.invalid(error, model, name, self.path(name))

    def together(
        self, choices: Mapping[Kind, tuple[Choice, ...]], beside: Mapping[str, Any]
    ) -> None:
        """Refuse keys that are valid by themselves but not together."""
        if GUARD in beside and Kind.REUSE not in choices and not self.refusals:
            self.refuse(
                self.path(GUARD),
                "watches reuse, but nothing is reused.",
                "add a reuse section, or remove guard.",
            )

    def kind(self, kind: Kind, value: Any) -> list[Choice]:
        key = self.path(str(kind))
        if isinstance(value, str):
            return self.one(kind, value, {}, key)
        if not isinstance(value, Mapping):
            self.refuse(
                key,
                f"must name a policy, got {type(value).__name__}.",
                f"write `{kind}: {{use: NAME}}`.",
            )
            return []
        if "use" not in value:
            self.refuse(key, "does not name a policy.", f"add `use:` to {kind!s}.")
            return []
        use, options = value["use"], {str(k): v for k, v in value.items() if k != "use"}
        if isinstance(use, str):
            return self.one(kind, use, options, f"{key}.use")
        if isinstance(use, Sequence) and kind in MANY:
            if options:
                self.refuse(
                    f"{key}.{next(iter(options))}",
                    "options are not allowed next to a list of policies.",
                    "write them under the policy: `use: [a, {b: {option: value}}]`.",
                )
            return [c for i, item in enumerate(use) for c in self.item(kind, item, key, i)]
        many = " or a list of policy names" if kind in MANY else ""
        self.refuse(
            f"{key}.use",
            f"must be a policy name{many}, got {type(use).__name__}.",
            f"use one of {', '.join(self.plugins.registry.names(kind)) or '(none installed)'}.",
        )
        return []

    def item(self, kind: Kind, item: Any, key: str, i: int) -> list[Choice]:
        where = f"{key}.use[{i}]"
        if isinstance(item, str):
            return self.one(kind, item, {}, where)
        if isinstance(item, Mapping) and len(item) == 1:
            ((name, options),) = item.items()
            if isinstance(options, Mapping):
                return self.one(kind, str(name), dict(options), where)
        self.refuse(where, "is not a policy.", "write a name, or `{name: {option: value}}`.")
        return []

    def one(self, kind: Kind, name: str, options: dict[str, Any], key: str) -> list[Choice]:
        registry = self.plugins.registry
        if name == "auto":
            try:
                chosen = self.plugins.manager.hook.kvplug_choose_policy(
                    kind=kind, engine=self.engine
                )
            except Exception as error:
                self.refuse(
                    key,
                    f"the plugin that chooses for `auto` failed: {type(error).__name__}: {error}.",
                    "name a policy.",
                )
                return []
            if not chosen:
                self.refuse(key, "no plugin chooses a policy for `auto`.", "name a policy.")
                return []
            name = chosen
        policy = registry.get(kind, name)
        if policy is None:
            near = registry.nearest(kind, name)
            installed = ", ".join(registry.names(kind)) or "none"
            fix = f"did you mean {' or '.join(near)}? " if near else ""
            if extra := registry.extra(kind, name):
                fix = f"pip install 'kvplug[{extra}]'. "
            elsewhere = [str(k) for k in Kind if registry.get(k, name)]
            if elsewhere:
                fix += f"{name!r} is a {elsewhere[0]} policy. "
            broken = "".join(
                f" Plugin {n} failed to load: {e}." for n, e in registry.broken.items()
            )
            self.refuse(
                key,
                f"unknown {kind} policy {name!r}.",
                f"{fix}Installed: {installed}.{broken}",
            )
            return []
        try:
            valid = policy.Options.model_validate(options)
        except ValidationError as error:
            self.invalid(error, policy.Options, policy.name, key.removesuffix(".use"))
            return []
        return [Choice(policy, valid, key)]

    def invalid(
        self, error: ValidationError, model: type[PolicyOptions], owner: str, key: str
    ) -> None:
        """Refuse each invalid option of a policy or a key."""
        for e in error.errors(include_url=False):
            name = ".".join(str(p) for p in e["loc"])
            where = f"{key}.{name}" if name else key
            at = _model_at(model, e["loc"][:-1])
            fields = at.model_fields
            if e["type"] == "extra_forbidden":
                last = str(e["loc"][-1])
                if last in (renamed := getattr(at, "renamed", {})):
                    self.refuse(where, f"`{last}` was renamed.", f"use {renamed[last]}.")
                    continue
                near = difflib.get_close_matches(last, list(fields), n=1)
                known = ", ".join(fields) or "it has no options"
                self.refuse(
                    where,
                    f"{owner} has no option {name!r}.",
                    f"did you mean {near[0]}?" if near else f"options: {known}.",
                )
                continue
            problem = _plain(e["type"], e["msg"])
            if not e["loc"]:
                self.refuse(where, f"{owner}: {problem}.", change_options(problem, fields))
                continue
            info = fields.get(str(e["loc"][-1]))
            got = "" if e["type"] == "missing" else f", got {e['input']!r}"
            means = f" ({info.description})" if info is not None and info.description else ""
            self.refuse(where, f"{problem}{got}.", f"{_remedy(e['type'])}{means}.")


def _plain(kind: str, message: str) -> str:
    """A validation error of pydantic's, as a predicate of the key."""
    if kind == "missing":
        return "is missing"
    message = message.removeprefix("Value error, ")
    return re.sub(r"^Input should (?:be|have) ", _must, message)


def _must(found: re.Match[str]) -> str:
    return "must be " if "be" in found[0].split() else "must have "


def _remedy(kind: str) -> str:
    if kind == "missing":
        return "add it"
    ranged = kind.startswith(("greater_than", "less_than"))
    return "use a value in range" if ranged else "use a valid value"


def _model_at(model: type[PolicyOptions], loc: tuple[int | str, ...]) -> type[PolicyOptions]:
    """The options that a place in a validation error belongs to."""
    found = model
    for part in loc:
        info = found.model_fields.get(str(part))
        inner = (
            [
                a
                for a in (info.annotation, *getattr(info.annotation, "__args__", ()))
                if isinstance(a, type) and issubclass(a, PolicyOptions)
            ]
            if info is not None
            else []
        )
        if not inner:
            break
        found = inner[0]
    return found
