"""Deployment files as kvplug reads them, against what vLLM's own parser makes of the same files."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvplug.errors import DeploymentError
from kvplug.hosts.vllm import arguments
from kvplug.hosts.vllm.flags import engine_from_flags, read_config

SECTION = {"prefix_cache": "lru", "sequence": {"use": "sink_window", "sink": 64, "window": 448}}
MODEL = Path(__file__).parent
"""Any folder: no model is read from it."""
CONNECTOR = {
    "kv_connector": "KVPlugConnector",
    "kv_connector_module_path": "kvplug.hosts.vllm.connector",
    "kv_role": "kv_both",
}


def connector(flag: str = "kv-transfer-config", section: Any = SECTION) -> str:
    """The connector's flag as YAML."""
    value = {**CONNECTOR, "kv_connector_extra_config": {"kvplug": section}}
    return f"{flag}: {json.dumps(value)}\n"


PLAIN = connector()
AS_JSON = f"kv-transfer-config: '{connector().partition(': ')[2].strip()}'\n"
DOTTED = "".join(f"kv-transfer-config.{k}: {v}\n" for k, v in CONNECTOR.items()) + (
    f"kv_transfer_config.kv_connector_extra_config.kvplug: {json.dumps(SECTION)}\n"
)

SAME = {
    "flags with dashes": "block-size: 32\nmax-model-len: 4096\n" + PLAIN,
    "flags with underscores": "block_size: 32\nmax_model_len: 4096\n" + PLAIN,
    "a shortened flag": "max-model: 4096\nenforce-e: true\n" + PLAIN,
    "a shortened connector": connector("kv-transfer-conf"),
    "underscores and shortened": connector("kv_transfer_c"),
    "quoted numbers": "block-size: '32'\ntensor-parallel-size: '2'\n" + PLAIN,
    "human numbers": "max-model-len: 4k\nmax-num-batched-tokens: 1K\n" + PLAIN,
    "octal and hexadecimal": "block-size: 0x20\nnum-gpu-blocks-override: 0400\n" + PLAIN,
    "numbers with underscores": "max-model-len: 4_096\n" + PLAIN,
    "JSON in YAML": AS_JSON + "block-size: 32\n",
    "human numbers in JSON": AS_JSON.replace("448", "4k").replace("64", "1k"),
    "dotted connector": DOTTED,
    "dotted below the section": DOTTED
    + "kv-transfer-config.kv_connector_extra_config.kvplug.format: int8\n",
    "dotted text": DOTTED.replace(json.dumps(SECTION), f"'{json.dumps(SECTION)}'"),
    "false as the flag is spelled": "enable-prefix-caching: false\n" + PLAIN,
    "false with underscores": "enable_prefix_caching: false\n" + PLAIN,
    "no- with dashes": "no-enable-prefix-caching: true\n" + PLAIN,
    "no- with underscores": "no_enable_chunked_prefill: true\n" + PLAIN,
    "no- that is false": "no-enable-prefix-caching: false\n" + PLAIN,
    "off and yes": "enable-chunked-prefill: off\nenforce-eager: yes\n" + PLAIN,
    "async scheduling": "async-scheduling: false\n" + PLAIN,
    "speculation": "speculative-config: {method: ngram, num_speculative_tokens: 3}\n" + PLAIN,
    "speculation as JSON": 'speculative-config: \'{"method": "ngram"}\'\n' + PLAIN,
    "speculation, dotted": "speculative-config.method: ngram\n" + PLAIN,
    "parallel": "tensor-parallel-size: 2\ndecode_context_parallel_size: 2\n" + PLAIN,
    "lists": "served-model-name: [a, b]\nlogits-processors: [x.y:Z]\n" + PLAIN,
    "an empty list": "served-model-name: []\n" + PLAIN,
    "null": "quantization: null\nkv-cache-dtype: auto\n" + PLAIN,
    "compilation": "compilation-config.mode: 0\ncompilation-config.cudagraph_mode: NONE\n" + PLAIN,
    "an anchor": "seed: &n 32\nblock-size: *n\n" + PLAIN,
    "numbers as keys": connector(section={"format": {"use": "kivi", "layers": {"0": 8}}}).replace(
        '"0": 8', "0: 8"
    ),
    "an empty section": connector(section={}),
    "a null section": connector(section=None),
    "frontend flags": "port: 8123\nhost: 127.0.0.1\ndisable-log-stats: true\n" + PLAIN,
}

NEITHER = {
    "no such flag": "blok-size: 32\n" + PLAIN,
    "an ambiguous flag": "max: 32\n" + PLAIN,
    "text instead of a number": "block-size: many\n" + PLAIN,
    "null for a number": "port:\n" + PLAIN,
    "a quoted true": "enforce-eager: 'true'\n" + PLAIN,
    "a list for one value": "middleware: [a.B, c.D]\n" + PLAIN,
    "a date in the section": PLAIN.replace("448", "2001-01-01"),
    "broken JSON": "kv-transfer-config: '{\"kv_connector\": '\n",
    "no role": PLAIN.replace('"kv_role": "kv_both", ', ""),
    "help": "help: true\n" + PLAIN,
    "a key with a value in it": '"port=8001": x\n' + PLAIN,
    "true at the end of a dotted flag": PLAIN + "compilation-config.mode: true\n",
}

