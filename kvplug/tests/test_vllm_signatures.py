"""Signatures of a vLLM release, read from source, and what of kvplug no longer fits one."""

from __future__ import annotations

import json
import textwrap
import zipfile
from pathlib import Path

import pytest

from kvplug_lab.vllm_signatures import Fit, Library, SignaturesError, added, moved
from kvplug_lab.vllm_signatures.library import Found, read

VLLM = {
    "vllm": 'MODULE_ATTRS = {"LLM": ".entrypoints:LLM"}\n',
    "vllm.entrypoints": "class LLM:\n    def generate(self, prompts, *, seed=0): ...\n",
    "vllm.config": "from .model import ModelConfig\nfrom vllm.config.whole import VllmConfig\n",
    "vllm.config.model": """
        class ModelConfig:
            model: str
            def get_head_size(self) -> int: ...
        """,
    "vllm.config.whole": """
        from typing import Optional
        from vllm.config.model import ModelConfig
        class VllmConfig:
            model_config: "ModelConfig | None" = None
            seed: Optional[int]
            @property
            def main(self) -> ModelConfig: ...
        """,
    "vllm.plugins": 'DEFAULT_PLUGINS_GROUP = "vllm.general_plugins"\n',
    "vllm.v1.request": """
        from vllm.config import ModelConfig
        class Request:
            def __init__(self, request_id: str, model: ModelConfig):
                self.request_id = request_id
                self.model = model
                self.hashes, self.tokens = [], 0
        """,
    "vllm.base": """
        from abc import ABC, abstractmethod
        class Connector(ABC):
            def load(self, context, **kwargs) -> None: ...
            @abstractmethod
            def save(self, name, part) -> None: ...
            @classmethod
            def build(cls, data=None): ...
            def later(self): ...
        def wrap(thing, *, size): ...
        """,
}
"""A small vLLM: modules by name."""

KVPLUG = """
    from typing import Any
    from vllm import LLM
    from vllm.base import Connector, wrap

    class Own(Connector):
        def __init__(self, vllm_config: Any):
            self._config = vllm_config
        def load(self, context: Any, **kwargs: Any) -> None:
            super().load(context)
        def save(self, name: str, part: Any) -> None:
            wrap(part, size=1)
        def head(self) -> int:
            return self._config.model_config.get_head_size()

    def tokens(request: Any, vllm_config: Any) -> Any:
        model = vllm_config.main
        return request.tokens, request.model.model, model.get_head_size()
    """


def library(changed: dict[str, str] | None = None, version: str = "1.0") -> Library:
    """The small vLLM, with some modules written otherwise; an empty one is gone."""
    sources = {**VLLM, **(changed or {})}

    def load(module: str) -> dict[str, object] | None:
        text = sources.get(module)
        if not text:
            return None
        packages = any(other.startswith(f"{module}.") for other in sources)
        file = module.replace(".", "/") + ("/__init__.py" if packages else ".py")
        return read(textwrap.dedent(text), module, file)

    return Library(version, load)


def fitted(
    tmp_path: Path, changed: dict[str, str] | None = None, source: str = KVPLUG
) -> list[str]:
    """Problems of some source with the small vLLM."""
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(source), "utf-8")
    fit = Fit(library(changed))
    fit.files([path])
    return fit.problems


def replaced(module: str, old: str, new: str) -> dict[str, str]:
    assert old in VLLM[module]
    return {module: VLLM[module].replace(old, new)}


# -- reading ---------------------------------------------------------------------------------------


def test_names_lead_through_packages_relative_imports_and_lazy_ones() -> None:
    vllm = library()
    assert vllm.find("vllm.config", "ModelConfig") == Found(
        "class", "vllm.config.model", "ModelConfig"
    )
    assert vllm.point("vllm:LLM") == Found("class", "vllm.entrypoints", "LLM")
    assert vllm.point("vllm.config:Nothing") is None


