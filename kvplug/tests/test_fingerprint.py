"""A model is known by its config and by every byte of the files its weights are read from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug import digests, fingerprint
from kvplug.digests import file_digest
from kvplug.fingerprint import model_fingerprint, once, weight_files

CONFIG = {"model_type": "llama", "hidden_size": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}


def model(folder: Path, files: dict[str, bytes] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    for name, content in (files or {"model.safetensors": b"weights" * 100}).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvplug" / "digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    found: list[str] = []
    real = digests._read

    def noted(path: Path, known: digests.Signature) -> str:
        found.append(path.name)
        return real(path, known)

    monkeypatch.setattr(digests, "_read", noted)
    return found


def age(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file's last change be long ago."""
    monkeypatch.setattr(digests.time, "time", lambda: path.stat().st_ctime + 60)


# -- What counts -----------------------------------------------------------------------------------


def test_every_byte_counts_and_the_place_does_not(tmp_path: Path) -> None:
    one = model(tmp_path / "one")
    assert model_fingerprint(one) == model_fingerprint(model(tmp_path / "two"))
    content = bytearray(b"weights" * 100)
    for place in (0, 350, len(content) - 1):
        other = bytearray(content)
        other[place] ^= 1
        changed = model(tmp_path / f"at{place}", {"model.safetensors": bytes(other)})
        assert model_fingerprint(changed) != model_fingerprint(one)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rope_theta": 5000.0}, False),
        ({"rms_norm_eps": 1e-6}, False),
        ({"a_key_nobody_knows": 1}, False),
        ({"transformers_version": "9"}, True),
        ({"torch_dtype": "float16"}, True),
        ({"eos_token_id": 5}, True),
    ],
)
def test_whatever_the_config_says_of_the_computation_counts(
    change: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other", **change)
    assert (model_fingerprint(one) == model_fingerprint(other)) is same


def test_an_override_is_the_config_that_says_so(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other", rope_theta=5000.0)

    def change(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "rope_theta": 5000.0}

    assert model_fingerprint(one, change=change) == model_fingerprint(other)


def test_code_that_the_config_names_counts(tmp_path: Path) -> None:
    found = {
        model_fingerprint(
            model(
                tmp_path / code,
                {"model.safetensors": b"w", "modeling.py": code.encode()},
                auto_map={"AutoModel": "modeling.Model"},
            )
        )
        for code in ("a", "b")
    }
    assert len(found) == 2 and "" not in found


@pytest.mark.parametrize(
    "name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"]
)
def test_how_weights_are_quantized_counts_where_a_file_beside_them_says_so(
    name: str, tmp_path: Path
) -> None:
    found = {
        model_fingerprint(model(tmp_path / bits, {"model.safetensors": b"w", name: bits.encode()}))
        for bits in ("4", "8")
    }
    found.add(model_fingerprint(model(tmp_path / "none", {"model.safetensors": b"w"})))
    assert len(found) == 3 and "" not in found


def test_arrays_that_npcache_reads_instead_of_the_files_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", {"x.bin": b"w"})
    found = [model_fingerprint(folder, one) for one in ("auto", "npcache")]
    (folder / "np").mkdir()
    for content in (b"1", b"2"):
        (folder / "np" / "layer").write_bytes(content)
        found += [model_fingerprint(folder, one) for one in ("auto", "npcache")]
    assert found[0] == found[2] == found[4]
    assert len({found[1], found[3], found[5]}) == 3


@pytest.mark.parametrize(
    ("files", "load_format", "expected"),
    [
        ({"b.safetensors", "a.safetensors", "x.bin"}, "auto", "a.safetensors b.safetensors"),
        ({"x.bin", "training_args.bin", "y.pt"}, "auto", "x.bin"),
        ({"y.pt", "scheduler.pt"}, "auto", "y.pt"),
        ({"training_args.bin", "y.pt"}, "auto", "y.pt"),
        ({"a.safetensors", "y.pt"}, "pt", "y.pt"),
        ({"a.safetensors", "x.bin"}, "npcache", "x.bin"),
        ({"a.safetensors", "consolidated.safetensors"}, "auto", "consolidated.safetensors"),
        ({"x.safetensors", "consolidated.safetensors"}, "pt", ""),
        ({"a.safetensors"}, "dummy", ""),
        ({"a.safetensors"}, "a_plugin_s_own", ""),
        ({".hidden.safetensors"}, "auto", ""),
    ],
)  # fmt: skip
def test_the_files_are_those_that_are_loaded(
    files: set[str], load_format: str, expected: str, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model", {name: b"w" for name in files})
    assert [file.name for file in weight_files(folder, load_format)] == expected.split()


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    files = {"a.safetensors": b"a", "b.safetensors": b"b", "old.safetensors": b"c"}
    folder = model(tmp_path / "model", files)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = model_fingerprint(folder)
    assert [file.name for file in weight_files(folder)] == ["a.safetensors", "b.safetensors"]
    (folder / "old.safetensors").write_bytes(b"other")
    assert model_fingerprint(folder) == found
    (folder / "b.safetensors").unlink()
    assert model_fingerprint(folder) == ""


def test_a_file_may_be_the_whole_model(tmp_path: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    one.write_bytes(b"GGUF1")
    other.write_bytes(b"GGUF1")
    assert model_fingerprint(one) == model_fingerprint(other) != ""
    assert weight_files(one, "a_plugin_s_own") == [one] and weight_files(one, "dummy") == []
    other.write_bytes(b"GGUF2")
    assert model_fingerprint(one) != model_fingerprint(other)


@pytest.mark.parametrize("name", ["", "s3://bucket/model", "org/name/more", "\0", "a" * 5000])
def test_what_is_not_here_has_no_fingerprint(name: str) -> None:
    assert model_fingerprint(name) == ""


def test_an_identity_of_its_own_equals_no_other() -> None:
    assert once() != once() and once().startswith(fingerprint.ONCE)


# -- What is remembered ----------------------------------------------------------------------------


def test_bytes_are_read_once(
    tmp_path: Path, reads: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    age(file, monkeypatch)
    found = file_digest(file)
    assert file_digest(file) == found and reads == ["file"]
    assert [path.read_text() for path in cache.iterdir()] == [found]


def overwrite(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"y" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_it(file: Path) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"y" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [overwrite, replace_it])
def test_a_change_that_leaves_size_and_time_is_seen(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    age(file, monkeypatch)
    before, facts = file_digest(file), file.stat()
    # The clock of a file system may be coarse.
    while file.stat().st_ctime_ns == facts.st_ctime_ns:
        change(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    assert file_digest(file) != before


def test_what_changed_just_now_is_not_remembered(
    tmp_path: Path, reads: list[str], cache: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    file_digest(file)
    file_digest(file)
    assert reads == ["file", "file"] and list(cache.iterdir()) == []


def test_a_digest_that_is_damaged_is_made_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    age(file, monkeypatch)
    found = file_digest(file)
    (kept,) = cache.iterdir()
    for damage in ("", "z" * 32, found[:-1]):
        kept.write_text(damage)
        assert file_digest(file) == found


def test_a_cache_that_cannot_be_written_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    file = tmp_path / "file"
    file.write_bytes(b"x")
    assert len(file_digest(file)) == 32


def test_a_file_that_changes_while_it_is_read_has_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "model")
    file = folder / "model.safetensors"
    known = digests.signature(file)
    seen = iter([known, (*known[:2], known[2] + 1, *known[3:])])
    monkeypatch.setattr(digests, "signature", lambda path: next(seen))
    with pytest.raises(OSError, match="changes while it is read"):
        file_digest(file)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            file_digest(path)
