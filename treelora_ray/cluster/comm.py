"""The workers of Ray Train as training sees them: what they add up and tell each other, through torch.distributed."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class TorchComm:
    def __init__(self) -> None:
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()

    def sum_(self, tensor: Tensor) -> None:
        if self.workers > 1:
            dist.all_reduce(tensor)

    def share(self, value: T) -> T:
        if self.workers == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, src=0)
        shared: T = found[0]
        return shared

    def gather(self, value: T) -> list[T]:
        if self.workers == 1:
            return [value]
        found: list[Any] = [None] * self.workers
        dist.all_gather_object(found, value)
        return found
