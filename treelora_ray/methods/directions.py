"""Products s B A of adapters as vectors: their inner products, and which mixture of some is nearest to another.

The products themselves, d_out x d_in, are never formed: <B A, B' A'> = <B^T B', A A'^T>, which are r x r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treelora_ray.core.layout import Layout


@torch.no_grad()
def inner(layout: Layout, one: Tensor, other: Tensor) -> Tensor:
    """[L] by layer <B A, B' A'> of two adapters [total], in double precision."""
    found = []
    for (_, (a, b)), (_, (c, d)) in zip(layout.views(one), layout.views(other), strict=True):
        found.append(((b.double().T @ d.double()) * (a.double() @ c.double().T)).sum())
    return torch.stack(found)


def mixture(gram: Tensor, with_other: Tensor) -> tuple[Tensor, float]:
    """Of directions with products `gram` [n, n], the mixture [n] nearest to one of length 1 whose products with them
    are `with_other` [n]; and the square of the distance left."""
    weights = torch.linalg.pinv(gram, hermitian=True) @ with_other
    return weights, max(0.0, 1.0 - float(with_other @ weights))
