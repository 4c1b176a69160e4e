"""Makes the package of a new policy: what `kvplug new` writes, from templates."""

from __future__ import annotations

import importlib.util
import keyword
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvplug.contract import Kind
from kvplug.errors import KVPlugError
from kvplug.near_names import did_you_mean
from kvplug.registry import NAME, plugins

WHAT = {
    Kind.PREFIX_CACHE: "Evicts the block released longest ago, and blocks with many hits last.",
    Kind.SEQUENCE: "Keeps the tokens with small keys, and discounts old ones.",
    Kind.FORMAT: "Stores K and V as 8-bit integers with one scale per token and head.",
    Kind.REUSE: "Uses no stored segment that is short or old.",
    Kind.ATTENTION: "Attends the first block and the latest tokens of long decode rows.",
    Kind.TIERS: "Stores KV that leaves the engine's pool in a dictionary.",
    Kind.TRANSFER: "Codes KV that leaves the accelerator as 8-bit integers.",
    Kind.LIFECYCLE: "Stores what several requests used, on its way out of the pool.",
}
"""What the policy of each template does."""

KERNELS = {Kind.SEQUENCE: "key_norms", Kind.FORMAT: "quantize", Kind.TRANSFER: "quantize"}
"""Kinds whose template has a kernel, and what it computes."""


class ScaffoldError(KVPlugError):
    """A package that cannot be made: the message names what is wrong and the fix."""


def new_policy(kind: str, name: str, directory: Path, *, kernel: bool = False) -> list[Path]:
    """Write the package of a policy, whole or not at all.

    Args:
        kind: A kind, as in YAML.
        name: The policy's name: lower-case letters, digits and underscores.
        directory: Folder that the package's own folder is made in; made if it is not there.
        kernel: Whether to add a kernel pair, plain loops and Triton.

    Returns:
        The files written, the package's folder first.

    Raises:
        ScaffoldError: There is no such kind, the name is invalid or taken, the kind has no
            kernel, or the folder exists or cannot be written.
    """
    of = _kind(kind)
    _check_name(of, name)
    if kernel and of not in KERNELS:
        kinds = ", ".join(KERNELS)
        raise ScaffoldError(f"--kernel: no kernel for {of}. Fix: leave it out; {kinds} have one.")
    target = directory / f"kvplug-{name.replace('_', '-')}"
    if target.exists():
        raise ScaffoldError(f"{target} is there already. Fix: remove it, or choose another name.")
    files = dict(_rendered(of, name, kernel))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".kvplug-new-", dir=directory))
        try:
            for path, text in files.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(text, encoding="utf-8")
            made.chmod(0o755)
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        where = f"{directory} cannot be written ({error.strerror})"
        raise ScaffoldError(f"{where}. Fix: name another folder with --directory.") from None
    return [target, *(target / path for path in files)]


def _kind(text: str) -> Kind:
    if text in set(map(str, Kind)):
        return Kind(text)
    meant = did_you_mean(text, map(str, Kind))
    kinds = ", ".join(Kind)
    raise ScaffoldError(f"{text[:64]!r} is no kind of policy. Fix: {meant}choose from {kinds}.")


def _check_name(kind: Kind, name: str) -> None:
    shown = repr(name[:64])
    if not NAME.fullmatch(name) or len(name) > 64 or keyword.iskeyword(name) or name == "auto":
        rule = "lower-case letters, digits and underscores, a letter first, and no Python keyword"
        raise ScaffoldError(f"{shown} is no name for a policy. Fix: use {rule}.")
    taken = plugins().registry.get(kind, name)
    if taken is not None:
        where = f"{taken.__module__}.{taken.__qualname__}"
        raise ScaffoldError(
            f"{kind} policy {name!r} is installed already: {where}. Fix: choose another name."
        )
    if importlib.util.find_spec(f"kvplug_{name}") is not None:
        raise ScaffoldError(
            f"a package kvplug_{name} is installed already. Fix: choose another name."
        )


def _rendered(kind: Kind, name: str, kernel: bool) -> Iterator[tuple[str, str]]:
    """The files of a package, by their paths in it."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("kvplug.scaffold", "template"),
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    package = f"kvplug_{name}"
    facts = {
        "kind": str(kind),
        "name": name,
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "package": package,
        "distribution": f"kvplug-{name.replace('_', '-')}",
        "what": WHAT[kind],
        "kernel": kernel,
    }
    paths = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{name}.yaml": "deployment.yaml.j2",
        f"{package}/__init__.py": "init.py.j2",
        f"{package}/policy.py": f"policy/{kind}.py.j2",
        f"tests/test_{name}.py": f"tests/{kind}.py.j2",
        f"tests/test_{name}_engine.py": "test_engine.py.j2",
    }
    if kernel:
        folder = f"kernel/{KERNELS[kind]}"
        paths |= {
            f"{package}/naive.py": f"{folder}/naive.py.j2",
            f"{package}/kernel.py": f"{folder}/kernel.py.j2",
            f"tests/test_{name}_kernel.py": f"{folder}/test.py.j2",
            "tests/conftest.py": "kernel/conftest.py.j2",
        }
    for path, template in paths.items():
        yield path, templates.get_template(template).render(facts)
    yield f"{package}/py.typed", ""
