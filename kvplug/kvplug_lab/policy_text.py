"""Policies as text on a command line: ``NAME:OPTION=VALUE``."""

from __future__ import annotations

from typing import Any

import yaml

from kvplug.errors import DeploymentError, Refusal


def policy_section(label: str, option: str, example: str) -> dict[str, Any]:
    """Parse ``NAME[:OPTION=VALUE...]`` into a policy's section.

    A value is YAML; ``outer.inner=VALUE`` sets an option of the policy inside a policy.

    Args:
        label: The text.
        option: The command-line option it was given to, for messages.
        example: A valid text, for messages.

    Returns:
        ``use`` and the options, e.g. ``{"use": "lfu", "half_life": 9}``.

    Raises:
        DeploymentError: A part is not an option.
    """
    name, *pairs = label.split(":")
    section: dict[str, Any] = {"use": name}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        *outer, last = (part.strip() for part in key.split("."))
        inside = section
        try:
            for part in outer:
                inside = inside.setdefault(part, {})
            inside[last] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
            equals = ""
        if not equals or not key.strip():
            fix = f"write NAME:OPTION=VALUE, e.g. {example}."
            raise DeploymentError(option, [Refusal(label, f"{pair!r} is not an option.", fix)])
    return section
