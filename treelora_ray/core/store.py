"""The signatures of all tasks so far, in half precision, with their pairwise distances.

Rows live on the host: what travels to a device are the segments of the chosen tasks, never the store.
N tasks take N signatures of `layout.total` halves, N x L scales, and N(N-1)/2 float32 distances (means
over layers), appended row by row and never computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core.layout import FloatArray, IntArray, Layout
from treelora_ray.core.signature import Distance, apart, layer_distances, length

CHUNK_VALUES = 1 << 20  # values handled at once when a row meets the whole store: stays in the caches
LONG_SEGMENT = 4096  # from here on a copy per layer is cheaper than one gather with an intermediate


class Rows:
    """Growing matrix [n, total] of directions, stored as `values * scale` with one scale a layer.

    Halves hold 11 bits, but only above 6e-5; scaling each segment to a largest value of 1 keeps tiny
    segments exact, and for unit directions the scale makes the *stored* direction of unit norm.
    """

    def __init__(self, layout: Layout, distance: Distance, dtype: torch.dtype = torch.float16) -> None:
        self.layout, self.distance = layout, distance
        self.values = torch.empty(0, layout.total, dtype=dtype)
        self.scales = torch.empty(0, len(layout))
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def append(self, flat: Tensor) -> int:
        if self.count == len(self.values):
            self._grow(max(8, self.count + self.count // 4))
        self.count += 1
        self[self.count - 1] = flat
        return self.count - 1

    def _grow(self, capacity: int) -> None:
        for name in ("values", "scales"):
            old = getattr(self, name)
            new = old.new_empty(capacity, old.shape[1])
            new[: self.count] = old[: self.count]
            setattr(self, name, new)

    def __setitem__(self, row: int, flat: Tensor) -> None:
        flat = flat.detach().to("cpu", torch.float32, copy=True)
        peaks = self.layout.per_layer(lambda x: x.abs().amax(-1), flat)
        peaks = torch.where(peaks > 0, peaks, 1.0)
        self.values[row] = self.layout.scale_(flat, 1 / peaks)
        if self.distance == "l2":
            self.scales[row] = peaks
            return
        stored = self.values[row].to(torch.float32, copy=True)
        norms = self.layout.per_layer(lambda x: length(x, self.distance), stored)
        self.scales[row] = torch.where(norms > 0, 1 / norms, 0.0)

    def __getitem__(self, rows: int | Sequence[int] | IntArray | slice) -> Tensor:
        """Directions of one row [total] or several [n, total], float32."""
        at = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
        # Of single rows and slices `.float()` would give the store's own floats, to be scaled in place.
        return self.layout.scale_(self.values[at].to(torch.float32, copy=True), self.scales[at])

    def layer(self, rows: IntArray, layer: int) -> Tensor:
        """[n, size] one layer's segments of several rows, float32."""
        chosen = torch.from_numpy(rows)
        values = self.layout.segment(self.values, layer)[chosen].float()
        return values * self.scales[chosen, layer].unsqueeze(-1)

    def segments(self, rows: IntArray, out: Tensor | None = None) -> Tensor:
        """Layer by layer another row: rows [L] -> [total] with layer l of row rows[l]; -1 leaves `out` as it is."""
        chosen = torch.from_numpy(rows)
        out = torch.zeros(self.layout.total) if out is None else out
        for number, block in enumerate(self.layout.blocks):
            at = self.layout.pick(chosen, number)
            layers = self.layout.pick(torch.arange(len(self.layout)), number)
            places = torch.arange(len(block.layers))
            if not bool((at >= 0).all()):
                wanted = at >= 0
                at, layers, places = at[wanted], layers[wanted], places[wanted]
            source, target = block.view(self.values), block.view(out)
            scales = self.scales[at, layers].unsqueeze(-1)
            if block.size < LONG_SEGMENT:
                target[places] = source[at, places] * scales
                continue
            for row, place, scale in zip(at.tolist(), places.tolist(), scales, strict=True):
                target[place].copy_(source[row, place]).mul_(scale)
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values[: self.count].clone(), "scales": self.scales[: self.count].clone()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.values, self.scales = tensors["values"].clone(), tensors["scales"].clone()
        self.count = len(self.values)


