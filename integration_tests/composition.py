"""Runs every pair of kinds under combinations of engine features, and judges every answer.

    python integration_tests/composition.py --json docs/figures/composition.json

A cell is one deployment on one engine. It is refused before the engine starts, with a sentence, or
it runs and every token is what an oracle of plain transformers says. Each deployment is run under
so many combinations that every two settings it is admitted with stand together in one of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reused_prompt import AT_A, GAP, WHOLE, A, B, Q, S, texts

HERE = Path(__file__).resolve().parent

SECONDS = 420
"""After which a cell counts as hanging."""

SWITCHES = {
    "no prefix cache": "prefix caching off",
    "chunks": "prompts in chunks of 64 tokens",
    "ahead": "async scheduling",
    "n-gram": "n-gram speculation",
    "pressure": "a pool of 23 blocks; all preempted once where steps end before the next begins",
    "two ranks": "tensor parallel over two ranks",
    "processes": "engine and workers in processes of their own",
    "second runner": "vLLM's second model runner",
}
"""What a cell's engine has on, and what that is."""

SLOW = frozenset({"two ranks", "processes"})
"""Of these, what starts slowly."""

Switches = frozenset[str]

CHUNK = 64
POOL = 23
BLOCK = 32
SINK, WINDOW = 40, 100
SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}

# -- deployments -----------------------------------------------------------------------------------

PREFIX_CACHE = {"prefix_cache": "s3fifo"}
WINDOWED = {"sequence": {"use": "sink_window", "sink": SINK, "window": WINDOW}}
KEPT = {"budget": 128, "sink": 4, "interval": 32, "recent": 16}
SCORED = {"sequence": {"use": "keydiff", **KEPT}}
SUMMED = {"sequence": {"use": "h2o", "recent_part": 0.125, **KEPT}}
CODED = {"format": {"use": "int4", "fit": 0, "rotate": False, "exact_chunk": False}}
MEMO = {"attention": {"use": "memo", "cosine": 1.0, "near": 64, "every": 8}}
REUSED = {
    "reuse": {
        "use": ["structure", "position", "mask"],
        "approximate": True,
        "segments": {"by": "request", "min_tokens": 16},
        "recompute": {"gaps": 64},
    }
}
GUARDED = {"guard": {"max_entropy_drift": 0.001, "max_logprob_drift": 0.001, "history": 1}}

KINDS: dict[str, dict[str, Any]] = {
    "prefix_cache": PREFIX_CACHE,
    "sequence (window)": WINDOWED,
    "sequence (keys)": SCORED,
    "sequence (attention)": SUMMED,
    "format": CODED,
    "reuse": REUSED,
    "attention": MEMO,
    "guard": REUSED | GUARDED,
}
"""A representative of each kind, of two kinds of scores."""


def deployments() -> dict[str, dict[str, Any]]:
    """Stock, each kind alone and every pair of kinds."""
    found: dict[str, dict[str, Any]] = {"empty section": {}}
    found |= KINDS
    for (one, mine), (other, theirs) in itertools.combinations(KINDS.items(), 2):
        if not mine.keys() & theirs.keys():
            found[f"{one} + {other}"] = mine | theirs
    return found


# -- cells -----------------------------------------------------------------------------------------


def possible(switches: Switches) -> bool:
    """True where vLLM's CPU build itself can run it."""
    second = "second runner" in switches
    # The CPU's first runner does not schedule ahead, nor does n-gram speculation.
    if "ahead" in switches and (not second or "n-gram" in switches):
        return False
    return "two ranks" not in switches or "processes" in switches


def combinations() -> list[Switches]:
    """Every combination of switches that vLLM's CPU build can run, those of few first."""
    names = list(SWITCHES)
    every = (
        frozenset(n for n, on in zip(names, bits, strict=True) if on)
        for bits in itertools.product((False, True), repeat=len(names))
    )
    return sorted(filter(possible, every), key=lambda s: (len(s), sorted(s)))


