from __future__ import annotations

from typing import ClassVar

from kvplug.testing import AttentionLaws
from kvplug_attention_memo.policy import Memo


class TestMemo(AttentionLaws):
    policy = Memo


class TestMemoOfLongRows(AttentionLaws):
    """Rows of which the most is far."""

    policy = Memo
    options: ClassVar = {"near": 16}
