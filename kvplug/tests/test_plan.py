"""`kvplug plan`: models' configs, what pools hold, and what is said about it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvplug import configs
from kvplug.cli import app
from kvplug.cli.check import read_checked
from kvplug.contract import Feature, Window
from kvplug.errors import KVPlugError
from kvplug.hosts.pruning import EvictionPlan, Limits
from kvplug.hosts.vllm.worker import tier_line
from kvplug.planning import hardware
from kvplug.planning import prices as prices_module
from kvplug.planning.candidates import Candidate, candidates
from kvplug.planning.files import deployment_file
from kvplug.planning.hardware import CARDS, card_of, suggest
from kvplug.planning.model import Model, UnknownModel, model_of, read_model
from kvplug.planning.plan import GIB, Planned, Question
from kvplug.planning.plan import plan as planned
from kvplug.planning.pool import Page, Positional, Pruned, Sliding, Texts, Whole, pool_of
from kvplug.planning.prices import prices
from kvplug.planning.weights import Weights, weights_of
from kvplug_kernels import splits

doctor_module = sys.modules["kvplug.cli.doctor"]

FOLDER = Path(__file__).parent / "model_configs"
ROOT = Path(__file__).resolve().parents[2]
LLAMA = FOLDER / "llama-3.1-8b.json"
WEIGHTS = Weights(16_060_522_496, "as given")
RULES = [Whole(), Positional(Window(4, 60)), Sliding(512)]


def config(name: str) -> Model:
    return read_model(str(FOLDER / f"{name}.json"))


def question(**given: Any) -> Question:
    return Question(**{"memory": 80 * GIB, "context": 32768, "weights": WEIGHTS, **given})


def of(name: str, **given: Any) -> Planned:
    """Plan one deployment of Llama-3.1-8B."""
    these = [c for c in candidates(2048) if c.name == name]
    (found,) = planned(read_model(str(LLAMA)), question(**given), these)
    return found


# -- models ----------------------------------------------------------------------------------------

TOKEN_BYTES = {
    # layers x KV heads x (key + value) x bytes
    "llama-2-7b": 32 * 32 * 256 * 2,
    "llama-2-70b": 80 * 8 * 256 * 2,
    "llama-3.1-8b": 32 * 8 * 256 * 2,
    "qwen2.5-7b": 28 * 4 * 256 * 2,
    "smollm2-135m": 30 * 3 * 128 * 2,
    "gemma-3-1b": 26 * 1 * 512 * 2,
    "gemma-3-4b": 34 * 4 * 512 * 2,
    # One latent of 512 and its rotary part of 64.
    "deepseek-v2-lite": 27 * 576 * 2,
}


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.json")))
def test_bytes_of_a_token_are_those_of_the_heads(name: str) -> None:
    assert config(name).token_bytes() == TOKEN_BYTES[name]


def test_sliding_layers_keep_their_window() -> None:
    model = config("gemma-3-4b")
    windows = [layer.window for layer in model.layers]
    assert windows.count(None) == 5 and windows.count(1024) == 29
    assert windows[:6] == [1024] * 5 + [None]
    assert Feature.SLIDING_WINDOW_LAYERS in model.features
    token = 4 * 512 * 2
    assert model.context_bytes(32768) == token * (5 * 32768 + 29 * 1024)
    assert model.context_bytes(1000) == token * 34 * 1000


LITTLE = {
    "model_type": "nobody_knows",
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "hidden_size": 1024,
    "torch_dtype": "float16",
}


@pytest.mark.parametrize(
    ("more", "token_bytes"),
    [
        ({}, 8 * 16 * 128 * 2),
        ({"num_key_value_heads": 2}, 8 * 2 * 128 * 2),
        ({"multi_query": True}, 8 * 1 * 128 * 2),
        ({"head_dim": 256}, 8 * 16 * 512 * 2),
        ({"num_kv_shared_layers": 3}, 5 * 16 * 128 * 2),
        ({"use_cla": True, "cla_share_factor": 2}, 4 * 16 * 128 * 2),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 8 * 576 * 2),
        ({"torch_dtype": "float32"}, 8 * 16 * 128 * 2),
    ],
)
def test_a_config_of_an_unknown_type_is_read_as_it_is(
    more: dict[str, Any], token_bytes: int
) -> None:
    model = model_of(LITTLE | more, "little")
    assert model.token_bytes() == token_bytes
    assert (Feature.KV_SHARING in model.features) == (len(model.layers) < 8)


@pytest.mark.parametrize("stated", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["auto", "half", "float", "bfloat16"])
def test_a_model_in_another_dtype_is_as_if_read_in_it(stated: str, dtype: str) -> None:
    raw = LITTLE | {"torch_dtype": stated}
    assert model_of(raw, "little").served_in(dtype) == model_of(raw, "little", dtype=dtype)
    with pytest.raises(UnknownModel, match="KV in fp4"):
        model_of(raw, "little").served_in("fp4")


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({"sliding_window": 100}, [100] * 8),
        ({"sliding_window": 100, "use_sliding_window": False}, [None] * 8),
        ({"sliding_window": 100, "sliding_window_pattern": 4}, [100, 100, 100, None] * 2),
        (
            {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 4},
            [9, None] * 4,
        ),
    ],
)
def test_windows_of_layers(more: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.window for layer in model_of(LITTLE | more, "little").layers] == windows


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_hidden_layers": None}, "states no num_hidden_layers"),
        ({"num_hidden_layers": -3}, "num_hidden_layers must be a number"),
        ({"num_hidden_layers": "8"}, "num_hidden_layers must be a number"),
        ({"num_attention_heads": 1 << 40}, "num_attention_heads must be a number"),
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers is 8 of 8"),
        ({"layer_types": ["linear_attention"] * 8}, "layers of type linear_attention"),
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"torch_dtype": "float64"}, "KV in float64"),
    ],
)
def test_what_is_not_known_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownModel, match=says):
        model_of(LITTLE | more, "little")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UnknownModel, match=r"config\.json"):
        read_model(str(file))


def test_a_downloaded_model_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    repository = tmp_path / "models--acme--little"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    (snapshot / "config.json").write_text(json.dumps(LITTLE), encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = read_model("acme/little")
    assert model.token_bytes() == 8 * 16 * 128 * 2
    assert model.folder == snapshot


PARAMETERS = {
    # As their authors state them, where they do so to this digit.
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_weights_are_counted_from_the_config(name: str) -> None:
    pytest.importorskip("transformers")
    assert weights_of(config(name)).bytes == 2 * PARAMETERS[name]


def test_weights_on_disk_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LITTLE), encoding="utf-8")
    (tmp_path / "model-00001.safetensors").write_bytes(b"0" * 1000)
    (tmp_path / "model-00002.safetensors").write_bytes(b"0" * 234)
    found = weights_of(read_model(str(tmp_path)))
    assert (found.bytes, found.source) == (1234, "size of its files")


def test_quantized_weights_are_not_guessed() -> None:
    with pytest.raises(UnknownModel, match="--weights"):
        weights_of(model_of(LITTLE | {"quantization_config": {"bits": 4}}, "little"))


# -- the table that articles print -----------------------------------------------------------------

ARTICLES = {
    # GB of KV as printed, by tokens.
    "llama-2-7b": {2048: 0.5, 8192: 2, 32768: 8, 131072: 32},
    "llama-2-70b": {8192: 2.5, 131072: 80},
}


@pytest.mark.parametrize("name", sorted(ARTICLES))
def test_the_table_of_articles_against_the_configs(name: str) -> None:
    model = config(name)
    for tokens, printed in ARTICLES[name].items():
        right = model.context_bytes(tokens) / GIB
        if name == "llama-2-7b":
            # Half a MiB a token: the table has half of that, as if there were K or V alone.
            assert right == 2 * printed
        else:
            assert right == {2.5: 2.5, 80: 40.0}[printed]
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for tokens in ARTICLES[name]:
        assert f"{model.context_bytes(tokens) / GIB:g} GiB" in page


# -- pools -----------------------------------------------------------------------------------------


def test_users_of_an_8b_model_on_80_gib_at_32k() -> None:
    """By hand: what is left for KV, over blocks of 16 tokens in 32 layers of 8 heads."""
    kv = int(80 * GIB * 0.92) - WEIGHTS.bytes - 3 * GIB
    stock = of("stock")
    assert stock.pool is not None and stock.pool.block_bytes == 16 * 131072
    assert stock.pool.blocks == kv // (16 * 131072)
    assert stock.users == (stock.pool.blocks - 1) // (32768 // 16) == 13
    fp8 = of("stock_fp8")
    assert fp8.pool is not None and fp8.pool.block_bytes == 8 * 131072
    # int4: half a byte an element, a scale of 2 bytes for keys and 2 + 2 for values, of a head.
    int4 = of("int4")
    assert int4.pool is not None and int4.pool.block_bytes == 32 * 8 * 16 * 136
    assert int4.users == (kv // int4.pool.block_bytes - 1) // 2048 == 52
    # A window of 2,048 tokens and the block being written, one more in flight.
    window = of("sink_window")
    assert window.held == 2048 // 16 + 2
    assert window.admitted == 2048 // 16 + 1 + 2 * 8192 // 16 + 1
    assert window.users == 1 + (stock.pool.usable - window.admitted) // window.held


def test_policies_pay_for_what_they_keep_beside_pages() -> None:
    kept, none = of("kivi", slots=256), of("kivi", slots=1)
    size = 2 * 64 * 8 * 128 * 2 * 32  # 64 tokens of K and V in 32 layers
    assert kept.beside - none.beside == 255 * size
    assert kept.pool is not None and none.pool is not None
    assert kept.pool.blocks < none.pool.blocks
    keydiff, snapkv = of("keydiff", slots=64), of("snapkv", slots=64)
    assert keydiff.beside == 0
    assert snapkv.beside == 32 * (64 * 32 + 1) * 32 * 128 * 2
    # A position of 4 bytes beside each token and head.
    assert keydiff.pool is not None
    assert keydiff.pool.block_bytes == 16 * 131072 + 32 * 8 * 16 * 4


def test_slots_are_as_many_as_fit_with_what_is_kept_for_each() -> None:
    for name in ("kivi", "expected_attention", "stock"):
        found = of(name)
        assert found.users == found.slots
        more = of(name, slots=found.slots + 1)
        assert more.users <= found.slots, "one more would not fit"


def test_the_longest_context_is_the_last_at_which_all_users_fit() -> None:
    found = of("stock", users=48)
    assert found.pool is not None
    at = Texts(found.longest, 512, 16384)
    assert found.pool.users(at) >= 48
    assert found.pool.users(Texts(found.longest + 1, 512, 16384)) < 48


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_a_request_holds_no_more_than_it_is_admitted_with(rule: Any) -> None:
    for context in (64, 1000, 4096, 50_000):
        found = rule.blocks(Texts(context, 16, 2048), 16)
        assert 0 < found.held <= max(found.admitted, 1)
        assert found.admitted <= -(-context // 16) + 1


@pytest.mark.parametrize("budget", [128, 1000, 0.25])
@pytest.mark.parametrize("prefill", [0, 40])
@pytest.mark.parametrize(("context", "output"), [(3000, 1), (3000, 700), (900, 899), (100, 50)])
def test_blocks_held_while_generating_are_the_most_at_any_token(
    budget: int | float, prefill: int, context: int, output: int
) -> None:
    limits = Limits(16, budget, 1.0, 36, 8, 8, prefill)
    rule, texts = Pruned(limits), Texts(context, output, 512)
    plan = EvictionPlan(limits, texts.prompt)
    most = 0
    for token in range(texts.prompt + 1, context + 1):
        last, _ = plan.between(token - 1, token - 1)
        held = -(-token // 16) - (last.end if last else 0) + (last.blocks if last else 0)
        most = max(most, held)
    assert rule.blocks(texts, 16).held == most


def test_pages_of_several_sizes_are_made_equal_only_between_rules() -> None:
    small, large = Page(1, 16, 100), Page(2, 16, 100)
    one = pool_of([(small, Whole()), (large, Whole())], 10**6)
    assert one.block_bytes == 4800 and len(one.groups) == 1
    two = pool_of([(small, Sliding(64)), (large, Whole())], 10**6)
    assert two.block_bytes == 3200 and [g.block_size for g in two.groups] == [32, 16]


def test_a_pool_without_room_for_one_request_serves_nobody() -> None:
    assert of("stock", context=131_072 * 8).users == 0


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(KVPlugError, match="leaves no memory for KV"):
        of("stock", memory=16 * GIB)


@pytest.mark.parametrize(
    "given",
    [{"memory": 0}, {"context": 1}, {"output": 32768}, {"utilization": 1.5}, {"ranks": 0}],
    ids=str,
)
def test_a_question_without_sense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(KVPlugError, match="Fix: pass a value between"):
        of("stock", **given)


def test_memory_that_overhead_takes_is_refused_by_name() -> None:
    with pytest.raises(KVPlugError, match=r"--memory is 2\.0 GiB, and 3\.0 GiB of it"):
        of("stock", memory=2 * GIB)


def test_tensor_parallel_divides_heads_and_weights() -> None:
    one, two = of("stock"), of("stock", ranks=2)
    assert one.pool is not None and two.pool is not None
    assert two.pool.block_bytes * 2 == one.pool.block_bytes
    assert two.pool.blocks > 2 * one.pool.blocks
    with pytest.raises(KVPlugError, match="cannot be divided among 3 GPUs"):
        of("stock", ranks=3)


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-1b", "deepseek-v2-lite"])
def test_what_a_model_does_not_allow_is_said(name: str) -> None:
    rows = planned(config(name), question(), candidates(2048))
    refused = {row.candidate.name: row.refused for row in rows if row.refused}
    assert {"stock", "stock_fp8"} & set(refused) == set()
    why = {"gemma-3-4b": "multimodal", "gemma-3-1b": "sliding", "deepseek-v2-lite": "MLA"}
    assert why[name] in str(refused["int4"])
    assert ("snapkv" in refused) == (name != "gemma-3-1b")


# -- prices ----------------------------------------------------------------------------------------


def test_prices_are_the_figures_of_the_pages() -> None:
    measured = pytest.importorskip("kvplug_lab.measured_rows")
    shipped = json.loads(prices_module.FILE.read_text(encoding="utf-8"))["rows"]
    assert shipped == measured.rows(measured.FIGURES), "run python -m kvplug_lab.measured_rows"
    for row in shipped:
        assert row["model"] and row["machine"] and row["date"] and row["command"]


def test_what_was_not_measured_has_no_price() -> None:
    assert prices("nobody") == []
    assert of("adaptive").prices == ()
    assert {p.what for p in of("int4").prices} == {"fidelity", "speed"}


def test_presets_say_what_was_measured() -> None:
    """The numbers of a preset's comments are those that `kvplug plan` has."""
    found = 0
    for name in configs.known("presets"):
        file = configs.shipped(f"presets/{name}")
        said = " ".join(file.read_text(encoding="utf-8").replace("\n# ", " ").split())
        section = read_checked(file).deployment.section
        used = [section[kind]["use"] for kind in ("sequence", "format") if kind in section]
        assert "What it costs:" in said
        for price in prices("+".join(used)):
            if price.what == "speed":
                assert f"{price.values['ratio']:.2f} times" in said, name
                assert f"with {price.values['running']:.0f} requests at once" in said, name
            else:
                assert f"{price.values['added']:.3f} nats" in said, name
            found += 1
    assert found >= 4


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run() -> Callable[..., Result]:
    runner = CliRunner()
    base = ["plan", "--model", str(LLAMA), "--memory", "80GiB", "--context", "32768"]
    return lambda *more: runner.invoke(app, [*base, "--weights", "16061MB", *map(str, more)])


