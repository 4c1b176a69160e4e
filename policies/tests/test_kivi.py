from __future__ import annotations

import pytest
import torch

from kvplug.contract import AttendBatch, EngineView
from kvplug.testing.format import Case, Pool, Shape, queries, relative, vectors, view
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.kivi import Kivi

SHAPE = Shape(64, 6, 2, 32)


def size(head_size: int, block: int = 128, **options: object) -> int:
    layer = view(Shape(head_size, 6, 2, block))
    policy = Kivi(Kivi.Options.model_validate(options), EngineView(block, layers=(layer,)))
    return policy.layout(layer).bytes_per_token_head


def test_a_token_takes_codes_its_part_of_the_keys_scales_and_its_values() -> None:
    assert [size(64), size(64, bits=2), size(64, bits=2, value_group=32)] == [76, 44, 48]
    assert size(64, key_bits=3, value_bits=2) == 52
    assert 64 * 4 / size(64, bits=2) >= 5
    assert 128 * 4 / size(128, bits=2) >= 6
    assert size(96, bits=2) == 64


def test_groups_must_fill_blocks_and_heads() -> None:
    with pytest.raises(ValueError, match=r"do not fill blocks of 16: start with --block-size 32"):
        size(64, block=16)
    with pytest.raises(ValueError, match=r"--block-size 144, or choose a group that divides 128"):
        size(96, group=48)
    with pytest.raises(ValueError, match=r"80 channels .* choose a group that divides 80"):
        size(80)
    assert size(80, group=16) > 0
    with pytest.raises(ValueError, match="groups of 48 channels do not divide a head of 64"):
        size(64, value_group=48)


def test_reading_the_step_back_is_refused() -> None:
    with pytest.raises(ValueError, match="an open group is attended exactly"):
        Kivi.Options(exact_chunk=False)


def test_an_element_is_off_by_half_a_step_of_its_channel_at_most() -> None:
    pool = Pool(Case(Kivi, {"bits": 2, "rotate": False, "anchor": False}), SHAPE)
    key, value = vectors(SHAPE, 96, seed=1)
    key[..., 9] *= 50
    pool.store({0: (key, value)})
    grouped = key.unflatten(0, (3, 32))
    spread = grouped.amax(1, keepdim=True) - grouped.amin(1, keepdim=True)
    off = (pool.read(0)[0].unflatten(0, (3, 32)) - grouped).abs()
    rounding = grouped.abs().amax(1, keepdim=True) * 2**-10
    assert (off <= spread / 6 * 1.001 + 2 * rounding).all()


def test_channels_that_are_large_cost_the_others_nothing() -> None:
    key, value = vectors(SHAPE, 64, seed=2)
    key[..., 3] += 40
    rest = torch.arange(64) != 3
    off = {}
    for policy in (Kivi, Int4):
        options = {"rotate": False}
        pool = Pool(Case(policy, options), SHAPE)
        pool.store({0: (key, value)})
        off[policy] = relative(pool.read(0)[0][..., rest], key[..., rest])
    assert off[Kivi] < 0.12 < 0.5 < off[Int4]


def test_the_open_group_is_attended_exactly_and_is_in_the_pages_too() -> None:
    """A prompt of less than a group: every later step is exact. The codes are there all along."""
    pool = Pool(Case(Kivi), SHAPE)
    key, value = vectors(SHAPE, 31, seed=3)
    query = queries(SHAPE, 31, seed=4)
    pool.step({0: (key[:10], value[:10])}, query[:10], True)
    for at in range(10, 31):
        out, _ = pool.step({0: (key[at : at + 1], value[at : at + 1])}, query[at : at + 1], True)
        weights = torch.einsum("hd,thd->ht", query[at], key[: at + 1].repeat_interleave(3, 1)).mul(
            pool.scale
        )
        exact = torch.einsum(
            "ht,thd->hd", weights.softmax(-1), value[: at + 1].repeat_interleave(3, 1)
        )
        torch.testing.assert_close(out[0], exact, atol=1e-5, rtol=1e-5)
        found = pool.read(0)
        assert relative(found[0], key[: at + 1]) < 0.6
        assert relative(found[1], value[: at + 1]) < 0.6


def test_slots_that_were_never_written_have_no_part_in_a_groups_scale() -> None:
    """The pages begin with keys of three times the size: the error is that of the new ones."""
    pool = Pool(Case(Kivi, {"bits": 4}), SHAPE)
    key, value = vectors(SHAPE, 2, seed=5)
    pool.store({0: (key * 1e-3, value)})
    assert relative(pool.read(0)[0], key * 1e-3) < 0.01


