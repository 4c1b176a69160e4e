"""`lossless`: what it saves, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from kvplug.contract import CorruptPayload
from kvplug.testing.transfer import as_stored, cells, check_round_trip, chunk, engine, shapes_of
from kvplug_policies.entropy import bits_of, expand, squeeze
from kvplug_policies.transfer.lossless import Lossless

CODEC = Lossless(Lossless.Options(), engine())


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 0.72), (torch.float16, 0.92), (torch.float32, 0.86)]
)
def test_exponents_take_few_bits(dtype: torch.dtype, most: float) -> None:
    assert check_round_trip(CODEC, chunk(32, dtype)) < most


def test_channels_of_other_sizes_cost_nothing() -> None:
    """Exponents are taken from those of their channel: sizes of channels do not add bits."""
    noise = torch.randn(2, 64, 2, 64, generator=torch.Generator().manual_seed(1))
    size = torch.exp2(torch.randint(-12, 12, (2, 1, 2, 64)).float())
    parts = [CODEC.cut("key", x.bfloat16(), 0)["top"].nbytes for x in (noise, noise * size)]
    assert parts[1] == pytest.approx(parts[0], rel=0.02)


def test_noise_stays_as_it_is() -> None:
    words = torch.randint(-(1 << 15), 1 << 15, (2, 16, 2, 64), dtype=torch.int16)
    planes = {"key": words.view(torch.bfloat16)}
    assert list(CODEC.encode(planes, 0)) == ["key"]
    assert check_round_trip(CODEC, planes) == 1


def test_bytes_of_a_cell_are_coded_by_their_place() -> None:
    parts = CODEC.cut("cells", cells(64)["cells"], 0)
    how = parts["how"].tolist()
    assert how[:16] == [3] * 16, "codes of even distribution stay"
    assert all(h in (1, 2) for h in how[16:24])
    assert all(h >= 8 for h in how[24:]), "what walks is coded by its steps"
    assert check_round_trip(CODEC, cells(64)) < 0.82


def test_a_place_of_an_unknown_class_is_corrupt() -> None:
    planes = cells(64)
    coded = as_stored(CODEC.encode(planes, 0))
    for wrong in (4, 7, 16, 255):
        coded["cells.how"][0] = wrong
        with pytest.raises(CorruptPayload):
            CODEC.decode(coded, shapes_of(planes), 0)


def test_squeezed_bytes_never_grow() -> None:
    random = torch.Generator().manual_seed(3)
    for n in (0, 1, 2, 5, 100, 5000):
        for top in (1, 2, 40, 256):
            given = torch.randint(0, top, (n,), generator=random).to(torch.uint8)
            coded = squeeze(given.numpy())
            assert len(coded) <= n
            assert expand(coded, n).tolist() == given.tolist()
    assert bits_of(torch.arange(256, dtype=torch.uint8).numpy()) == 8
