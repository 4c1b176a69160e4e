"""Presses as policies: what is handed over, what stays, and what is refused; without kvpress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvplug.contract import EngineView, Kind
from kvplug.hosts.pruning import choose
from kvplug.registry import plugins
from kvplug.testing import ScoringLaws, random_residents, residents
from kvplug_kvpress.policy import KvPress

ENGINE = EngineView(block_size=16, num_blocks=64, host="test")
HERE = __name__


class ScorerPress:
    """The interface of kvpress's class of that name."""

    compression_ratio: float = 0.0

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Tensor:
        raise NotImplementedError

    def compress(self, *arguments: Any) -> None:
        raise NotImplementedError


class Norm(ScorerPress):
    def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Tensor:
        return -keys.norm(dim=-1)


class ByOrder(ScorerPress):
    """A token scores by its key's distance from the key before it in the text."""

    def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Tensor:
        return (keys - keys.roll(1, 2)).norm(dim=-1)


@dataclass
class Window(ScorerPress):
    """Attention of the latest queries, as presses compute it."""

    window_size: int = 8

    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Tensor:
        heads, size, w = module.config.num_attention_heads, module.head_dim, self.window_size
        query = module.q_proj(hidden[:, -w:]).view(1, w, heads, size).transpose(1, 2)
        cos, sin = (x[:, -w:, None].transpose(1, 2) for x in kwargs["position_embeddings"])
        query = query * cos + query.roll(size // 2, -1) * sin
        wide = keys.repeat_interleave(heads // keys.shape[1], 1)
        mass = (query @ wide.mT / size**0.5).softmax(-1).sum(2)
        return mass.unflatten(1, (keys.shape[1], -1)).mean(2)


class AllQueries(ScorerPress):
    def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Tensor:
        return module.q_proj(hidden).mean() * keys.norm(dim=-1)


class Attentions(ScorerPress):
    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Tensor:
        assert attentions is not None, "it needs attentions"
        return attentions.sum(2)


class OutputMatrix(ScorerPress):
    def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Tensor:
        return module.o_proj.weight.norm() * keys.norm(dim=-1)


class TheCache(ScorerPress):
    def score(
        self, module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Tensor:
        return kwargs["past_key_values"].norm() * keys.norm(dim=-1)


class Chance(ScorerPress):
    def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Tensor:
        return torch.rand(keys.shape[:3])


class Nothing(ScorerPress):
    def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Tensor:
        return torch.ones(keys.shape[:3])


class OtherShape(ScorerPress):
    def score(self, module: Any, hidden: Any, keys: Any, *others: Any) -> Tensor:
        return keys


class Compresses(Norm):
    def compress(self, *arguments: Any) -> None:
        raise NotImplementedError


class NoPress:
    pass


def build(press: type, **options: Any) -> KvPress:
    stated = {"press": f"{HERE}.{press.__name__}", **options}
    return KvPress(KvPress.Options.model_validate(stated), ENGINE)


class TestByOrder(ScoringLaws):
    policy = KvPress
    options: ClassVar = {"press": f"{HERE}:ByOrder"}
    least = 2


class TestWindow(ScoringLaws):
    policy = KvPress
    options: ClassVar = {"press": f"{HERE}.Window", "recent": 8}
    least = 12


def test_it_is_registered() -> None:
    assert plugins().registry.get(Kind.SEQUENCE, "kvpress") is KvPress


def test_tokens_come_in_text_order_whatever_their_slots() -> None:
    case = random_residents(build(ByOrder), seed=3)
    found = build(ByOrder).score(case)
    for row in range(2):
        for head in range(2):
            order = case.positions[row, head].argsort()
            keys = case.keys[row, head, order]
            right = (keys - keys.roll(1, 0)).norm(dim=-1)
            torch.testing.assert_close(found[row, head, order], right)


def test_queries_are_those_of_the_latest_tokens_at_the_models_scale() -> None:
    policy = build(Window, arguments={"window_size": 4}, recent=4)
    assert policy.observation == 4
    keys = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(1))
    queries = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    found = policy.score(residents(keys, queries=queries, scale=0.7))
    wide = keys.repeat_interleave(2, 1)
    mass = (queries.transpose(1, 2) @ wide.mT * 0.7).softmax(-1).sum(2)
    torch.testing.assert_close(found, mass.unflatten(1, (2, 2)).mean(2))


def test_what_scores_by_keys_keeps_no_queries() -> None:
    assert build(Norm).observation == 0


def test_the_host_keeps_what_the_press_scores_best() -> None:
    keys = torch.full((1, 1, 64, 4), 4.0)
    keys[0, 0, [20, 25]] = 0.5
    policy = build(Norm, budget=8, sink=2, recent=4)
    keep, _ = choose(policy, residents(keys), candidates=64, count=8)
    assert keep.tolist() == [[[0, 1, 20, 25, 60, 61, 62, 63]]]


@pytest.mark.parametrize(
    ("press", "said"),
    [
        (AllQueries, "reads the hidden states of more than the latest 1 tokens"),
        (Attentions, r"it raised AssertionError: it needs attentions"),
        (OutputMatrix, r"it asks for module\.o_proj"),
        (TheCache, r"it asks for kwargs\['past_key_values'\]"),
        (Chance, "scores by chance: give it a seed"),
        (Nothing, "gives every token one score"),
        (OtherShape, r"score returned \[1, 2, 600, 64\] in place of \[1, 2, 600\]"),
        (Compresses, "overrides compress"),
        (NoPress, "is no class with a method score"),
        (Window, "looks at the latest 8 queries.* set recent to at least 8"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(press: type, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        build(press, recent=4)
    assert f"{HERE}.{press.__name__}" in str(refused.value)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"press": "Norm"}, "must be module and class"),
        ({"press": "no_such_module.Press"}, "cannot be imported: No module named"),
        ({"press": f"{HERE}.Absent"}, "is no class with a method score"),
        ({"press": f"{HERE}.Window", "arguments": {"size": 3}}, "cannot be made with"),
    ],
)
def test_a_press_that_is_not_there_is_refused(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KvPress(KvPress.Options.model_validate(stated), ENGINE)


def test_without_kvpress_the_refusal_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kvpress", None)
    stated = {"press": "kvpress.KnormPress"}
    with pytest.raises(ValueError, match="pip install --no-deps kvpress"):
        KvPress(KvPress.Options.model_validate(stated), ENGINE)
