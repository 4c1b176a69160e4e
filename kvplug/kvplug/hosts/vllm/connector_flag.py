"""The one flag of vLLM's that turns kvplug on, ``--kv-transfer-config``, and what it must say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvplug.errors import Refusal
from kvplug.near_names import nearest
from kvplug.parser import SECTION_KEYS

__all__ = [
    "CONNECTOR",
    "FLAG",
    "MODULE",
    "connector_refusals",
    "is_connector_flag",
    "misplaced",
    "missing",
]

FLAG = "kv-transfer-config"
CONNECTOR = "KVPlugConnector"
MODULE = "kvplug.hosts.vllm.connector"


def is_connector_flag(name: str) -> bool:
    """True if a key of a file is the connector's flag, dotted or shortened as it may be."""
    head = name.replace("_", "-").split(".")[0]
    return len(head) > len("kv-t") and FLAG.startswith(head)


def missing() -> Refusal:
    """The refusal of a file that leaves the flag out."""
    return Refusal(
        FLAG,
        "is missing, so kvplug is not enabled.",
        f"add it with kv_connector: {CONNECTOR}, kv_connector_module_path: {MODULE}, "
        "kv_role: kv_both and kv_connector_extra_config: {kvplug: ...}.",
    )


def misplaced(extra: Mapping[Any, Any]) -> list[tuple[str, str, str]]:
    """Find what stands beside the section and was meant as it, or as a part of it.

    Args:
        extra: ``kv_connector_extra_config``.

    Returns:
        Key, problem and fix of each.
    """
    section = "kvplug"
    found = []
    for name in map(str, extra):
        if name == section:
            continue
        if name in SECTION_KEYS:
            found.append((name, f"stands beside {section}, where nothing reads it."))
        elif nearest(name.lower(), [section], 0.75):
            found.append((name, f"is not read: the section is {section}."))
    return [(name, problem, f"write it below {section}.") for name, problem in found]


def connector_refusals(transfer: Any, key: str, lines: Mapping[str, int]) -> list[Refusal]:
    """What keeps the connector's flag from turning kvplug on.

    Args:
        transfer: The flag's value.
        key: The flag as the file spells it.
        lines: Line of each key path in the file.
    """

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
    elif not found:
        found += [
            refusal(f"kv_connector_extra_config.{name}", problem, fix)
            for name, problem, fix in misplaced(extra)
        ]
    return found
