"""Memory that a kind holds on a worker for the life of an engine.

vLLM measures what is left for pages once the model is loaded. So kinds take what they will hold
while it is loaded, under a name by which they find it again; what is taken later lies outside that
measurement, and is counted apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from math import prod

import torch
from torch import Tensor


class HeldMemory:
    """Tensors of one kind on one worker.

    Attributes:
        measured: Whether vLLM measures memory. On a CPU it then counts what the process has
            touched; where a size is given for the pages, memory is only mapped.
    """

    def __init__(self) -> None:
        self.measured = True
        self._free: dict[Hashable, list[Tensor]] = defaultdict(list)
        self._reserved: dict[Hashable, list[Tensor]] = defaultdict(list)
        self._late: list[Tensor] = []

    def reserve(self, name: Hashable, count: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take memory, once for a name.

        Args:
            name: By which `take` finds it.
            count: Elements.
            dtype: Their type.
            device: Where.
        """
        if name in self._reserved:
            return
        made = self._zeros(count, dtype, device)
        self._reserved[name].append(made)
        self._free[name].append(made)

    def take(
        self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return memory of a shape: what was reserved under the name, or more. Zeros at first.

        Args:
            name: As given to `reserve`.
            shape: The shape.
            dtype: Their type.
            device: Where.
        """
        count, device = prod(shape), torch.device(device)
        for flat in self._free[name]:
            if flat.numel() >= count and flat.dtype is dtype and flat.device.type == device.type:
                self._free[name] = [own for own in self._free[name] if own is not flat]
                return flat[:count].view(shape)
        made = self._zeros(count, dtype, device)
        self._late.append(made)
        return made.view(shape)

    def start_over(self) -> None:
        """Let everything reserved be taken again: vLLM profiles with pages and builders of their
        own, and then makes those of the engine."""
        self._free = defaultdict(list, {name: list(own) for name, own in self._reserved.items()})
        self._late.clear()

    @property
    def reserved_bytes(self) -> int:
        """Bytes taken while the model was loaded."""
        return sum(tensor.nbytes for own in self._reserved.values() for tensor in own)

    @property
    def late_bytes(self) -> int:
        """Bytes taken after that."""
        return sum(tensor.nbytes for tensor in self._late)

    def _zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "cpu" and not self.measured:
            return torch.zeros(count, dtype=dtype)
        return torch.empty(count, dtype=dtype, device=device).zero_()
