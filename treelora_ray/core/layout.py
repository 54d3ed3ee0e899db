"""How a task's per-layer tensors lie in one flat vector.

A layer contributes one or more tensors (its A and B factors, or only B's gradient), and layers may
differ in size: grouped-query attention gives `v` fewer rows than `q`. Nothing is padded. Layers of
equal size stand next to each other in the flat vector, so that whatever is done "per layer" runs as
one vectorised operation per distinct size, whatever the forward order of the layers is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treelora_ray.core.errors import LayoutError

LayerTensors = Mapping[str, Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Block:
    """All layers of one size: flat[start : start + count * size] viewed as [count, size]."""

    layers: tuple[int, ...]
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + len(self.layers) * self.size

    def view(self, flat: Tensor) -> Tensor:
        """[..., total] -> [..., count, size], a view."""
        return flat[..., self.start : self.stop].view(*flat.shape[:-1], len(self.layers), self.size)


@dataclass(frozen=True)
class Layout:
    """Names of the layers in forward order, and the shapes of each layer's tensors."""

    names: tuple[str, ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.shapes):
            raise LayoutError(f"a layout needs layers: got {len(self.names)} names, {len(self.shapes)} shapes")
        if len(set(self.names)) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise LayoutError(f"layer names must differ; given twice: {', '.join(twice)}")
        for name, size in zip(self.names, self.sizes, strict=True):
            if size == 0:
                raise LayoutError(f"layer {name!r} has no values")

    @classmethod
    def of(cls, tensors: LayerTensors) -> Layout:
        """The layout of tensors given by layer name, in forward order."""
        shapes = tuple(tuple(tuple(part.shape) for part in _parts(value)) for value in tensors.values())
        return cls(tuple(tensors), shapes)

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], names: Sequence[str] | None = None) -> Layout:
        """A layout of plain vectors, one a layer."""
        named = tuple(names) if names is not None else tuple(f"layer{i}" for i in range(len(sizes)))
        return cls(named, tuple(((int(size),),) for size in sizes))

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sum(int(np.prod(shape)) for shape in parts) for parts in self.shapes)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        found, start = [], 0
        for size in dict.fromkeys(self.sizes):
            layers = tuple(i for i, other in enumerate(self.sizes) if other == size)
            found.append(Block(layers, start, size))
            start = found[-1].stop
        return tuple(found)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer's segment starts, by forward order of the layers."""
        starts = {i: b.start + k * b.size for b in self.blocks for k, i in enumerate(b.layers)}
        return tuple(starts[i] for i in range(len(self)))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @cached_property
    def _index(self) -> dict[tuple[int, torch.device], Tensor]:
        return {}

    def _layers(self, block: int, device: torch.device) -> Tensor:
        """The block's layer numbers as an index tensor, made once per device."""
        key = (block, device)
        if key not in self._index:
            self._index[key] = torch.tensor(self.blocks[block].layers, device=device)
        return self._index[key]

    # -- between layer tensors and the flat vector

    def check(self, tensors: LayerTensors) -> None:
        """Raises, naming the layer, unless the tensors have this layout."""
        for name in self.names:
            if name not in tensors:
                raise LayoutError(f"layer {name!r} is missing; given: {', '.join(tensors)}")
        for name in tensors:
            if name not in self.names:
                raise LayoutError(f"layer {name!r} is not in the layout; it has: {', '.join(self.names)}")
        for name, shapes in zip(self.names, self.shapes, strict=True):
            given = tuple(tuple(part.shape) for part in _parts(tensors[name]))
            if given != shapes:
                raise LayoutError(f"layer {name!r} has shapes {list(given)}, the layout says {list(shapes)}")

    def flatten(self, tensors: LayerTensors, out: Tensor | None = None) -> Tensor:
        """Layer tensors -> [total]; into `out` where given, else a new float32 vector."""
        self.check(tensors)
        if out is None:
            out = torch.empty(self.total, device=_parts(tensors[self.names[0]])[0].device)
        for name, views in self.views(out):
            for part, view in zip(_parts(tensors[name]), views, strict=True):
                view.copy_(part.detach())
        return out

    def views(self, flat: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """The flat vector's layers in forward order, as views with the shapes of the layer's tensors."""
        for name, shapes, offset in zip(self.names, self.shapes, self.offsets, strict=True):
            views, at = [], offset
            for shape in shapes:
                size = int(np.prod(shape))
                views.append(flat[at : at + size].view(shape))
                at += size
            yield name, tuple(views)

    def bind(
        self, parameters: LayerTensors, theta: Tensor | None = None, grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Moves the parameters and their gradients into two flat vectors [total], and returns these.

        `theta` and `grad` are vectors to use, for callers who keep more than these parameters in one buffer.

        The parameters stay what they were for their module and optimizer, but share memory with the
        flat vectors; zero gradients in place (`zero_grad(set_to_none=False)`) to keep it so.
        """
        self.check(parameters)
        first = _parts(parameters[self.names[0]])[0]
        kinds = {(str(part.dtype), str(part.device)) for parts in parameters.values() for part in _parts(parts)}
        if len(kinds) > 1:
            raise LayoutError(f"parameters to bind must share one dtype and device, got {sorted(kinds)}")
        theta = torch.empty(self.total, dtype=first.dtype, device=first.device) if theta is None else theta
        self.flatten(parameters, theta)
        grad = torch.zeros_like(theta) if grad is None else grad.zero_()
        for (name, views), (_, grads) in zip(self.views(theta), self.views(grad), strict=True):
            for part, view, slot in zip(_parts(parameters[name]), views, grads, strict=True):
                if part.grad is not None:
                    slot.copy_(part.grad)
                part.data, part.grad = view, slot
        return theta, grad

    # -- per layer

    def segment(self, flat: Tensor, layer: int) -> Tensor:
        """[..., total] -> [..., size of the layer], a view."""
        return flat[..., self.offsets[layer] : self.offsets[layer] + self.sizes[layer]]

    def per_layer(self, reduce: Callable[..., Tensor], *flats: Tensor) -> Tensor:
        """Applies `reduce` to each block's views [..., count, size] -> [..., count]; returns [..., L]."""
        parts = [reduce(*(block.view(flat) for flat in flats)) for block in self.blocks]
        if len(parts) == 1:
            return parts[0]
        out = parts[0].new_empty(*parts[0].shape[:-1], len(self))
        for number, part in enumerate(parts):
            out[..., self._layers(number, part.device)] = part
        return out

    def pick(self, values: Tensor, block: int) -> Tensor:
        """[..., L] -> [..., count]: the values of the block's layers."""
        if len(self.blocks) == 1:
            return values
        return values[..., self._layers(block, values.device)]

    def scale_(self, flat: Tensor, factors: Tensor) -> Tensor:
        """Multiplies each layer's segment of [..., total] by its factor of [..., L], in place."""
        for number, block in enumerate(self.blocks):
            block.view(flat).mul_(self.pick(factors, number).unsqueeze(-1))
        return flat

    def require_flat(self, flat: Tensor, what: str) -> None:
        """Raises unless `flat` is a finite vector of this layout; names the first bad layer."""
        if flat.ndim != 1 or flat.numel() != self.total:
            sizes = ", ".join(f"{n}={s}" for n, s in zip(self.names[:3], self.sizes, strict=False))
            raise LayoutError(
                f"{what} has shape {list(flat.shape)}, the layout needs [{self.total}] "
                f"({len(self)} layers: {sizes}{', ...' if len(self) > 3 else ''})"
            )
        if not bool(torch.isfinite(flat).all()):
            for layer, name in enumerate(self.names):
                bad = int((~torch.isfinite(self.segment(flat, layer))).sum())
                if bad:
                    raise LayoutError(f"{what} has {bad} NaN or infinite values in layer {name!r}")

    # -- identity

    def to_json(self) -> dict[str, Any]:
        return {"names": list(self.names), "shapes": [[list(s) for s in parts] for parts in self.shapes]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        shapes = tuple(tuple(tuple(int(n) for n in s) for s in parts) for parts in data["shapes"])
        return cls(tuple(data["names"]), shapes)

    @cached_property
    def digest(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first_difference(self, other: Layout) -> str | None:
        """In words, the first layer in which the two layouts differ; None if they are equal."""
        for i in range(max(len(self), len(other))):
            mine = (self.names[i], self.shapes[i]) if i < len(self) else None
            theirs = (other.names[i], other.shapes[i]) if i < len(other) else None
            if mine != theirs:
                return f"layer {i} is {_describe(mine)} here and {_describe(theirs)} there"
        return None


def _parts(value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (value,) if isinstance(value, Tensor) else value


def _describe(layer: tuple[str, tuple[tuple[int, ...], ...]] | None) -> str:
    return "missing" if layer is None else f"{layer[0]!r} {[list(shape) for shape in layer[1]]}"


FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