def pairs(switches: Switches) -> set[tuple[tuple[str, bool], tuple[str, bool]]]:
    """Every two settings of a combination; beside what starts slowly, only what is on."""
    settings = [(name, name in switches) for name in SWITCHES]
    return {
        (one, other)
        for one, other in itertools.combinations(settings, 2)
        if (one[1] and other[1]) or not SLOW & {n for n, on in (one, other) if on}
    }


def covering(admitted: Sequence[Switches], seed: str) -> list[Switches]:
    """Few of the combinations in which every two settings of any of them stand together."""
    left = set().union(*map(pairs, admitted)) if admitted else set()
    order = list(admitted)
    random.Random(seed).shuffle(order)
    found = []
    while left:
        best = max(order, key=lambda s: (len(pairs(s) & left), -len(SLOW & s)))
        found.append(best)
        left -= pairs(best)
    return found


def covered(ran: Sequence[Switches], admitted: Sequence[Switches]) -> list[int]:
    """Pairs of settings that stood together in a run, and those that can."""
    every = set().union(*map(pairs, admitted))
    return [len(every & set().union(*map(pairs, ran))), len(every)]


def engine_of(section: Mapping[str, Any], switches: Switches) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    from kvplug.hosts.vllm.flags import EXTENSION, GUARD

    engine: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 640,
        "block_size": BLOCK,
        "enforce_eager": True,
        "num_gpu_blocks_override": POOL if "pressure" in switches else 160,
        "max_num_batched_tokens": CHUNK if "chunks" in switches else 1024,
        "enable_prefix_caching": "no prefix cache" not in switches,
    }
    if "reuse" in section:
        engine["worker_extension_cls"] = EXTENSION
    if "guard" in section:
        engine["logits_processors"] = [GUARD]
    if "n-gram" in switches:
        engine["speculative_config"] = SPECULATION
    if "two ranks" in switches:
        engine["tensor_parallel_size"] = 2
    return engine


# -- the workload ----------------------------------------------------------------------------------

LENGTHS = [3, 150, 320, 500]
GENERATED = 16
ASKS_REUSE = {"reuse": "approximate"}
RESET_AT = 12


SEGMENTS = [len(part) for part in (S, B, GAP, A)]


@dataclass
class Asked:
    """One request, and what is known of its answer.

    Attributes:
        prompt: Token ids, or those that follow the text of ``after``.
        wave: As of a `TrialRequest`.
        max_tokens: Tokens of its answer.
        kvplug: Its options.
        after: Index of the request that it goes on from.
        salt: Its cache salt.
        keeps: No sequence policy applies to it.
        foreign: Stored KV of another text is used for it.
    """

    prompt: list[int]
    wave: int
    max_tokens: int = GENERATED
    kvplug: dict[str, Any] | None = None
    after: int | None = None
    salt: str | None = None
    keeps: bool = False
    foreign: bool = False


def workload(section: Mapping[str, Any]) -> list[Asked]:
    """What is asked under a deployment."""
    prompts = texts(*LENGTHS, seed=0)
    asked: list[Asked] = []
    if "reuse" in section:
        own: dict[str, Any] = {"segments": SEGMENTS}
        asked += [
            Asked(S + A, 0, 1, {"segments": [len(S), len(A)]}),
            Asked(S + B, 1, 1, {"segments": [len(S), len(B)]}),
            Asked(WHOLE, 2, kvplug=own | ASKS_REUSE, foreign=True),
            Asked(prompts[1], 2),
            # What stands on foreign KV is nothing that an exact request may find.
            Asked(texts(9, seed=9)[0], 3, after=2),
            Asked(WHOLE[: -len(Q)] + texts(len(Q), seed=8)[0], 4, kvplug=own | {"reuse": "off"}),
            Asked(WHOLE, 5, kvplug=own),
            Asked(S + A + Q, 5, kvplug={"segments": [len(S), len(A)]}),
            Asked(WHOLE, 5, salt="another tenant", kvplug=own | ASKS_REUSE),
        ]
    else:
        asked += [Asked(p, 0) for p in prompts]
        asked += [
            Asked(texts(20, seed=3)[0], 1, after=2),
            Asked(prompts[1], 1),
            Asked(prompts[2], 1, salt="another tenant"),
        ]
    last = asked[-1].wave + 1
    if "sequence" in section:
        asked.append(Asked(prompts[3], last, kvplug={"sequence": "off"}, keeps=True))
        asked.append(Asked(prompts[2], last))
    if "attention" in section:
        asked.append(Asked(prompts[2], last, kvplug={"attention": "approximate"}))
        asked.append(Asked(prompts[1], last))
    return asked


