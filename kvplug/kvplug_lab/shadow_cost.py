"""What the guard's shadow costs beside the requests of a server.

``python -m kvplug_lab.shadow_cost FILE --model M`` serves a deployment with a shadow, and the same
without it, one after the other and as often as there are rounds, and sends both the same requests
one at a time, with pauses. It prints what a request took, in seconds to its last token, the tokens
that shadows computed, and what became of watched answers. Pauses shorter than a shadow show what
stopping it costs, longer ones what is left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from kvplug_lab import texts

START_SECONDS = 600.0

NAME = "measured"


def without_shadow(file: Path) -> str:
    """The deployment's file without ``guard.shadow``.

    Raises:
        typer.BadParameter: It has none.
    """
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        section = data["kv-transfer-config"]["kv_connector_extra_config"]["kvplug"]
        del section["guard"]["shadow"]
    except (KeyError, TypeError):
        raise typer.BadParameter(f"{file} has no guard.shadow in its kvplug section") from None
    if not section["guard"]:
        del section["guard"]
    return yaml.safe_dump(data)


@contextmanager
def server(file: Path, model: str, folder: Path) -> Iterator[str]:
    """A server of a deployment while the block runs; gives its address.

    Raises:
        RuntimeError: It ended, or was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from kvplug.cli import app; app()", "serve", str(file)]
    command += ["--model", model, "--", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", NAME]
    log = folder / "server.log"
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"} | dict(os.environ)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no server:\n{log.read_text(errors='replace')[-4000:]}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def seconds_of(url: str, prompt: str, tokens: int) -> float:
    """Send one greedy request; returns the seconds until its last token."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    data = json.dumps(body | {"ignore_eos": True}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", data, {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
        answer.read()
    return time.perf_counter() - began


def shadow_metrics(url: str) -> dict[str, float]:
    """The shadow's counters and its state, by their own label."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if match := re.match(r"kvplug_shadow_(\w+?)(?:_total)?\{(.*)\} (\S+)$", line):
            name, labels, value = match.groups()
            own = re.findall(r'(?:state|result|of)="(\w+)"', labels)
            found[":".join([name, *own])] = float(value)
    return found


def main(
    file: Annotated[Path, typer.Argument(help="Deployment with guard.shadow.")],
    model: Annotated[str, typer.Option(help="Model id or folder.")],
    requests: Annotated[int, typer.Option(help="Requests of a server.")] = 24,
    words: Annotated[int, typer.Option(help="Words of a prompt.")] = 300,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 24,
    pause: Annotated[list[float] | None, typer.Option(help="Seconds between requests.")] = None,
    rounds: Annotated[int, typer.Option(help="Servers of each row.")] = 1,
) -> None:
    """Serve with and without the shadow, and print what requests took."""
    # So that the server, which has a session of its own, ends with the command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pauses = pause or [0.2, 3.0]
    prompts = texts.passages(texts.shakespeare(), requests * len(pauses) * rounds, words, seed=0)
    took: dict[tuple[str, float], list[float]] = {}
    seen: dict[float, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        off = folder / "without.yaml"
        off.write_text(without_shadow(file), encoding="utf-8")
        for which in range(rounds):
            for label, served in (("off", off), ("on", file)):
                with server(served, model, folder) as url:
                    at = which * requests * len(pauses)
                    seconds_of(url, "To be", 4)  # what is compiled or loaded on first use
                    for seconds in pauses:
                        before = shadow_metrics(url)
                        for prompt in prompts[at : at + requests]:
                            took.setdefault((label, seconds), []).append(
                                seconds_of(url, prompt, tokens)
                            )
                            time.sleep(seconds)
                        at += requests
                        if label == "on":
                            _add(seen.setdefault(seconds, {}), before, shadow_metrics(url))
    Console().print(_table(took, seen))


def _add(into: dict[str, float], before: dict[str, float], after: dict[str, float]) -> None:
    for key, value in after.items():
        into[key] = into.get(key, 0.0) + value - before.get(key, 0.0)


def _table(took: dict[tuple[str, float], list[float]], seen: dict[float, dict[str, Any]]) -> Table:
    table = Table()
    columns = (
        "pause, s",
        "shadow",
        "requests",
        "median, s",
        "90%, s",
        "again",
        "stopped",
        "tokens",
    )
    for name in columns:
        table.add_column(name, justify="right" if name != "shadow" else "left")
    for (label, pause), seconds in sorted(took.items(), key=lambda item: item[0][1]):
        more = ["", "", ""]
        if label == "on":
            counts = seen[pause]
            requests = counts.get("computed_tokens:requests", 0.0)
            share = counts.get("computed_tokens:shadows", 0.0) / requests if requests else 0.0
            more = [
                f"{counts.get('requests:compared', 0.0):.0f}",
                f"{counts.get('requests:stopped', 0.0):.0f}",
                f"{share:+.1%}",
            ]
        ninth = statistics.quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
        table.add_row(
            f"{pause:g}",
            label,
            str(len(seconds)),
            f"{statistics.median(seconds):.3f}",
            f"{ninth:.3f}",
            *more,
        )
    return table


if __name__ == "__main__":
    typer.run(main)
