"""``python -m kvplug_lab.gpu_check.publish RESULTS... --to docs/figures``: results for the pages.

Writes ``gpu.json``, which `docs/gpu.md` shows, and its entry in ``sources.json``. Its form is that
of `kvplug_lab.gpu_check.parts.Results` without what only a search for a fault needs: rows keep
numbers, and the first line of an error.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvplug.errors import KVPlugError
from kvplug_lab.gpu_check.parts import SCHEMA

NAME = "gpu"
SAME = ("gpu", "vllm", "torch", "triton")
"""What results that are put together must agree in."""
LEFT_OUT = ("reports", "example", "decode_turns_ms", "section", "engine")
COMMIT = re.compile(r"[0-9a-f]{7,40}")


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of one check, from those of several that ran its parts.

    Args:
        results: What `kvplug_lab.gpu_check.parts.Results` wrote. A row of a later one replaces
            the row of the same part and name.

    Raises:
        KVPlugError: They are of another form, or of different machines or versions.
    """
    first = dict(results[0])
    parts: dict[str, Any] = {}
    for one in results:
        if one["schema"] != SCHEMA:
            raise KVPlugError(f"the results have schema {one['schema']}, not {SCHEMA}")
        for key in SAME:
            own, other = first["machine"].get(key), one["machine"].get(key)
            if own != other:
                raise KVPlugError(f"the results are of different machines: {key} {own} and {other}")
        for name, part in one["parts"].items():
            again = {row["name"] for row in part["rows"]}
            kept = [r for r in parts.get(name, {"rows": []})["rows"] if r["name"] not in again]
            rows = [*kept, *map(_slim, part["rows"])]
            error = part["error"] and str(part["error"]).splitlines()[0][:200]
            ok = error is None and all(row["ok"] for row in rows)
            parts[name] = {**part, "ok": ok, "error": error, "rows": rows}
    seconds = round(sum(one["seconds"] for one in results), 1)
    ok = all(part["ok"] for part in parts.values())
    return first | {"date": results[-1]["date"], "seconds": seconds, "ok": ok, "parts": parts}


def _slim(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in row.items() if key not in LEFT_OUT}
    for key in ("problem", "error", "message"):
        if found.get(key):
            found[key] = str(found[key]).splitlines()[0][:200]
    return found


def publish(results: Sequence[Path], folder: Path, commit: str | None, note: str) -> Path:
    """Write the figures' data and where it is from.

    Args:
        results: Files that ``gpu-check`` wrote.
        folder: ``docs/figures``.
        commit: Commit that was checked, where the results do not state it.
        note: What the page's reader should know, one sentence.

    Returns:
        The file written.

    Raises:
        KVPlugError: As `merged`, or no commit is known.
    """
    data = merged([json.loads(file.read_text(encoding="utf-8")) for file in results])
    data["commit"] = commit or data["commit"]
    if not COMMIT.fullmatch(str(data["commit"])):
        raise KVPlugError("the results state no commit. Fix: pass --commit HASH.")
    file = folder / f"{NAME}.json"
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    machine = data["machine"]
    sources = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
    sources[NAME] = {
        "command": "python -m kvplug_lab.gpu_check",
        "kind": "measured",
        "page": "docs/gpu.md",
        "commit": data["commit"],
        "date": data["date"][:10],
        "machine": f"{machine['gpu']}, {machine['cores']} cores",
        "note": note,
    }
    text = json.dumps(sources, indent=1) + "\n"
    (folder / "sources.json").write_text(text, encoding="utf-8")
    return file


def main() -> None:
    """Entry point of ``python -m kvplug_lab.gpu_check.publish``."""
    parser = argparse.ArgumentParser(description=publish.__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="docs/figures")
    parser.add_argument("--commit", help="commit that was checked")
    parser.add_argument("--note", default="One run.")
    options = parser.parse_args()
    try:
        print(publish(options.results, options.to, options.commit, options.note))
    except KVPlugError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
