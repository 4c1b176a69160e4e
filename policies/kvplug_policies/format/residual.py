"""Cheap corrections of what a format loses: its mean, its outliers, its bias.

A wrapper around any format that stores codes. Three corrections, one option each:

* ``mean``: the channels' means, from calibration, are taken off K and V before they are coded and
  given back to logits and outputs. Scales then span what varies, not where it lies. No bytes.
  (The first token's value is near 0 and attended most; less the mean it can be worse off.)
* ``outliers``: the channels with the largest range are coded apart, with 8 bits and a scale of
  their own, and no longer stretch the others' scale. Costs ``n`` bytes and 4 more, for K and for V.
* ``rank1``: the affine map ``x ~ D x' + b`` from decoded vectors ``x'`` back, ``D = I + u v^T``,
  fitted to what the format itself makes of the first half of calibration's sample: among such maps
  the one that loses least (reduced-rank regression), keys weighted by the queries' second moment.
  ``D`` is absorbed into queries and outputs. No bytes.

Means and maps are kept, for each head's keys and values by themselves, only where they lower the
error of attention outputs of the sample's last queries.

After GEAR, arXiv 2403.05527, which stores a low-rank part and a sparse part of each token's error;
here the correction is one for all tokens, so it costs no bytes and no work per token. Outlier
channels are those of KVQuant, arXiv 2401.18079, by channel instead of by element.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvplug.contract import (
    EngineView,
    FormatPolicy,
    LayerView,
    PageLayout,
    PolicyOptions,
    Recent,
    WriteBatch,
)
from kvplug_kernels.coding import CodedPage, Coding
from kvplug_policies.calibration import (
    SUPPORTS,
    CalibratedOptions,
    OnDevice,
    by_kv_head,
    calibration_for,
)
from kvplug_policies.coded import CodedFormat, Levels
from kvplug_policies.inner import build_inner, inner_format
from kvplug_policies.turned import TurnedFormat

RIDGE = 1e-2
"""Of a regression, as a part of the mean variance: a sample is small."""


def rank_one(exact: Tensor, coded: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the affine map ``x ~ x' + u (v . x') + b`` with the least loss.

    Args:
        exact: ``[n, d]``.
        coded: The same after coding and decoding, ``[n, d]``.
        weight: ``[d, d]``, second moment of what they are multiplied with.

    Returns:
        ``u``, ``v`` and ``b``, ``[d]`` each, float64.
    """
    exact, coded, weight = exact.double(), coded.double(), weight.double()
    width = exact.shape[1]
    middle = coded.mean(0)
    centred, error = coded - middle, (exact - coded) - (exact - coded).mean(0)
    variance = centred.T @ centred / len(coded)
    eye = torch.eye(width, dtype=torch.float64)
    variance = variance + eye * (RIDGE * variance.diagonal().mean() + 1e-12)
    root = torch.linalg.cholesky(variance)
    size = weight.diagonal().mean().clamp_min(1e-30)
    outer = torch.linalg.cholesky(weight / size + 1e-4 * eye)
    # error ~ M coded; of all M of rank one, that whose weighted loss is least.
    full = torch.linalg.solve_triangular(root, centred.T @ error / len(coded), upper=False).T
    left, size_of, right = torch.linalg.svd(outer.T @ full)
    u = torch.linalg.solve_triangular(outer.T, left[:, :1] * size_of[0], upper=True)[:, 0]
    v = torch.linalg.solve_triangular(root.T, right[:1].T, upper=True)[:, 0]
    bias = exact.mean(0) - middle - u * (v @ middle)
    return u, v, bias


class _Trial:
    """Attention outputs of one head under a correction of its keys or values.

    Args:
        query: The sample's last queries, ``[m, readers, d]``.
        exact: Its keys and values, ``[n, d]`` each.
        coded: The same after coding and decoding.
    """

    def __init__(self, query: Tensor, exact: list[Tensor], coded: list[Tensor]):
        self.query, self.now = query, coded
        self.output = _attention(query, exact[0], exact[1])
        self.least = self._error(coded)

    def _error(self, coded: list[Tensor]) -> float:
        return float((_attention(self.query, coded[0], coded[1]) - self.output).norm())

    def nearer(self, at: int, part: Tensor) -> bool:
        """Take other keys (0) or values (1) if they lower the error; returns True if taken."""
        tried = list(self.now)
        tried[at] = part
        error = self._error(tried)
        if error >= self.least:
            return False
        self.now, self.least = tried, error
        return True


