"""All that is ever trained as one vector that grows with the stream: the adapter, then the head, row after row.

While a task is learnt, the learner's buffer holds the adapter and the rows of the head that compete. What a method
keeps of a task (importance, anchors, directions) must find its place again when other rows compete, or more of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.methods.learner import Learner


def size(learner: Learner) -> int:
    """Of the vector now."""
    return learner.layout.total + len(learner.head) * (learner.model.width + 1)


def places(learner: Learner) -> Tensor:
    """[theta] where each value of the learner's buffer stands in the vector."""
    total, width = learner.layout.total, learner.model.width
    device = learner.device
    starts = total + torch.tensor(learner.rows, dtype=torch.long, device=device) * (width + 1)
    weights = (starts.unsqueeze(1) + torch.arange(width, device=device)).reshape(-1)
    return torch.cat([torch.arange(total, device=device), weights, starts + width])


def values(learner: Learner) -> Tensor:
    """[size] the adapter and the whole head as they are, rows in training included."""
    head = torch.cat([learner.head.weight, learner.head.bias.unsqueeze(1)], dim=1)
    found = torch.cat([learner.adapter, head.reshape(-1)])
    found[places(learner)] = learner.theta
    return found


def spread(learner: Learner, vector: Tensor) -> Tensor:
    """[..., theta] -> [..., size], zero where nothing is trained."""
    found = torch.zeros(*vector.shape[:-1], size(learner), dtype=vector.dtype, device=learner.device)
    found[..., places(learner)] = vector
    return found


def grown(learner: Learner, kept: Tensor) -> Tensor:
    """[..., size at some time] -> [..., size], zero for rows that came later."""
    return F.pad(kept.to(learner.device), (0, size(learner) - kept.shape[-1]))


def trained(learner: Learner, kept: Tensor) -> Tensor:
    """[..., size at some time] -> [..., theta] what is in training now; zero for rows that came later."""
    return grown(learner, kept)[..., places(learner)]
