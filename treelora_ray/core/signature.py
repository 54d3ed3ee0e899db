"""A task's signature: one direction per layer, comparable with any other task's.

Kinds (`Accumulator`): `anchor`, the mean gradient at an adapter all tasks share; `delta`, how far the
adapter moved; `grad_ema`, a running mean of gradients along the way; `raw`, the adapter itself;
`running`, the partial sum that the released TreeLoRA code compares.

Distances, per layer (x and y are a layer's segments):

    l1      1/2 |x/|x|_1 - y/|y|_1|_1      in [0, 1]
    cosine  1/2 |x/|x|_2 - y/|y|_2|_2      in [0, 1]; the chord, since 1 - cos is no metric
    l2      |x - y|_2                      of the vectors as they are

A layer whose segment is zero has the zero direction: at distance 1/2 from any other, 0 from its like.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from treelora_ray.core.errors import SettingError
from treelora_ray.core.layout import Layout

Distance = Literal["l1", "l2", "cosine"]
SignatureKind = Literal["anchor", "delta", "grad_ema", "raw", "running"]


def directions(layout: Layout, flat: Tensor, distance: Distance) -> Tensor:
    """[..., total] -> a new [..., total]: unit segments in the norm of the distance (l2: a copy)."""
    if distance == "l2":
        return flat.float().clone()
    unit = flat.to(torch.float32, copy=True)
    norms = layout.per_layer(lambda x: length(x.clone(), distance), unit)
    return layout.scale_(unit, torch.where(norms > 0, 1 / norms, 0.0))


def layer_distances(layout: Layout, x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distances [..., L] between directions [..., total], which broadcast against each other."""
    return layout.per_layer(lambda a, b: apart(a - b, distance), x, y)


def apart(difference: Tensor, distance: Distance) -> Tensor:
    """[..., size of a layer] differences of directions, overwritten -> distances [...]."""
    norm = length(difference, distance)
    return norm if distance == "l2" else norm / 2


def length(x: Tensor, distance: Distance) -> Tensor:
    """[..., size of a layer] values, overwritten -> their norm [...] in the distance's norm.

    Written out, since `vector_norm` over rows costs four times as much on CPU.
    """
    return x.abs_().sum(-1) if distance == "l1" else x.square_().sum(-1).sqrt()


class Accumulator:
    """Builds a signature from what a training loop sees, one flat vector [total] at a time.

    anchor: `add(gradient)` of each probe batch. delta, raw, running: `add(adapter)` after each step, with
    `start_epoch` at each epoch, so that the mean is over the last epoch. grad_ema: `add(gradient)`.
    """

    def __init__(
        self,
        layout: Layout,
        kind: SignatureKind,
        start: Tensor | None = None,
        decay: float = 0.9,
        steps_per_epoch: int | None = None,
    ) -> None:
        if kind not in get_args(SignatureKind):
            raise SettingError(f"signature kind {kind!r} is unknown; known: {', '.join(get_args(SignatureKind))}")
        if kind == "delta" and start is None:
            raise SettingError("signature kind 'delta' needs `start`, the adapter at the start of the task")
        if kind == "running" and not steps_per_epoch:
            raise SettingError("signature kind 'running' needs `steps_per_epoch`")
        if not 0 <= decay < 1:
            raise SettingError(f"decay must lie in [0, 1), got {decay}")
        self.layout, self.kind, self.decay, self.steps_per_epoch = layout, kind, decay, steps_per_epoch
        self.start = start.float().clone() if start is not None and kind == "delta" else None
        self.total = torch.zeros(layout.total)
        self.count = 0

    def start_epoch(self) -> None:
        """Means over the last epoch start again; anchor and grad_ema know no epochs."""
        if self.kind in ("delta", "raw", "running"):
            self.total.zero_()
            self.count = 0

    def add(self, flat: Tensor) -> None:
        if self.total.device != flat.device:
            self.total = self.total.to(flat.device)
        self.count += 1
        if self.kind == "grad_ema":
            self.total.mul_(self.decay).add_(flat, alpha=1 - self.decay)
        elif self.kind == "running":
            # The released code adds its rows inside a loop over the rows: the mean times their number.
            assert self.steps_per_epoch is not None
            self.total.add_(flat, alpha=len(self.layout) / self.steps_per_epoch)
        else:
            self.total.add_(flat)

    def value(self) -> Tensor:
        """The signature so far, [total]."""
        if self.count == 0:
            raise SettingError(f"a {self.kind!r} signature needs at least one observation")
        if self.kind == "running":
            return self.total.clone()
        if self.kind == "grad_ema":
            return self.total / (1 - self.decay**self.count)
        mean = self.total / self.count
        return mean if self.start is None else mean - self.start.to(mean.device)


