"""Parses what a request asks of kvplug: ``kv_transfer_params: {kvplug: {...}}``."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)

from kvplug.near_names import nearest

__all__ = ["Cause", "ParsedOptions", "RefusedOption", "RequestOptions"]

SECTION = "kvplug"
"""Key of ``kv_transfer_params`` that holds the options."""

MAX_SESSION_ID = 256
"""Longest session id, in characters."""

MAX_SEGMENTS = 16384
"""Most lengths in ``segments``."""

_RENAMED = {"session": "session_id"}
_MAX_NAMED = 8
_MAX_KEY = 64

_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = 60


class Cause(StrEnum):
    """Cause of a refused request option, for counters."""

    UNKNOWN_OPTION = "unknown option"
    INVALID_VALUE = "invalid value"
    NOT_A_MAPPING = "not a mapping"
    NOT_MET = "not met by the deployment"


@dataclass(frozen=True, slots=True)
class RefusedOption:
    """One request option that is not applied.

    Attributes:
        cause: For counters.
        sentence: For the user; names the option, and the fix where it is known.
    """

    cause: Cause
    sentence: str


class RequestOptions(BaseModel):
    """Options of one request. An option that is left out has its default; null is no value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: Literal["on", "off"] = Field(
        default="on", description="'on' or 'off'; off keeps every token of the request"
    )
    reuse: Literal["exact", "approximate", "off"] = Field(
        default="exact",
        description="'exact', 'approximate' or 'off'; approximate needs a deployment that allows "
        "it, off neither takes nor stores segments",
    )
    attention: Literal["exact", "approximate"] = Field(
        default="exact",
        description="'exact' or 'approximate'; approximate needs a deployment that allows it",
    )
    store: bool = Field(
        default=True,
        description="true or false; false stores nothing of the request's prompt and answer in a "
        "tier",
    )
    missed: bool = Field(
        default=False,
        description="true or false; true says in the answer why blocks of the prompt were computed",
    )
    segments: tuple[Annotated[StrictInt, Field(gt=0)], ...] | None = Field(
        default=None,
        max_length=MAX_SEGMENTS,
        description=f"a list of at most {MAX_SEGMENTS} positive integers; lengths in tokens of the "
        "prompt's first segments, in order",
    )
    session_id: Annotated[StrictStr, Field(max_length=MAX_SESSION_ID)] | None = Field(
        default=None,
        description=f"a string of at most {MAX_SESSION_ID} characters; names the conversation "
        "the request belongs to",
    )

    @field_validator("sequence", mode="before")
    @classmethod
    def _sequence_switch(cls, value: Any) -> Any:
        return ("on" if value else "off") if isinstance(value, bool) else value

    @field_validator("reuse", mode="before")
    @classmethod
    def _reuse_switch(cls, value: Any) -> Any:
        return "off" if value is False else value

    @classmethod
    def parse(
        cls,
        params: Mapping[str, Any] | None,
        *,
        num_prompt_tokens: int | None = None,
        session_id: str | None = None,
    ) -> ParsedOptions:
        """Parse a request's options; raises nothing.

        Valid options are kept, refused ones fall back to their defaults.

        Args:
            params: The request's ``kv_transfer_params``, or None.
            num_prompt_tokens: Tokens of the prompt, which ``segments`` must not exceed in sum;
                None where the prompt's length is not known.
            session_id: The engine's own session id, used where the options give none.
        """
        section = params.get(SECTION) if isinstance(params, Mapping) else None
        refused = _beside(params) if isinstance(params, Mapping) else {}
        if section is None and session_id is None:
            return ParsedOptions(_DEFAULT.options, refused) if refused else _DEFAULT
        given: dict[str, Any] = {}
        if isinstance(section, Mapping):
            given = _known(section, refused)
        elif section is not None:
            refused[SECTION] = RefusedOption(
                Cause.NOT_A_MAPPING, f"{SECTION} must be a mapping, got {type(section).__name__}"
            )
        if session_id is not None:
            given.setdefault("session_id", session_id)
        options = _validated(given, refused)
        total = sum(options.segments or ())
        if num_prompt_tokens is not None and total > num_prompt_tokens:
            refused["segments"] = RefusedOption(
                Cause.INVALID_VALUE,
                f"segments add up to {total} tokens, but the prompt has {num_prompt_tokens}",
            )
            options = options.model_copy(update={"segments": None})
        return ParsedOptions(options, refused)


@dataclass(frozen=True, slots=True)
class ParsedOptions:
    """A request's options, and those of its keys that are refused.

    Attributes:
        options: The valid options; defaults elsewhere.
        refused: Refused keys, shortened to 64 characters. At most 8 unknown keys are named, the
            others are counted together under ``...``.
    """

    options: RequestOptions
    refused: Mapping[str, RefusedOption] = field(default_factory=dict)

    @property
    def sentences(self) -> dict[str, str]:
        """Reason for each refused key, as the answer states it."""
        return {key: refused.sentence for key, refused in self.refused.items()}


_DEFAULT = ParsedOptions(RequestOptions())
_OPTIONS = list(RequestOptions.model_fields)


def _beside(params: Mapping[Any, Any]) -> dict[str, RefusedOption]:
    """Options that stand one level too high, and what was meant as the section."""
    found = {}
    for key in islice((key for key in params if key != SECTION), _MAX_NAMED):
        name = str(key)[:_MAX_KEY]
        if name in _OPTIONS or name in _RENAMED:
            sentence = f"{name} stands beside {SECTION!r}, where it is not read; write it below"
        elif nearest(name.lower(), [SECTION], 0.75):
            sentence = f"unknown key {name!r}; did you mean {SECTION!r}?"
        else:
            continue
        found[name] = RefusedOption(Cause.UNKNOWN_OPTION, sentence)
    return found


def _known(section: Mapping[Any, Any], refused: dict[str, RefusedOption]) -> dict[str, Any]:
    """Keys that are options and have a value; the other keys are refused."""
    known = {key: section[key] for key in _OPTIONS if key in section}
    unknown = islice((key for key in section if key not in _OPTIONS), _MAX_NAMED)
    for key in unknown:
        name = str(key)[:_MAX_KEY]
        refused[name] = RefusedOption(Cause.UNKNOWN_OPTION, _unknown(name))
    if (others := len(section) - len(known) - _MAX_NAMED) > 0:
        refused["..."] = RefusedOption(Cause.UNKNOWN_OPTION, f"further unknown options: {others}")
    for key in [key for key, value in known.items() if value is None]:
        refused[key] = RefusedOption(Cause.INVALID_VALUE, _invalid(key, known.pop(key)))
    return known


def _unknown(key: str) -> str:
    if key in _RENAMED:
        return f"unknown option {key!r}; use {_RENAMED[key]!r}"
    if near := nearest(key, _OPTIONS):
        return f"unknown option {key!r}; did you mean {near!r}?"
    return f"unknown option {key!r}; known options: {', '.join(_OPTIONS)}"


def _validated(given: dict[str, Any], refused: dict[str, RefusedOption]) -> RequestOptions:
    try:
        return RequestOptions(**given)
    except ValidationError as error:
        bad = {str(e["loc"][0]) for e in error.errors(include_url=False, include_input=False)}
    for key in sorted(bad):
        refused[key] = RefusedOption(Cause.INVALID_VALUE, _invalid(key, given.pop(key)))
    return RequestOptions(**given)


def _invalid(key: str, value: Any) -> str:
    described = RequestOptions.model_fields[key].description or ""
    return f"{key} must be {described.split(';')[0]}, got {_VALUES.repr(value)}"
