"""What a user asks to be evaluated, read and checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kvplug.contract import Kind
from kvplug.deployment import Choice, load_deployment
from kvplug.errors import DeploymentError, KVPlugError, Refusal
from kvplug.eval.run import Variant
from kvplug.registry import plugins

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
    named = [one.strip() for text in asked or ["all"] for one in text.split(",") if one.strip()]
    found: dict[str, Choice] = {}
    for label in named:
        for one in _everything() if label == "all" else [label]:
            found.setdefault(one, _choice(one))
    return found


def budgets(text: str) -> list[float]:
    """Parts of the context, ascending.

    Raises:
        KVPlugError: One is no number above 0 and at most 1.
    """
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        found = []
    if not found or not all(0 < budget <= 1 for budget in found):
        raise KVPlugError(
            f"--budget {text!r}: write parts of the context above 0 and at most 1, "
            "e.g. 0.25,0.5,0.75"
        )
    return found


def variants(chosen: dict[str, Choice], parts: Sequence[float], once: bool) -> list[Variant]:
    """Every policy at every budget.

    Args:
        chosen: What `policies` gave.
        parts: Parts of the context.
        once: Cut the context only, never while the text goes on.
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
    for name in registry.names(Kind.SEQUENCE):
        policy = registry.get(Kind.SEQUENCE, name)
        assert policy is not None
        knobs = policy.Options.model_fields
        needed = [n for n, info in knobs.items() if info.is_required() and n != "budget"]
        if not needed and ("budget" in knobs or {"sink", "window"} <= set(knobs)):
            found.append(name)
    return found


def _choice(label: str) -> Choice:
    if label.endswith((".yaml", ".yml")):
        from kvplug.hosts.vllm.flags import read_config

        choice = read_config(Path(label)).deployment.choice(Kind.SEQUENCE)
        if choice is None:
            refusal = Refusal(
                "sequence", "chooses no policy.", "name a file whose kvplug section does."
            )
            raise DeploymentError(label, [refusal])
        return choice
    name, *pairs = label.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key.strip():
            refusal = Refusal(
                label,
                f"{pair!r} is no option.",
                "write NAME:OPTION=VALUE, e.g. snapkv:window=64.",
            )
            raise DeploymentError("--policy", [refusal])
    if "budget" in options:
        refusal = Refusal(label, "sets a budget.", "write it as --budget.")
        raise DeploymentError("--policy", [refusal])
    section = {"sequence": {"use": name, **options}}
    choice = load_deployment(section, source="--policy", key="").choice(Kind.SEQUENCE)
    assert choice is not None
    return choice