class Sketch:
    """A seeded linear map that keeps at most `dim` values of each layer.

    Each layer's values are permuted, given random signs and summed in `dim` bins of equal size (a count
    sketch with balanced bins). Inner products are kept in expectation with standard error about
    |x| |y| / sqrt(dim), so l2 and cosine distances survive; l1 distances do not. Being linear, the
    sketch of a mean is the mean of the sketches. Layers no larger than `dim` pass unchanged.
    """

    def __init__(self, layout: Layout, dim: int, seed: int = 0) -> None:
        if dim < 1:
            raise SettingError(f"sketch_dim must be at least 1, got {dim} (leave it out for no sketch)")
        self.full, self.dim, self.seed = layout, dim, seed
        self.layout = Layout.of_sizes([min(size, dim) for size in layout.sizes], layout.names)
        self._maps: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def _map(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions and signs, both [bins * dim]; positions past the layer's end have sign 0."""
        if (layer, device) not in self._maps:
            size = self.full.sizes[layer]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            padded = -(-size // self.dim) * self.dim
            order = torch.zeros(padded, dtype=torch.int32)
            order[:size] = torch.randperm(size, generator=generator, dtype=torch.int32)
            signs = torch.zeros(padded, dtype=torch.int8)
            signs[:size] = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
            self._maps[layer, device] = order.to(device), signs.to(device)
        return self._maps[layer, device]

    def __call__(self, flat: Tensor) -> Tensor:
        """[total of the full layout] -> [total of `self.layout`], float32."""
        out = torch.empty(self.layout.total, device=flat.device)
        for layer, size in enumerate(self.full.sizes):
            values, slot = self.full.segment(flat, layer), self.layout.segment(out, layer)
            if size <= self.dim:
                slot.copy_(values)
            else:
                order, signs = self._map(layer, flat.device)
                torch.sum((values[order] * signs).view(-1, self.dim), 0, out=slot)
        return out


def related_layers(layout: Layout, x: Tensor, y: Tensor, distance: Distance, arms: int, level: float) -> Tensor:
    """Which layers of two direction vectors are nearer than chance: bool [L].

    The null is: the same magnitudes, each with a random sign. Under it the distance is nearly normal with
    mean and variance in closed form (what many random sign flips would converge to), and the nearest of
    `arms` unrelated tasks lies below the `level / arms` quantile with probability at most `level`.
    """
    quantile = float(torch.special.ndtri(torch.tensor(level / arms, dtype=torch.float64)))

    def nearer(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        if distance == "l1":  # a flip leaves |a - b| or makes it |a + b|
            mean = torch.maximum(a.abs(), b.abs()).sum(-1)
            spread = torch.minimum(a.abs(), b.abs()).square().sum(-1).sqrt()
            seen = (a - b).abs().sum(-1)
        else:  # |a - b|^2 = |a|^2 + |b|^2 - 2<a, b>, and a flip changes the last term only
            mean = a.square().sum(-1) + b.square().sum(-1)
            spread = 2 * (a * b).square().sum(-1).sqrt()
            seen = (a - b).square().sum(-1)
        return (spread > 0) & (seen < mean + quantile * spread)

    return layout.per_layer(nearer, x, y)


def aligned(layout: Layout, x: Tensor, others: Tensor, level: float, differences: Tensor) -> Tensor:
    """Which of other direction vectors [k, total] agree with x over all layers by more than chance allows: bool [k].

    Signs of single values are too free a null for gradients, whose values hang together. What chance allows is read
    off the task's own noise: differences [n, total] of each mini-batch's gradient from the mean of those before it, so
    that the task itself drops out. Their squared cosines, among themselves and with the others, are in the mean the
    variance of the cosine of vectors that have nothing in common but what they are made of; the larger of both counts.
    All are True for fewer than two differences, which say nothing.
    """
    if len(differences) < 2:
        return torch.ones(len(others), dtype=torch.bool)
    n, layers = len(differences), len(layout)
    cosines = layout.per_layer(_cosines, torch.cat([differences, x[None], others]))  # [n + 1 + k, n + 1 + k, L]
    among = cosines[:n, :n].square().mean(-1)
    own = float((among.sum() - among.diagonal().sum()) / (n * (n - 1))) / layers
    with_others = float(cosines[:n, n + 1 :].mean(-1).square().mean())
    quantile = -float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
    agree: Tensor = cosines[n, n + 1 :].mean(-1) > quantile * max(own, with_others) ** 0.5
    return agree


def _cosines(vectors: Tensor) -> Tensor:
    """[n, count, size] -> [n, n, count]; 0 where a vector is 0."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return torch.einsum("ics,jcs->ijc", unit, unit)