REFUSED = {
    "one flag in two spellings": (
        "block-size: 16\nblock_size: 32\n" + PLAIN,
        ":2: block_size: sets block-size, which the file sets already.",
    ),
    "one flag, whole and shortened": (
        "max-model-len: 64\nmax-model: 32\n" + PLAIN,
        ":2: max-model: sets max-model-len, which the file sets already.",
    ),
    "one flag and its opposite": (
        "enable-prefix-caching: true\nno_enable_prefix_caching: true\n" + PLAIN,
        ":2: no_enable_prefix_caching: sets enable-prefix-caching, which the file sets already.",
    ),
    "nested and dotted": (
        PLAIN + "kv-transfer-config.kv_role: kv_producer\n",
        ":2: kv-transfer-config.kv_role: sets kv-transfer-config.kv_role, which",
    ),
    "dotted twice": (
        DOTTED + "kv-transfer-config.kv_connector_extra_config: {kvplug: {prefix_cache: fifo}}\n",
        ":5: kv-transfer-config.kv_connector_extra_config: sets",
    ),
    "a key twice in JSON": (
        AS_JSON.replace('"sequence"', '"prefix_cache": "fifo", "sequence"'),
        ":1: kv-transfer-config: names 'prefix_cache' twice in its JSON.",
    ),
    "a dropped flag that vLLM does not have": (
        "enable-prefix-cachng: false\n" + PLAIN,
        ":1: enable-prefix-cachng: is not a vLLM flag. Fix: did you mean enable-prefix-caching?",
    ),
    "another file": ("config: x.yaml\n" + PLAIN, ":1: config: names another file"),
    "a dropped dotted false": (
        "compilation-config.compile_mm_encoder: false\n" + PLAIN,
        ":1: compilation-config.compile_mm_encoder: is true or false, which vLLM reads in no",
    ),
}


def theirs(file: Path | None, *line: str) -> Any:
    """vLLM's engine arguments for a file and a command line; None where its server would not
    start."""
    parser = make_arg_parser(FlexibleArgumentParser())
    config = ["--config", str(file)] if file is not None else []
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            parsed = parser.parse_args([*config, "--model", str(MODEL), *line])
        except (SystemExit, Exception):
            return None
    return None if parsed.model_tag else AsyncEngineArgs.from_cli_args(parsed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "engine.yaml"


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_what_check_reads_is_what_the_engine_gets(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    args = theirs(file)
    assert args is not None
    ours = read_config(file)
    transfer = args.kv_transfer_config
    section = transfer.kv_connector_extra_config["kvplug"]
    assert ours.deployment.section == ({} if section is None else section)
    given = {"kv_connector", "kv_connector_module_path", "kv_role", "kv_connector_extra_config"}
    assert ours.transfer == {name: getattr(transfer, name) for name in given}
    default = theirs(None)
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if flag in ours.flags:
            assert ours.flags[flag] == value, flag
        elif name not in ("kv_transfer_config", "model"):
            assert value == getattr(default, name), flag
    engine = engine_from_flags(ours.flags)
    assert engine.block_size == (args.block_size or 16)
    assert engine.max_model_len == (args.max_model_len or 0)


@pytest.mark.parametrize("text", NEITHER.values(), ids=NEITHER)
def test_what_the_engine_refuses_check_refuses(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert theirs(file) is None
    with pytest.raises(DeploymentError) as refused:
        read_config(file)
    assert str(refused.value).startswith(str(file)) and " Fix: " in str(refused.value)


@pytest.mark.parametrize(("text", "told"), REFUSED.values(), ids=REFUSED)
def test_what_the_engine_would_pass_over_is_refused(file: Path, text: str, told: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert theirs(file) is not None
    with pytest.raises(DeploymentError) as refused:
        read_config(file)
    assert str(refused.value).startswith(f"{file}{told}")


def test_the_command_line_comes_after_the_file(file: Path) -> None:
    file.write_text("block-size: 32\nenforce-eager: true\n" + PLAIN, encoding="utf-8")
    line = ["--block_size", "64", "--no-enable-prefix-caching", "-tp", "2"]
    args = theirs(file, *line)
    flags = read_config(file, line).flags
    assert flags == {
        "block-size": 64,
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "tensor-parallel-size": 2,
    }
    assert all(getattr(args, name.replace("-", "_")) == value for name, value in flags.items())


def test_vllm_serve_hears_no_false_in_a_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "enable-prefix-caching: false\nenable_chunked_prefill: false\nenforce-eager: false\n"
    file.write_text(text + PLAIN, encoding="utf-8")
    server = read_config(file)
    assert server.flags == {"enable-prefix-caching": False, "enforce-eager": False}
    assert server.remarks == (
        "enable_chunked_prefill: false is not heard by python -m "
        "vllm.entrypoints.openai.api_server, which keeps its default; "
        "write no-enable-chunked-prefill: true.",
    )
    monkeypatch.setattr("kvplug.hosts.vllm.flags.vllm_distribution", lambda: "vllm")
    command = read_config(file)
    assert command.flags == {}
    assert [remark.split(",")[0] for remark in command.remarks] == [
        "enable-prefix-caching: false is not heard by vllm serve",
        "enable_chunked_prefill: false is not heard by vllm serve",
    ]
    # vLLM's own program: a parser of commands, which has the server's flags in a command of it.
    parser = FlexibleArgumentParser()
    make_arg_parser(parser.add_subparsers(dest="subparser").add_parser("serve"))
    parsed = parser.parse_args(["serve", "MODEL", "--config", str(file)])
    assert parsed.enable_prefix_caching is None


def test_an_engine_id_is_kept_where_it_was_given(file: Path) -> None:
    text = PLAIN.replace('"kv_role"', '"engine_id": "mine", "kv_role"')
    file.write_text(text, encoding="utf-8")
    assert read_config(file).transfer["engine_id"] == "mine"


def test_reading_arguments_leaves_logging_as_it_was() -> None:
    import logging

    before = logging.root.manager.disable
    arguments.parse(["--port", "8000"], "api_server")
    assert logging.root.manager.disable == before
