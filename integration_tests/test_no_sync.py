"""The guard against waiting for a device: what it lets pass, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from no_sync import DEVICE, Accelerator, DeviceMismatch, HostSync, no_sync
from torch import Tensor

from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug_kernels.select_top import select_top

HOST = torch.arange(4)


@pytest.fixture
def device() -> Iterator[Tensor]:
    tensor = torch.arange(4)
    with no_sync(tensor):
        yield tensor


WAITS: list[Callable[[Tensor], object]] = [
    lambda x: x[0].item(),
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    lambda x: np.asarray(x),
    lambda x: int(x.max()),
    lambda x: bool((x > 3).any()),
    lambda x: [0] if x[0] > 3 else [1],
    lambda x: list(range(4))[: x[0]],
    lambda x: torch.arange(x[2]),
    lambda x: f"{x}",
    lambda x: torch.equal(x, x),
    lambda x: torch.allclose(x, x),
    lambda x: x.nonzero(),
    lambda x: torch.where(x > 1),
    lambda x: torch.unique(x),
    lambda x: torch.isin(x, x),
    lambda x: x.masked_select(x > 1),
    lambda x: x[x > 1],
    lambda x: x.index_put_((x > 1,), x[2:].clone()),
    lambda x: torch.repeat_interleave(x, x),
    lambda x: x.cpu(),
    lambda x: x.to("cpu"),
    lambda x: x.to(HOST),
    lambda x: HOST.to(x.device),
    lambda x: HOST.to(x),
    lambda x: HOST.cuda(),
    lambda x: x.copy_(HOST),
    lambda x: HOST.clone().copy_(x),
    lambda x: torch.tensor([1, 2], device=x.device),
    lambda x: torch.as_tensor(np.arange(2), device=x.device),
    lambda x: x.new_tensor([1, 2]),
    lambda x: x[[0, 1]],
    lambda x: x[HOST],
    lambda x: 3 in x,
]


@pytest.mark.parametrize("call", WAITS, ids=range(len(WAITS)))
def test_the_host_would_wait(device: Tensor, call: Callable[[Tensor], object]) -> None:
    with pytest.raises(HostSync, match="wait for the device"):
        call(device)


@pytest.mark.parametrize("call", WAITS, ids=range(len(WAITS)))
def test_waits_pass_where_they_are_allowed(call: Callable[[Tensor], object]) -> None:
    accelerator = Accelerator()
    own = torch.arange(4)
    accelerator.put(own)
    with accelerator.no_sync(), accelerator.waiting():
        call(own)


PASSES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x + 1,
    lambda x: x[x],
    lambda x: x[1:3],
    lambda x: x.gather(0, x),
    lambda x: torch.where(x > 1, x, 0),
    lambda x: torch.repeat_interleave(x, x, output_size=6),
    lambda x: x.masked_fill(x > 1, 0),
    lambda x: x.index_fill_(0, x[:1].clone(), 7),
    lambda x: torch.cat([x, x]).sort().values,
    lambda x: HOST.to(x.device, non_blocking=True),
    lambda x: x.copy_(HOST, non_blocking=True),
    lambda x: torch.zeros(4, dtype=torch.int64, device=x.device),
    lambda x: torch.arange(4, device=x.device) + x,
    lambda x: torch.zeros_like(x),
    lambda x: x.new_zeros(3),
    lambda x: x.to(torch.int32),
    lambda x: x.to(x.device),
    lambda x: to_device([1, 2, 3], x.device),
    lambda x: to_device(np.arange(3), x.device, torch.int32),
    lambda x: x[:, None].expand(4, 2).contiguous(),
    lambda x: select_top(x.float()[None, None], 2),
]


@pytest.mark.parametrize("call", PASSES, ids=range(len(PASSES)))
def test_work_stays_on_the_device(device: Tensor, call: Callable[[Tensor], Tensor]) -> None:
    found = call(device)
    for tensor in found if isinstance(found, tuple) else (found,):
        assert tensor.device == DEVICE
        assert not tensor.is_cpu


def test_numbers_are_assigned_without_a_copy(device: Tensor) -> None:
    device[0] = 5
    device[1:] = 6
    device[device > 5] = 7


def test_operands_must_lie_together(device: Tensor) -> None:
    with pytest.raises(DeviceMismatch):
        _ = device + HOST
    with pytest.raises(DeviceMismatch):
        HOST.clone().gather(0, device)


def test_a_copy_to_the_host_need_not_wait_and_lies_there(device: Tensor) -> None:
    found = device.to("cpu", non_blocking=True)
    assert found.device == HOST.device
    assert found.tolist() == [0, 1, 2, 3]


def test_nothing_changes_outside() -> None:
    own = torch.arange(4)
    with no_sync(own) as accelerator:
        made = own + 1
        assert accelerator.holds(made)
    assert made.device == HOST.device
    assert made.tolist() == [1, 2, 3, 4]


def test_vectorized_kernels_may_wait(device: Tensor) -> None:
    wait = eval("lambda x: x.tolist()", {"__name__": "kvplug_kernels.some.vectorized"})
    assert wait(device) == [0, 1, 2, 3]
