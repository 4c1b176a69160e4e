from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvplug.contract import EngineView, LayerView, Window
from kvplug_policies.sequence.sink_window import SinkWindow


def policy(block_size: int = 32, **options: object) -> SinkWindow:
    return SinkWindow(SinkWindow.Options.model_validate(options), EngineView(block_size=block_size))


def layer(index: int = 0, of: int = 4) -> LayerView:
    return LayerView(index=index, num_layers=of)


@pytest.mark.parametrize(
    ("sink", "window", "block_size", "expected"),
    [
        (64, 448, 32, Window(2, 14)),
        (64, 449, 32, Window(2, 14)),
        (64, 450, 32, Window(2, 15)),
        (1, 1, 16, Window(1, 0)),
        (0, 2, 16, Window(0, 1)),
        (33, 100, 128, Window(1, 1)),
    ],
)
def test_tokens_become_blocks(sink: int, window: int, block_size: int, expected: Window) -> None:
    assert policy(block_size, sink=sink, window=window).window(layer()) == expected


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (5, 17), (64, 448), (200, 3)])
def test_every_query_sees_the_sink_and_its_window(block_size: int, sink: int, window: int) -> None:
    rule = policy(block_size, sink=sink, window=window).window(layer())
    assert rule is not None
    for position in range(0, 1500, 7):
        start, end = rule.gap(position // block_size)
        hidden = range(start * block_size, end * block_size)
        oldest = max(0, position - window + 1)
        assert not any(token in hidden for token in range(min(sink, position + 1)))
        assert oldest >= hidden.stop or oldest < hidden.start or not hidden
        assert position not in hidden
        seen = position + 1 - len(hidden)
        assert seen <= -(-sink // block_size) * block_size + window + 2 * block_size - 2


def test_exact_blocks_is_where_the_first_gap_opens() -> None:
    rule = Window(2, 3)
    opens = next(b for b in range(100) if rule.gap(b)[0] < rule.gap(b)[1])
    assert rule.exact_blocks == opens == 6


def test_windows_by_layer() -> None:
    by_layer = policy(32, sink=0, window=33, layers={"0": 97, "1-2": 65, "-1": 129})
    windows = [by_layer.window(layer(i)) for i in range(4)]
    assert windows == [Window(0, 3), Window(0, 2), Window(0, 2), Window(0, 4)]


@pytest.mark.parametrize("layers", [{"4": 10}, {"2-9": 10}, {"-5": 10}])
def test_a_layer_outside_the_model_is_named(layers: dict[str, int]) -> None:
    outside = policy(layers=layers)
    with pytest.raises(ValueError, match="outside the model's 0-3"):
        outside.window(layer())


@pytest.mark.parametrize(
    "options",
    [
        {"sink": -1},
        {"window": 0},
        {"window": "448"},
        {"layers": {"3-1": 5}},
        {"layers": {"first": 5}},
        {"layers": {"0": 0}},
        {"budget": 512},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SinkWindow.Options.model_validate(options)


@pytest.mark.parametrize(("sink", "window"), [(-1, 0), (0, -1)])
def test_a_window_counts_blocks(sink: int, window: int) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        Window(sink, window)
