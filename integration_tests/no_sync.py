"""A stand-in for an accelerator on the CPU, and a guard against waiting for it.

Host and device run one after the other here, so nothing really waits and every value is real. Some
tensors are taken to lie on the device, together with everything computed from them; their
``device`` says so, and code that asks for one makes them. Within `no_sync` whatever would have the
host wait for a real device raises `HostSync`:

* values read on the host (``item``, ``tolist``, ``int``, ``bool``, ``equal``, printing),
* shapes that depend on data (``nonzero``, ``unique``, ``masked_select``, boolean indexing,
  ``repeat_interleave`` without its size),
* copies between host and device without ``non_blocking=True``, of which ``torch.tensor(list,
  device=...)`` and indexing by a list or by a tensor of the host are the hidden ones.

Operands on different devices raise `DeviceMismatch`, as they do on a real one.

``is_cuda`` stays False, so kernels take their vectorized form. That may wait where the Triton form,
which a real device runs, does not: waits inside `kvplug_kernels` pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")


class HostSync(AssertionError):
    """The host would wait for the device."""


class DeviceMismatch(AssertionError):
    """An operation got tensors of the host and of the device."""


class Accelerator:
    """The stand-in.

    Attributes:
        device: Its name.
    """

    device = DEVICE

    def __init__(self) -> None:
        # Kept alive, so that no other storage takes the number of one that is gone.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._strict = False

    def put(self, *tensors: Tensor) -> None:
        """Take tensors, and all views of their storage, to lie on the device."""
        for tensor in tensors:
            storage = _storage(tensor)
            self._storages[storage._cdata] = storage

    def holds(self, tensor: Tensor) -> bool:
        """Return True if a tensor lies on the device."""
        return _storage(tensor)._cdata in self._storages

    def wait(self, what: str) -> None:
        """Take note that the host would wait.

        Raises:
            HostSync: It must not.
        """
        if self._strict and not _in_kernels():
            raise HostSync(f"{what} makes the host wait for the device")

    @contextmanager
    def faked(self) -> Iterator[Accelerator]:
        """Run code on the stand-in; it may wait."""
        with _Functions(self), _Operations(self):
            yield self

    @contextmanager
    def no_sync(self) -> Iterator[Accelerator]:
        """Run code on the stand-in that must not wait."""
        before, self._strict = self._strict, True
        try:
            with self.faked():
                yield self
        finally:
            self._strict = before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Allow waits within `no_sync`."""
        before, self._strict = self._strict, False
        try:
            yield
        finally:
            self._strict = before


@contextmanager
def no_sync(*tensors: Tensor) -> Iterator[Accelerator]:
    """Run code on a stand-in of its own that must not wait.

    Args:
        tensors: Tensors that lie on the device.
    """
    accelerator = Accelerator()
    accelerator.put(*tensors)
    with accelerator.no_sync():
        yield accelerator


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _in_kernels() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("kvplug_kernels"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _tensors(of: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)]


# -- what Python asks of tensors -------------------------------------------------------------------

READS = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "__array__",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__repr__",
        "__format__",
        "__contains__",
    ]
)
"""Methods that give the host a tensor's values."""

FROM_DATA = frozenset(["tensor", "as_tensor", "asarray", "new_tensor"])


class _Functions(TorchFunctionMode):
    """Says where tensors lie, makes them there, and copies between the two."""

    def __init__(self, accelerator: Accelerator):
        super().__init__()
        self._on = accelerator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        own = args[0] if args and isinstance(args[0], Tensor) else None
        held = own is not None and self._on.holds(own)
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if held else func(*args)
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return not held
        if held and (name in READS or (name == "new_tensor" and "device" not in kwargs)):
            self._on.wait(f"{name}()")
        if func is Tensor.pin_memory:
            return own
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, *args, **kwargs)
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        target = torch.device(kwargs["device"])
        kwargs["device"] = CPU
        copied = name in FROM_DATA and (target.type == "cpu") == held
        if copied:
            self._on.wait(f"torch.{name}(data, device={str(target)!r})")
        with _disable_current_modes():
            found = func(*args, **kwargs)
            found = found.clone() if copied else found
        if target.type != "cpu":
            self._on.put(found)
        return found

    def _to(self, func: Any, own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        held = self._on.holds(own)
        target, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        blocks = not kwargs.pop("non_blocking", False)
        if func is Tensor.cpu:
            target = CPU
        elif func is Tensor.cuda:
            target = DEVICE
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, Tensor):
                target, dtype = DEVICE if self._on.holds(arg) else CPU, arg.dtype
            elif isinstance(arg, bool):
                blocks = not arg
            elif arg is not None:
                target = arg
        if target is None or (torch.device(target).type != "cpu") == held:
            return own.to(dtype=own.dtype if dtype is None else dtype, **kwargs)
        if blocks:
            self._on.wait(f"a copy to {str(target)!r} without non_blocking=True")
        with _disable_current_modes():
            found = own.to(own.dtype if dtype is None else dtype, copy=True)
        if not held:
            self._on.put(found)
        return found


# -- what is computed ------------------------------------------------------------------------------

WAITS = frozenset(
    [
        "_local_scalar_dense",
        "allclose",
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique",
        "_unique2",
        "unique_consecutive",
        "unique_dim_consecutive",
        "equal",
        "is_nonzero",
        "bincount",
        "isin",
        "histogram",
    ]
)
"""Operations that wait for the device, by name."""

INDEXING = frozenset(["index", "index_put", "index_put_", "_index_put_impl_"])


class _Operations(TorchDispatchMode):
    """Checks operations on the device; what they make lies there too."""

    def __init__(self, accelerator: Accelerator):
        super().__init__()
        self._on = accelerator

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        held = [t for t in tensors if self._on.holds(t)]
        if not held:
            return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if name == "copy_":
            self._copy(*args, **kwargs)
            return func(*args, **kwargs)
        if name in WAITS:
            self._on.wait(f"{name}()")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._on.wait("repeat_interleave() without output_size")
        others = [t for t in tensors if t.dim() > 0 and not self._on.holds(t)]
        if name in INDEXING:
            self._index(*args)
            # Indices of the host are copied; the rest must lie together.
            others = [t for t in others if not any(t is index for index in args[1])]
        if others:
            raise DeviceMismatch(f"{func} got tensors of {DEVICE} and of the host")
        found = func(*args, **kwargs)
        self._on.put(*_tensors(found))
        return found

    def _copy(self, into: Tensor, source: Tensor, non_blocking: bool = False) -> None:
        apart = self._on.holds(into) != self._on.holds(source)
        # A number that is assigned comes as a tensor of the host.
        number = source.dim() == 0 and not self._on.holds(source)
        if apart and not number and not non_blocking:
            self._on.wait("copy_() between host and device without non_blocking=True")

    def _index(self, own: Tensor, indices: Sequence[Tensor | None], *rest: Any) -> None:
        given = [index for index in indices if index is not None]
        if any(not self._on.holds(index) for index in given):
            self._on.wait("an index on the host")
        if any(index.dtype in (torch.bool, torch.uint8) for index in given):
            value = rest[0] if rest else None
            # Numbers are filled in where the mask says.
            if value is None or value.numel() != 1 or self._on.holds(value):
                self._on.wait("a boolean index")