def test_it_prints_every_deployment_and_what_it_costs(run: Callable[..., Result]) -> None:
    done = run("--users", 48, "--host", "64GiB")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())  # lines break where the terminal ends
    assert "131,072 bytes of KV a token in bfloat16 (32 layers); 4.00 GiB" in said
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "455,792" in lines["stock"] and "524,288" in lines["stock"]
    assert "not measured" in lines["adaptive"]
    assert "1.65x stock's tokens/s" in lines["int4"]
    assert "[1] " in said and "SmolLM2-135M-Instruct" in said
    assert "not planned: lowrank, merge_heads, residual: calibration" in said


def test_json_has_all_of_it(run: Callable[..., Result]) -> None:
    data = json.loads(run("--json").stdout)
    rows = {row["name"]: row for row in data["deployments"]}
    assert data["token_bytes"] == 131072 and rows["stock"]["users"] == 13
    assert rows["snapkv"]["part_kept"] == pytest.approx(136 * 16 / 32768, abs=1e-4)
    assert rows["h2o"]["prefix_cache"] == "none" and rows["snapkv"]["runner"] == "second"
    assert rows["int4"]["measured"] and not rows["adaptive"]["measured"]
    assert rows["lowrank"]["refused"]


@pytest.mark.parametrize("name", ["stock", "stock_fp8", "kivi", "pyramidkv", "snapkv+int4"])
def test_a_planned_deployment_can_be_served(name: str, tmp_path: Path) -> None:
    """The file passes `kvplug check`, and says what was planned to vLLM."""
    found = of(name)
    file = tmp_path / "deployment.yaml"
    file.write_text(deployment_file(read_model(str(LLAMA)), question(), found), encoding="utf-8")
    checked = read_checked(file)
    assert checked.deployment.section == dict(found.candidate.section)
    assert checked.flags["max-num-seqs"] == found.slots
    assert checked.flags["max-model-len"] == 32768
    assert checked.flags["block-size"] == found.block_size
    assert checked.flags.get("kv-cache-dtype", "auto") == ("fp8" if name == "stock_fp8" else "auto")
    (again,) = planned(
        read_model(str(LLAMA)),
        question(slots=found.slots),
        [Candidate(name, checked.deployment.section, found.candidate.flags)],
    )
    assert again.users == found.users


