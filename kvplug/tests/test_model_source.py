"""What `--model` finds, and what it says of a model that is not there. No network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvplug import model_source
from kvplug.errors import KVPlugError
from kvplug.model_source import ModelNotFound, Need, NotDownloaded, model_label, resolve

huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors  # noqa: E402

WHOLE = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory beside an empty cache of downloads; no network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(model_source, "made_here", lambda: ["smollm2"])
    return tmp_path


@pytest.fixture
def downloaded(place: Path) -> Callable[..., Path]:
    """Puts a model among the hub's downloads."""

    def put(name: str, *files: str) -> Path:
        repository = place / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
        for file in files:
            (snapshot / file).write_text("{}", encoding="utf-8")
        return snapshot

    return put


def model_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def refused(name: str, **how: Any) -> str:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, **how)
    assert caught.value.exit_code == 2
    assert caught.value.problem.endswith(".") and caught.value.fix.endswith((".", "?"))
    return str(caught.value)


# -- directories -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "./model", "org/model", "smollm2"])
def test_a_directory_is_taken_however_it_is_written(name: str) -> None:
    folder = model_at(Path(name))
    found = resolve(name)
    assert (found.folder, found.hub, found.made) == (folder, False, False)


def test_a_home_directory_is_expanded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    assert resolve("~/model" if model_at(place / "model") else "").folder == place / "model"
    assert "~ is not a model directory" in refused("~")


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(name: str) -> None:
    assert refused(name, option="--of").startswith("--of: is empty. Fix: pass a directory, ORG/NA")


@pytest.mark.parametrize("name", ["/not/here", "./here", "../here/nothing", "~no_such_user/x"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    assert f"{name} is not a model directory: nothing is there." in refused(name)


def test_a_directory_without_a_config_names_one_below_it(place: Path) -> None:
    Path("models").mkdir()
    told = refused("models")
    assert "models is not a model directory: it has no config.json. Fix: pass the dire" in told
    below = model_at(Path("models/small"))
    assert refused("models").endswith(f"Fix: did you mean {below}?")


def test_a_file_an_adapter_and_gguf_files_each_have_their_sentence() -> None:
    Path("model.safetensors").touch()
    assert "model.safetensors is a file, not a model directory. Fix: pass the directory that" in (
        refused("model.safetensors")
    )
    Path("q4.gguf").touch()
    assert "q4.gguf is a GGUF file" in refused("q4.gguf")
    assert "nowhere.gguf is a GGUF file" in refused("./nowhere.gguf")
    Path("folder").mkdir()
    Path("folder/q4.gguf").touch()
    assert "folder holds GGUF files and no config.json" in refused("folder")
    Path("lora").mkdir()
    Path("lora/adapter_config.json").touch()
    assert "lora is an adapter, not a model" in refused("lora")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_directory_that_cannot_be_read_is_refused(place: Path) -> None:
    model_at(place / "locked").chmod(0)
    assert "cannot be read" in refused(str(place / "locked"))


@pytest.mark.parametrize("name", ["a/b/c", "x y", "ünï/cöde", "a" * 5000, "a\0b", "-x", "a/"])
def test_what_is_no_name_of_anything_is_refused(name: str) -> None:
    assert " is no directory " in refused(name)


# -- names -------------------------------------------------------------------------------------


class Entry:
    name = "smollm2"

    def load(self) -> Callable[..., Path]:
        return lambda progress: Path("/made")


def test_a_name_is_made_and_a_folder_without_a_model_does_not_hide_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_source.importlib.metadata, "entry_points", lambda **_: [Entry()])
    Path("smollm2").mkdir()
    found = resolve("smollm2")
    assert (found.folder, found.made) == (Path("/made"), True)


def test_a_name_of_the_lab_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "made_here", list)
    with pytest.raises(KVPlugError, match=r"--model smollm2 needs the lab.*'kvplug\[lab\]'"):
        resolve("smollm2")


def test_an_unknown_name_has_near_ones(downloaded: Callable[..., Path]) -> None:
    assert "Fix: did you mean smollm2? Otherwise pass a directory" in refused("smolm2")
    downloaded("acme/tiny", *WHOLE)
    assert "Fix: did you mean acme/tiny? Otherwise" in refused("Tiny")
    assert "Fix: pass a directory, ORG/NAME" in refused("xyzzy")


# -- the hub -----------------------------------------------------------------------------------


