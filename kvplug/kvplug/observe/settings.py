"""Settings of what is observed: the ``observe`` key."""

from __future__ import annotations

from pydantic import Field, field_validator

from kvplug.contract.policy import PolicyOptions


class ObserveSettings(PolicyOptions):
    """The ``observe`` key: what is recorded and shown beside the policies' work."""

    misses: bool = Field(
        default=True, description="tell for every prompt why blocks of it were computed again"
    )
    latency_window: float = Field(
        default=300.0,
        ge=10.0,
        le=86400.0,
        description="seconds that the quantiles of latency named `now` are of",
    )
    baseline_requests: int = Field(
        default=200,
        ge=0,
        le=1_000_000,
        description="first requests of a class of prompts that are its baseline; 0 for none",
    )
    baseline_file: str = Field(
        default="",
        description="file that full baselines of latency are kept in and read from at the next "
        "start; empty for none",
    )
    answers: bool = Field(
        default=False,
        description="say in every answer why blocks of its prompt were computed; with `false` only "
        "where a request asks by `missed: true`",
    )
    events: str | None = Field(
        default=None,
        description="file that what happens is written to as JSON lines, for `kvplug explain`; "
        "each data-parallel engine but the first adds its rank to the name",
    )
    events_size: float = Field(
        default=64.0,
        ge=1.0,
        le=65_536.0,
        allow_inf_nan=False,
        description="most MiB of `events`, the older file of a rotation included",
    )
    events_tokens: bool = Field(
        default=False,
        description="write token ids where a prompt differs from a known text, which is a part of "
        "both texts",
    )
    page: bool = Field(
        default=False,
        description="let the server show the engine's state at `/kvplug`, for a browser and for "
        "`kvplug top`",
    )

    @field_validator("events")
    @classmethod
    def _names_a_file(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value.endswith("/") or "\0" in value):
            raise ValueError("events must name a file")
        return value
