"""The wheel alone serves: kvplug from its wheel in an empty environment, without the lab.

What kvplug depends on is linked into that environment from the one that runs the tests; nothing
else of this repository is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import site
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path
from typing import Any

import pytest

from kvplug_lab import models

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/cpu/quickstart.yaml"
START_SECONDS = 600
STOP_SECONDS = 300


class Environment:
    """An environment of its own with the wheel in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "COLUMNS": "100"}
        self.environ.pop("TRITON_INTERPRET", None)

    @property
    def packages(self) -> Path:
        (found,) = (self.folder / "venv").glob("lib/python*/site-packages")
        return found

    def command(self, *arguments: str) -> list[str]:
        return [str(self.folder / "venv/bin/kvplug"), *arguments]

    def kvplug(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    made = Environment(folder)
    venv.create(folder / "venv")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "venv/bin/python")]
    install += ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=made.environ)
    linked = folder / "linked"
    linked.mkdir()
    for packages in site.getsitepackages():
        for entry in Path(packages).iterdir():
            ours = "kvplug" in entry.name or entry.suffix == ".pth"
            if not ours and not (linked / entry.name).exists():
                (linked / entry.name).symlink_to(entry)
    (made.packages / "linked.pth").write_text(f"{linked}\n", encoding="utf-8")
    return made


def test_kvplug_comes_from_the_wheel_and_nothing_else_does(environment: Environment) -> None:
    code = (
        "import importlib.metadata as m, importlib.util as u, json, kvplug\n"
        "names = ['kvplug_lab', 'kvplug_reuse_learned', 'kvplug_attention_memo']\n"
        "names += ['kvplug_kvpress']\n"
        "print(json.dumps([kvplug.__file__, [n for n in names if u.find_spec(n)],"
        " [d.name for d in m.distributions() if 'kvplug' in d.name]]))"
    )
    done = subprocess.run(
        [environment.folder / "venv/bin/python", "-c", code],
        cwd=environment.folder,
        env=environment.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    file, found, distributions = json.loads(done.stdout)
    assert environment.packages in Path(file).parents
    assert (found, distributions) == ([], ["kvplug"])


def test_the_commands_are_the_products(environment: Environment) -> None:
    done = environment.kvplug("--help")
    assert (done.returncode, done.stderr) == (0, "")
    commands = re.findall(r"^│ (\w+)  ", done.stdout, re.MULTILINE)
    look = ["top", "explain", "doctor"]
    choose = ["policies", "presets", "check", "plan"]
    assert commands == ["serve", "record", *look, *choose, "new"]


def test_a_command_of_the_lab_names_the_extra(environment: Environment) -> None:
    done = environment.kvplug("eval", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "`kvplug eval` is not installed; it comes with pip install 'kvplug[lab]'.\n"
    )


@pytest.mark.slow
def test_the_built_in_policies_are_there(environment: Environment) -> None:
    found = json.loads(environment.kvplug("policies", "--json").stdout)
    assert found["broken"] == {}
    assert {p["kind"] for p in found["policies"]} >= {"prefix_cache", "sequence", "format"}


@pytest.mark.slow
def test_it_serves_dry(environment: Environment) -> None:
    done = environment.kvplug("serve", str(CONFIG), "--model", "acme/tiny", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"--config {CONFIG}" in done.stdout
    room = ["--", "--block-size", "32"]
    done = environment.kvplug("serve", "gpu/int8", "--model", "acme/tiny", "--dry-run", *room)
    assert done.returncode == 0, done.stderr
    assert f"--config {environment.packages}/kvplug/_configs/gpu/int8.yaml" in done.stdout
    done = environment.kvplug("serve", str(CONFIG), "--model", "smollm2", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "kvplug[lab]" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, data: dict[str, Any] | None = None) -> str:
    body = json.dumps(data).encode() if data is not None else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(answer.read().decode())


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_serves_a_completion(environment: Environment, tmp_path: Path) -> None:
    model = models.tiny_llama(tmp_path / "tiny")
    port, log = free_port(), tmp_path / "server.log"
    command = environment.command("serve", str(CONFIG), "--model", str(model), "--")
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                ask(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, log.read_text("utf-8", "replace")
                assert time.monotonic() < deadline, log.read_text("utf-8", "replace")
                time.sleep(0.5)
        asked = {"model": "tiny", "prompt": "Say something.", "max_tokens": 8, "ignore_eos": True}
        answer = json.loads(ask(f"{url}/v1/completions", asked))
        assert answer["usage"]["completion_tokens"] == 8
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    written = log.read_text("utf-8", "replace")
    assert "kvplug is on: prefix_cache: lru {}; sequence: sink_window" in written
