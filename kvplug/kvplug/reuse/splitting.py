"""Splits token ids into segments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvplug.errors import KVPlugError
from kvplug.reuse.settings import Splitting

__all__ = ["Splitter", "line_ends"]

_BLANK = frozenset(" \t\n\r\u0120\u0109\u010a\u010d\u2581")
"""Characters that stand for white space in a vocabulary: themselves, those of the alphabet of
byte-level BPE (space, tab, line feed, carriage return), and SentencePiece's word mark."""

_BREAKS = ("\n", "\u010a")
_BREAK_BYTES = ("<0x0A>", "<0x0D>", "<0x20>", "<0x09>")


def line_ends(tokenizer: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Find line feeds and white space among a vocabulary's tokens.

    Args:
        tokenizer: A Hugging Face tokenizer: `get_vocab` and `decode` are called.

    Returns:
        Line feeds in the trailing white space of each token, and a mask of tokens that are white
        space only; both ``[largest id + 1]``.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    trailing = np.zeros(size, np.int64)
    blank = np.zeros(size, np.bool_)
    for token, index in vocabulary.items():
        # Decoding a whole vocabulary takes seconds, and few tokens matter.
        if not (
            any(mark in token for mark in _BREAKS)
            or token in _BREAK_BYTES
            or _BLANK.issuperset(token)
        ):
            continue
        text = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        rest = text.rstrip(" \t\r\n")
        trailing[index] = text[len(rest) :].count("\n")
        blank[index] = not rest and text != ""
    return trailing, blank


class Splitter:
    """Splits a text into segments.

    A text that is continued splits as before, except for its last segment, so boundaries stay where
    they are as a conversation grows.

    Args:
        settings: The rule.
        tokenizer: A Hugging Face tokenizer; may be None with ``by: fixed`` and ``by: request``.

    Raises:
        KVPlugError: The rule needs a tokenizer and there is none, or the separator has no tokens.
    """

    def __init__(self, settings: Splitting, tokenizer: Any | None) -> None:
        self._settings = settings
        self._separator: NDArray[np.int32] | None = None
        self._lines: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None
        if settings.by in ("paragraph", "separator") and tokenizer is None:
            raise KVPlugError(
                f"reuse.segments.by: {settings.by} needs the model's tokenizer, but the engine has "
                "none. Fix: use by: fixed or by: request."
            )
        if settings.by == "paragraph":
            self._lines = line_ends(tokenizer)
        elif settings.by == "separator":
            assert tokenizer is not None
            ids = tokenizer.encode(settings.separator, add_special_tokens=False)
            if not ids:
                raise KVPlugError(
                    f"reuse.segments.separator: {settings.separator!r} has no tokens in this "
                    "model's vocabulary. Fix: choose another separator."
                )
            self._separator = np.asarray(ids, np.int32)

    def split(
        self, tokens: NDArray[np.int32], lengths: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """Split a text.

        Args:
            tokens: Token ids, ``[n]``.
            lengths: Lengths of the first segments, from the request; those that are too long are
                split, but none are merged. Values that are not positive integers are ignored, and
                a length beyond the text's end is shortened.

        Returns:
            ``(begin, end)`` of each segment, in order; together they cover ``[0, n)``.
        """
        tokens = np.asarray(tokens)
        size, longest = len(tokens), self._settings.max_tokens
        runs: list[tuple[int, int]] = []
        start = 0
        for length in lengths or ():
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                continue
            end = min(start + length, size)
            while start < end:
                cut = min(start + longest, end)
                runs.append((start, cut))
                start = cut
        for boundary in self._boundaries(tokens, start):
            while boundary - start > longest:
                runs.append((start, start + longest))
                start += longest
            if boundary - start >= self._settings.min_tokens:
                runs.append((start, boundary))
                start = boundary
        while start < size:
            cut = min(start + longest, size)
            runs.append((start, cut))
            start = cut
        return runs

    def _boundaries(self, tokens: NDArray[np.int32], start: int) -> Iterable[int]:
        """Boundaries that the rule gives after `start`, in order."""
        if self._settings.by == "fixed":
            return range(start + self._settings.size, len(tokens) + 1, self._settings.size)
        if self._lines is not None:
            return map(int, start + self._empty_lines(tokens[start:]))
        if self._separator is not None:
            return map(int, start + self._separators(tokens[start:], self._separator))
        return ()

    def _empty_lines(self, tokens: NDArray[np.int32]) -> NDArray[np.int64]:
        assert self._lines is not None
        if not len(tokens):
            return np.empty(0, np.int64)
        trailing, blank = self._lines
        known = (tokens >= 0) & (tokens < len(trailing))
        ids = np.where(known, tokens, 0)
        feeds = np.where(known, trailing[ids], 0)
        empty = known & blank[ids]
        # Count line feeds since the last character that is not white space.
        last = np.maximum.accumulate(np.where(empty, -1, np.arange(len(tokens))))
        total = np.cumsum(feeds)
        before = np.where(last >= 0, total[last] - feeds[last], 0)
        ended = total - before >= 2
        # The last of several empty lines ends the paragraph.
        goes_on = np.zeros(len(tokens), np.bool_)
        goes_on[:-1] = empty[1:] & (feeds[1:] > 0)
        return np.flatnonzero(ended & ~goes_on & (feeds > 0)) + 1

    @staticmethod
    def _separators(tokens: NDArray[np.int32], separator: NDArray[np.int32]) -> NDArray[np.int64]:
        width = len(separator)
        if len(tokens) < width:
            return np.empty(0, np.int64)
        equal = np.ones(len(tokens) - width + 1, np.bool_)
        for offset, token in enumerate(separator):
            equal &= tokens[offset : offset + len(equal)] == token
        return np.flatnonzero(equal) + width
