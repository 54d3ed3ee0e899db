"""LoRA adapters through peft: which modules get one, in which order they run, and plain peft folders."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treelora_ray.config import LoraConfig
from treelora_ray.files import write_atomically
from treelora_ray.models.errors import ModelError

NAME = "default"
# Last parts of the names under which architectures keep the query and value projections of their attention.
SEPARATE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "q", "v", "wq", "wv", "to_q", "to_v")
FUSED = ("qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj", "attn_qkv")

Factors = Mapping[str, tuple[Tensor, Tensor]]


def linears(net: nn.Module) -> dict[str, nn.Module]:
    """Modules that peft can adapt, by name."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def find_targets(net: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the modules that get an adapter."""
    candidates = linears(net)
    wanted = [*SEPARATE] if config.targets == "auto" else list(config.targets)
    found = [name for name in candidates if _ends(name, wanted)]
    if config.targets == "auto" and not found:
        found = [name for name in candidates if _ends(name, FUSED)]
    ends = ", ".join(sorted({name.split(".")[-1] for name in candidates}))
    if config.targets == "auto" and not found:
        raise ModelError(
            f"no query or value projection was found in {type(net).__name__}; name the modules in "
            f"model.lora.targets; its linear modules end in: {ends}"
        )
    for end in wanted if config.targets != "auto" else []:
        if not any(_ends(name, [end]) for name in candidates):
            raise ModelError(f"model.lora.targets has {end!r}, which no linear module ends in; these do: {ends}")
    if config.layers is not None:
        kept = [name for name in found if _block(name) in config.layers]
        blocks = sorted({_block(name) for name in found} - {None}, key=lambda block: block or 0)
        if missing := sorted(set(config.layers) - {_block(name) for name in found}):
            raise ModelError(f"model.lora.layers has {missing}, the model's blocks with targets are {blocks}")
        found = kept
    return found


def _ends(name: str, wanted: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _block(name: str) -> int | None:
    """The number of the block a module lies in: the first number in its name."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else None


def forward_order(net: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> list[str]:
    """The names in the order in which one forward pass first calls them."""
    order: list[str] = []
    modules = dict(net.named_modules())

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if name not in order:
                order.append(name)

        return hook

    hooks = [modules[name].register_forward_pre_hook(note(name)) for name in names]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [name for name in names if name not in order]:
        raise ModelError(
            f"{len(idle)} of the modules to adapt take no part in the model's forward pass: {', '.join(idle[:5])}; "
            "leave them out of model.lora.targets"
        )
    return order


def inject(net: Any, config: LoraConfig, names: Sequence[str], task_type: str | None, seed: int) -> Any:
    """The peft model, its adapters drawn from the seed: A Kaiming-uniform(sqrt 5), B = 0."""
    import peft

    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(names),
        bias="none",
        task_type=task_type,
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(net, lora, adapter_name=NAME)
    for number, name in enumerate(names):
        a, b = factors(wrapped, name)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        bound = 1 / math.sqrt(a.shape[1])  # what kaiming_uniform_ with a = sqrt(5) draws from
        a.data.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        b.data.zero_()
        a.data, b.data = a.data.float(), b.data.float()
    wanted = {id(part) for name in names for part in factors(wrapped, name)}
    trained = {id(p) for p in wrapped.parameters() if p.requires_grad}
    assert trained == wanted, "exactly the adapters are to be trained"
    return wrapped


def factors(wrapped: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """(A [r, d_in], B [d_out, r]) of a module of the model that was wrapped."""
    module = wrapped.base_model.model.get_submodule(name)
    return module.lora_A[NAME].weight, module.lora_B[NAME].weight


def export(wrapped: Any, folder: Path, parts: Factors, backbone: str, scaling: float) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft itself lays them out."""
    from safetensors.torch import save

    rank = next(iter(parts.values()))[0].shape[0]
    config = wrapped.peft_config[NAME].to_dict()
    config |= {
        "r": rank,
        "lora_alpha": rank * scaling,
        "base_model_name_or_path": backbone,
        "inference_mode": True,
        "target_modules": sorted(config["target_modules"]),
    }
    tensors = {}
    for name, (a, b) in parts.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().float().cpu().contiguous().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().float().cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    write_atomically(folder / "adapter_config.json", text.encode())


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def load_exported(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By module name the (A, B) of a plain peft folder."""
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder} holds no adapter: there is no {path.name}")
    tensors = load_file(path)
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    key = "base_model.model.{}.lora_{}.weight"
    return {name: (tensors[key.format(name, "A")], tensors[key.format(name, "B")]) for name in names}
