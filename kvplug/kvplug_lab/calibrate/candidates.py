"""The formats a calibration chooses from, and the section it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kvplug.containment import PolicyFailure
from kvplug.contract import EngineView, FormatPolicy, Kind
from kvplug.errors import KVPlugError
from kvplug.parser import load_deployment
from kvplug.registry import plugins
from kvplug_lab.policy_text import policy_section

DEFAULT = "plain,int8,int4,kivi,kivi:key_bits=3:value_bits=2"


@dataclass(frozen=True)
class Candidate:
    """A format and its options.

    Attributes:
        label: As it was written.
        section: ``use`` and the options, as in a deployment.
    """

    label: str
    section: dict[str, Any]

    def build(self, engine: EngineView) -> FormatPolicy:
        """The format for an engine.

        Raises:
            DeploymentError: It has no such option.
            KVPlugError: It refuses the model.
        """
        loaded = load_deployment({"format": self.section}, source="--candidates", key="")
        choice = loaded.choice(Kind.FORMAT)
        assert choice is not None
        try:
            built = choice.build(engine)
        except PolicyFailure as failure:
            raise KVPlugError(f"--candidates {self.label}: {failure.problem}") from failure
        assert isinstance(built, FormatPolicy)
        return built


def candidates(text: str, calibration: str) -> list[Candidate]:
    """``NAME[:OPTION=VALUE...],...``; formats that need a calibration get the one just made.

    Raises:
        DeploymentError: A format does not exist, or one is written wrongly.
    """
    found: dict[str, Candidate] = {}
    for label in (part.strip() for part in text.split(",") if part.strip()):
        section = policy_section(label, "--candidates", "kivi:bits=2")
        policy = plugins().registry.get(Kind.FORMAT, section["use"])
        if policy is not None and "calibration" in policy.Options.model_fields:
            section.setdefault("calibration", calibration)
        load_deployment({"format": section}, source="--candidates", key="")
        found.setdefault(label, Candidate(label, section))
    if not found:
        raise KVPlugError(
            f"--candidates {text!r} must name at least one format; write e.g. {DEFAULT}"
        )
    return list(found.values())


def mixed(chosen: Sequence[Candidate]) -> dict[str, Any]:
    """The options of the format `mixed` that gives each layer its candidate."""
    sections = [c.section for c in chosen]
    default = max(sections, key=sections.count)
    layers: dict[str, dict[str, Any]] = {}
    start = 0
    for i in range(1, len(sections) + 1):
        if i == len(sections) or sections[i] != sections[start]:
            if sections[start] != default:
                name = str(start) if i - start == 1 else f"{start}-{i - 1}"
                layers[name] = sections[start]
            start = i
    return {"use": "mixed", "default": default, "layers": layers}


def section(chosen: Sequence[Candidate], about: Sequence[str]) -> str:
    """The YAML section of a deployment, with lines of comment before it."""
    body = yaml.safe_dump(
        {"format": _plain(mixed(chosen))}, sort_keys=False, default_flow_style=None, width=96
    )
    return "".join(f"# {line}\n" for line in about) + body


def _plain(value: Any) -> Any:
    """Copies all the way down, so that YAML writes no aliases."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