_FITTED: dict[tuple[str, LayerView, int], tuple[dict[str, Tensor], int, int]] = {}
"""Corrections of a layer and how many heads of K and V have them, by what they follow from."""


class Residual(CodedFormat):
    """A format with its error compensated."""

    name = "residual"
    changes = "corrects another format: means, outlier channels and a fitted bias"
    supports = SUPPORTS
    paper = (
        "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of "
        "LLM, arXiv 2403.05527; KVQuant, arXiv 2401.18079 (outliers)"
    )

    class Options(CalibratedOptions):
        """Options of `Residual`."""

        format: str = Field("int4", description="name of the format to correct")
        options: dict[str, Any] = Field(default_factory=dict, description="its options")
        mean: bool = Field(True, description="subtract the channels' means and add them back")
        outliers: int = Field(
            0,
            ge=0,
            le=64,
            description="channels of a head with the largest range, stored with 8 bits",
        )
        rank1: bool = Field(
            True, description="correct decoded vectors by an affine map of rank one"
        )

        @model_validator(mode="after")
        def _inner_format_is_known(self) -> Residual.Options:
            self.inner()
            if not (self.mean or self.outliers or self.rank1):
                raise ValueError("corrects nothing: enable mean, outliers or rank1")
            return self

        def inner(self) -> tuple[type[CodedFormat], PolicyOptions]:
            """Return the format to correct and its options."""
            if "exact_chunk" in self.options:
                raise ValueError("exact_chunk is residual's own option, not one of `options`")
            defaults: dict[str, Any] = {
                "exact_chunk": self.exact_chunk,
                "calibration": self.calibration,
            }
            if self.outliers:
                # Behind a rotation no channel is an outlier.
                defaults["rotate"] = False
            found, options = inner_format(self.format, self.options, defaults)
            if found.name in (Residual.name, "plain") or not issubclass(found, CodedFormat):
                raise ValueError(
                    f"residual cannot correct {found.name}: name a format that stores codes"
                )
            return found, options

    options: Options

    def prepare(self) -> None:
        self.calibration = calibration_for(self.options.calibration, self.engine)
        found, inner = self.options.inner()
        built: FormatPolicy = build_inner(found, inner, self.engine)
        assert isinstance(built, CodedFormat)
        self.inner = built
        # Of the format corrected, not of the class.
        self.integer = built.integer  # type: ignore[misc]
        if self.integer and self.options.outliers:
            raise ValueError(
                f"{built.name} multiplies integer codes of one width: set outliers to 0"
            )
        self.rotation = built.rotation
        self.moves_tokens = built.moves_tokens
        self.graph_safe = built.graph_safe
        self._maps = OnDevice()
        self.corrected: dict[tuple[int, str], int] = {}

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        for layer in engine.layers:
            self.corrected[layer.index, "key"] = self.corrected[layer.index, "value"] = 0
            if self.options.rank1 or self.options.mean:
                self._fit_once(layer)

    # -- codes ---------------------------------------------------------------------------------

    def coding(self, layer: LayerView) -> CodedPage:
        page, n = self.inner.coded(layer), self.options.outliers
        of, heads, width = self.calibration.of, layer.num_kv_heads, layer.head_size
        turned = isinstance(self.inner, TurnedFormat)
        if n and (self.inner.rotation if turned else type(self.inner).into is not CodedFormat.into):
            fix = " or options: {rotate: false}" if hasattr(self.inner.options, "rotate") else ""
            raise ValueError(f"{self.inner.name} mixes channels: set outliers: 0{fix}")
        maps = {}
        for side, coding in (("key", page.key), ("value", page.value)):
            zero = torch.zeros(heads, width)
            maps[f"{side}_mean"] = of(layer, f"{side}_mean").clone() if self.options.mean else zero
            maps[f"{side}_u"], maps[f"{side}_v"], maps[f"{side}_bias"] = zero, zero, zero
            if n and coding.axis == "channels":
                order = of(layer, f"{side}_range").sort(dim=-1, descending=True, stable=True)[1]
                # Within the two parts channels keep their order.
                order = torch.cat([order[:, :n].sort(-1)[0], order[:, n:].sort(-1)[0]], -1)
                maps[f"{side}_order"] = order
                maps[f"{side}_place"] = order.argsort(-1)
        self._maps.put(layer, maps)
        if not n:
            return page
        return CodedPage(_with_outliers(page.key, n), _with_outliers(page.value, n))

    def levels(self, layer: LayerView, device: torch.device) -> Levels:
        return self.inner.levels(layer, device)

    def layout(self, layer: LayerView) -> PageLayout:
        inner = self.inner.layout(layer)
        return replace(super().layout(layer), heads=inner.heads, rank=inner.rank)

    def recent(self, layer: LayerView) -> int:
        return self.inner.recent(layer)

    def _fit_once(self, layer: LayerView) -> None:
        """`_fit`, unless an object with these bytes was built in this process: an engine's start
        builds several, to check, to lay out and to run."""
        key = (self.fingerprint(), layer, self.engine.block_size)
        fitted = _FITTED.get(key)
        if fitted is None:
            self._fit(layer)
            maps = self._maps.get(layer, torch.device("cpu"))
            counts = self.corrected[layer.index, "key"], self.corrected[layer.index, "value"]
            _FITTED[key] = (maps, *counts)
            return
        self._maps.put(layer, fitted[0])
        self.corrected[layer.index, "key"], self.corrected[layer.index, "value"] = fitted[1:]

    def _fit(self, layer: LayerView) -> None:
        """Keep of each head's corrections those that bring the sample's outputs nearer."""
        of = self.calibration.of
        query = by_kv_head(of(layer, "query_sample").float(), layer.num_kv_heads)
        exact = [of(layer, f"{side}_sample").float() for side in ("key", "value")]
        maps = {k: v.clone() for k, v in self._maps.get(layer, torch.device("cpu")).items()}
        means = {side: maps[f"{side}_mean"].clone() for side in ("key", "value")}
        found = {}
        for mean in (False, True) if self.options.mean else (False,):
            for side in means:
                maps[f"{side}_mean"] = means[side] * mean
            self._maps.put(layer, maps)
            found[mean] = self._through(layer, exact[0], exact[1])
        half, eye = len(exact[0]) // 2, torch.eye(layer.head_size)
        for head in range(layer.num_kv_heads):
            wanted = [part[:, head] for part in exact]
            trial = _Trial(query[:, head], wanted, [part[:, head] for part in found[False]])
            # Keys first: a correction of values is judged with the keys that it will meet.
            for at, side in enumerate(means):
                if self.options.mean and not trial.nearer(at, found[True][at][:, head]):
                    maps[f"{side}_mean"][head] = 0
                if not self.options.rank1:
                    continue
                weight = of(layer, "query_moment")[head] if side == "key" else eye
                now = trial.now[at]
                fitted = rank_one(wanted[at][:half], now[:half], weight)
                u, v, bias = (x.float() for x in fitted)
                if trial.nearer(at, now + (now @ v)[:, None] * u + bias):
                    for name, part in (("u", u), ("v", v), ("bias", bias)):
                        maps[f"{side}_{name}"][head] = part
                    self.corrected[layer.index, side] += 1
        self._maps.put(layer, maps)

    def _through(self, layer: LayerView, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[n, heads, d]`` written to separate pages and read back."""
        size = self.engine.block_size
        n = len(key) - len(key) % size
        dtype = getattr(torch, layer.dtype or "float32")
        cache = self.layout(layer).pages(layer, n // size, size)
        self.write(
            layer, WriteBatch(key[:n].to(dtype), value[:n].to(dtype), torch.arange(n)), cache
        )
        self._nonfinite = None
        pages = self.read(layer, cache, torch.arange(n // size))
        back = [p.transpose(1, 2).flatten(0, 1).float() for p in pages]
        return torch.cat([back[0], key[n:]]), torch.cat([back[1], value[n:]])

    # -- maps ----------------------------------------------------------------------------------

    def _ordered(self, maps: dict[str, Tensor], x: Tensor, order: str) -> Tensor:
        """Channels of ``[n, heads, d]`` in another order, by KV head."""
        found = maps.get(order)
        return x if found is None else x.gather(-1, found.expand_as(x))

    def into(self, layer: LayerView, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        maps = self._maps.get(layer, key.device)
        key = self._ordered(maps, key.float() - maps["key_mean"], "key_order")
        value = self._ordered(maps, value.float() - maps["value_mean"], "value_order")
        return self.inner.into(layer, key, value)

    def _queries(self, layer: LayerView, query: Tensor) -> Tensor:
        """Queries as the inner format gets them, float32."""
        maps = self._maps.get(layer, query.device)
        grouped = by_kv_head(query.float(), layer.num_kv_heads)
        along = (grouped * maps["key_u"][:, None]).sum(-1, keepdim=True)
        grouped = grouped + along * maps["key_v"][:, None]
        order = maps.get("key_order")
        if order is not None:
            grouped = grouped.gather(-1, order[:, None].expand_as(grouped))
        return grouped.flatten(1, 2)

    def query_into(self, layer: LayerView, query: Tensor) -> Tensor:
        return self.inner.query_into(layer, self._queries(layer, query).to(query.dtype))

    def shift(self, layer: LayerView, query: Tensor) -> Tensor:
        maps = self._maps.get(layer, query.device)
        offset = maps["key_mean"] + maps["key_bias"]
        grouped = by_kv_head(query.float(), layer.num_kv_heads)
        found = torch.einsum("nhgd,hd->nhg", grouped, offset).flatten(1)
        inner = self.inner.shift(layer, self._queries(layer, query))
        return found if inner is None else found + inner

    def _corrected(self, layer: LayerView, x: Tensor, side: str) -> Tensor:
        """Vectors ``[n, heads, d]`` that the inner format gave back, made good."""
        maps = self._maps.get(layer, x.device)
        x = self._ordered(maps, x.float(), f"{side}_place")
        along = (x * maps[f"{side}_v"]).sum(-1, keepdim=True)
        return x + along * maps[f"{side}_u"] + maps[f"{side}_bias"] + maps[f"{side}_mean"]

    def key_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self._corrected(layer, self.inner.key_back(layer, coded), "key")

    def value_back(self, layer: LayerView, coded: Tensor) -> Tensor:
        return self._corrected(layer, self.inner.value_back(layer, coded), "value")

    def out_back(self, layer: LayerView, out: Tensor) -> Tensor:
        back = by_kv_head(self.inner.out_back(layer, out), layer.num_kv_heads)
        parts = [self._corrected(layer, back[:, :, i], "value") for i in range(back.shape[2])]
        return torch.stack(parts, 2).flatten(1, 2)

    def lse_back(self, layer: LayerView, lse: Tensor) -> Tensor:
        return self.inner.lse_back(layer, lse)

    # -- what the host calls -------------------------------------------------------------------

    def write(self, layer: LayerView, batch: WriteBatch, cache: Tensor) -> None:
        recent = batch.recent
        if recent is not None:
            # An open group is coded again with its earlier tokens, which are kept exactly.
            request_slots, size = recent.key.shape[:2]
            key, _ = self.into(layer, recent.key.flatten(0, 1), recent.value.flatten(0, 1))
            recent = Recent(key.view(request_slots, size, *key.shape[1:]), recent.value)
            batch = replace(batch, recent=recent)
        super().write(layer, batch, cache)

    def counters(self) -> dict[str, float]:
        return {**super().counters(), "corrected_heads": float(sum(self.corrected.values()))}

    def fingerprint(self) -> str:
        inner = self.inner.fingerprint()
        return f"{super().fingerprint()}:{self.calibration.checksum}:{inner}"


def _with_outliers(coding: Coding, n: int) -> Coding:
    """The same coding with its first channels coded apart."""
    if coding.axis == "tokens":
        return coding
    group = 0 if coding.group == coding.width else coding.group
    if group and n % group:
        raise ValueError(
            f"{n} outliers do not fill groups of {group}: set outliers to {group} or 0"
        )
    return replace(coding, group=group, outliers=n)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the latest queries ``[m, readers, d]`` to a sample ``[n, d]``, causal."""
    n, m = len(key), len(query)
    seen = torch.arange(n) <= torch.arange(n - m, n)[:, None]
    logits = torch.einsum("mrd,nd->mrn", query, key) * query.shape[-1] ** -0.5
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("mrn,nd->mrd", weights, value)