class SignatureStore:
    """Signatures of tasks 0 .. n-1 and the mean-over-layers distance of every pair."""

    def __init__(self, layout: Layout, distance: Distance, dtype: torch.dtype = torch.float16) -> None:
        self.layout, self.distance = layout, distance
        self.rows = Rows(layout, distance, dtype)
        self.pairs = np.empty(0, np.float32)  # row-major lower triangle: (1,0) (2,0) (2,1) (3,0) ...

    def __len__(self) -> int:
        return len(self.rows)

    def append(self, flat: Tensor) -> FloatArray:
        """Stores a task's signature; returns its distances [n] to the tasks before it."""
        number = self.rows.append(flat)
        row = self.from_all(self.rows[number])[:number]
        used = number * (number - 1) // 2
        if used + number > len(self.pairs):
            grown = np.empty(max(64, used + number, len(self.pairs) * 5 // 4), np.float32)
            grown[:used] = self.pairs[:used]
            self.pairs = grown
        self.pairs[used : used + number] = row
        return self.pair_row(number)[:number]

    def extend(self, flats: Tensor) -> None:
        """Stores many signatures [n, total] at once, with the same result as one at a time."""
        for flat in flats:
            self.append(flat)

    def replace(self, task: int, flat: Tensor) -> None:
        """Another signature for a stored task (the `paper` mode averages those of merged tasks)."""
        self.rows[task] = flat
        row = self.from_all(self.rows[task])
        for other in range(len(self)):
            if other != task:
                self.pairs[_pair(task, other)] = row[other]

    def from_all(self, direction: Tensor) -> FloatArray:
        """Distances [n], mean over layers, of a direction [total] to every stored task."""
        step = max(1, CHUNK_VALUES // self.layout.total)
        scratch = torch.empty(step, self.layout.total)  # allocated once: page faults cost more than the sums
        out = torch.empty(len(self))
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            chunk = scratch[: stop - start]
            chunk.copy_(self.rows.values[start:stop])
            self.layout.scale_(chunk, self.rows.scales[start:stop]).sub_(direction)
            out[start:stop] = self.layout.per_layer(lambda d: apart(d, self.distance), chunk).mean(-1)
        return out.double().numpy()

    def from_rows(self, direction: Tensor, rows: Sequence[int] | IntArray) -> Tensor:
        """Distances [n, L] of a direction [total] to stored tasks."""
        return layer_distances(self.layout, self.rows[rows], direction, self.distance)

    def by_layer(self) -> FloatArray:
        """Distances [n, n, L] of all pairs."""
        n, step = len(self), max(1, CHUNK_VALUES // self.layout.total)
        out = np.zeros((n, n, len(self.layout)))
        for task in range(1, n):
            own = self.rows[task]
            for start in range(0, task, step):
                rows = np.arange(start, min(start + step, task))
                out[task, rows] = out[rows, task] = self.from_rows(own, rows).double().numpy()
        return out

    @property
    def condensed(self) -> FloatArray:
        """All pairs in the order scipy's linkage reads, of tasks numbered from the last to the first."""
        n = len(self)
        return self.pairs[: n * (n - 1) // 2][::-1].astype(np.float64)

    def pair_row(self, task: int) -> FloatArray:
        """Distances [n] of a stored task to all, 0 to itself."""
        n = len(self)
        low, high = np.arange(task), np.arange(task + 1, n)
        before = self.pairs[task * (task - 1) // 2 + low] if task else np.empty(0)
        return np.concatenate([before, [0.0], self.pairs[high * (high - 1) // 2 + task]]).astype(np.float64)

    def nbytes(self) -> int:
        """Bytes of what is stored, spare capacity included."""
        return int(self.rows.values.nbytes + self.rows.scales.nbytes + self.pairs.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        n = len(self)
        return {**self.rows.tensors(), "pairs": torch.from_numpy(self.pairs[: n * (n - 1) // 2].copy())}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.rows.load(tensors)
        self.pairs = tensors["pairs"].numpy().copy()


def _pair(i: int, j: int) -> int:
    i, j = max(i, j), min(i, j)
    return i * (i - 1) // 2 + j
