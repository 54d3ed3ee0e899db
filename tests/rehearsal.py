"""A GPU that is only said to be one: tensors of the CPU with a mark, which operations pass on and must not mix.

Within `rehearsal()` it shows what would fail on a GPU: tensors of two devices in one operation, and arrays made of a
tensor that is not on the host. It shows nothing of what GPUs compute differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
GET_DEVICE, GET_IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]
TO, CPU, PIN, TO_ARRAY = Tensor.to, Tensor.cpu, Tensor.pin_memory, (Tensor.numpy, Tensor.__array__)


class Marks:
    """Marks on memory, and so on all views of it."""

    def __init__(self) -> None:
        self.known: dict[int, StorageWeakRef] = {}  # a weak reference keeps its number from being used again
        self.most = 64

    def put(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        self.known[storage._cdata] = StorageWeakRef(storage)
        if len(self.known) > self.most:  # weak references hold memory too
            self.known = {number: found for number, found in self.known.items() if not found.expired()}
            self.most = 2 * len(self.known) + 64
        return tensor

    def on(self, tensor: Tensor) -> bool:
        found = self.known.get(_storage(tensor)._cdata)
        return found is not None and not found.expired()


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Every operation, those of the backward pass too."""

    def __init__(self, gpu: Marks) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = str(func), _tensors((args, kwargs))
        there, here = [t for t in given if self.gpu.on(t)], [t for t in given if not self.gpu.on(t)]
        if there and here and not self._may_mix(name, args, here):
            shown = ", ".join(f"{'gpu' if self.gpu.on(t) else 'host'} {list(t.shape)}" for t in given)
            raise RuntimeError(f"{name} is given tensors of two devices: {shown}")
        out = func(*args, **(kwargs or {}))
        if there and not ("copy_" in name and not self.gpu.on(args[0])):
            for tensor in _tensors(out):
                self.gpu.put(tensor)
        return out

    def _may_mix(self, name: str, args: Any, here: list[Tensor]) -> bool:
        if "copy_" in name:
            return True
        if name.startswith(("aten.index.", "aten.index_put")):  # by indices that lie on the host
            return self.gpu.on(args[0]) and all(t.dtype in (torch.long, torch.bool) or t.ndim == 0 for t in here)
        one_device = ("fused", "foreach", "index_", "gather", "scatter")
        return not any(word in name for word in one_device) and all(t.ndim == 0 for t in here)


class _Calls(TorchFunctionMode):
    """What names a device, or asks for one."""

    def __init__(self, gpu: Marks) -> None:
        super().__init__()
        self.gpu, self.pinned = gpu, Marks()
        self.moves: list[tuple[bool, bool]] = []  # to the GPU, outside of modules: (from pinned memory, not waited for)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == GET_DEVICE:
            return GPU if self.gpu.on(args[0]) else func(*args)
        if func == GET_IS_CUDA:
            return self.gpu.on(args[0])
        if func in TO_ARRAY and self.gpu.on(args[0]):
            raise TypeError("can't convert a tensor of the GPU to an array: .cpu() is missing")
        if func is PIN:
            assert not self.gpu.on(args[0]), "what is on the GPU cannot be pinned"
            return self.pinned.put(args[0].clone())
        if func is CPU:
            return self._moved(args[0], HOST, False)
        if func is TO:
            return self._to(*args, **kwargs)
        named = kwargs.get("device")
        if named is not None and torch.device(named).type == "cuda":
            return self.gpu.put(func(*args, **{**kwargs, "device": HOST}))
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *given: Any, non_blocking: bool = False, copy: bool = False, **named: Any) -> Tensor:
        device, dtype = named.get("device"), named.get("dtype")
        for one in given:
            if isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, Tensor):
                device, dtype = (GPU if self.gpu.on(one) else HOST), one.dtype
            elif isinstance(one, str | torch.device):
                device = one
            else:
                non_blocking = non_blocking or bool(one)
        out = tensor if device is None else self._moved(tensor, torch.device(device), non_blocking)
        out = out if dtype is None or out.dtype == dtype else out.to(dtype)
        return out.clone() if copy and out is tensor else out

    def _moved(self, tensor: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        if not self.gpu.on(tensor) and device.type != "cuda":
            return TO(tensor, device)
        if self.gpu.on(tensor) and device.type == "cuda":
            return tensor
        if device.type == "cuda":
            self.moves.append((self.pinned.on(tensor), non_blocking))
            return self.gpu.put(tensor.clone())
        assert not tensor.requires_grad, "no gradient goes through a copy on the host here"
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return tensor.clone()


@contextmanager
def rehearsal() -> Iterator[_Calls]:
    gpu = Marks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
        with _Calls(gpu) as calls, _Operations(gpu):
            yield calls