class Expected:
    """Answers of the oracle, each computed once.

    Args:
        folder: Where models are written.
    """

    def __init__(self, folder: Path):
        from kvplug_lab import models

        self.tiny = models.tiny_llama(folder / "tiny", layers=2)
        # Deep enough for a token's KV to depend on the text before it.
        self.deep = models.tiny_llama(folder / "deep", layers=6, seed=2)
        self._oracles: dict[Path, Any] = {}
        self._found: dict[str, list[int]] = {}

    def model(self, section: Mapping[str, Any]) -> Path:
        """The model that a deployment is run on."""
        return self.deep if "reuse" in section else self.tiny

    def answers(self, section: Mapping[str, Any], switches: Switches) -> list[list[int]]:
        """What the workload's requests are answered."""
        found: list[list[int]] = []
        asked = workload(section)
        for one in asked:
            before: list[int] = []
            if one.after is not None:
                before = asked[one.after].prompt + found[one.after]
            found.append(self.answer(section, switches, one, before + one.prompt))
        return found

    def answer(
        self, section: Mapping[str, Any], switches: Switches, one: Asked, prompt: list[int]
    ) -> list[int]:
        """What one request of a workload is answered; ``prompt`` is its whole text."""
        key = repr((sorted(section), section.get("sequence"), one.keeps, one.foreign, prompt))
        key += repr("pressure" in switches) + repr(self.model(section))
        if key not in self._found:
            oracle, how = self._oracle(section, switches, one)
            self._found[key] = oracle.answer(prompt, one.max_tokens, **how)
        return self._found[key]

    def behind(
        self,
        section: Mapping[str, Any],
        switches: Switches,
        one: Asked,
        prompt: list[int],
        answer: list[int],
    ) -> float:
        """How far an answer is from the likeliest tokens at most, in logits."""
        oracle, how = self._oracle(section, switches, one)
        found: float = oracle.behind(prompt, answer, **how)
        return found

    def _oracle(
        self, section: Mapping[str, Any], switches: Switches, one: Asked
    ) -> tuple[Any, dict[str, Any]]:
        from composed_oracle import ComposedOracle
        from format_oracle import per_token
        from oracle import visible
        from pruned_oracle import Rule, heavy, keydiff

        how: dict[str, Any] = {}
        if "format" in section:
            how["stored"] = per_token(4)
        use = "" if one.keeps else section.get("sequence", {}).get("use", "")
        if use == "sink_window":
            how["visible"] = lambda n: visible(n, BLOCK, SINK, WINDOW)
        elif use:
            hold = (POOL - 1) // 2 * BLOCK if "pressure" in switches else None
            how["score"] = {"keydiff": keydiff, "h2o": heavy}[use]
            how["rules"] = [Rule(128, 32, 4, 16, BLOCK, hold)]
        model = self.model(section)
        if model not in self._oracles:
            self._oracles[model] = ComposedOracle(model)
        oracle = self._oracles[model]
        if one.foreign:
            moved = oracle.segment(S, A, AT_A - len(S), how.get("stored"))
            how |= {"loaded": [(AT_A, moved)], "fresh": [(AT_A - len(GAP), AT_A)]}
        return oracle, how


# -- running and judging ---------------------------------------------------------------------------


@dataclass
class Cell:
    """A deployment on an engine, and what came of it.

    Attributes:
        deployment: Name of the deployment.
        switches: What the engine has on.
        verdict: ``right``, ``refused`` or ``wrong``.
        why: The refusal, or what was wrong.
        seconds: How long it took.
        preemptions: Times a request was preempted.
    """

    deployment: str
    switches: list[str]
    verdict: str
    why: list[str] = field(default_factory=list)
    seconds: float = 0.0
    preemptions: int = 0


