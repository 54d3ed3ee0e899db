"""Tasks as a guide sees them: gradients and distances of which every third belongs to the same family."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from treelora_ray.core import Layout
from treelora_ray.core.layout import IntArray

RAGGED = Layout.of_sizes([48, 16, 48, 16], ["q0", "v0", "q1", "v1"])


def gradient(task: int, step: int) -> Tensor:
    """Tasks t and t + 3 are kin."""
    family = torch.Generator().manual_seed(task % 3)
    own = torch.Generator().manual_seed(100 + 17 * task + step)
    return torch.randn(RAGGED.total, generator=family) + 0.4 * torch.randn(RAGGED.total, generator=own)


def distances(task: int, step: int, arms: IntArray | Tensor) -> Tensor:
    noise = np.random.default_rng((task, step)).normal(0, 0.02, len(arms))
    return torch.from_numpy(np.where((np.asarray(arms) - task) % 3 == 0, 0.2, 0.7) + noise)
