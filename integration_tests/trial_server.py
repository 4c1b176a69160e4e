"""Trials in processes of their own that need not import vLLM again.

Importing vLLM takes two thirds of a small engine's start. A server process imports it once and
forks for every trial; the child has what a fresh process has after its imports, no engine was ever
built in its parent, and nothing it does outlives it. Orders are JSON lines on the server's standard
input; it answers each with the child's exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from kvplug_lab.engine.detached import detach, die_with_parent, take_environment

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import TrialResult, TrialSpec

PRELOADED = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    # Of vLLM and of kvplug, what an engine imports only while it starts.
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "kvplug.hosts.vllm.connector",
    "kvplug.hosts.vllm.plugin",
    "kvplug_lab.engine.trial",
    "kvplug_policies.builtin",
)

SECOND_RUNNER = Path(__file__).parent / "second_runner"
BACKEND = "KVPLUG_TEST_ATTENTION"
"""Environment variable that names the attention backend of a trial's layers."""
LONGEST = 600
"""Seconds after which a trial writes where it stands, and ends: less than a test has."""
AHEAD = "KVPLUG_TEST_AHEAD"
"""Environment variable that has a trial schedule a step ahead."""


class TrialServer:
    """Starts the server when the first trial needs it; one trial at a time.

    Args:
        log: Where the server's own output goes.
        second_runner: Run vLLM's second model runner, the one GPUs have, with Triton kernels
            interpreted.
    """

    def __init__(self, log: Path, second_runner: bool = False):
        self._log = log
        self._second_runner = second_runner
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        spec: TrialSpec,
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        phases: list[str] | None = None,
        seconds: float = LONGEST,
    ) -> TrialResult:
        """Run a trial; what `kvplug_lab.engine.trial.run_fresh` does.

        Args:
            spec: What to run.
            log: Where the engine's log goes.
            env: Environment variables added to this process's own.
            phases: Gets the phases that the trial went through, each once.
            seconds: What it may take; later it ends, with where its threads stood in its log.

        Raises:
            TrialFailed: The engine's process failed, or took too long.
        """
        from kvplug_lab.engine.trial import TrialFailed, TrialResult

        with tempfile.TemporaryDirectory(prefix="kvplug-trial-") as scratch:
            folder = Path(scratch)
            (folder / "spec.json").write_text(spec.to_json(), encoding="utf-8")
            environment = self._environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"} | (env or {})
            order = {"folder": scratch, "log": str(log), "env": environment, "seconds": seconds}
            try:
                code = self._ask(order)
            except BaseException:
                self.stop()  # the trial of a test that ran out of time ends with it
                raise
            if phases is not None:
                reported = (folder / "phases").read_text(encoding="utf-8").split()
                phases.extend(dict.fromkeys(reported))
            result = folder / "result.json"
            if code or not result.exists():
                tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
                raise TrialFailed(f"the engine run ended with code {code}:\n{tail}")
            return TrialResult.from_json(result.read_text(encoding="utf-8"))

    def stop(self) -> None:
        """End the server and the trial that it runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self._second_runner:
            path = [str(SECOND_RUNNER), environment.get("PYTHONPATH", "")]
            return environment | {
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "TRITON_INTERPRET": "1",
                "VLLM_USE_V2_MODEL_RUNNER": "1",
            }
        # Kernel tests set this for their own process; an engine must not inherit it.
        environment.pop("TRITON_INTERPRET", None)
        return environment

    def _ask(self, order: dict[str, Any]) -> int:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the trial server ended:\n{self._log.read_text(errors='replace')}")
        return int(reply)

    def _start(self) -> subprocess.Popen[str]:
        # Some variables are read when the modules that ask for them are imported.
        environment = self._environment() | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        with self._log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )


def _preload() -> None:
    """Import what every engine imports, and build nothing."""
    for name in PRELOADED:
        importlib.import_module(name)


def _become(order: dict[str, Any]) -> None:
    """Turn a forked child into the process of a trial."""
    detach(Path(order["log"]))
    faulthandler.dump_traceback_later(order["seconds"], exit=True, file=2)
    environment: dict[str, str] = order["env"]
    take_environment(environment)
    folders = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]


def _run(folder: Path) -> None:
    """What ``python -m kvplug_lab.engine.trial`` does."""
    from kvplug_lab.engine.trial import TrialSpec, run_trial

    if AHEAD in os.environ:
        importlib.import_module("as_on_cuda").schedule_ahead()
    if BACKEND in os.environ:
        importlib.import_module("as_on_cuda").choose(os.environ[BACKEND])

    spec = TrialSpec.from_json((folder / "spec.json").read_text(encoding="utf-8"))
    with (folder / "phases").open("w", encoding="utf-8") as phases:

        def progress(what: dict[str, Any]) -> None:
            print(what["phase"], file=phases, flush=True)

        result = run_trial(spec, progress)
    (folder / "result.json").write_text(result.to_json(), encoding="utf-8")


def _end() -> NoReturn:
    """End a trial's process as `multiprocessing` ends one it forked.

    Threads are joined and what was registered for the exit runs; taking every imported module down
    after that would take as long as the engine's start.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _serve(orders: TextIO, replies: int) -> Path | None:
    """Fork for every order.

    Returns:
        In a child the folder of its trial, in the server None once there are no more orders.
    """
    for line in iter(orders.readline, ""):
        order = json.loads(line)
        child = os.fork()
        if not child:
            os.close(replies)
            _become(order)
            return Path(order["folder"])
        _, status = os.waitpid(child, 0)
        os.write(replies, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return None


def main() -> None:
    """Entry point of the server process."""
    die_with_parent()
    replies = os.dup(1)
    os.dup2(2, 1)
    _preload()
    # A trial's collections need not go through what was imported, nor copy its pages.
    gc.collect()
    gc.freeze()
    folder = _serve(sys.stdin, replies)
    if folder is not None:
        _run(folder)
        _end()


if __name__ == "__main__":
    main()