def requests_of(asked: Sequence[Asked]) -> list[Any]:
    """The requests of a workload as a trial takes them."""
    from kvplug_lab.engine.trial import TrialRequest

    return [
        TrialRequest(one.prompt, one.max_tokens, one.wave, one.kvplug, one.after, one.salt)
        for one in asked
    ]


CLOSE = 0.1
"""Logits that a token may be behind the likeliest one under a format, where logits spread by 4: the
order of a sum decides now and then to which of two codes a number is rounded."""


def judge(
    section: Mapping[str, Any], switches: Switches, result: Any, expected: Expected
) -> list[str]:
    """What is wrong with a run."""
    found = []
    asked, rights = workload(section), expected.answers(section, switches)
    for i, (one, answer, right) in enumerate(zip(asked, result.answers, rights, strict=True)):
        said = answer.kvplug or {}
        # Once preempted, a request is computed from its text, and what it had used is not used.
        anything = one.foreign and result.preemptions
        if one.after is not None and asked[one.after].foreign and result.preemptions:
            continue
        if answer.token_ids != right and not anything:
            prompt = list(one.prompt)
            if one.after is not None:
                prompt = asked[one.after].prompt + result.answers[one.after].token_ids + prompt
            near = "format" in section and len(answer.token_ids) == len(right)
            if near:
                how_far = expected.behind(section, switches, one, prompt, answer.token_ids)
                near = how_far < CLOSE
            both = zip(answer.token_ids, right, strict=False)
            at = next((n for n, (a, b) in enumerate(both) if a != b), len(right))
            if not near:
                found.append(f"request {i}: differs from token {at} of {len(right)} on")
        used = said.get("reused") or result.preemptions
        if one.foreign and (said.get("exact", True) or not used):
            found.append(f"request {i}: foreign KV was to be used, the answer says {said}")
        approximates = {"sequence", "format"} & section.keys() or "attention" in said
        if not one.foreign and not approximates and said.get("exact") is False:
            found.append(f"request {i}: exact, the answer says {said}")
        if "format" in section and said.get("exact", True):
            found.append(f"request {i}: stored in a format, the answer says {said}")
        if one.kvplug == {"attention": "approximate"} and said.get("attention") != "memo":
            found.append(f"request {i}: memo was asked for, the answer says {said}")
        if one.keeps and "format" not in section and said != {"exact": True, "blocks_freed": 0}:
            found.append(f"request {i}: keeps everything, the answer says {said}")
        windowed = "sequence" in section and not one.keeps and len(one.prompt) >= 320
        if windowed and (said.get("exact", True) or not said.get("blocks_freed")):
            found.append(f"request {i}: past its budget, the answer says {said}")
        if said.get("refused"):
            found.append(f"request {i}: refused {said['refused']}")
    if not result.reports and "processes" not in switches and section:
        found.append("nothing reported")
    # Names of slots stay until others take the slots: of no more than there are slots.
    known = [where for where in result.leftovers if "._in_force" not in where]
    found += [f"still known of after their end: {where}" for where in known]
    for report in result.reports:
        if report["errors"]:
            found.append(f"{report['name']}: {report['errors']} errors")
        acts = report["counters"].get("hits", 0) if report["kind"] == "prefix_cache" else 1
        if report["kind"] == "prefix_cache":
            acts += report["acted"]
        elif report["kind"] in ("sequence", "format"):
            acts = report["acted"]
        elif report["kind"] == "attention":
            acts = report["counters"].get("rows", 0)
        if not acts:
            found.append(f"{report['name']} did nothing: {report['counters']}")
    return found


def resets(switches: Switches) -> bool:
    """True where everybody is preempted once. vLLM cannot where a step is in flight."""
    return "pressure" in switches and not {"processes", "ahead"} & switches


REFUSAL = "DeploymentError"


def refusal_in(log: str) -> str | None:
    """The sentence that an engine's log ends its start with."""
    lines = [line for line in log.splitlines() if f"{REFUSAL}: " in line]
    return lines[-1].split(f"{REFUSAL}: ", 1)[1].strip() if lines else None