def test_files_and_names_are_planned_instead(run: Callable[..., Result]) -> None:
    kivi, edge = json.loads(run("--json", "gpu/kivi", "presets/edge").stdout)["deployments"]
    assert (kivi["name"], edge["name"]) == ("gpu/kivi", "presets/edge")
    assert kivi["block_size"] == 64
    assert [m["what"] for m in edge["measured"]] == ["speed"]
    # What is in flight is of the file's own steps of 1,024 tokens.
    assert edge["blocks_to_admit"] == 2048 // 16 + 1 + 2 * 1024 // 16 + 1


def test_passwords_of_tiers_are_not_printed(run: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "section.yaml"
    file.write_text('tiers: [{redis: {url: "redis://:secret@there/0"}}]\n', encoding="utf-8")
    for more in ([], ["--json"]):
        done = run(str(file), *more)
        assert done.exit_code == 0, done.output
        assert "secret" not in done.output
    assert json.loads(done.stdout)["deployments"][0]["section"] == {"tiers": ["redis"]}


@pytest.mark.parametrize("name", ["gpu/reuse", "presets/multi_turn"])
def test_what_a_file_sets_beside_its_section_stays(
    run: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(run(name, "--yaml", name).stdout, encoding="utf-8")
    own, shipped = read_checked(file), read_checked(configs.shipped(name))
    assert own.transfer == shipped.transfer
    assert own.flags.items() >= shipped.flags.items()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--yaml", "nobody"], "the plan has no deployment 'nobody'. Fix: choose from stock"),
        (["--yaml", "lowrank"], "lowrank cannot run: "),
        (["--memory", "much"], "--memory: 'much' is no size. Fix: write e.g. 80GiB"),
        (["--model", "acme/a/b"], "no directory and no name of a model"),
        (["nowhere"], "kvplug ships no deployment of that name"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    run: Callable[..., Result], more: list[str], says: str
) -> None:
    done = run(*more)
    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_plan_needs_no_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from kvplug.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
    )
    arguments = ["plan", "--model", str(LLAMA), "--memory", "80GiB", "--context", "32768", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--weights", "16GB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["deployments"]) > 20


# -- hardware --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200 96 GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144 GB"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_cards_are_known_by_what_torch_calls_them(name: str, card: str) -> None:
    found = card_of(name)
    assert found is not None and found.name == card
    assert card_of(found.name) is found


def test_an_unknown_card_gets_only_what_is_read_from_it() -> None:
    assert card_of("NVIDIA L4") is None
    assert card_of("AMD Instinct MI300A") is None, "a card with memory and units of its own"
    named = {one.setting: one for one in suggest({"name": "NVIDIA L4"})}
    assert set(named) == {"block-size", "format"}
    assert "8-bit floats" not in named["format"].reason
    facts = {"name": "NVIDIA L4", "multiprocessors": 58, "capability": [8, 0]}
    read = {one.setting: one for one in suggest(facts)}
    assert read["splits"].value == "116 programs, 14 a KV head"
    assert "does not compute in 8-bit floats" in read["format"].reason


def test_only_the_card_that_was_measured_is_said_to_be() -> None:
    measured = {
        card.name
        for card in CARDS
        if any(one.evidence == "measured" for one in suggest({"name": card.name}))
    }
    assert measured == {card_of(p.machine).name for p in prices("int4") if p.what == "speed"}  # type: ignore[union-attr]


def test_every_card_has_every_column() -> None:
    rows = list(hardware.table())
    names = ["A100", "GH200", "H100", "H200", "MI300", "CPU"]
    assert {row[0].split()[0].rstrip("X") for row in rows} == set(names)
    for name, card, suggestions in rows:
        assert tuple(one.setting for one in suggestions) == hardware.SETTINGS
        assert (card is None) == (name == "CPU")
        for one in suggestions:
            assert one.value and one.reason.endswith("."), (name, one)


@pytest.mark.parametrize(
    ("name", "splits", "chunks"),
    [
        # Chunks: link x 16 GB / bandwidth / 2 MiB.
        ("A100 80 GB", "216 programs, 27 a KV head", 119),
        ("GH200 96 GB", "264 programs, 33 a KV head", 858),
        ("H100 SXM", "264 programs, 33 a KV head", 145),
        ("H200", "264 programs, 33 a KV head", 101),
        ("MI300X", "608 programs, 76 a KV head", 92),
    ],
)
def test_what_is_arithmetic_follows_from_the_facts(name: str, splits: str, chunks: int) -> None:
    named = {one.setting: one for one in suggest({"name": name})}
    assert named["splits"].value == splits
    assert named["transfer"].value == f"2 MiB a chunk, {chunks} in a decode step"
    assert named["splits"].evidence == named["transfer"].evidence == "arithmetic"


def test_what_is_said_of_the_machinery_is_what_it_does() -> None:
    assert hardware.PROGRAMS == splits.PROGRAMS
    assert hardware.SLOT_BYTES == tier_line.SLOT_BYTES
    assert config("llama-3.1-8b").token_bytes(2) == hardware.TOKEN_BYTES


def test_what_a_cpu_was_measured_to_do_is_in_the_figures() -> None:
    """The numbers in the sentences."""
    speeds, gains = (
        json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("tier_speed", "gain_formats")
    )
    read = {one["kib"]: one["get"] for one in speeds["tiers"]["host"]}
    gained = {one["policy"]: one["pool_ratio"] for one in gains["runs"]}
    named = {one.setting: one for one in suggest(None)}
    assert f"read {read[512] / read[64]:.1f} times as fast" in named["transfer"].reason
    assert f"{gained['int4']:.1f} times the tokens" in named["format"].reason


def test_doctor_prints_the_whole_table() -> None:
    printed = CliRunner().invoke(app, ["doctor", "--hardware", "--json"])
    rows = {row["device"]: row for row in json.loads(printed.stdout)["hardware"]}
    assert list(rows) == [*(card.name for card in CARDS), "CPU"]
    assert rows["H200"]["data_sheet"]["bandwidth"] == 4_800 * 10**9
    assert rows["CPU"]["suggestions"][0] == {
        "setting": "block-size",
        "value": "32",
        "reason": suggest(None)[0].reason,
        "evidence": "arithmetic",
    }
    table = CliRunner().invoke(app, ["doctor", "--hardware"], env={"COLUMNS": "80"})
    assert table.exit_code == 0
    assert all(card.name in table.stdout for card in CARDS)
    assert max(map(len, table.stdout.splitlines())) <= 80
    assert CliRunner().invoke(app, ["doctor", "--hardware", "file.yaml"]).exit_code == 2


def test_doctor_says_what_the_hardware_suggests() -> None:
    found = doctor_module._suggestions([{"name": "NVIDIA H100 80GB HBM3"}] * 2)
    (one,) = found
    assert one["device"] == "NVIDIA H100 80GB HBM3"
    assert {s["setting"] for s in one["suggestions"]} == {
        "block-size",
        "splits",
        "transfer",
        "format",
    }
    assert [of["device"] for of in doctor_module._suggestions([])] == ["CPU"]
