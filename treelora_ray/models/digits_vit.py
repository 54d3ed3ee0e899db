"""The built-in backbone: a small vision transformer, pre-trained on digits that no task shows; made once, cached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from treelora_ray.files import cache_folder, locked, new_folder

VERSION = 3  # a change of the recipe makes a new folder
STEPS, BATCH = 1000, 64
SETTLE, GRID = 10, 2.0**-14  # steps between two roundings of the weights, and to what


def digits_vit_folder() -> Path:
    """A folder that transformers loads, made where it is missing: by one process, for which others wait."""
    folder = cache_folder() / f"digits-vit-{VERSION}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.lock"):
        if not (folder / "config.json").is_file():
            with new_folder(folder) as temporary:
                _make(temporary)
    return folder


def _make(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order, whatever the number of cores
    try:
        with torch.random.fork_rng(devices=[]):
            model = _pretrain()
    finally:
        torch.set_num_threads(threads)
    model.config.save_pretrained(folder)
    # Not by the model's own `save_pretrained`, which saves nothing on workers but the first.
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.3],
        "image_std": [0.3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))


def _pretrain() -> Any:
    """Which digit is it, whatever frame it stands in?

    The same weights on every machine: processors round differently, and training makes much of little. So they are
    drawn and trained in double precision, and rounded so coarsely every few steps that what machines differ by is gone.
    """
    import torch
    from transformers import ViTConfig, ViTModel

    from treelora_ray.data.digits import draw, frames, spoil

    config = ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, head = ViTModel(config, add_pooling_layer=False).double(), torch.nn.Linear(64, 10, bias=False).double()
    weights, rng = [*model.parameters(), *head.parameters()], np.random.default_rng(1)
    with torch.no_grad():
        for weight in weights:
            if weight.dim() > 1:  # others begin with zeros or ones
                spread = 0.07 if weight is head.weight else 0.02
                weight.copy_(torch.from_numpy(rng.normal(0, spread, weight.shape)))
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    for step in range(STEPS):
        if step % SETTLE == 0:
            _settle(optimizer)
        digits = rng.integers(0, 10, BATCH)
        pictures = spoil(draw(digits, "pretrain", rng), rng, frames(rng, BATCH))
        pixels = (torch.from_numpy(pictures).double().unsqueeze(1) / 255 - 0.3) / 0.3
        features = model(pixel_values=pixels).last_hidden_state[:, 0]
        loss = torch.nn.functional.cross_entropy(head(features), torch.from_numpy(digits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    _settle(optimizer)
    return model.float().eval()


def _settle(optimizer: Any) -> None:
    """Rounds weights to the grid, and what the optimizer remembers of them to eight digits of two."""
    import torch

    with torch.no_grad():
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.copy_((weight / GRID).round() * GRID + 0.0)  # no zero is negative
                for name in ("exp_avg", "exp_avg_sq"):
                    if (moment := optimizer.state[weight].get(name)) is not None:
                        moment.copy_(moment.bfloat16())