class Runner:
    """Runs cells, each in a process of its own.

    Args:
        folder: Where logs go.
    """

    def __init__(self, folder: Path):
        from trial_server import TrialServer

        self.folder = folder
        self.expected = Expected(folder / "models")
        self._servers = {
            second: TrialServer(folder / f"server{int(second)}.log", second_runner=second)
            for second in (False, True)
        }

    def stop(self) -> None:
        """End the servers."""
        for server in self._servers.values():
            server.stop()

    def run(self, name: str, section: Mapping[str, Any], switches: Switches) -> Cell:
        """Run and judge one cell."""
        from trial_server import AHEAD

        from kvplug_lab.engine.trial import TrialFailed, TrialSpec

        cell = Cell(name, sorted(switches, key=list(SWITCHES).index), "wrong")
        watched = "processes" not in switches
        env = {AHEAD: "1"} if "ahead" in switches else {}
        if "two ranks" in switches:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        spec = TrialSpec(
            str(self.expected.model(section)),
            requests_of(workload(section)),
            engine_of(section, switches),
            dict(section),
            reset_running_at=RESET_AT if resets(switches) else None,
            watched=watched,
        )
        stem = "-".join([name, *cell.switches]).replace(" ", "_").replace("/", "_")
        log = self.folder / f"{stem}.log"
        server = self._servers["second runner" in switches]
        before = time.perf_counter()
        timer = threading.Timer(SECONDS, _kill, (server,))
        timer.start()
        try:
            result = server.run(spec, env=env, log=log)
        except TrialFailed:
            text = log.read_text(encoding="utf-8", errors="replace")
            refused = refusal_in(text)
            cell.verdict = "refused" if refused else "wrong"
            cell.why = [refused or "the engine failed: " + text[-600:]]
        except RuntimeError:
            cell.why = [f"no result after {SECONDS} s"]
            server.stop()
        else:
            cell.why = judge(section, switches, result, self.expected)
            cell.verdict = "wrong" if cell.why else "right"
            cell.preemptions = result.preemptions
            if cell.why:
                log.with_suffix(".json").write_text(result.to_json(), encoding="utf-8")
        finally:
            timer.cancel()
            cell.seconds = round(time.perf_counter() - before, 1)
        return cell


def _kill(server: Any) -> None:
    if server._process is not None:
        os.killpg(server._process.pid, signal.SIGKILL)


# -- admission -------------------------------------------------------------------------------------


