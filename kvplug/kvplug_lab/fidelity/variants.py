"""Parse and check the policies and formats to evaluate, before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvplug.contract import Kind
from kvplug.deployment import Choice
from kvplug.errors import DeploymentError, KVPlugError, Refusal
from kvplug.parser import load_deployment
from kvplug.registry import Plugins, plugins
from kvplug.yaml_file import read_yaml
from kvplug_lab.fidelity.peer_formats import PEERS
from kvplug_lab.fidelity.run import FormatVariant, Variant
from kvplug_lab.policy_text import policy_section

NEVER = 1 << 20
"""An interval no evaluation reaches."""


def policies(asked: Sequence[str] | None) -> dict[str, Choice]:
    """The policies by the label their rows carry.

    Args:
        asked: ``NAME[:OPTION=VALUE...]``, deployment files and ``all``, joined by commas; every
            installed one by default.

    Raises:
        DeploymentError: A policy or option does not exist, or a file chooses no sequence policy.
    """
    found: dict[str, Choice] = {}
    for label in _names(asked or ["all"]):
        for one in _everything() if label == "all" else [label]:
            found.setdefault(one, _choice(one))
    return found


def formats(asked: Sequence[str]) -> list[FormatVariant]:
    """The formats, in order; their labels are what was written.

    Args:
        asked: ``NAME[:OPTION=VALUE...]``, ``@FILE`` with a section, deployment files, ``all``
            (every installed format that needs no option) and ``peers`` (vLLM's own, see
            `kvplug_lab.fidelity.peer_formats`), joined by commas.

    Raises:
        DeploymentError: A format or option does not exist, or a file chooses none.
    """
    found: dict[str, FormatVariant] = {}
    for label in _names(asked):
        for one in _every_format().get(label, [label]):
            choice = _choice(one, Kind.FORMAT, "--format")
            options = choice.options
            given = {name: getattr(options, name) for name in options.model_fields_set}
            found.setdefault(one, FormatVariant(one, choice.policy, given))
    return list(found.values())


@functools.cache
def with_peers() -> Plugins:
    """The installed plugins, and the formats there are for comparison only."""
    found = Plugins()
    for policy in PEERS:
        # An installed format of that name is what was asked for.
        if found.registry.get(Kind.FORMAT, policy.name) is None:
            found.registry.add(policy)
    return found


def _names(asked: Sequence[str]) -> list[str]:
    return [one.strip() for text in asked for one in text.split(",") if one.strip()]


def _is_file(label: str) -> bool:
    return label.startswith("@") or label.endswith((".yaml", ".yml"))


def _every_format() -> dict[str, list[str]]:
    registry, names = plugins().registry, []
    for name in registry.ready(Kind.FORMAT):
        policy = registry.get(Kind.FORMAT, name)
        assert policy is not None
        # A calibration is a file of the model's own, which must be named.
        if "calibration" not in policy.Options.model_fields:
            names.append(name)
    return {"all": names, "peers": [policy.name for policy in PEERS]}


def budgets(text: str) -> list[float]:
    """Parts of the context, ascending.

    Raises:
        KVPlugError: A share is not a number above 0 and at most 1.
    """
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        found = []
    if not found or not all(0 < budget <= 1 for budget in found):
        raise KVPlugError(
            f"--budget {text!r}: use shares of the context above 0 and at most 1, "
            "e.g. 0.25,0.5,0.75"
        )
    return found


def variants(chosen: dict[str, Choice], parts: Sequence[float], once: bool) -> list[Variant]:
    """Every policy at every budget.

    Args:
        chosen: What `policies` gave.
        parts: Parts of the context.
        once: Evict once, after the prompt; never during generation.
    """
    found = []
    for label, choice in chosen.items():
        options = {name: getattr(choice.options, name) for name in choice.options.model_fields_set}
        if once and "interval" in choice.policy.Options.model_fields:
            options["interval"] = NEVER
        options.pop("budget", None)
        found += [Variant(label, budget, choice.policy, options) for budget in parts]
    return found


def _everything() -> list[str]:
    """Every installed sequence policy that a budget can be set for."""
    registry, found = plugins().registry, []
    for name in registry.ready(Kind.SEQUENCE, "budget"):
        policy = registry.get(Kind.SEQUENCE, name)
        assert policy is not None
        fields = policy.Options.model_fields
        if "budget" in fields or {"sink", "window"} <= set(fields):
            found.append(name)
    return found


def _choice(label: str, kind: Kind = Kind.SEQUENCE, option: str = "--policy") -> Choice:
    if label.startswith("@"):
        return _section(Path(label[1:]), kind, option)
    if _is_file(label):
        from kvplug.hosts.vllm.flags import read_config

        choice = read_config(Path(label)).deployment.choice(kind)
        if choice is None:
            refusal = Refusal(str(kind), "is not set.", "use a file whose kvplug section sets it.")
            raise DeploymentError(label, [refusal])
        return choice
    example = "kivi:bits=2" if kind is Kind.FORMAT else "snapkv:window=64"
    own = policy_section(label, option, example)
    if kind is Kind.SEQUENCE and "budget" in own:
        refusal = Refusal(label, "sets a budget.", "write it as --budget.")
        raise DeploymentError(option, [refusal])
    using = with_peers() if kind is Kind.FORMAT else None
    choice = load_deployment({str(kind): own}, source=option, key="", using=using).choice(kind)
    assert choice is not None
    return choice


def _section(path: Path, kind: Kind, option: str) -> Choice:
    """The choice of a file that holds a whole ``kvplug`` section, or one kind's part of it."""
    data, lines = read_yaml(path)
    if isinstance(data, Mapping) and "use" in data:
        data, lines = {str(kind): data}, {f"{kind}.{key}": line for key, line in lines.items()}
    using = with_peers() if kind is Kind.FORMAT else None
    deployment = load_deployment(data, source=str(path), key="", lines=lines, using=using)
    choice = deployment.choice(kind)
    if choice is None:
        refusal = Refusal(str(kind), "is not set.", f"write `{kind}: {{use: NAME}}`.")
        raise DeploymentError(f"{option} {path}", [refusal])
    return choice