def test_without_a_slot_the_codes_stand_for_what_is_exact() -> None:
    """A request that has no slot still gets attention over its pages, open group included."""
    pool = Pool(Case(Kivi, {"bits": 4}), SHAPE)
    key, value = vectors(SHAPE, 45, seed=6)
    query = queries(SHAPE, 45, seed=7)
    pool.store({0: (key[:40], value[:40])})
    write, attend = pool.batch({0: (key[40:], value[40:])}, query[40:], True)
    fields = {**{f: getattr(attend, f) for f in attend.__dataclass_fields__}}
    fields["request_slots"] = torch.tensor([-1])
    pool.policy.write(pool.layer, write, pool.pages)
    out = torch.full_like(query[40:], torch.nan)
    pool.policy.attend(pool.layer, AttendBatch(**fields), pool.pages, out)
    near = pool.expected(attend)
    assert 1e-4 < relative(out, near) < 0.2


def test_the_ring_is_as_long_as_a_block_unless_told_otherwise() -> None:
    layer = view(SHAPE)
    for block, options, length in (
        (32, {}, 32),
        (128, {}, 128),
        (256, {}, 128),
        (96, {}, 96),
        (512, {"group": 256, "bits": 4}, 256),
        (128, {"recent": 64}, 64),
    ):
        shape = Shape(256, 6, 2, block)
        policy = Kivi(
            Kivi.Options.model_validate(options), EngineView(block, layers=(view(shape),))
        )
        assert policy.recent(layer) == length
        assert not policy.moves_tokens


def test_a_ring_that_is_no_part_of_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recent: 48 .* blocks of 128; choose 32 or 64 or 128"):
        size(64, recent=48)


def test_a_head_that_cannot_be_rotated_is_refused_with_the_option_that_helps() -> None:
    with pytest.raises(ValueError, match=r"no Hadamard matrix .* set rotate: false"):
        size(92, group=4)
    assert size(92, group=4, rotate=False) > 0


def test_the_first_key_of_a_block_is_exact_and_costs_the_others_little() -> None:
    """A first token that is large in a few channels, as an attention sink is."""
    key, value = vectors(SHAPE, 64, seed=12)
    key[0, :, ::9] *= 20
    parts, off = (slice(1), slice(1, 32), slice(32, 64)), {}
    for anchor in (False, True):
        shape = Shape(64, 6, 2, 64)
        pool = Pool(Case(Kivi, {"bits": 2, "anchor": anchor}), shape)
        pool.store({0: (key, value)})
        found = pool.read(0)[0]
        off[anchor] = [relative(found[at], key[at]) for at in parts]
    assert off[True][0] < 1e-3 < 1e-2 < off[False][0]
    assert off[True][1] < 1.3 * off[False][1]
    assert off[True][2] == off[False][2]


def test_keys_are_coded_the_same_whether_a_step_is_long_or_short() -> None:
    """Rotated keys of a ring, by token of a short step and by request of a long one."""
    key, value = vectors(SHAPE, 75, seed=13)
    query = queries(SHAPE, 75, seed=14)
    pools = []
    for steps in ((75,), (20, 1, 1, 11, 30, 1, 2, 9)):
        pool, at = Pool(Case(Kivi), SHAPE), 0
        for n in steps:
            part = slice(at, at + n)
            pool.step({0: (key[part], value[part])}, query[part], True)
            at += n
        pools.append(pool.read(0))
    for a, b in zip(*pools, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_none_spoils_neither_other_channels_nor_other_groups(bad: float) -> None:
    key, value = vectors(SHAPE, 70, seed=8)
    spoilt = key.clone()
    spoilt[7, 0, 5] = bad
    found = []
    for keys in (spoilt, key):
        pool = Pool(Case(Kivi, {"rotate": False}), SHAPE)
        pool.store({0: (keys, value)})
        found.append(pool.read(0)[0])
    rest = torch.arange(64) != 5
    assert torch.equal(found[0][..., rest], found[1][..., rest])
    assert torch.equal(found[0][32:], found[1][32:])
    assert torch.equal(found[0][:, 1], found[1][:, 1])
    # The number itself counts as 0, which is within the range of the others.
    others = torch.arange(70) != 7
    assert relative(found[0][others, 0, 5], key[others, 0, 5]) < 0.7


def test_fitting_lowers_the_error_of_values() -> None:
    key, value = vectors(SHAPE, 64, seed=11)
    errors = []
    for fit in (0, 2):
        pool = Pool(Case(Kivi, {"fit": fit}), SHAPE)
        pool.store({0: (key, value)})
        errors.append(
            [
                float((a - b).square().mean())
                for a, b in zip(pool.read(0), (key, value), strict=True)
            ]
        )
    assert errors[1][0] == errors[0][0], "keys are coded per channel"
    assert errors[1][1] < 0.97 * errors[0][1]
