"""What every class of laws is made of, and the laws of every policy."""

from __future__ import annotations

import functools
import math
import unittest
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, ParamSpec

from kvplug.contract import BASES, EngineView, Feature, LayerView, Policy, Rope
from kvplug.registry import PolicyRegistry

P = ParamSpec("P")

HEAD_SIZE = 32
LAYERS = tuple(
    LayerView(
        index,
        4,
        num_kv_heads=2,
        num_heads=4,
        head_size=HEAD_SIZE,
        dtype="float32",
        rope=Rope(tuple(1e4 ** (-i / (HEAD_SIZE // 2)) for i in range(HEAD_SIZE // 2))),
    )
    for index in range(4)
)
ENGINE = EngineView(
    block_size=16,
    num_blocks=64,
    max_model_len=4096,
    features=frozenset({Feature.PREFIX_CACHING}),
    layers=LAYERS,
    host="test",
)
"""An engine of four layers of two KV heads; laws that need another say so."""


class BrokenLaw(AssertionError):
    """A policy does not keep a line of its contract."""


def law(where: str, line: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Mark a test as the law of one line of the contract; a failure then names that line.

    Args:
        where: Attribute of `kvplug.contract`, e.g. ``"PrefixCachePolicy.victims"``.
        line: Words of its documentation.
    """

    def mark(test: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(test)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                test(*args, **kwargs)
            except unittest.SkipTest:
                raise
            except Exception as error:
                what = f"{error}" if isinstance(error, AssertionError) else repr(error)
                raise BrokenLaw(f"{where} says: {line!r}\n  broken by: {what}") from error

        run.law = (where, line)  # type: ignore[attr-defined]
        return run

    return mark


def skip(reason: str) -> None:
    """End a test that does not apply, with the reason."""
    raise unittest.SkipTest(reason)


class PolicyLaws:
    """Laws of every policy, whatever its kind.

    Attributes:
        policy: The class.
        options: Its options; the defaults where left out.
    """

    policy: ClassVar[type[Policy]]
    options: ClassVar[Mapping[str, Any]] = {}

    def build(self, engine: EngineView = ENGINE, **more: Any) -> Any:
        """Make the policy, with more options or others."""
        options = self.policy.Options.model_validate({**self.options, **more})
        return self.policy(options, engine)

    @law("PolicyRegistry.add", "A concrete subclass of a kind's base class.")
    def test_it_can_be_registered(self) -> None:
        PolicyRegistry().add(self.policy)
        assert self.policy.changes.strip(), "`changes` is empty: `kvplug policies` prints it"

    @law("PolicyOptions", "unknown keys are refused")
    def test_an_unknown_option_is_refused(self) -> None:
        try:
            self.policy.Options.model_validate({**self.options, "no_such_option": 1})
        except ValueError:
            return
        raise AssertionError("no_such_option=1 was accepted")

    @law("PolicyOptions", "Give every field a unit in its description")
    def test_every_option_is_described(self) -> None:
        for name, field in self.policy.Options.model_fields.items():
            assert field.description, f"option {name} has no description"

    @law("Policy", "Policies it cannot be combined with")
    def test_what_it_excludes_are_kinds(self) -> None:
        for other, reason in self.policy.excludes.items():
            kind = other.partition(":")[0]
            assert kind in {str(k) for k in BASES}, f"excludes {other!r}, which is no kind"
            assert reason, f"excludes {other!r} for no reason"

    @law("Policy.counters", "Report the policy's own counters by name")
    def test_counters_are_numbers(self) -> None:
        found = self.build().counters()
        for name, value in found.items():
            assert math.isfinite(value) and value >= 0, f"counter {name} is {value}"
        assert len(found) <= 64, f"{len(found)} counters: the host takes 64"


def each(
    laws: type[PolicyLaws], cases: Iterable[tuple[str, Mapping[str, Any]]]
) -> dict[str, type[PolicyLaws]]:
    """Make one test class for each of several policies, for ``globals().update(...)``.

    Args:
        laws: The laws.
        cases: Label and attributes of each class, e.g. ``("mru", {"policy": Mru})``.
    """
    classes = {}
    for label, attributes in cases:
        words = "".join(c if c.isalnum() else "_" for c in label)
        name = f"Test_{words}"
        if name in classes:
            raise ValueError(f"two cases are called {label}")
        classes[name] = type(name, (laws,), dict(attributes))
    return classes
