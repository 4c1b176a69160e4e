"""Reads a deployment file, and tells the engine that its flags describe. Imports no vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvplug.contract import EngineView, Kind
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.connector_flag import connector_refusals, is_connector_flag, missing
from kvplug.hosts.vllm.distribution import command_of, vllm_distribution
from kvplug.hosts.vllm.features import features_from_flags, number
from kvplug.hosts.vllm.file_flags import plain_flags, vllm_flags
from kvplug.near_names import nearest
from kvplug.parser import SECTION_KEYS, load_deployment
from kvplug.yaml_file import read_yaml

EXTENSION = "kvplug.hosts.vllm.extension.WorkerExtension"
"""Value of ``--worker-extension-cls`` that lets tokens be recomputed inside a reused run."""
GUARD = "kvplug.hosts.vllm.guard:GuardProcessor"
"""Value of ``--logits-processors`` that lets the guard see next-token distributions."""
REQUEST_CHECK = "kvplug.hosts.vllm.request_check:RequestCheck"
"""Value of ``--logits-processors`` that refuses requests with invalid options."""
REQUEST_CHECK_MIDDLEWARE = "kvplug.hosts.vllm.request_check.RequestCheckMiddleware"
"""Value of ``--middleware`` that answers HTTP 400 to streamed requests, too."""
ANSWER_MIDDLEWARE = "kvplug.hosts.vllm.answers.AnswerMiddleware"
"""Value of ``--middleware`` that lets streamed answers say how exact they are."""
SHADOW_MIDDLEWARE = "kvplug.hosts.vllm.shadow.ShadowMiddleware"
"""Value of ``--middleware`` that lets approximate answers be answered again."""
LIVE_PAGE = "kvplug.hosts.vllm.page.LivePage"
"""Value of ``--middleware`` that serves the page ``/kvplug``."""
RUNS = frozenset(Kind)
"""Kinds this host runs."""
SUFFIXES = (".yaml", ".yml")
"""What vLLM's ``--config`` accepts."""


@dataclass(frozen=True)
class ConfigFile:
    """A vLLM ``--config`` file with a ``kvplug`` section, or a file that is a section by itself.

    Attributes:
        path: The file.
        flags: vLLM's flags by name, dashes, the connector left out.
        deployment: The parsed section.
        standalone: True when the file is a section by itself.
        transfer: The connector's flag as data, where the file sets it.
        remarks: What a user should know of how vLLM reads the file, one sentence each.
    """

    path: Path
    flags: Mapping[str, Any]
    deployment: Deployment
    standalone: bool
    transfer: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def read_config(path: Path, arguments: Sequence[str] = ()) -> ConfigFile:
    """Read a deployment file as vLLM's server would, together with what its command line adds.

    vLLM's own parser reads a file that describes an engine, where vLLM is installed; elsewhere
    `plain_flags` does, which refuses what only that parser can tell. A file that is only a
    section takes neither.

    Args:
        path: The file.
        arguments: Arguments of the server that follow the file's and override them.

    Raises:
        DeploymentError: It cannot be read, does not enable kvplug, vLLM would not start with it,
            or the section is invalid.
    """
    data, lines = read_yaml(path)
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise DeploymentError(
            str(path),
            [Refusal("file", f"must be a mapping, got {type(data).__name__}.", "see configs/cpu.")],
        )
    distribution = vllm_distribution()
    if _is_section(data):
        flags: Mapping[str, Any] = {}
        if arguments and distribution is not None:
            flags = vllm_flags(path, None, {}, arguments, command_of(distribution)).flags
        return ConfigFile(path, flags, load_deployment(path), True)
    if path.suffix not in SUFFIXES:
        raise DeploymentError(
            str(path),
            [
                Refusal(
                    "file",
                    f"vLLM reads --config files named {' or '.join(SUFFIXES)} only.",
                    f"rename it to {path.stem}.yaml.",
                )
            ],
        )
    if distribution is None:
        flags, transfer, written, remarks = plain_flags(path, data, lines)
    else:
        command = command_of(distribution)
        flags, transfer, written, remarks = vllm_flags(path, data, lines, arguments, command)
    if transfer is None:
        raise DeploymentError(str(path), [missing()])
    if refusals := connector_refusals(transfer, written, lines):
        raise DeploymentError(str(path), refusals)
    section = transfer["kv_connector_extra_config"]["kvplug"]
    if section is None:
        section = {}
    if isinstance(section, str) and not Path(section).is_absolute():
        beside = path.parent / section
        section = str(beside) if os.path.lexists(beside) else section
    deployment = load_deployment(
        section,
        source=str(path),
        key=f"{written}.kv_connector_extra_config.kvplug",
        lines=lines,
        engine=engine_from_flags(flags),
    )
    return ConfigFile(path, flags, deployment, False, transfer, remarks)


def _is_section(data: Mapping[Any, Any]) -> bool:
    """True for a file that is a section by itself, perhaps with keys that are misspelt."""
    names = [str(key) for key in data]
    if any(is_connector_flag(name) for name in names):
        return False
    known = [name in SECTION_KEYS for name in names]
    return any(known) or all(nearest(name, SECTION_KEYS, 0.75) for name in names)


def request_flags(config: ConfigFile) -> list[str]:
    """Command-line flags that a deployment needs to check requests, to speak in streamed answers,
    to answer again and to show the state, and that its file does not set."""
    deployment = config.deployment
    found: list[str] = []
    middleware = []
    processors = []
    if deployment.on_bad_request == "refuse":
        processors.append(REQUEST_CHECK)
        middleware.append(REQUEST_CHECK_MIDDLEWARE)
    if deployment.all():
        middleware.append(ANSWER_MIDDLEWARE)
    if deployment.guard is not None and deployment.guard.shadow is not None:
        processors.append(GUARD)
        middleware.append(SHADOW_MIDDLEWARE)
    if config.deployment.observe.page:
        # The last one is asked first, and takes only what is its own.
        middleware.append(LIVE_PAGE)
    set_already = _listed(config.flags.get("logits-processors"))
    if added := [one for one in processors if one not in set_already]:
        # On the command line it replaces what the file lists.
        found += ["--logits-processors", *set_already, *added]
    for one in middleware:
        if one not in _listed(config.flags.get("middleware")):
            found += ["--middleware", one]
    return found


def has_processor(config: ConfigFile, name: str) -> bool:
    """True if a file enables a logits processor, or `request_flags` does."""
    return name in (*_listed(config.flags.get("logits-processors")), *request_flags(config))


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def engine_from_flags(flags: Mapping[str, Any]) -> EngineView:
    """The engine that flags describe, as far as it can be known without starting it."""
    return EngineView(
        block_size=number(flags, "block-size", 16),
        num_blocks=number(flags, "num-gpu-blocks-override", 0),
        max_model_len=number(flags, "max-model-len", 0),
        max_in_flight_tokens=number(flags, "max-num-batched-tokens", 2048),
        features=features_from_flags(flags),
        host="vllm",
    )
