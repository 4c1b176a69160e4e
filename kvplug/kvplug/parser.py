"""Parses the ``kvplug`` section into a deployment; refuses each key that is wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from kvplug.containment import STARTING, Contained, PolicyFailure
from kvplug.contract import EngineView, Kind, PolicyOptions, TierOptions
from kvplug.deployment import ON_BAD_REQUEST_VALUES, Choice, Deployment, TierChoice
from kvplug.errors import DeploymentError, Refusal, change_options
from kvplug.near_names import did_you_mean
from kvplug.observe.settings import ObserveSettings
from kvplug.plain_text import CAUSE, LABEL, one_line, without_logins
from kvplug.registry import Plugins, plugins
from kvplug.reuse.settings import GuardSettings, ReuseSettings
from kvplug.yaml_file import read_yaml

KINDS = [str(k) for k in Kind]


MANY = frozenset({Kind.REUSE})
"""Kinds whose `use` may be a list of policies."""
DEFAULT_CODEC = "raw"
DEFAULT_LIFECYCLE = "watermarks"


GUARD = "guard"
SHADOW = "shadow"
OBSERVE = "observe"
ON_BAD_REQUEST = "on_bad_request"
MAX_REFUSALS = 64
"""Refusals after which a section is read no further."""
SECTION_KEYS = frozenset({*KINDS, GUARD, OBSERVE, ON_BAD_REQUEST})
"""Keys of a section."""


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
        # A URL may stand under any key by mistake, with the password of a server.
        key, problem = without_logins(key), without_logins(problem)
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
                if len(self.refusals) >= MAX_REFUSALS:
                    break
                if name == GUARD:
                    self.settings(GuardSettings, value, GUARD, beside)
                    continue
                if name == OBSERVE:
                    self.settings(ObserveSettings, value, OBSERVE, beside)
                    continue
                if name == ON_BAD_REQUEST:
                    self.on_bad_request(value, beside)
                    continue
                if name not in KINDS:
                    known = [*KINDS, GUARD, OBSERVE, ON_BAD_REQUEST]
                    fix = f"{did_you_mean(str(name), known)}use one of {', '.join(known)}."
                    self.refuse(self.path(str(name)), "unknown key.", fix)
                    continue
                if name == Kind.REUSE and isinstance(value, Mapping):
                    own = {k: v for k, v in value.items() if k != "use"}
                    self.settings(ReuseSettings, own, str(name), beside)
                    value = {k: v for k, v in value.items() if k == "use"}
                chosen = self.kind(Kind(name), value)
                if chosen:
                    choices[Kind(name)] = tuple(chosen)
            self.tiers(choices, beside)
            self.together(choices, beside)
        if self.refusals:
            raise DeploymentError(self.source, self.refusals)
        deployment = Deployment(self.source, choices, self.lines, section, **beside)
        loaded = self.plugins.manager.hook.kvplug_deployment_loaded
        try:
            Contained(loaded, STARTING).run(partial(loaded, deployment=deployment))
        except PolicyFailure as failure:
            raise DeploymentError(
                self.source,
                [
                    Refusal(
                        self.path() or "file",
                        f"{failure.problem}.",
                        "change the section as the message says; a plugin refused it.",
                    )
                ],
            ) from failure
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
        if GUARD not in beside or self.refusals:
            return
        guard: GuardSettings = beside[GUARD]
        if guard.shadow is not None:
            self.shadow(choices, beside)
        if Kind.REUSE in choices:
            return
        if guard.shadow is None:
            self.refuse(
                self.path(GUARD),
                "watches reuse, but nothing is reused.",
                "add a reuse section, or guard.shadow for other policies, or remove guard.",
            )
        for name in sorted(guard.model_fields_set - {SHADOW} if guard.shadow else ()):
            self.refuse(
                self.path(GUARD, name),
                "is about reuse, but nothing is reused.",
                f"add a reuse section, or remove {name}.",
            )

    def shadow(self, choices: Mapping[Kind, tuple[Choice, ...]], beside: Mapping[str, Any]) -> None:
        """Refuse a shadow where no request can be exact, or none can be anything else."""
        key = self.path(GUARD, SHADOW)
        codecs = [tier.codec for tier in beside.get("tiers", ())]
        for choice in (*choices.get(Kind.FORMAT, ()), *codecs):
            if not choice.policy.exact:
                self.refuse(
                    key,
                    f"answers again exactly, but {choice.policy.name} changes the KV of every "
                    "request.",
                    f"remove guard.shadow, or choose another {choice.policy.kind!s}.",
                )
        sequence = any(not choice.policy.exact for choice in choices.get(Kind.SEQUENCE, ()))
        reuse = beside.get(str(Kind.REUSE))
        approximate = Kind.REUSE in choices and reuse is not None and reuse.approximate
        if not sequence and not approximate and Kind.ATTENTION not in choices:
            self.refuse(
                key,
                "answers approximate answers again, but nothing here approximates.",
                "add a sequence or attention policy or reuse with approximate: true, or remove "
                "guard.shadow.",
            )

    def tiers(self, choices: dict[Kind, tuple[Choice, ...]], into: dict[str, Any]) -> None:
        """Give each tier its name, its codec and its order, and the tiers a lifecycle policy."""
        chosen = choices.get(Kind.TIERS, ())
        if not chosen:
            for kind in (Kind.TRANSFER, Kind.LIFECYCLE):
                if kind in choices:
                    self.refuse(
                        self.path(str(kind)),
                        "has no effect without tiers.",
                        f"add e.g. `tiers: [{{host: {{size: 8GiB}}}}]`, or remove {kind!s}.",
                    )
            return
        for kind, default in (
            (Kind.TRANSFER, DEFAULT_CODEC),
            (Kind.LIFECYCLE, DEFAULT_LIFECYCLE),
        ):
            if kind not in choices:
                choices[kind] = tuple(self.one(kind, default, {}, self.path(str(kind))))
        seen: Counter[str] = Counter()
        found = []
        for choice in chosen:
            assert isinstance(choice.options, TierOptions)
            seen[choice.policy.name] += 1
            count = seen[choice.policy.name]
            name = choice.policy.name + (f"_{count}" if count > 1 else "")
            codec = choices[Kind.TRANSFER]
            if choice.options.transfer:
                codec = self.nested(Kind.TRANSFER, choice.options.transfer, choice, "transfer")
            order = self.nested(Kind.PREFIX_CACHE, choice.options.order, choice, "order")
            if codec and order:
                found.append(TierChoice(name, choice, codec[0], order[0]))
        self.apart(found)
        self.saved(choices[Kind.LIFECYCLE], found)
        into["tiers"] = tuple(found)

    def apart(self, tiers: Sequence[TierChoice]) -> None:
        """Refuse tiers that store the same in the same place: one would drop the other's."""
        owners: dict[tuple[str, str, Any], TierChoice] = {}
        for one in tiers:
            assert isinstance(one.tier.options, TierOptions)
            for place in sorted(one.tier.options.places):
                own = one.tier.policy.name, place, (one.codec.policy, one.codec.options)
                other = next((o for key, o in owners.items() if key == own), None)
                if other is not None:
                    self.refuse(
                        one.tier.key,
                        f"stores in the same place as {other.tier.key}.",
                        "give each tier a place of its own, or remove one of them.",
                    )
                    break
                owners[own] = one

    def saved(self, lifecycle: Sequence[Choice], tiers: Sequence[TierChoice]) -> None:
        """Refuse checkpoints that nothing would keep."""
        for choice in lifecycle:
            seconds = getattr(choice.options, "checkpoint", 0)
            durable = any(getattr(one.tier.policy, "durable", False) for one in tiers)
            if seconds and tiers and not durable:
                self.refuse(
                    f"{self.path(str(Kind.LIFECYCLE))}.checkpoint",
                    "saves KV for the engine's next start, but no tier outlives the engine.",
                    "add e.g. `disk: {path: /var/kvplug, size: 100GiB}` to tiers, or remove "
                    "checkpoint.",
                )

    def nested(self, kind: Kind, value: Any, owner: Choice, name: str) -> tuple[Choice, ...]:
        """Parse a policy that is an option of another one: a name, or ``{use: NAME, ...}``."""
        key = f"{owner.key}.{name}"
        if isinstance(value, str):
            return tuple(self.one(kind, value, {}, key))
        if not isinstance(value.get("use"), str):
            self.refuse(key, "does not name a policy.", f"write `{name}: {{use: NAME}}`.")
            return ()
        options = {str(k): v for k, v in value.items() if k != "use"}
        return tuple(self.one(kind, value["use"], options, key))

    def kind(self, kind: Kind, value: Any) -> list[Choice]:
        key = self.path(str(kind))
        if kind is Kind.TIERS:
            return self.list_of_tiers(value, key)
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
        if isinstance(use, Sequence) and kind in MANY and use:
            if options:
                self.refuse(
                    f"{key}.{next(iter(options))}",
                    "options are not allowed next to a list of policies.",
                    "write them under the policy: `use: [a, {b: {option: value}}]`.",
                )
            return [c for i, item in enumerate(use) for c in self.item(kind, item, key, i)]
        many = " or a list of policy names" if kind in MANY else ""
        got = "an empty list" if use == [] else type(use).__name__
        self.refuse(
            f"{key}.use",
            f"must be a policy name{many}, got {got}.",
            f"use one of {', '.join(self.plugins.registry.names(kind)) or '(none installed)'}.",
        )
        return []

    def list_of_tiers(self, value: Any, key: str) -> list[Choice]:
        """Parse the tiers: a list, as their order matters."""
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
            self.refuse(
                key,
                "must be a list of tiers, fastest first.",
                f"write `{Kind.TIERS}: [{{host: {{size: 8GiB}}}}, ...]`, or remove it.",
            )
            return []
        found = []
        for i, item in enumerate(value):
            where = f"{key}[{i}]"
            if isinstance(item, str):
                found += self.one(Kind.TIERS, item, {}, where)
            elif isinstance(item, Mapping) and len(item) == 1:
                ((name, options),) = item.items()
                if options is None or isinstance(options, Mapping):
                    found += self.one(Kind.TIERS, str(name), dict(options or {}), f"{where}.{name}")
                    continue
                self.refuse(
                    f"{where}.{name}", "has no options.", f"write `{name}: {{option: value}}`."
                )
            else:
                self.refuse(where, "is not a tier.", "write `NAME: {option: value}`.")
        return found

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
            choose = self.plugins.manager.hook.kvplug_choose_policy
            try:
                chosen = Contained(choose, STARTING).run(
                    lambda: one_line(choose(kind=kind, engine=self.engine) or "", LABEL)
                )
            except PolicyFailure as failure:
                self.refuse(
                    key,
                    f"the plugin that chooses for `auto` failed: {failure.cause}.",
                    "name a policy.",
                )
                return []
            if not chosen:
                self.refuse(key, "no plugin chooses a policy for `auto`.", "name a policy.")
                return []
            name = chosen
        policy = registry.get(kind, name)
        if policy is None:
            fix = f"{registry.choose(kind, name)}."
            elsewhere = [str(k) for k in Kind if registry.get(k, name)]
            if elsewhere:
                fix += f" {name!r} is a {elsewhere[0]} policy."
            broken = "".join(
                f" Plugin {n} failed to load: {e}." for n, e in registry.broken.items()
            )
            self.refuse(key, f"unknown {kind} policy {name!r}.", f"{fix}{broken}")
            return []
        owner = key.removesuffix(".use")
        contained = Contained(policy, STARTING, f"{kind} policy {policy.name!r}")

        def validated() -> PolicyOptions | None:
            try:
                return policy.Options.model_validate(options)
            except ValidationError as error:
                self.invalid(error, policy.Options, policy.name, owner)
                return None

        try:
            valid: PolicyOptions | None = contained.run(validated)
        except PolicyFailure as failure:
            self.refuse(
                owner,
                f"{policy.name} failed to validate its options: {failure.cause}.",
                "change them, or choose another policy.",
            )
            return []
        return [Choice(policy, valid, key)] if valid is not None else []

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
                known = ", ".join(fields)
                fix = f"{did_you_mean(last, fields)}use one of {known}." if known else "remove it."
                self.refuse(where, f"{owner} has no option {name!r}.", fix)
                continue
            problem = one_line(_plain(e["type"], e["msg"]), CAUSE)
            if not e["loc"]:
                self.refuse(where, f"{owner}: {problem}.", change_options(problem, fields))
                continue
            info = fields.get(str(e["loc"][-1]))
            got = f", got {e['input']!r}"
            if e["type"] == "missing" or (info is not None and info.annotation is SecretStr):
                got = ""
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
