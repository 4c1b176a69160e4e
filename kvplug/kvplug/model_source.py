"""Finds the model that ``--model`` names: a directory, a model of the Hugging Face hub, or a name.

Everything is looked for on this machine first; the hub is asked only for a model of its own that is
not here. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from kvplug.errors import KVPlugError
from kvplug.near_names import did_you_mean, nearest, suggestion

__all__ = [
    "FoundModel",
    "ModelNotFound",
    "Need",
    "NotDownloaded",
    "downloaded",
    "made_here",
    "model_label",
    "resolve",
]

GROUP = "kvplug.models"
"""Entry-point group of models that can be made on this machine, by name."""

OF_THE_LAB = ("smollm2",)
"""Names that the lab's package brings."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_SECONDS = 10.0
"""For the hub to answer whether a model is there."""

CONFIG = "config.json"
TOKENIZER = ("tokenizer*", "*.model", "vocab*", "tekken.json", "*.tiktoken")
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*")
"""Files of a model beside its weights."""
WEIGHTS = (("*.safetensors", "consolidated*"), ("*.bin", "training_args.bin"))
"""Names of files of weights and of those that are left out; the first that a model has count."""

_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/[^/]+/?$")


class Need(Enum):
    """What a command needs of a model."""

    CONFIG = "its config"
    SERVED = "its config, and weights that vLLM may download"
    ALL = "all of its files"


class ModelNotFound(KVPlugError):
    """A model that is not there; the message says what was looked for and what to do.

    Attributes:
        problem: What is wrong, one sentence.
        fix: What to do, one sentence.
    """

    exit_code = 2

    def __init__(self, option: str, problem: str, fix: str):
        self.problem, self.fix = problem, fix
        super().__init__(f"{option}: {problem} Fix: {fix}")


class NotDownloaded(ModelNotFound):
    """A model of the hub that is not on this machine, where the hub was not to be asked."""


@dataclass(frozen=True)
class FoundModel:
    """A model that is there.

    Attributes:
        name: As it was asked for.
        folder: Its directory; what is there of it, for a model of the hub that vLLM downloads.
        hub: True for a model of the hub, which vLLM finds by its name.
        made: True for a model made on this machine.
    """

    name: str
    folder: Path
    hub: bool = False
    made: bool = False


def made_here() -> list[str]:
    """Return the names of the models that can be made on this machine, sorted."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)})


def model_label(folder: Path) -> str:
    """Return what to call a model by its directory: its name on the hub, or the directory's."""
    found = _SNAPSHOT.search(str(folder))
    return found[1].replace("--", "/") if found else folder.name or folder.resolve().name