def admission(
    asked: Sequence[tuple[str, Mapping[str, Any], Switches]], models: Mapping[str, str]
) -> dict[tuple[str, Switches], str | None]:
    """What kvplug says of deployments before an engine starts: a refusal, or None.

    Args:
        asked: Name, section and switches of each.
        models: Model directory by deployment.
    """
    found: dict[tuple[str, Switches], str | None] = {}
    for second in (False, True):
        mine = [a for a in asked if ("second runner" in a[2]) == second]
        if not mine:
            continue
        environment = dict(os.environ)
        environment.pop("TRITON_INTERPRET", None)
        if second:
            path = [str(HERE / "second_runner"), environment.get("PYTHONPATH", "")]
            environment |= {
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "TRITON_INTERPRET": "1",
                "VLLM_USE_V2_MODEL_RUNNER": "1",
            }
        orders = [
            {"model": models[name], "section": section, "switches": sorted(switches)}
            for name, section, switches in mine
        ]
        done = subprocess.run(
            [sys.executable, __file__, "--admit"],
            input=json.dumps(orders),
            env=environment | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"admission failed:\n{done.stderr[-3000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        for (name, _, switches), one in zip(mine, said, strict=True):
            found[name, switches] = one
    return found


def _admit(orders: Sequence[Mapping[str, Any]]) -> Iterator[str | None]:
    """A child: what the host says of each deployment, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    from kvplug.errors import DeploymentError
    from kvplug.hosts.vllm.admission import deployment_of
    from kvplug_lab.engine.trial import connector_flags

    for order in orders:
        switches = frozenset(order["switches"])
        arguments = engine_of(order["section"], switches)
        arguments["kv_transfer_config"] = connector_flags(order["section"])
        config = EngineArgs(order["model"], **arguments).create_engine_config()
        if "ahead" in switches:
            config.scheduler_config.async_scheduling = True
        try:
            deployment_of(config)
        except DeploymentError as refused:
            yield str(refused)
        else:
            yield None


IRRELEVANT = frozenset({"chunks", "pressure", "processes"})
"""Switches that change numbers or where code runs: admission does not look at them."""


def admitted_of(
    chosen: Mapping[str, Mapping[str, Any]], expected: Expected
) -> dict[tuple[str, Switches], str | None]:
    """Admission of deployments under every combination of switches."""
    telling = sorted({s - IRRELEVANT for s in combinations()}, key=sorted)
    telling = [s for s in telling if "ahead" not in s or "second runner" in s]
    asked = [(name, section, s) for name, section in chosen.items() for s in telling]
    models = {name: str(expected.model(section)) for name, section in chosen.items()}
    said = admission(asked, models)
    return {(n, s): said[n, s - IRRELEVANT] for n in chosen for s in combinations()}


# -- the command -----------------------------------------------------------------------------------


def planned(
    chosen: Sequence[str] | Mapping[str, Any],
    refused: Mapping[tuple[str, Switches], str | None],
) -> list[tuple[str, Switches]]:
    """Deployments and combinations to run: of every deployment the first one, which has most
    pairs, then of every one the second; those that start slowly later."""
    found = []
    for name in chosen:
        admitted = [s for s in combinations() if refused[name, s] is None]
        for turn, switches in enumerate(covering(admitted, name)):
            found.append((turn + len(SLOW & switches), name, switches))
    found.sort(key=lambda cell: cell[0])
    return [(name, switches) for _, name, switches in found]


def summary(cells: Sequence[Cell], refused: Mapping[tuple[str, Switches], str | None]) -> Any:
    """What the page shows."""
    found = []
    for name, section in deployments().items():
        if (name, frozenset()) not in refused:
            continue
        mine = [c for c in cells if c.deployment == name]
        row: dict[str, Any] = {
            "deployment": name,
            "section": section,
            "right": sum(c.verdict == "right" for c in mine),
            "ran": [c.switches for c in mine if c.verdict == "right"],
            "pairs": covered(
                [frozenset(c.switches) for c in mine if c.verdict == "right"],
                [s for s in combinations() if refused[name, s] is None],
            ),
            "wrong": [asdict(c) for c in mine if c.verdict == "wrong"],
            "alone": refused[name, frozenset()],
            "switches": {},
        }
        for switch in SWITCHES:
            least = min(
                (s for s in combinations() if switch in s),
                key=lambda s: (refused[name, s] is not None, len(s)),
            )
            row["switches"][switch] = {
                "right": sum(switch in c.switches and c.verdict == "right" for c in mine),
                "refused": refused[name, least],
            }
        found.append(row)
    return {"switches": SWITCHES, "rows": found}


def main() -> None:
    """Run what was not run yet, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the summary goes")
    parser.add_argument("--work", type=Path, help="folder of logs and results, to go on from")
    parser.add_argument("--only", default="", help="deployments whose name contains this")
    parser.add_argument("--most", type=int, default=1 << 30, help="cells to run now")
    parser.add_argument("--admit", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.admit:
        said = list(_admit(json.load(sys.stdin)))
        print("\n" + json.dumps(said))
        return
    work = arguments.work or Path(tempfile.mkdtemp(prefix="kvplug-composition-"))
    work.mkdir(parents=True, exist_ok=True)
    (work / "models").mkdir(exist_ok=True)
    results = work / "cells.jsonl"
    done = [Cell(**json.loads(line)) for line in _lines(results)]
    runner = Runner(work)
    try:
        chosen = {n: s for n, s in deployments().items() if arguments.only in n}
        refused = admitted_of(chosen, runner.expected)
        known = {(c.deployment, frozenset(c.switches)) for c in done}
        left = [cell for cell in planned(chosen, refused) if cell not in known]
        for name, switches in left[: arguments.most]:
            cell = runner.run(name, chosen[name], switches)
            done.append(cell)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
            print(f"{cell.verdict:8} {name}: {', '.join(cell.switches)}", *cell.why, flush=True)
    finally:
        runner.stop()
    if arguments.json is not None:
        text = json.dumps(summary(done, refused), indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