def test_a_signature_keeps_what_a_caller_must_know() -> None:
    made = read(
        "class C:\n @classmethod\n def f(cls, a: int, /, b=1, *args, c, d=2, **more) -> int: ...\n"
        " @staticmethod\n def g(): ...\n",
        "vllm.x",
        "vllm/x.py",
    )["classes"]["C"]["methods"]
    assert made["f"] == "@classmethod (cls, a, /, b=..., *args, c, d=..., **more) -> int"
    assert made["g"] == "@staticmethod ()"


def test_what_stands_under_a_condition_is_read() -> None:
    made = read(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from vllm.a import A\n"
        "else:\n  B = 1\ntry:\n  import c\nexcept ImportError:\n  c = None\n",
        "vllm.x",
        "vllm/x.py",
    )
    assert made["names"]["A"] == "vllm.a:A"
    assert "B" in made["values"] and made["names"]["c"] == "c"


def test_a_wheel_is_read_as_the_package_is_and_recorded(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "from vllm.a import f\n")
        archive.writestr("vllm/a.py", "def f(x, y=1): ...\n")
    vllm = Library.of_wheel(wheel)
    assert vllm.version == "9.8.7" and len(vllm.wheel["sha256"]) == 64
    found = vllm.point("vllm:f")
    assert found == Found("function", "vllm.a", "f", "(x, y=...)")
    vllm.write(tmp_path / "vllm-9.8.7.json")
    again = Library.of_json(tmp_path / "vllm-9.8.7.json")
    assert again.point("vllm:f") == found and again.wheel == vllm.wheel


def test_a_record_does_not_answer_for_a_module_it_never_saw(tmp_path: Path) -> None:
    vllm = library()
    vllm.find("vllm.config", "VllmConfig")
    vllm.wheel = {"name": "vllm-1.0.whl"}
    vllm.write(tmp_path / "vllm-1.0.json")
    with pytest.raises(SignaturesError, match=r"vllm\.base, which vllm-1\.0\.json does not cover"):
        Library.of_json(tmp_path / "vllm-1.0.json").find("vllm.base", "Connector")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"version": "1"})])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vllm-1.0.json"
    path.write_text(text, "utf-8")
    with pytest.raises(SignaturesError, match="holds no signatures"):
        Library.of_json(path)


def test_what_is_no_wheel_of_vllm_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other-1.0-py3-none-any.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(SignaturesError, match="is no wheel"):
        Library.of_wheel(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(SignaturesError, match="holds no package vllm"):
        Library.of_wheel(path)


# -- what moved ------------------------------------------------------------------------------------


def test_what_fits_has_no_problem(tmp_path: Path) -> None:
    assert fitted(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (replaced("vllm.base", "def wrap(", "def wrapped("), "vllm.base:wrap is gone"),
        (replaced("vllm.base", "*, size", "*, length"), "vllm.base:wrap does not take size"),
        (replaced("vllm.base", "*, size", "*, size, more"), "vllm.base:wrap needs more"),
        (
            replaced("vllm.base", "def save(self, name, part)", "def save(self, name, part, n)"),
            "vllm.base:Connector.save takes n as its argument 3, which the override does not",
        ),
        (
            replaced("vllm.base", "def save(self, name, part)", "def save(self, title, part)"),
            "vllm.base:Connector.save takes title by name, which the override does not",
        ),
        (
            replaced("vllm.base", "def save(self, name, part)", "def save(self, part, name)"),
            "vllm.base:Connector.save takes part as its argument 1",
        ),
        (
            replaced("vllm.base", "def save(self, name, part)", "def save(self, name)"),
            "vllm.base:Connector.save no longer passes part, which the override needs",
        ),
        (
            replaced("vllm.base", "def load(self, context", "def load(self"),
            "vllm.base:Connector.load no longer passes context",
        ),
        (
            replaced("vllm.base", "def later", "@abstractmethod\n            def later"),
            "vllm.base:Connector.later must be defined by Own",
        ),
        (
            replaced("vllm.base", "def load(self, context,", "def load(self, context, how=1,"),
            "vllm.base:Connector.load takes how as its argument 2, which the override does not",
        ),
        (
            replaced("vllm.base", "def load(", "def begin("),
            "vllm.base:Connector has no load",
        ),
        ({"vllm.base": ""}, "vllm.base:Connector is gone"),
        (
            replaced("vllm.v1.request", "self.tokens", "self.count"),
            "vllm.v1.request:Request has no tokens",
        ),
        (
            replaced("vllm.config.model", "get_head_size", "head_size"),
            "vllm.config.model:ModelConfig has no get_head_size",
        ),
        (
            replaced("vllm.config.model", "get_head_size(self", "get_head_size(self, part"),
            "vllm.config.model:ModelConfig.get_head_size needs part",
        ),
        (
            replaced("vllm.config.whole", "def main", "def first"),
            "vllm.config.whole:VllmConfig has no main",
        ),
        (
            replaced("vllm.config.whole", "model_config:", "text_config:"),
            "vllm.config.whole:VllmConfig has no model_config",
        ),
        ({"vllm": 'MODULE_ATTRS = {"Engine": ".entrypoints:LLM"}\n'}, "vllm:LLM is gone"),
    ],
)
def test_what_moved_is_named(tmp_path: Path, changed: dict[str, str], said: str) -> None:
    problems = fitted(tmp_path, changed)
    assert any(one.startswith(f"vLLM 1.0: {said}") for one in problems), problems


