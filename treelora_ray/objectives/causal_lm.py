"""Fine-tuning a language model on prompts and answers: loss on the answer's tokens, greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.models.backbone import CausalModel, Shown
from treelora_ray.objectives.base import AnchorHead, Batch, Columns


class CausalLM:
    kind: ClassVar[str] = "causal-lm"

    def __init__(self, model: CausalModel, max_new_tokens: int, precision: str = "fp32") -> None:
        self.model, self.max_new_tokens, self.precision = model, max_new_tokens, precision
        self.shown: Shown | None = None  # what stands before the prompts that are answered

    def batch(self, rows: Columns, tasks: Sequence[int]) -> Batch:  # noqa: ARG002
        inputs = self.model.encode(rows["prompt"], rows["answer"])
        return Batch(inputs, int((inputs["labels"][:, 1:] >= 0).sum()))

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        with self.model.autocast(self.precision):
            logits = self.model.logits(batch.inputs)
        nll = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch.inputs["labels"][:, 1:].flatten(), reduction="sum"
        )
        return nll, {"logits": logits}

    def anchor_loss(self, batch: Batch, head: AnchorHead | None) -> Tensor:  # noqa: ARG002
        return self.loss(batch)[0] / max(batch.count, 1)

    @torch.no_grad()
    def answer(self, rows: Columns, tasks: Sequence[int], classes: Sequence[int] | None) -> list[str]:  # noqa: ARG002
        with self.model.autocast(self.precision):
            return self.model.generate(list(rows["prompt"]), self.max_new_tokens, self.shown)
