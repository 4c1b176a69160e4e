"""`kvplug gain` before any engine starts; what it measures is printed by engines that do."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.errors import KVPlugError
from kvplug.parser import load_deployment
from kvplug_lab.cli.gain import BLOCK, _block_bytes, _groups, _work, section_of
from kvplug_lab.engine.trial import pool_tokens
from kvplug_lab.models import tiny_llama


def test_an_unknown_policy_is_refused_before_anything_runs() -> None:
    result = CliRunner().invoke(app, ["gain", "--policy", "snapkv,snipkv"])
    assert result.exit_code == 2
    assert "--policy: unknown sequence policy 'snipkv'; installed: ada_kv, " in result.output


@pytest.mark.parametrize("name", ["snapkv", "sink_window"])
def test_every_kind_of_policy_gets_the_same_budget(name: str) -> None:
    section = section_of(name, 256)
    (choice,) = load_deployment(section).all()
    options = choice.options.model_dump()
    kept = options["budget"] if "budget" in options else options["sink"] + options["window"]
    assert kept == 256


def test_layers_in_groups_get_as_many_times_the_blocks(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path, layers=6)
    assert _groups(section_of("snapkv", 256), model) == 1
    assert _groups(section_of("sink_window", 256), model) == 1
    assert _groups(section_of("pyramidkv", 256), model) == 3


def test_long_prompts_and_long_outputs_come_mixed() -> None:
    work = _work(2, 3, 200, 99)
    assert [r.max_tokens for r in work] == [48, 99, 48, 99, 99]
    assert len({str(r.prompt) for r in work}) == 5
    assert BLOCK == 32


def test_an_unknown_format_is_refused_before_anything_runs() -> None:
    result = CliRunner().invoke(app, ["gain", "--format", "int4,int5"])
    assert result.exit_code == 2
    assert "unknown format policy 'int5'" in result.output


@pytest.mark.parametrize(
    ("section", "bytes_per_head"),
    [({"use": "int4"}, 32 + 32 + 8), ({"use": "plain"}, 256), ({"use": "kivi", "bits": 2}, 44)],
)
def test_formats_get_the_blocks_that_fit_the_same_memory(
    tmp_path: Path, section: dict[str, object], bytes_per_head: int
) -> None:
    model = tiny_llama(tmp_path, layers=3)
    assert _block_bytes({"format": section}, model) == BLOCK * 3 * 2 * bytes_per_head


def test_the_pool_is_what_vllm_says() -> None:
    assert pool_tokens("... CPU KV cache size: 46,592 tokens, Maximum ...") == 46592
    with pytest.raises(KVPlugError, match="does not state"):
        pool_tokens("nothing of the kind")
