"""A frozen backbone that one run hands to the next, in a process or between processes.

A run adapts, hooks and moves its model as it likes. So none is given back: each run gets modules of its own, around the
same weights. The modules are copied from a skeleton whose tensors have no storage. Skeleton and weights are plain data,
which pickle's protocol 5, and so Ray's object store, hands over without copying the weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from treelora_ray.config import ModelConfig
from treelora_ray.files import stamp
from treelora_ray.models.loading import folder_of, from_pretrained, quiet

Source = tuple[Any, ...]  # what of a config says which backbone it is


@dataclass(frozen=True)
class Backbone:
    skeleton: Any  # the net, its tensors on torch's meta device
    tensors: Mapping[str, Tensor]  # parameters and buffers by name, frozen
    helper: Any  # image processor or tokenizer
    weights: str  # digest of the tensors
    digest: str  # of all that what it computes depends on: weights, settings of the net, helper

    def net(self) -> Any:
        """New modules around the weights; what is assigned to them, and what is hooked in, is theirs alone."""
        own: dict[int, Any] = {}
        for name, empty in _named(self.skeleton).items():
            tensor = self.tensors[name].detach()
            own[id(empty)] = nn.Parameter(tensor, requires_grad=False) if isinstance(empty, nn.Parameter) else tensor
        return copy.deepcopy(self.skeleton, own)

    def whole(self) -> bool:
        """Whether the weights are those that were loaded, to the bit."""
        return weights_digest(self.tensors) == self.weights


@dataclass(frozen=True)
class Packed:
    """A backbone as plain data for another process; its arrays may be read-only and shared."""

    source: Source
    skeleton: Any
    arrays: Mapping[str, NDArray[np.uint8]]  # bytes of each tensor
    helper: Any
    weights: str
    digest: str

    def unpacked(self, device: torch.device) -> Backbone:
        """Around the arrays' own memory where the device is the CPU: these weights must never be written to."""
        _introduce(self.skeleton)
        tensors = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            for name, empty in _named(self.skeleton).items():
                flat = torch.from_numpy(self.arrays[name]).view(empty.dtype)
                tensors[name] = flat.view(empty.shape).to(device)
        return Backbone(self.skeleton, tensors, self.helper, self.weights, self.digest)


class Backbones:
    """The backbone used last. `packed` comes from another process, and is used for configs that name the same one."""

    def __init__(self, packed: Packed | None = None, note: Callable[[str], None] = lambda _: None) -> None:
        self.packed, self.note = packed, note
        self._key: tuple[Any, ...] | None = None
        self._kept: Backbone | None = None

    def get(self, config: ModelConfig, kind: str, device: torch.device) -> Backbone:
        """Kept where it is the same, and whole; else unpacked, or loaded."""
        packed = self.packed if self.packed is not None and self.packed.source == source_of(config, kind) else None
        folder = None if packed is not None else Path(folder_of(config))
        files = stamp(folder) if folder is not None and folder.is_dir() else None
        key = (source_of(config, kind), files, device)
        kept, self._kept = self._kept if key == self._key else None, None
        if kept is not None and not kept.whole():
            self.note(f"the frozen weights of {config.backbone} were changed by an earlier run: they are loaded anew")
            kept = None
        if kept is None and packed is not None:
            kept = packed.unpacked(device)
            if not kept.whole():
                self.note(f"the weights of {config.backbone} that were handed over are damaged: they are loaded anew")
                self.packed = None
                return self.get(config, kind, device)
        self._kept, self._key = kept or _load(config, kind, device), key
        return self._kept

    def pack(self, config: ModelConfig, kind: str) -> Packed:
        """The backbone of a config for other processes; loaded where it is not kept."""
        kept = self.get(config, kind, torch.device("cpu"))
        arrays = {name: _bytes(tensor) for name, tensor in kept.tensors.items()}
        return Packed(source_of(config, kind), kept.skeleton, arrays, kept.helper, kept.weights, kept.digest)


def source_of(config: ModelConfig, kind: str) -> Source:
    return config.backbone, config.revision, config.dtype, config.attention, kind


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(_bytes(tensor).data)
    return found.hexdigest()


def _load(config: ModelConfig, kind: str, device: torch.device) -> Backbone:
    net, helper = from_pretrained(folder_of(config), config, kind)
    net.requires_grad_(False)
    net.eval().to(device)
    named = _named(net)
    tensors = {name: tensor.detach() for name, tensor in named.items()}
    weights = weights_digest(tensors)
    digest = hashlib.sha256(json.dumps([weights, kind, _settings(net), _helper_digest(helper)]).encode())
    return Backbone(_skeleton(net, named), tensors, helper, weights, digest.hexdigest())


def _named(net: Any) -> dict[str, Tensor]:
    """Each tensor once, by its first name."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _skeleton(net: Any, named: Mapping[str, Tensor]) -> Any:
    empty: dict[int, Any] = {}
    for tensor in named.values():
        hollow = torch.empty_like(tensor, device="meta")
        empty[id(tensor)] = nn.Parameter(hollow, requires_grad=False) if isinstance(tensor, nn.Parameter) else hollow
    return copy.deepcopy(net, empty)


def _introduce(net: Any) -> None:
    """transformers notes how to record hidden states when the first model of a class is made in a process, as
    unpickling does not: one is made, without storage."""
    with quiet(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        type(net)(copy.deepcopy(net.config))


def _settings(net: Any) -> str:
    """What the net computes with its weights, but for where they were read."""
    settings = {k: v for k, v in net.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    attention = getattr(net.config, "_attn_implementation", None)
    return json.dumps([type(net).__qualname__, attention, settings], sort_keys=True, default=str)


def _helper_digest(helper: Any) -> str:
    """Of the files it saves itself to, which say all about it."""
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory() as name:
        helper.save_pretrained(name)
        for path in sorted(Path(name).rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                found.update(f"{path.name} {len(data)} ".encode() + data)
    return found.hexdigest()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found
