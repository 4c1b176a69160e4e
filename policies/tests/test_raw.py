"""`raw` hands planes on as they are."""

from __future__ import annotations

import torch

from kvplug.contract import EngineView, PlaneShape
from kvplug_policies.transfer.raw import Raw


def test_nothing_is_copied_where_nothing_need_be() -> None:
    codec = Raw(Raw.Options(), EngineView(block_size=16))
    plane = torch.randn(2, 16, 3, 8)
    coded = codec.encode({"key": plane}, 0)
    assert coded["key"].data_ptr() == plane.data_ptr()
    back = codec.decode(coded, {"key": PlaneShape("float32", (2, 16, 3, 8))}, 0)
    assert back["key"].data_ptr() == plane.data_ptr()
