"""Formats inside a format: named in its options, validated with them, built for its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kvplug.contract import EngineView, FormatPolicy, Kind, PolicyOptions
from kvplug.registry import plugins


def inner_format(
    use: object, options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[type[FormatPolicy], PolicyOptions]:
    """Find a format by name and validate its options; third-party formats included.

    Args:
        use: Its name.
        options: Its options as written.
        defaults: Options of the outer format, used where the inner one has them and they are not
            written.

    Raises:
        ValueError: There is no such format, or an option is unknown or out of range.
    """
    registry = plugins().registry
    found = registry.get(Kind.FORMAT, use) if isinstance(use, str) else None
    if found is None or not issubclass(found, FormatPolicy):
        raise ValueError(f"unknown format {use!r}; {registry.choose(Kind.FORMAT, str(use))}")
    known = found.Options.model_fields
    taken = {n: v for n, v in defaults.items() if n in known and n not in options}
    try:
        return found, found.Options.model_validate({**taken, **options})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(p) for p in first["loc"])
        if first["type"] == "extra_forbidden":
            listed = ", ".join(known) or "it has none"
            raise ValueError(f"{use} has no option {name!r}; options: {listed}") from None
        problem = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{use}{': ' if name else ''}{name}: {problem}") from None


def build_inner(
    found: type[FormatPolicy], options: PolicyOptions, engine: EngineView
) -> FormatPolicy:
    """Build the format for an engine. Raises ValueError for features it does not support."""
    refused = sorted(engine.features - found.supports)
    if refused:
        raise ValueError(
            f"{found.name} does not support {', '.join(refused)}, which must be disabled"
        )
    built = found(options, engine)
    assert isinstance(built, FormatPolicy)
    return built
