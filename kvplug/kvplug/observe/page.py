"""The page `/kvplug`: its HTML, its files and the headers they are served with.

Everything the page needs is in `page_files`, the charting library (uPlot, under its own licence)
among it: nothing is built, and nothing is fetched from elsewhere. The HTML holds no data; what the
engine does comes to it as a stream that the server's key guards.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jinja2

from kvplug.observe.live import BlockState

__all__ = ["FILES", "HEADERS", "file", "html"]

FOLDER = Path(__file__).parent / "page_files"

FILES: Mapping[str, tuple[str, str]] = {
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "uPlot.min.css": ("uplot/uPlot.min.css", "text/css; charset=utf-8"),
    "uPlot.iife.min.js": ("uplot/uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "uPlot.LICENSE": ("uplot/LICENSE", "text/plain; charset=utf-8"),
}
"""Files by the name they are served under: where they lie in `FOLDER`, and their type."""

HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every answer."""

FIGURES = (
    ("running", "running"),
    ("waiting", "waiting"),
    ("computed", "computed tok/s"),
    ("generated", "generated tok/s"),
    ("hit", "prefix hit rate"),
    ("held", "pool held"),
)
"""Figures at the top: id and title."""


@functools.cache
def file(name: str) -> bytes:
    """Content of one of `FILES`.

    Raises:
        KeyError: There is none of that name.
    """
    return (FOLDER / FILES[name][0]).read_bytes()


@functools.cache
def html() -> bytes:
    """The page."""
    files = hashlib.blake2b(b"".join(file(name) for name in FILES), digest_size=8)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    page = template.render(figures=FIGURES, states=list(BlockState), digest=files.hexdigest())
    return page.encode()
