"""What a model said, whatever it is trained for: a row of logits for each thing its loss is a mean over.

That is a row of the batch in classification, and a token of an answer in language modelling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treelora_ray.objectives.base import Batch


def logits(batch: Batch, said: Any) -> Tensor:
    """[n, K] before any mask, n = `batch.count`."""
    found: Tensor = said["logits"]
    return found.float() if batch.targets is not None else found[:, :-1][_answers(batch)].float()


def gold(batch: Batch) -> Tensor:
    """[n] the right one of the K."""
    return batch.targets if batch.targets is not None else batch.inputs["labels"][:, 1:][_answers(batch)]


def log_probabilities(batch: Batch, said: Any) -> Tensor:
    """[n, K] among what competes in training."""
    found = logits(batch, said)
    if batch.allowed is not None:
        found = found.masked_fill(~batch.allowed, float("-inf"))
    return torch.log_softmax(found, dim=-1)


def rows_of(batch: Batch) -> int:
    """Rows of the batch, whatever its loss is a mean over."""
    return len(next(iter(batch.inputs.values())))


def answer_lengths(batch: Batch) -> list[int]:
    """How many of the n belong to each row."""
    if batch.targets is not None:
        return [1] * rows_of(batch)
    found: list[int] = _answers(batch).sum(1).tolist()
    return found


def _answers(batch: Batch) -> Tensor:
    return batch.inputs["labels"][:, 1:] >= 0
