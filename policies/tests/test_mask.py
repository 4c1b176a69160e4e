from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reuse_cases import build, candidate, refusal, request

from kvplug.contract.reuse import Verdict
from kvplug_policies.reuse.mask import Mask, Template

CHECK = build(Mask)


def verdict(
    stored: str, wanted: str, *, before: int = 64, start: int = 64, length: int = 96
) -> Verdict:
    return CHECK.check(
        candidate(mask=stored, start=before), request(mask=wanted, start=start, length=length)
    )


@pytest.mark.parametrize(
    ("stored", "wanted", "where"),
    [
        ("causal", "causal", {}),
        ("causal", "causal", {"start": 300}),
        ("window:32", "window:32", {}),
        ("window:32", "window:32", {"start": 300}),
        ("window:160", "causal", {}),
        ("causal", "window:160", {}),
        ("window:160", "window:200", {}),
        ("causal", "window:96", {"start": 0}),
        ("causal+bidirectional:4-9", "causal+bidirectional:4-9", {}),
        ("causal+bidirectional:4-9,90-95", "causal+bidirectional:4-9", {"length": 90}),
        ("causal+bidirectional:90-95", "causal", {"length": 90}),
        ("causal+bidirectional:90-120", "causal", {"length": 90}),
        ("window:32+bidirectional:0-3", "window:32+bidirectional:0-3", {}),
    ],
)
def test_masks_that_agree_on_the_run(stored: str, wanted: str, where: dict[str, int]) -> None:
    assert verdict(stored, wanted, **where) == Verdict(True)


@pytest.mark.parametrize(
    ("stored", "wanted", "where", "cause"),
    [
        ("window:159", "causal", {}, "window cuts its context"),
        ("causal", "window:159", {}, "window cuts its context"),
        ("causal", "window:160", {"start": 65}, "window cuts its context"),
        ("window:160", "window:200", {"start": 400}, "window cuts its context"),
        ("window:32", "window:48", {}, "window cuts its context"),
        ("causal+bidirectional:4-9", "causal", {}, "other mask"),
        ("causal", "causal+bidirectional:4-9", {}, "other mask"),
        ("causal+bidirectional:4-9", "causal+bidirectional:4-8", {}, "other mask"),
        ("causal+bidirectional:88-95", "causal+bidirectional:88-95", {"length": 92}, "span cut"),
        ("causal+bidirectional:88-95", "causal", {"length": 92}, "span cut"),
        ("causal+bidirectional:90-99", "causal+bidirectional:90-99", {}, "span cut"),
        ("causal+bidirectional:-4-9", "causal+bidirectional:-4-9", {}, "span cut"),
        ("prefix", "causal", {}, "mask unknown"),
        ("causal", "", {}, "mask unknown"),
        ("strange", "strange", {}, "mask unknown"),
    ],
)
def test_masks_that_differ_refuse_by_cause(
    stored: str, wanted: str, where: dict[str, int], cause: str
) -> None:
    assert refusal(verdict(stored, wanted, **where)) == cause


@pytest.mark.parametrize(
    "text",
    [
        "Causal",
        "causal ",
        "causal\n",
        "window:0",
        "window:-1",
        "window:1e3",
        "window:99999999999",
        "window:٣",
        "causal+bidirectional:",
        "causal+bidirectional:9-4",
        "causal+bidirectional:4-9,",
        "causal+bidirectional:4-9,9-12",
        "causal+bidirectional:10-12,4-9",
        "causal+bidirectional:4-9, 10-12",
        "causal+bidirectional:4-9,-1-3",
        "bidirectional:4-9",
    ],
)
def test_what_is_no_template_is_not_guessed(text: str) -> None:
    assert Template.parse(text) is None


def test_templates_are_read() -> None:
    assert Template.parse("causal") == Template()
    assert Template.parse("window:4096") == Template(4096)
    spans = ((-2, 3), (4, 4), (10, 20))
    assert Template.parse("causal+bidirectional:-2-3,4-4,10-20") == Template(None, spans)


def seen(template: Template, start: int, length: int, upto: int) -> np.ndarray:
    """Mask of the text's first ``upto`` tokens that a run's first ``length`` tokens see."""
    at = start + np.arange(length)[:, None]
    key = np.arange(upto)[None, :]
    mask = key <= at
    if template.window is not None:
        mask &= at - key < template.window
    for a, b in template.spans:
        for i in range(max(a, 0), min(b, length - 1) + 1):
            mask[i, max(start + a, 0) : start + b + 1] = True
    return mask


templates = st.builds(
    lambda window, spans: (
        (f"window:{window}" if window else "causal")
        + ("+bidirectional:" + ",".join(f"{a}-{b}" for a, b in spans) if spans else "")
    ),
    st.one_of(st.none(), st.integers(1, 40)),
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda s: (s[0], s[0] + s[1])),
        max_size=2,
    ),
)


@given(stored=templates, wanted=templates, start=st.integers(0, 20), length=st.integers(1, 30))
def test_at_one_position_it_agrees_with_the_masks_drawn_out(
    stored: str, wanted: str, start: int, length: int
) -> None:
    had, has = Template.parse(stored), Template.parse(wanted)
    assume(had is not None and has is not None)
    assert had is not None and has is not None
    found = verdict(stored, wanted, before=start, start=start, length=length)
    upto = start + length + 40
    same = np.array_equal(seen(had, start, length, upto), seen(has, start, length, upto))
    inside = not seen(had, start, length, upto)[:, start + length :].any()
    if found.ok:
        assert same and inside
    elif found.reason == "other mask":
        # Spans of one token, or inside a wider one, draw the same mask and are refused all the
        # same: nobody writes them.
        assert not same or any(a == b for a, b in (*had.spans, *has.spans))
    elif found.reason == "window cuts its context":
        assert had.window != has.window
    else:
        assert found.reason == "span cut"
        assert any(a < length <= b for a, b in (*had.spans, *has.spans))
