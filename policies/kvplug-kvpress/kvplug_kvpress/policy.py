"""kvpress: a press of kvpress, or one written for it, decides which tokens stay.

kvpress (https://github.com/NVIDIA/kvpress) holds methods for dropping tokens as presses, run inside
a forward pass of transformers. A press that scores tokens, a subclass of its ``ScorerPress``, is
called here at each of the host's decisions, with one request's resident tokens in text order.

Differences from kvpress, forced by serving:

* The budget says how much stays, not ``compression_ratio``; decisions fall every ``interval``
  generated tokens too, over what is left.
* The first ``sink`` and latest ``recent`` tokens are always kept.
* Only what a serving engine has is handed over: keys, values, and the latest queries. A press that
  needs more is refused when the engine starts.
* kvpress averages and takes maxima over a batch; here every request is scored by itself.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvplug.contract import (
    EngineView,
    LayerView,
    PolicyOptions,
    ResidentView,
    ScoringOptions,
    ScoringPolicy,
)
from kvplug_kvpress.stand_ins import Arguments, Module, hidden_states

MADE_UP = LayerView(0, 2, num_kv_heads=2, num_heads=4, head_size=64, dtype="float32")
"""The layer that a press is tried on where the engine's are not known yet."""


class KvPress(ScoringPolicy):
    """Scores tokens by a press. A call of the press for each request and layer."""

    name = "kvpress"
    changes = "drops the tokens that a press of kvpress scores least, per KV head"
    paper = "kvpress, github.com/NVIDIA/kvpress; each press has its own"
    # A press may look at the index of its layer.
    layerwise: ClassVar[bool] = True

    class Options(ScoringOptions):
        """Options of `KvPress`."""

        press: str = Field(
            description="class of the press, module and name: kvpress.KnormPress, my_module.Mine"
        )
        arguments: dict[str, Any] = Field(
            default_factory=dict,
            description="arguments of its constructor, e.g. {window_size: 32}",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.press = _made(self.options.press, self.options.arguments)
        self.observation = self._tried(engine.layers[0] if engine.layers else MADE_UP)
        if self.observation > self.options.recent:
            raise ValueError(
                f"{self.options.press} looks at the latest {self.observation} queries, whose "
                f"tokens must be there: set recent to at least {self.observation}"
            )

    def score(self, resident: ResidentView) -> Tensor:
        order = resident.positions.argsort(-1)
        wide = order[..., None].expand(-1, -1, -1, resident.layer.head_size)
        keys, values = resident.keys.gather(2, wide), resident.values.gather(2, wide)
        rows = [
            self._scored(
                resident.layer,
                resident.scale,
                keys[r : r + 1],
                values[r : r + 1],
                None if resident.queries is None else resident.queries[r],
            )[0]
            for r in range(len(keys))
        ]
        return rows[0].new_empty(order.shape).scatter_(2, order, torch.cat(rows))

    def _scored(
        self,
        layer: LayerView,
        scale: float,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
    ) -> tuple[Tensor, list[str]]:
        """Scores of one request, ``[1, kv_heads, count]`` float32, and what was asked in vain."""
        count, size = keys.shape[2:]
        if queries is not None:
            # Presses divide by the root of the head size, whatever the model's scale is.
            queries = queries * (scale * size**0.5)
        module, arguments = Module(layer, scale), Arguments(count, size, keys)
        hidden = hidden_states(count, queries, layer, keys)
        with torch.no_grad():
            try:
                found = self.press.score(module, hidden, keys, values, None, arguments)
            except Exception as error:
                raise _Failed(error, [*module.missed, *arguments.missed]) from error
        if not isinstance(found, Tensor) or found.shape != keys.shape[:3]:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise _Failed(
                ValueError(f"score returned {shape} in place of {list(keys.shape[:3])}"), []
            )
        return found.float(), [*module.missed, *arguments.missed]

    def _tried(self, layer: LayerView) -> int:
        """Call the press on made-up tokens; return how many of the latest queries it reads.

        Raises:
            ValueError: It cannot be served; the message says why.
        """
        name, fix = self.options.press, "choose a press that scores by keys, values or the latest"
        window = getattr(self.press, "window_size", None)
        observed = window if isinstance(window, int) and 0 < window <= 1024 else 1
        count = max(600, 4 * observed)
        random = torch.Generator().manual_seed(0)
        shape = (1, layer.num_kv_heads, count, layer.head_size)
        keys, values = (torch.randn(shape, generator=random) for _ in "kv")
        queries = torch.randn(observed, layer.num_heads, layer.head_size, generator=random)
        for n in (0, observed):
            given = (layer, layer.head_size**-0.5, keys, values, queries if n else None)
            try:
                scores, missed = self._scored(*given)
                again, _ = self._scored(*given)
            except _Failed as failed:
                raise ValueError(
                    f"{name} cannot be served: {failed.said()}. It was given keys, values and "
                    f"the latest queries; {fix} queries"
                ) from None
            if bool(scores.isnan().any()):
                continue
            if not torch.equal(scores, again):
                raise ValueError(f"{name} scores by chance: give it a seed, arguments: {{seed: 1}}")
            if not bool((scores.amax(-1) > scores.amin(-1)).all()):
                raise ValueError(
                    f"{name} gives every token one score: what it keeps depends on "
                    "compression_ratio, in whose place there is a budget; see sink_window"
                )
            return n
        asked = f" and {', '.join(sorted({*missed}))}" if missed else ""
        raise ValueError(
            f"{name} cannot be served: it reads the hidden states of more than the latest "
            f"{observed} tokens{asked}, which a serving engine does not keep; {fix} queries"
        )


class _Failed(Exception):
    """A press that raised, with what it had asked for in vain."""

    def __init__(self, error: Exception, missed: list[str]):
        self.error, self.missed = error, missed
        super().__init__(str(error))

    def said(self) -> str:
        what = " ".join(f"{type(self.error).__name__}: {self.error}".split())[:200].rstrip(".: ")
        asked = sorted({*self.missed})
        return f"it asks for {', '.join(asked)} ({what})" if asked else f"it raised {what}"


def _made(path: str, arguments: dict[str, Any]) -> Any:
    """The press that an option names.

    Raises:
        ValueError: It is not there, or no press that scores tokens.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module or not name.isidentifier():
        raise ValueError(f"press {path!r} must be module and class, e.g. kvpress.KnormPress")
    try:
        press = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        if module.split(".")[0] == "kvpress" and isinstance(error, ModuleNotFoundError):
            raise ValueError(
                f"press {path} needs {error.name}: run pip install --no-deps kvpress "
                "(it pins a transformers older than vLLM's, and scores without it), and what it "
                "imports"
            ) from None
        raise ValueError(f"press {path} cannot be imported: {error}") from None
    if not inspect.isclass(press) or not callable(getattr(press, "score", None)):
        raise ValueError(f"press {path} is no class with a method score, as kvpress.ScorerPress")
    compress = getattr(press, "compress", None)
    if compress is not None and compress.__qualname__ != "ScorerPress.compress":
        raise ValueError(
            f"press {path} overrides compress, so its scores alone do not say what it keeps: "
            "choose a press that overrides score only"
        )
    try:
        return press(**arguments)
    except Exception as error:
        raise ValueError(f"press {path} cannot be made with {arguments}: {error}") from None
