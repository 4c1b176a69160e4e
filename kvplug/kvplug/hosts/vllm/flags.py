"""Reads vLLM's flags from a ``--config`` file, without importing vllm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.contract import EngineView, Kind
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.features import features_from_flags, number
from kvplug.parser import SECTION_KEYS, load_deployment, read_yaml

CONNECTOR = "KVPlugConnector"
MODULE = "kvplug.hosts.vllm.connector"
EXTENSION = "kvplug.hosts.vllm.extension.WorkerExtension"
"""Value of ``--worker-extension-cls`` that lets tokens be recomputed inside a reused run."""
GUARD = "kvplug.hosts.vllm.guard:GuardProcessor"
"""Value of ``--logits-processors`` that lets the guard see next-token distributions."""
REQUEST_CHECK = "kvplug.hosts.vllm.request_check:RequestCheck"
"""Value of ``--logits-processors`` that refuses requests with invalid options."""
REQUEST_CHECK_MIDDLEWARE = "kvplug.hosts.vllm.request_check.RequestCheckMiddleware"
"""Value of ``--middleware`` that answers HTTP 400 to streamed requests, too."""
RUNS = frozenset({Kind.PREFIX_CACHE, Kind.SEQUENCE, Kind.FORMAT, Kind.REUSE, Kind.ATTENTION})
"""Kinds this host runs."""


@dataclass(frozen=True)
class ConfigFile:
    """A vLLM ``--config`` file with a ``kvplug`` section, or a file that is a section by itself.

    Attributes:
        path: The file.
        flags: vLLM's flags by name, dashes, the section left out.
        deployment: The parsed section.
        standalone: True when the file is a section by itself.
    """

    path: Path
    flags: Mapping[str, Any]
    deployment: Deployment
    standalone: bool


def read_config(path: Path) -> ConfigFile:
    """Read a deployment file.

    Raises:
        DeploymentError: It cannot be read, does not enable kvplug, or the section is invalid.
    """
    data, lines = read_yaml(path)
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise DeploymentError(
            str(path),
            [Refusal("file", f"must be a mapping, got {type(data).__name__}.", "see configs/cpu.")],
        )
    data = {k: _parsed(path, str(k), v, lines) for k, v in data.items()}
    flags = {str(k).replace("_", "-"): v for k, v in data.items()}
    if "kv-transfer-config" not in flags:
        if dotted := [k for k in data if str(k).startswith(("kv-transfer", "kv_transfer"))]:
            raise DeploymentError(
                str(path),
                [
                    Refusal(
                        str(k),
                        "kvplug does not read dotted flags.",
                        "write kv-transfer-config as a nested mapping.",
                        lines.get(str(k)),
                    )
                    for k in dotted
                ],
            )
        if set(data) <= SECTION_KEYS:
            return ConfigFile(path, {}, load_deployment(path), True)
        raise DeploymentError(
            str(path),
            [
                Refusal(
                    "kv-transfer-config",
                    "is missing, so kvplug is not enabled.",
                    f"add it with kv_connector: {CONNECTOR}, kv_connector_module_path: {MODULE}, "
                    "kv_role: kv_both and kv_connector_extra_config: {kvplug: ...}.",
                )
            ],
        )
    written = next(k for k in data if str(k).replace("_", "-") == "kv-transfer-config")
    transfer = data[written]
    refusals = _connector_refusals(transfer, str(written), lines)
    if refusals:
        raise DeploymentError(str(path), refusals)
    key = f"{written}.kv_connector_extra_config.kvplug"
    section = transfer["kv_connector_extra_config"]["kvplug"]
    if section is None:
        section = {}
    if isinstance(section, str) and not Path(section).is_absolute():
        beside = path.parent / section
        section = str(beside) if beside.exists() else section
    flags.pop("kv-transfer-config")
    deployment = load_deployment(
        section, source=str(path), key=key, lines=lines, engine=engine_from_flags(flags)
    )
    return ConfigFile(path, flags, deployment, False)


def _parsed(path: Path, key: str, value: Any, lines: Mapping[str, int]) -> Any:
    """A flag's value, parsed where it is JSON text: vLLM accepts structured flags as both."""
    if not (key.endswith("config") and isinstance(value, str) and value.lstrip().startswith("{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DeploymentError(
            str(path),
            [
                Refusal(
                    key, f"is not valid JSON: {error}.", "write it as nested YAML.", lines.get(key)
                )
            ],
        ) from error


def _connector_refusals(transfer: Any, key: str, lines: Mapping[str, int]) -> list[Refusal]:
    def refusal(below: str, problem: str, fix: str) -> Refusal:
        where = f"{key}.{below}" if below else key
        return Refusal(where, problem, fix, lines.get(where, lines.get(key)))

    if not isinstance(transfer, Mapping):
        return [refusal("", "must be a mapping.", "see configs/cpu for examples.")]
    found = []
    for name, value in (
        ("kv_connector", CONNECTOR),
        ("kv_connector_module_path", MODULE),
        ("kv_role", "kv_both"),
    ):
        if transfer.get(name) != value:
            found.append(
                refusal(
                    name,
                    f"is {transfer.get(name)!r}, so kvplug is not enabled.",
                    f"set it to {value}.",
                )
            )
    extra = transfer.get("kv_connector_extra_config")
    if not isinstance(extra, Mapping) or "kvplug" not in extra:
        found.append(
            refusal(
                "kv_connector_extra_config",
                "has no kvplug section.",
                "add `kvplug: {}` or a section with policies.",
            )
        )
    return found


def request_check_flags(config: ConfigFile) -> list[str]:
    """Command-line flags that a deployment needs for ``on_bad_request: refuse``; else none."""
    if config.deployment.on_bad_request != "refuse":
        return []
    found: list[str] = []
    processors = _listed(config.flags.get("logits-processors"))
    if REQUEST_CHECK not in processors:
        # On the command line it replaces what the file lists.
        found += ["--logits-processors", *processors, REQUEST_CHECK]
    if REQUEST_CHECK_MIDDLEWARE not in _listed(config.flags.get("middleware")):
        found += ["--middleware", REQUEST_CHECK_MIDDLEWARE]
    return found


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
