"""Deployments for a GPU and presets are admitted on the engine that vLLM takes there by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
FOLDERS = ("gpu", "presets")
CONFIGS = [f for of in FOLDERS for f in sorted((HERE.parent / "configs" / of).glob("*.yaml"))]
RECALLS = "keydiff with on_demand"
"""A deployment that ships with none: the second runner cannot recall tokens from the host."""


@pytest.fixture(scope="module")
def admitted(tiny: Path) -> dict[str, Any]:
    """Deployment to what the host says of it where Triton seems able to run, as it is on a GPU."""
    path = os.pathsep.join(
        filter(None, [str(HERE / "second_runner"), os.environ.get("PYTHONPATH")])
    )
    environment = {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tiny)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_it_is_admitted_on_the_second_runner(admitted: dict[str, Any], file: Path) -> None:
    said = admitted[file.stem]
    assert said["error"] is None
    assert said["second_runner"]
    kivi = "use: kivi" in file.read_text(encoding="utf-8")
    assert said["block_size"] == (64 if kivi else 16), "vLLM's default, but for kivi"


def test_the_host_sees_what_that_runner_cannot_do(admitted: dict[str, Any]) -> None:
    assert "second model runner" in admitted[RECALLS]["error"]


def _main(model: str) -> None:
    """A child: admit every deployment, and print what the host says of each."""
    from vllm.engine.arg_utils import EngineArgs

    from kvplug.errors import DeploymentError
    from kvplug.hosts.vllm.admission import deployment_of
    from kvplug.yaml_file import read_yaml

    files = {file.stem: read_yaml(file)[0] for file in CONFIGS}
    copy = json.loads(json.dumps(files["keydiff"]))
    section = copy["kv-transfer-config"]["kv_connector_extra_config"]["kvplug"]
    section["sequence"]["on_demand"] = 64
    found = {}
    for name, data in (files | {RECALLS: copy}).items():
        flags = {flag.replace("-", "_"): value for flag, value in data.items()}
        flags.pop("shutdown_timeout")  # the server's
        config = EngineArgs(model, **flags).create_engine_config()
        error = None
        try:
            deployment_of(config)
        except DeploymentError as refused:
            error = str(refused)
        found[name] = {
            "second_runner": bool(config.use_v2_model_runner),
            "block_size": config.cache_config.block_size,
            "error": error,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