def resolve(
    name: str,
    *,
    option: str = "--model",
    need: Need = Need.ALL,
    network: bool = True,
    revision: str | None = None,
    cache: str | None = None,
    load_format: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> FoundModel:
    """Find a model, and download or make it where it is not here yet.

    A directory with a ``config.json`` comes first, then a name of `made_here`, then the hub's
    downloads on this machine, then the hub itself.

    Args:
        name: A directory, the name of a model of the Hugging Face hub, or one of `made_here`.
        option: Where the name was given, for messages.
        need: What has to be there.
        network: False to leave the hub alone, whatever the environment allows.
        revision: Branch, tag or commit on the hub; the hub's own default if None.
        cache: Folder of the hub's downloads; the usual one if None.
        load_format: vLLM's ``--load-format``, which says what the weights are.
        progress: Called with a line before what takes time.

    Raises:
        NotDownloaded: It is not here, and the hub was not to be asked.
        ModelNotFound: There is no such model, or it cannot be had.
        KVPlugError: It cannot be made, or a package is missing.
    """
    if not name.strip():
        fix = f"pass a directory, ORG/NAME of the Hugging Face hub{_or_names()}."
        raise ModelNotFound(option, "is empty.", fix)
    path = _path(name)
    if os.path.isfile(path / CONFIG):  # noqa: PTH113 -- False for no path
        return FoundModel(name, path)
    is_path = name.startswith(("/", "./", "../", "~")) or name in (".", "..")
    if not is_path and "/" not in name:
        if name in made_here():
            return FoundModel(name, _make(name, progress), made=True)
        if name in OF_THE_LAB:
            raise KVPlugError(
                f"{option} {name} needs the lab, which is not installed. "
                "Fix: pip install 'kvplug[lab]', or pass a model directory or name."
            )
    if is_path or _exists(path):
        _refuse_path(option, name, path)
    if not HUB_ID.fullmatch(name):
        fix = f"check the path, or pass ORG/NAME of the Hugging Face hub{_or_names()}."
        raise ModelNotFound(option, f"{name} is no directory and no name of a model.", fix)
    return _of_hub(name, option, need, network, revision, cache, load_format, progress)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~NAME, where there is no user NAME
        return Path(name)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _or_names() -> str:
    names = made_here()
    return f", or {' or '.join(names)}" if names else ""


def _make(name: str, progress: Callable[[str], None] | None) -> Path:
    (entry, *_) = importlib.metadata.entry_points(group=GROUP, name=name)
    return Path(entry.load()(progress=progress))


def _refuse_path(option: str, name: str, path: Path) -> NoReturn:
    """Say what is wrong with a path.

    Raises:
        ModelNotFound: Always.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        problem = f"{name} is a GGUF file, whose weights are quantized in a way of its own."
        fix = "pass the directory of the model that it was made from, with its safetensors."
    elif not _exists(path):
        problem, fix = f"{name} is not a model directory: nothing is there.", "check the path."
    elif not path.is_dir():
        problem = f"{name} is a file, not a model directory."
        fix = f"pass the directory that holds {CONFIG} and the weights."
    elif not os.access(path, os.R_OK | os.X_OK):
        problem, fix = f"{name} cannot be read.", "change its permissions."
    else:
        problem, fix = _without_config(name, path)
    raise ModelNotFound(option, problem, fix)


def _without_config(name: str, path: Path) -> tuple[str, str]:
    problem = f"{name} is not a model directory: it has no {CONFIG}."
    try:
        entries = sorted(path.iterdir())[:1000]
    except OSError:
        entries = []
    below = [one for one in entries if (one / CONFIG).is_file()]
    if (path / "adapter_config.json").is_file():
        return (
            f"{name} is an adapter, not a model: it has an adapter_config.json and no {CONFIG}.",
            "pass the model that it was made for; vLLM takes adapters by `-- --lora-modules`.",
        )
    if below:
        return problem, f"did you mean {below[0]}?"
    if any(one.suffix == ".gguf" for one in entries):
        return (
            f"{name} holds GGUF files and no {CONFIG}.",
            "pass the directory of the model that they were made from, with its safetensors.",
        )
    return problem, f"pass the directory that holds {CONFIG} and the weights."


# -- the hub ---------------------------------------------------------------------------------------


def _of_hub(
    name: str,
    option: str,
    need: Need,
    network: bool,
    revision: str | None,
    cache: str | None,
    load_format: str,
    progress: Callable[[str], None] | None,
) -> FoundModel:
    from kvplug.hosts.vllm.hub import model_folder

    try:
        from huggingface_hub import constants
    except ImportError:
        problem = f"{name} is no directory here, and the hub needs the package huggingface_hub."
        raise ModelNotFound(option, problem, "pip install huggingface_hub.") from None
    folder: Path | None
    try:
        folder = model_folder(name, revision, cache)
    except OSError:
        folder = None
    lacking = CONFIG if folder is None else _lacking(folder, need, load_format)
    if folder is not None and lacking is None:
        return FoundModel(name, folder, hub=True)
    if "/" not in name:
        _refuse_name(name, option, cache)
    if not network or constants.HF_HUB_OFFLINE:
        _refuse_offline(name, option, need, cache, lacking if folder else None)
    say = progress or (lambda _: None)
    try:
        folder = _download(name, need, revision, cache, say)
    except Exception as error:
        problem, fix = _cause(name, error, cache)
        raise ModelNotFound(option, problem, fix) from None
    return FoundModel(name, folder, hub=True)


def _lacking(folder: Path, need: Need, load_format: str) -> str | None:
    """What a snapshot lacks of what is needed, or None."""
    from kvplug.fingerprint import reads_files, weight_files

    if not (folder / CONFIG).is_file():
        return CONFIG
    if need is Need.CONFIG:
        return None
    if reads_files(load_format):
        try:
            weights = weight_files(folder, load_format)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            weights = []
        if not weights:
            return "its weights"
    if not any(found for pattern in TOKENIZER for found in folder.glob(pattern)):
        return "its tokenizer"
    return None


def _download(
    name: str, need: Need, revision: str | None, cache: str | None, say: Callable[[str], None]
) -> Path:
    """Download what is needed of a model; what vLLM is to download is only asked for."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    # Asked once: the client's downloads ask again and again where there is no network.
    about = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    config = hf_hub_download(
        name, CONFIG, revision=revision, cache_dir=cache, etag_timeout=HUB_SECONDS
    )
    if need is not Need.ALL:
        return Path(config).parent
    files = [one.rfilename for one in about.siblings or () if "/" not in one.rfilename]
    taken, left = [*SMALL], ["*/*"]
    for pattern, besides in WEIGHTS:
        if any(Path(file).match(pattern) for file in files):
            taken.append(pattern)
            left.append(besides)
            break
    say(f"downloading {name} from the Hugging Face hub")
    found = snapshot_download(
        name, revision=revision, cache_dir=cache, allow_patterns=taken, ignore_patterns=left
    )
    return Path(found)


def _refuse_name(name: str, option: str, cache: str | None) -> NoReturn:
    """Refuse a name without a slash that nothing here has.

    Raises:
        ModelNotFound: Always.
    """
    names = [*made_here(), *downloaded(cache)]
    same = (one for one in names if one.rpartition("/")[2].lower() == name.lower())
    near = nearest(name.lower(), names) or next(same, None)
    meant = suggestion(near) if near else ""
    raise ModelNotFound(
        option,
        f"{name} is no directory here, and no name that kvplug knows.",
        f"{meant}pass a directory, ORG/NAME of the Hugging Face hub{_or_names()}.",
    )


def _refuse_offline(
    name: str, option: str, need: Need, cache: str | None, lacking: str | None
) -> NoReturn:
    from huggingface_hub import constants

    looked = f"no directory {name}, and nothing of that name in {cache or constants.HF_HUB_CACHE}"
    if lacking is not None:
        looked = f"it was downloaded in part, without {lacking}"
    meant = did_you_mean(name, downloaded(cache), cutoff=0.8)
    if constants.HF_HUB_OFFLINE:
        why, fix = ", and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE, "
    else:
        why, fix = "", ""
    directory = f"a directory with its {CONFIG}" if need is Need.CONFIG else "a directory"
    raise NotDownloaded(
        option,
        f"{name} is not on this machine ({looked}){why}.",
        f"{meant}{fix}run `hf download {name}` where there is a network, or pass {directory}.",
    )


def downloaded(cache: str | None = None) -> list[str]:
    """Return the names of the models among the hub's downloads on this machine.

    Args:
        cache: Folder of the downloads; the usual one if None.
    """
    try:
        from huggingface_hub import constants

        found = sorted(Path(cache or constants.HF_HUB_CACHE).glob("models--*"))
    except (ImportError, OSError):
        return []
    return [one.name.removeprefix("models--").replace("--", "/") for one in found]


def _cause(name: str, error: Exception, cache: str | None) -> tuple[str, str]:
    """What an error of the hub's client means, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT.split("//")[-1]
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: {hub} gives it to accounts that accepted its terms.",
            f"accept them on {constants.ENDPOINT}/{name}, then run `hf auth login` or set "
            "HF_TOKEN.",
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such revision on {hub}.", "check --revision."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        meant = did_you_mean(name, downloaded(cache), cutoff=0.8)
        return (
            f"{name} is no directory here, and {hub} has no model of that name that it shows you.",
            f"{meant}check the spelling; for a private model, run `hf auth login` or set HF_TOKEN.",
        )
    # No network is an EntryNotFoundError, too.
    if isinstance(error, LocalEntryNotFoundError) or _is_connection(error):
        return (
            f"{name} is not on this machine, and {hub} does not answer.",
            f"check the network, run `hf download {name}` where there is one, or pass a directory.",
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{name} is on {hub} and has no {CONFIG}.",
            "pass a model in transformers' format; GGUF files and adapters are none.",
        )
    said = " ".join(str(error).split())[:200]
    return f"{name} cannot be downloaded: {type(error).__name__}: {said}.", "try again."


def _is_connection(error: BaseException) -> bool:
    """True for a network that is not there, from any of the libraries between."""
    seen: Any = error
    for _ in range(8):
        if seen is None:
            return False
        kind = type(seen).__name__
        if isinstance(seen, ConnectionError | TimeoutError) or "Connect" in kind:
            return True
        if kind in ("OfflineModeIsEnabled", "ProxyError") or kind.endswith("Timeout"):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
