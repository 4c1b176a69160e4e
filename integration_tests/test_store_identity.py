"""Stored KV is taken only for what it is: which engines, adapters and requests share any, what a
reset leaves, and whose folder it is. Engines are configured and not run."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvplug.contract import Fingerprint
from kvplug.errors import DeploymentError
from kvplug.fingerprint import ONCE, model_fingerprint, weight_files
from kvplug.hosts.vllm.admission import deployment_of
from kvplug.hosts.vllm.connector import KVPlugConnector
from kvplug.hosts.vllm.hub import model_folder
from kvplug.hosts.vllm.messages import ReuseReport, StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.adapters import Adapters
from kvplug.hosts.vllm.scheduler.events import Events
from kvplug.hosts.vllm.scheduler.half import SchedulerHalf
from kvplug.hosts.vllm.scheduler.kind import Answer, SchedulerContext, SchedulerStep
from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.hosts.vllm.view import engine_view
from kvplug.request_options import RequestOptions
from kvplug.reuse.file import file_name
from kvplug_lab.engine.trial import connector_flags
from kvplug_lab.models import tiny_llama

REUSE = {"use": ["structure", "position", "mask"], "segments": {"by": "fixed", "size": 64}}
OPTIONS = RequestOptions.parse(None, num_prompt_tokens=128).options


def scheduler(model: Path, section: dict[str, Any] | None = None, **engine: Any) -> ReuseScheduler:
    """The reuse kind of an engine that is configured so."""
    flags = connector_flags(section or {"reuse": REUSE})
    config = EngineArgs(
        **{
            "model": str(model),
            "max_model_len": 512,
            "dtype": "bfloat16",
            "block_size": 32,
            "enforce_eager": True,
            "kv_transfer_config": flags,
            **engine,
        }
    ).create_engine_config()
    with set_current_vllm_config(config):
        deployment, view = deployment_of(config), engine_view(config, num_blocks=64)
        context = SchedulerContext(deployment, config, view, Events(deployment), Slots())
        return ReuseScheduler(context)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def reuse(model: Path) -> ReuseScheduler:
    """One that tests may not change."""
    return scheduler(model)


@pytest.fixture
def fresh(model: Path) -> ReuseScheduler:
    """One that started after the adapters of the test were made."""
    found = scheduler(model)
    found._adapters = Adapters(time.time() + 3600)
    return found


def request(name: str = "r", **changes: Any) -> Request:
    asked: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": list(range(128)),
        "sampling_params": SamplingParams(max_tokens=4),
        "pooling_params": None,
    }
    return Request(**asked | changes)


# -- The model -------------------------------------------------------------------------------------


def elsewhere(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def fine_tuned(model: Path, folder: Path) -> Path:
    copy = elsewhere(model, folder)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    return copy


def as_pt(model: Path, folder: Path) -> Path:
    from safetensors.torch import load_file

    copy = elsewhere(model, folder)
    torch.save(load_file(copy / "model.safetensors"), copy / "model.pt")
    (copy / "model.safetensors").unlink()
    return copy


def same_place(model: Path, folder: Path) -> Path:
    return model


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


@pytest.mark.parametrize(
    ("where", "engine", "same"),
    [
        (same_place, {}, True),
        (elsewhere, {}, True),
        (same_place, {"max_model_len": 256, "seed": 3, "max_num_seqs": 4}, True),
        (same_place, {"served_model_name": "other", "load_format": "safetensors"}, True),
        (fine_tuned, {}, False),
        (as_pt, {}, False),
        (same_place, {"hf_overrides": ROPE}, False),
        (same_place, {"hf_overrides": {"rms_norm_eps": 1e-3}}, False),
        (same_place, {"dtype": "float32"}, False),
        (same_place, {"load_format": "dummy"}, False),
    ],
)
def test_engines_share_what_is_the_same_computation(
    where: Callable[[Path, Path], Path],
    engine: dict[str, Any],
    same: bool,
    model: Path,
    reuse: ReuseScheduler,
    tmp_path: Path,
) -> None:
    other = scheduler(where(model, tmp_path), **engine)
    assert (other.identity == reuse.identity) is same
    assert len(other.identity["model"]) >= 32


def test_calibrations_know_an_overridden_model_by_the_config_that_says_so(
    model: Path, tmp_path: Path
) -> None:
    import json

    copy = elsewhere(model, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    overridden = scheduler(model, hf_overrides={"rms_norm_eps": 1e-3}).context.engine
    assert overridden.model == model_fingerprint(copy) != model_fingerprint(model)
    assert scheduler(model).context.engine.model == model_fingerprint(model)


@pytest.mark.parametrize(
    ("pattern", "known"),
    [
        (None, True),
        ("model-rank-{rank}-part-{part}.safetensors", True),
        ("shards/model-rank-{rank}-part-{part}.safetensors", False),
        ("model-rank-{rank}-part-{part}.bin", False),
    ],
)
def test_shards_that_a_pattern_leads_to_are_those_that_count(
    model: Path, pattern: str | None, known: bool
) -> None:
    """Beside them the folder may hold the files that they were made of."""
    extra = {"pattern": pattern} if pattern else {}
    found = scheduler(model, load_format="sharded_state", model_loader_extra_config=extra)
    assert bool(found.context.engine.model) is known
    assert found.identity["model"].startswith(ONCE) is not known


def test_what_adapters_apply_to_counts_and_how_many_there_may_be_does_not(model: Path) -> None:
    def identity(**flags: Any) -> Any:
        return scheduler(model, enable_lora=True, **flags).identity["model"]

    assert identity() == identity(max_loras=2, max_lora_rank=8)
    assert identity() != identity(lora_target_modules=["q_proj"])


def test_a_policys_copy_of_the_engine_copies_no_weights(reuse: ReuseScheduler) -> None:
    config = reuse.context.vllm_config
    layers = config.compilation_config.static_forward_context

    class Layer:
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise AssertionError("a layer was copied")

    layers["model.layers.0"] = Layer()
    try:
        own = copy.deepcopy(reuse.context.engine)
    finally:
        del layers["model.layers.0"]
    assert own == reuse.context.engine
    assert own.model == reuse.context.engine.model != ""


def test_an_engine_without_identity_equals_not_even_itself(model: Path) -> None:
    one, other = (scheduler(model, load_format="dummy") for _ in range(2))
    assert one.identity["model"] != other.identity["model"]
    assert one.identity["model"].startswith(ONCE)
    assert not one.context.engine.model


@pytest.mark.parametrize("key", ["store", "records"])
def test_files_that_outlive_an_unknown_engine_are_refused(
    key: str, model: Path, tmp_path: Path
) -> None:
    store, guard = {"directory": str(tmp_path / "segments")}, {"records": str(tmp_path)}
    section: dict[str, Any] = (
        {"reuse": {**REUSE, "store": store}} if key == "store" else {"reuse": REUSE, "guard": guard}
    )
    processors = {"logits_processors": ["kvplug.hosts.vllm.guard:GuardProcessor"]}
    named = {"store": "reuse.store.directory", "records": "guard.records"}[key]
    with pytest.raises(DeploymentError) as error:
        scheduler(model, section, load_format="dummy", **processors)
    assert named in str(error.value) and "load_format dummy" in str(error.value)
    assert "Fix: load the weights from files" in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        "a.safetensors b.safetensors x.bin y.pt",
        "x.bin y.pt training_args.bin optimizer.bin",
        "y.pt scheduler.pt",
        "consolidated.safetensors a.safetensors x.bin",
        "consolidated-1.safetensors consolidated-2.safetensors",
        ".hidden.safetensors x.bin",
        "x.bin x.BIN y.safetensors.bak",
    ],
)
def test_the_files_of_a_model_are_those_that_vllm_loads(names: str, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / name).write_bytes(b"x")
    formats = ("auto", "hf", "safetensors", "mistral", "pt", "npcache")
    for load_format in formats:
        loader = DefaultModelLoader(LoadConfig(load_format=load_format))
        try:
            _, found, *_ = loader._prepare_weights(str(tmp_path), None, None, True, None)
        except RuntimeError:
            found = []
        assert [str(file) for file in weight_files(tmp_path, load_format)] == sorted(found)


def test_a_name_on_the_hub_is_the_snapshot_that_was_downloaded(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    repo = hub / "models--org--name"
    blobs, (first, second) = repo / "blobs", ("1" * 40, "2" * 40)
    blobs.mkdir(parents=True)
    for commit in (first, second):
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (blobs / commit).write_bytes(commit.encode())
        (folder / "model.safetensors").symlink_to(blobs / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(first)

    def known(name: str, revision: str | None = None) -> str:
        return model_fingerprint(model_folder(name, revision, str(hub)))

    named = known("org/name")
    assert named == model_fingerprint(repo / "snapshots" / first) != ""
    (repo / "refs" / "main").write_text(second)
    assert known("org/name") != named
    assert known("org/name", first) == named
    for name in ("org/other", "s3://bucket/model", "a/b/c", "a" * 5000):
        with pytest.raises(OSError, match=r"."):
            model_folder(name, None, str(hub))


# -- Requests --------------------------------------------------------------------------------------


def taken(reuse: ReuseScheduler, asked: Request) -> Fingerprint | None:
    """Fingerprint of what a request leaves, or None if it is left alone."""
    reuse.on_new_request(asked, OPTIONS)
    reusing = reuse.requests.get(asked.request_id)
    return reusing.fingerprint(reuse.identity, reusing.tokens, 0, 64) if reusing else None


def test_requests_that_are_more_than_their_tokens_are_left_alone(reuse: ReuseScheduler) -> None:
    mask = [i % 64 == 0 for i in range(128)]
    embeds = torch.zeros(128, 8)
    mixed = request("mixed", prompt_embeds=embeds, prompt_is_token_ids=mask)
    alone = request("alone", prompt_embeds=embeds, prompt_token_ids=None)
    images = request("images")
    images.mm_features = [SimpleNamespace()]
    in_parts = request("in parts", resumable=True)
    for one in (mixed, alone, images, in_parts):
        assert taken(reuse, one) is None
    assert taken(reuse, request("plain")) is not None


def adapter(folder: Path, content: bytes = b"weights") -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(content)
    return str(folder)


def with_adapter(name: str, number: int, path: str, of: str = "support") -> Request:
    return request(name, lora_request=LoRARequest(of, number, path))


def test_adapters_are_told_apart_by_their_bytes(fresh: ReuseScheduler, tmp_path: Path) -> None:
    one, same = adapter(tmp_path / "v1"), adapter(tmp_path / "copy")
    other = adapter(tmp_path / "v2", b"another")
    config = adapter(tmp_path / "v3")
    (tmp_path / "v3" / "adapter_config.json").write_text('{"r": 16}')
    found = [
        taken(fresh, with_adapter(f"r{number}", number, path, of))
        for number, path, of in (
            (1, one, "support"),
            (2, same, "renamed"),
            (3, other, "support"),
            (4, config, "support"),
        )
    ]
    identities = [f.lora for f in found if f is not None]
    assert len(identities) == 4 and identities[0] == identities[1]
    assert len(set(identities)) == 3 and "" not in identities
    plain = taken(fresh, request("plain"))
    assert plain is not None and plain.lora == ""


def test_an_adapter_whose_content_is_not_known_is_left_alone(
    fresh: ReuseScheduler, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "adapter_config.json").write_text("{}")
    for number, path in enumerate(("org/adapter", str(tmp_path / "absent"), str(empty)), 1):
        assert taken(fresh, with_adapter(f"r{number}", number, path)) is None
    assert fresh.refused["adapter of unknown content"] == 3


def test_an_adapter_younger_than_the_engine_may_have_been_another_when_it_was_loaded(
    fresh: ReuseScheduler, tmp_path: Path
) -> None:
    path = adapter(tmp_path / "v1")
    fresh._adapters = Adapters((tmp_path / "v1" / "adapter_config.json").stat().st_ctime - 0.01)
    assert taken(fresh, with_adapter("r", 1, path)) is None
    fresh._adapters = Adapters(time.time() + 1)
    assert taken(fresh, with_adapter("s", 1, path)) is not None


def relinked(place: Path) -> None:
    """The link that requests name leads to another adapter."""
    (place / "next").symlink_to(place / "v2")
    (place / "next").replace(place / "current")


def relinked_below(place: Path) -> None:
    """The link that requests name stays, and leads to one that leads elsewhere."""
    (place / "next").symlink_to(place / "v2")
    (place / "next").replace(place / "stable")


def weights_relinked(place: Path) -> None:
    (place / "v1" / "next").symlink_to(place / "v2" / "adapter_model.safetensors")
    (place / "v1" / "next").replace(place / "v1" / "adapter_model.safetensors")


def renamed(place: Path) -> None:
    """Another folder takes the place of the one that requests name."""
    (place / "v1").rename(place / "before")
    (place / "v2").rename(place / "v1")


@pytest.mark.parametrize("change", [relinked, relinked_below, weights_relinked, renamed])
def test_an_adapter_that_another_took_the_place_of_may_have_been_loaded_before(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    """Whatever the age of its files: vLLM loads an adapter before a request names it, too."""
    for name, content in (("v1", b"weights"), ("v2", b"another")):
        adapter(tmp_path / name, content)
    (tmp_path / "stable").symlink_to(tmp_path / "v1")
    (tmp_path / "current").symlink_to("stable")
    asked = LoRARequest("support", 1, str(tmp_path / "current"))
    # File systems count time in steps of some milliseconds.
    time.sleep(0.1)
    started = time.time()
    time.sleep(0.1)
    assert Adapters(started).identity(asked)
    change(tmp_path)
    assert Adapters(started).identity(asked) is None


def test_an_adapter_is_what_its_request_says_of_its_layout(tmp_path: Path) -> None:
    path, adapters = adapter(tmp_path / "v1"), Adapters(time.time() + 3600)
    fused = LoRARequest("support", 1, path, is_3d_lora_weight=True)
    found = adapters.identity(fused), adapters.identity(LoRARequest("support", 2, path))
    assert None not in found and found[0] != found[1]
    assert adapters.identity(LoRARequest("support", 1, path)) is None


def overwritten(path: Path) -> None:
    (path / "adapter_model.safetensors").write_bytes(b"changed")


def repointed(path: Path) -> None:
    """The same number comes with another path."""


@pytest.mark.parametrize("change", [overwritten, repointed])
def test_a_number_that_may_mean_two_adapters_is_left_alone(
    change: Callable[[Path], None], fresh: ReuseScheduler, tmp_path: Path
) -> None:
    path, other = adapter(tmp_path / "v1"), adapter(tmp_path / "v2", b"another")
    first = taken(fresh, with_adapter("first", 1, path))
    assert first is not None
    entry = fresh.catalog.plan_save(first, fresh.requests["first"].tokens[:64], EMPTY)
    assert entry is not None
    fresh.catalog.saved(entry.id)
    change(tmp_path / "v1")
    later = other if change is repointed else path
    assert taken(fresh, with_adapter("later", 1, later)) is None
    # What was stored may have been computed by either.
    fresh.finished(fresh.requests["first"].request, [0, 1, 2, 3], Answer())
    assert not entry.valid and not fresh._left
    assert fresh.refused["adapter changed"] == 1
    # Nor does the first one come back under its number.
    assert taken(fresh, with_adapter("again", 1, path)) is None


# -- Reset -----------------------------------------------------------------------------------------


EMPTY: Any = torch.zeros(0, dtype=torch.int32).numpy()


def step(reuse: ReuseScheduler) -> StepDirectives:
    """An empty step of the engine."""
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], resumed_req_ids=[])
    output = SimpleNamespace(
        num_scheduled_tokens={}, scheduled_cached_reqs=cached, scheduled_new_reqs=[]
    )
    directives = StepDirectives()
    reuse.step(SchedulerStep(output, 1, reuse.context.slots), directives)
    return directives


def stored(reuse: ReuseScheduler, name: str, salt: str = "") -> str:
    """A segment in memory, and on its way to its file if there is a folder."""
    found = taken(reuse, request(name, cache_salt=salt or None))
    assert found is not None
    entry = reuse.catalog.plan_save(found, reuse.requests[name].tokens[:64], EMPTY)
    assert entry is not None
    reuse.catalog.saved(entry.id)
    return entry.id


def test_a_reset_drops_what_is_stored_and_what_is_on_its_way(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "segments"
    folder.mkdir()
    reuse = scheduler(model, {"reuse": {**REUSE, "store": {"directory": str(folder)}}})
    ids = {name: stored(reuse, name, name) for name in ("memory", "file", "fetched")}
    for name in ("file", "fetched"):
        (folder / file_name(ids[name], 0, 1)).write_bytes(b"segment")
        reuse.catalog.written(ids[name])
    fetched = reuse.catalog.get(ids["fetched"])
    assert fetched is not None
    reuse.catalog._inventory.evict([fetched], [])
    step(reuse)
    assert reuse.catalog.want(ids["fetched"])
    coming = taken(reuse, request("saving", cache_salt="saving"))
    assert coming is not None
    saving = reuse.catalog.plan_save(coming, reuse.requests["saving"].tokens[:64], EMPTY)
    assert saving is not None
    before, running = dict(reuse.identity), reuse.requests["memory"]
    running.request.num_computed_tokens = 70
    assert reuse.reset()
    assert len(reuse.catalog) == 0 and not list(folder.glob("*.kvseg"))
    part = step(reuse).reuse
    assert part is not None and part.generation == 1 and not part.fetch
    assert {*ids.values(), saving.id} == set(part.delete) >= set(part.drop)
    # Reports of before come late and change nothing.
    report = ReuseReport(saved={saving.id: {}}, counts={saving.id: 1}, written=[ids["memory"]])
    reuse.on_report(StepReport(reuse=report))
    assert len(reuse.catalog) == 0
    # Nothing tells whether the weights are still those of the files.
    assert reuse.identity["model"].startswith(ONCE) and before["model"] not in str(reuse.identity)
    # A request that goes on was computed before, one that has not begun was not.
    assert not running.keeps and reuse.requests["file"].keeps
    assert reuse.reset() and reuse._generation == 2


def test_a_file_that_stays_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "segments"
    folder.mkdir()
    reuse = scheduler(model, {"reuse": {**REUSE, "store": {"directory": str(folder)}}})
    name = stored(reuse, "r")
    reuse.catalog.written(name)
    # It cannot be unlinked.
    (folder / file_name(name, 0, 1)).mkdir()
    assert reuse.reset() is False


def test_weights_loaded_again_reset_the_store(fresh: ReuseScheduler) -> None:
    stored(fresh, "r")
    fresh.on_report(StepReport(reuse=ReuseReport(reloaded=True)))
    assert len(fresh.catalog) == 0 and fresh.identity["model"].startswith(ONCE)


def test_the_connector_passes_a_reset_on() -> None:
    asked: list[str] = []

    def kind(name: str, done: bool) -> Any:
        return SimpleNamespace(reset=lambda: asked.append(name) or done)

    half = object.__new__(SchedulerHalf)
    connector = object.__new__(KVPlugConnector)
    connector.scheduler = half
    half.shadow = None
    for ends, expected in (((True, True), True), ((False, True), False)):
        half.kinds = tuple(kind(name, done) for name, done in zip("ab", ends, strict=True))
        assert connector.reset_cache() is expected
    assert asked == ["a", "b", "a", "b"]
