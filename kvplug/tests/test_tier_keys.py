"""Keys of chunks: equal where the KV is, in every process, and different wherever it may not be."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from kvplug.contract import EngineView, PolicyOptions, TransferCodec
from kvplug.tiers.keys import KEY_BYTES, KeyChain, engine_identity, stored_identity
from kvplug_policies.transfer.raw import Raw

IDENTITY = engine_identity({"model": "m", "layers": [[2, 64]]})
TEXT = [random.Random(1).randrange(1000) for _ in range(100)]


def keys(tokens: list[int] = TEXT, inputs: list[tuple[str, int, int]] | None = None, **other: str):
    identity = other.pop("identity", IDENTITY)
    chain = KeyChain(identity, 16, **other)
    chain.extend(tokens, inputs or [])
    return chain.keys


def test_a_key_covers_all_that_comes_before_it() -> None:
    own = keys()
    assert len(own) == 6 and all(len(key) == KEY_BYTES for key in own)
    assert len(set(own)) == 6
    changed = keys([*TEXT[:40], TEXT[40] + 1, *TEXT[41:]])
    assert changed[:2] == own[:2]
    assert not set(changed[2:]) & set(own)


def test_a_text_that_grows_keeps_its_keys() -> None:
    chain = KeyChain(IDENTITY, 16)
    for end in (0, 15, 16, 40, 41, 100):
        chain.extend(TEXT[:end])
        assert chain.keys == keys()[: end // 16]


@pytest.mark.parametrize(
    "other",
    [
        {"identity": engine_identity({"model": "n", "layers": [[2, 64]]})},
        {"tenant": "a"},
        {"adapter": "a"},
    ],
)
def test_other_models_tenants_and_adapters_share_no_key(other: dict[str, str]) -> None:
    assert not set(keys(**other)) & set(keys())


def test_what_is_written_one_way_cannot_be_read_another() -> None:
    assert keys(tenant="ab", adapter="c") != keys(tenant="a", adapter="bc")
    assert keys(tenant="a") != keys(adapter="a")


def test_images_count_from_where_they_begin() -> None:
    plain, one, other = keys(), keys(inputs=[("x", 20, 30)]), keys(inputs=[("y", 20, 30)])
    assert one[0] == other[0] == plain[0]
    assert not set(one[1:]) & set(other[1:])
    assert keys(inputs=[("x", 21, 30)])[1] != one[1]
    # In the second chunk of the image nothing else may differ.
    assert keys(inputs=[("x", 10, 30)])[1] != keys(inputs=[("x", 11, 30)])[1]


def test_every_process_has_the_same_keys() -> None:
    script = (
        "from kvplug.tiers.keys import KeyChain, engine_identity as of;"
        "c = KeyChain(of({'layers': [[2, 64]], 'model': 'm'}), 16);"
        f"c.extend({TEXT}); print(c.keys[-1].hex())"
    )
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == keys()[-1].hex()


def test_a_chunk_has_tokens() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        KeyChain(IDENTITY, 0)


def test_engines_of_different_codecs_do_not_meet_in_a_tier() -> None:
    """Their chunks have the same keys, and neither can read what the other wrote."""

    def codec(**facts: object) -> TransferCodec:
        made = type("Codec", (Raw,), {"fingerprint": lambda self: facts.get("calibration", "")})
        made.name, made.version = str(facts.get("name", "one")), facts.get("version", 1)
        return made(PolicyOptions(), EngineView(16))

    own = stored_identity(IDENTITY, codec())
    assert stored_identity(IDENTITY, codec()) == own != IDENTITY
    others = {
        stored_identity(IDENTITY, codec(name="two")),
        stored_identity(IDENTITY, codec(version=2)),
        stored_identity(IDENTITY, codec(calibration="ab")),
        stored_identity("cd", codec()),
    }
    assert len(others - {own}) == 4