def test_a_downloaded_model_needs_no_network(downloaded: Callable[..., Path]) -> None:
    snapshot = downloaded("acme/tiny", *WHOLE)
    found = resolve("acme/tiny", network=False)
    assert (found.folder, found.hub) == (snapshot, True)
    assert model_label(found.folder) == "acme/tiny"
    assert model_label(Path("models/small")) == "small"
    downloaded("gpt2", *WHOLE)
    assert resolve("gpt2").hub


def test_offline_says_what_was_looked_for(place: Path, downloaded: Callable[..., Path]) -> None:
    told = refused("acme/tiny")
    assert f"(no directory acme/tiny, and nothing of that name in {place}/hub)" in told
    assert "HF_HUB_OFFLINE is set. Fix: unset HF_HUB_OFFLINE, run `hf download acme/tiny`" in told
    downloaded("acme/tiny", *WHOLE)
    assert "Fix: did you mean acme/tiny? Otherwise unset" in refused("acme/tinny")


@pytest.mark.parametrize(
    ("files", "lacking"),
    [((), "config.json"), (WHOLE[:1], "its weights"), (WHOLE[:2], "its tokenizer")],
)
def test_a_model_in_part_is_not_enough(
    downloaded: Callable[..., Path], files: tuple[str, ...], lacking: str
) -> None:
    downloaded("acme/tiny", *files)
    assert f"(it was downloaded in part, without {lacking})" in refused("acme/tiny")
    if files:
        assert resolve("acme/tiny", need=Need.CONFIG).hub
    if len(files) == 1:
        assert "its tokenizer" in refused("acme/tiny", load_format="dummy")


def test_a_list_of_weights_that_is_not_complete_is_seen(downloaded: Callable[..., Path]) -> None:
    snapshot = downloaded("acme/tiny", *WHOLE)
    index = snapshot / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "other.safetensors"}}', encoding="utf-8")
    assert "without its weights" in refused("acme/tiny")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """A hub that answers with an error."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def answers(error: Exception) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)

    return answers


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.GatedRepoError("x", response=response(403)), "is gated: huggingface.co gives it"),
        (
            errors.RepositoryNotFoundError("x", response=response(401)),
            "huggingface.co has no model of that name that it shows you. Fix: check the spelling",
        ),
        (errors.RevisionNotFoundError("x", response=response(404)), "no such revision"),
        (errors.LocalEntryNotFoundError("x"), "huggingface.co does not answer. Fix: check the net"),
        (errors.RemoteEntryNotFoundError("x", response=response(404)), "has no config.json"),
        (httpx.ConnectError("x"), "huggingface.co does not answer"),
        (
            errors.HfHubHTTPError("a\nb", response=response(503)),
            "cannot be downloaded: HfHubHTTPEr",
        ),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(
    hub: Callable[[Exception], None], error: Exception, told: str
) -> None:
    hub(error)
    said = refused("acme/tiny")
    assert said.startswith("--model: acme/tiny ") and told in said
    assert "\n" not in said


def test_without_network_the_hub_is_not_asked(hub: Callable[[Exception], None]) -> None:
    hub(AssertionError("asked"))
    with pytest.raises(NotDownloaded, match="acme/tiny is not on this machine"):
        resolve("acme/tiny", network=False)
    assert "no name that kvplug knows" in refused("tiny")


def test_what_is_needed_is_downloaded(
    hub: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.safetensors")
    siblings = [type("File", (), {"rfilename": name}) for name in names]
    about = type("Model", (), {"siblings": siblings})
    asked: list[Any] = []

    def snapshot(name: str, **how: Any) -> str:
        asked.append((name, how["allow_patterns"], how["ignore_patterns"]))
        return str(place)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: about)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **__: str(place / "config.json")
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("kvplug.hosts.vllm.hub.model_folder", _nothing)
    for need in (Need.SERVED, Need.CONFIG):
        assert resolve("acme/tiny", need=need).folder == place
    assert asked == []
    lines: list[str] = []
    assert resolve("acme/tiny", progress=lines.append).folder == place
    ((name, taken, left),) = asked
    assert name == "acme/tiny" and "*.safetensors" in taken and "*.bin" not in taken
    assert "*/*" in left and lines == ["downloading acme/tiny from the Hugging Face hub"]


def _nothing(*_: Any) -> Path:
    raise FileNotFoundError
