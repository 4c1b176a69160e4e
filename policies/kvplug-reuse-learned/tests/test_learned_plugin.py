"""The distribution: what it registers, where it is found, and kvplug without it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from kvplug.contract import Kind
from kvplug.registry import EXTRAS, Plugins
from kvplug_policies import builtin
from kvplug_reuse_learned import plugin
from kvplug_reuse_learned.compensate import Compensate
from kvplug_reuse_learned.credibility import Credibility


def test_it_registers_what_kvplug_says_the_extra_brings() -> None:
    plugins = Plugins(entry_points=False)
    plugins.register(plugin, "reuse_learned")
    assert {(p.kind, p.name) for p in plugins.registry} == EXTRAS["reuse-learned"]
    assert plugins.registry.get(Kind.REUSE, "credibility") is Credibility
    assert plugins.registry.get(Kind.REUSE, "compensate") is Compensate


def test_the_installed_distribution_is_found_by_its_entry_points() -> None:
    (found,) = importlib.metadata.entry_points(group="kvplug", name="reuse_learned")
    assert found.value == plugin.__name__
    (command,) = importlib.metadata.entry_points(group="kvplug.commands", name="calibrate.reuse")
    assert command.value == "kvplug_reuse_learned.cli:reuse"
    assert callable(command.load())


def test_without_it_kvplug_knows_neither_check() -> None:
    plugins = Plugins(entry_points=False)
    plugins.register(builtin, "builtin")
    for kind, name in EXTRAS["reuse-learned"]:
        assert plugins.registry.get(kind, name) is None
        assert plugins.registry.extra(kind, name) == "reuse-learned"


def test_the_checks_serve_without_the_lab() -> None:
    code = (
        "import sys\n"
        "sys.modules['kvplug_lab'] = sys.modules['transformers'] = None\n"
        "from kvplug.registry import Plugins\n"
        "from kvplug_reuse_learned import plugin\n"
        "plugins = Plugins(entry_points=False)\n"
        "plugins.register(plugin, 'learned')\n"
        "print(sorted(p.name for p in plugins.registry))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['compensate', 'credibility']\n"
