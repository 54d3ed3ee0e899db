"""A task's adapter as a plain peft folder, and beside it its rows of the head."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from treelora_ray.files import write_atomically
from treelora_ray.methods.base import Method


def export_adapter(method: Method, task: int, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors for peft; head.safetensors (weight, bias), labels.json."""
    learner = method.learner
    factors = {name: (a.cpu(), b.cpu()) for name, (a, b) in method.factors(task).items()}
    learner.model.export(folder, factors)
    if not learner.head.rows:
        return
    rows = torch.tensor(learner.head.rows[task], device=learner.device)
    head = {
        "weight": learner.head.weight[rows].cpu().contiguous(),
        "bias": learner.head.bias[rows].cpu().contiguous(),
    }
    write_atomically(folder / "head.safetensors", save(head))
    labels = json.dumps(list(learner.infos[task].labels), ensure_ascii=False, indent=1)
    write_atomically(folder / "labels.json", labels.encode())
