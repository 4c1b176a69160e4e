"""A format for each layer: a wrapper around any of the others.

Layers differ in what they lose by coarse codes, so bits are worth more in some than in others.
`kvplug calibrate MODEL --bytes-per-token N` measures that and writes this format's section.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from kvplug.contract import (
    AttendBatch,
    EngineView,
    FormatOptions,
    FormatPolicy,
    LayerView,
    PageLayout,
    PolicyOptions,
    WriteBatch,
    layer_range,
)
from kvplug_policies.inner import build_inner, inner_format

DEFAULT = "default"


def layers_of(text: str, num_layers: int | None) -> tuple[int, int]:
    """Parse ``"3"``, ``"-1"``, ``"0-9"`` or ``"4--1"`` (to the last) into first and last layer.

    Raises:
        ValueError: The text is not a range, or outside the model.
    """
    start, dash, end = text.partition("--")
    if start and dash and end.isdigit():
        if num_layers is None:
            layer_range(start, None)
            return int(start), int(start)
        return layer_range(f"{start}-{num_layers - int(end)}", num_layers)
    return layer_range(text, num_layers)


class Mixed(FormatPolicy):
    """Stores each layer in the format chosen for it."""

    name = "mixed"
    changes = "stores each layer in its own format"
    paper = ""

    class Options(FormatOptions):
        """Options of `Mixed`."""

        default: dict[str, Any] = Field(
            default_factory=lambda: {"use": "plain"},
            description="format of the layers not listed: use and its options",
        )
        layers: dict[str, dict[str, Any]] = Field(
            default_factory=dict,
            description="format by layer or range of layers, e.g. {'0-3': {use: int8}, '4--1': "
            "{use: kivi, bits: 2}}; the last entry that covers a layer applies",
        )

        @field_validator("default", "layers", mode="before")
        @classmethod
        def _names_are_short_for_use(cls, value: object) -> object:
            if isinstance(value, str):
                return {"use": value}
            if isinstance(value, dict):
                return {
                    str(k): {"use": v} if isinstance(v, str) and k != "use" and _is_range(k) else v
                    for k, v in value.items()
                }
            return value

        @model_validator(mode="after")
        def _inner_formats_exist(self) -> Mixed.Options:
            for where in self.layers:
                layers_of(where, None)
            for where, section in self.sections().items():
                try:
                    self.inner(section)
                except ValueError as error:
                    raise ValueError(f"{_where(where)}: {error}") from None
            return self

        def sections(self) -> dict[str, dict[str, Any]]:
            """All sections; the default's key is `DEFAULT`."""
            return {DEFAULT: self.default, **self.layers}

        def inner(self, section: dict[str, Any]) -> tuple[type[FormatPolicy], PolicyOptions]:
            """Return the format a section names and its options."""
            if "use" not in section:
                raise ValueError("does not name a format; add `use:`")
            if section["use"] == Mixed.name:
                raise ValueError("mixed cannot be used inside mixed")
            options = {k: v for k, v in section.items() if k != "use"}
            if "exact_chunk" in options and options["exact_chunk"] != self.exact_chunk:
                raise ValueError("exact_chunk applies to all layers: set it beside `layers`")
            return inner_format(section["use"], options, {"exact_chunk": self.exact_chunk})

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.exact_chunk = self.options.exact_chunk
        self._ranges = tuple(self.options.layers)
        self._chosen: dict[int, str] = {}
        mine: dict[str, list[LayerView]] = {where: [] for where in self.options.sections()}
        for layer in engine.layers:
            mine[self._section(layer)].append(layer)
        self.inner: dict[str, FormatPolicy] = {}
        for where, section in self.options.sections().items():
            if engine.layers and not mine[where]:
                continue
            try:
                found, inner = self.options.inner(section)
                part = replace(engine, layers=tuple(mine[where]))
                self.inner[where] = build_inner(found, inner, part)
            except ValueError as error:
                raise ValueError(f"{_where(where)}: {error}") from None
        built = self.inner.values()
        # Of this choice of formats, not of the class.
        self.moves_tokens = all(f.moves_tokens for f in built)
        self.graph_safe = all(f.graph_safe for f in built)
        self.exact = bool(built) and all(f.exact for f in built)  # type: ignore[misc]

    def _section(self, layer: LayerView) -> str:
        found = self._chosen.get(layer.index)
        if found is None:
            found = DEFAULT
            for where in self._ranges:
                first, last = layers_of(where, layer.num_layers)
                if first <= layer.index <= last:
                    found = where
            self._chosen[layer.index] = found
        return found

    def format_of(self, layer: LayerView) -> FormatPolicy:
        """Return the format a layer is stored in."""
        return self.inner[self._section(layer)]

    def layout(self, layer: LayerView) -> PageLayout:
        return self.format_of(layer).layout(layer)

    def recent(self, layer: LayerView) -> int:
        return self.format_of(layer).recent(layer)

    def encode(self, layer: LayerView, key: Tensor, value: Tensor) -> Tensor:
        return self.format_of(layer).encode(layer, key, value)

    def decode(self, layer: LayerView, cells: Tensor) -> tuple[Tensor, Tensor]:
        return self.format_of(layer).decode(layer, cells)

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        self.format_of(layer).write(layer, batch, cache)

    def read(self, layer: LayerView, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return self.format_of(layer).read(layer, cache, blocks)

    def attend(self, layer: LayerView, batch: AttendBatch, cache: Tensor, out: Tensor) -> None:
        self.format_of(layer).attend(layer, batch, cache, out)

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for policy in self.inner.values():
            for name, count in policy.counters().items():
                found[name] = found.get(name, 0.0) + count
        return found

    def fingerprint(self) -> str:
        parts = [f"{where}={policy.fingerprint()}" for where, policy in self.inner.items()]
        return f"{self.name}:{';'.join(parts)}"


def _is_range(key: object) -> bool:
    return str(key).lstrip("-")[:1].isdigit()


def _where(section: str) -> str:
    return "the default" if section == DEFAULT else f"layers {section}"