@pytest.mark.parametrize(
    "changed",
    [
        replaced("vllm.base", "*, size", "*, size, more=1"),
        replaced("vllm.base", "thing, *, size", "thing, size=1"),
        replaced("vllm.config.whole", "seed: Optional[int]", "seed: int\n            other: int"),
    ],
)
def test_what_moved_and_still_fits_is_none(tmp_path: Path, changed: dict[str, str]) -> None:
    assert fitted(tmp_path, changed) == []


@pytest.mark.parametrize(("first", "second"), [("new", "base"), ("base", "new")])
def test_an_import_may_have_another_in_its_place(tmp_path: Path, first: str, second: str) -> None:
    source = f"""
        try:
            from vllm.{first} import wrap
        except ImportError:
            from vllm.{second} import wrap
        wrap(1, size=1)
        """
    assert fitted(tmp_path, source=source) == []
    assert len(fitted(tmp_path, replaced("vllm.base", "*, size", "*, sizes"), source)) == 1
    assert len(fitted(tmp_path, replaced("vllm.base", "def wrap", "def wraps"), source)) == 2


def test_declared_points_and_attributes_are_compared() -> None:
    fit = Fit(library())
    fit.declared(
        [
            ("vllm.base:wrap", ("thing", "size")),
            ("vllm.base:wrap", ("gone",)),
            ("vllm.base:Connector.never", ()),
            ("vllm.v1.request:Request", ("tokens", "lost")),
        ],
        [("vllm.v1.request:Request", ("hashes", "missing")), ("vllm.nowhere:Thing", ("a",))],
    )
    assert [one.split(": ", 1)[1] for one in fit.problems] == [
        "vllm.base:wrap no longer takes gone (compat.py)",
        "vllm.base:Connector.never is gone (compat.py)",
        "vllm.v1.request:Request no longer takes lost (compat.py)",
        "vllm.v1.request:Request no longer has missing (compat.py)",
        "vllm.nowhere:Thing is gone (compat.py)",
    ]


def test_a_group_that_was_renamed_is_named() -> None:
    group = ("vllm.plugins:DEFAULT_PLUGINS_GROUP", "'vllm.general_plugins'")
    fit = Fit(library())
    fit.values([group])
    assert fit.problems == []
    fit = Fit(library(replaced("vllm.plugins", "general", "common")))
    fit.values([group])
    assert "is no longer 'vllm.general_plugins'" in fit.problems[0]


def test_two_releases_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(KVPLUG), "utf-8")
    fit = Fit(library())
    fit.files([path])
    other = library(
        {
            "vllm.base": VLLM["vllm.base"]
            .replace("*, size", "*, size, more=1")
            .replace("def later(self)", "def later(self): ...\n            def sleeps(self)"),
        },
        "1.1",
    )
    assert moved(fit, other) == [
        ("vllm.base:wrap", "(thing, *, size)", "(thing, *, size, more=...)")
    ]
    assert [one.point for one in added(fit, other)] == ["vllm.base:Connector.sleeps"]
