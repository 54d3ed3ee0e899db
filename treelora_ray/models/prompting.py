"""Prompts within a frozen encoder: tokens before its first block, and rows before the keys and values of blocks.

A block with a prefix is handed as many rows of zeros before its tokens. Their keys and values are replaced by the
prefix, and what they would say is dropped. So heads, mask and kernel of the attention are the model's own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from treelora_ray.models.errors import ModelError

if TYPE_CHECKING:
    from treelora_ray.models.backbone import Inputs, Model

# Encoders in which a token's place is part of its embedding, and each block attends to all tokens in the same way.
KNOWN = (
    "bert", "camembert", "deit", "dinov2", "dinov2_with_registers", "distilbert", "electra", "roberta", "vit",
    "vit_msn", "xlm-roberta",
)  # fmt: skip
PAIRS = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"))  # names of the projections in these


@dataclass(frozen=True)
class Inserted:
    """What stands before the inputs of a forward pass: a set for each sample, or one (B = 1) for all."""

    tokens: Tensor | None = None
    """[B, n, d] before the first block."""
    prefixes: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By block, rows [B, n, width] before its keys, and as many before its values."""


@dataclass(frozen=True)
class Block:
    whole: nn.Module
    attention: nn.Module
    key: nn.Module
    value: nn.Module


class Prompting:
    """Puts into each forward pass of a model what `prompt` says for its inputs; nothing while the adapters are off."""

    def __init__(self, model: Model, prompt: Callable[[Inputs], Inserted]) -> None:
        self.model, self.prompt = model, prompt
        self.now: Inserted | None = None  # of the last pass, which checkpointed gradients go through again
        self.blocks = find_blocks(model)
        self.width = _width(model, self.blocks)
        self.blocks[0].whole.register_forward_pre_hook(self._add_tokens, with_kwargs=True)
        for number, block in enumerate(self.blocks):
            block.attention.register_forward_pre_hook(partial(self._widen, number), with_kwargs=True)
            block.attention.register_forward_hook(partial(self._narrow, number))
            block.key.register_forward_hook(partial(self._replace, number, 0))
            block.value.register_forward_hook(partial(self._replace, number, 1))

    def begin(self, inputs: Inputs) -> int:
        """A forward pass begins; how many tokens stand before those of the inputs."""
        self.now = None if self.model.is_plain else self.prompt(inputs)
        return self._tokens

    @property
    def _tokens(self) -> int:
        return 0 if self.now is None or self.now.tokens is None else self.now.tokens.shape[1]

    def _prefix(self, number: int) -> tuple[Tensor, Tensor] | None:
        return None if self.now is None else self.now.prefixes.get(number)

    def _rows(self, number: int) -> int:
        found = self._prefix(number)
        return 0 if found is None else found[0].shape[1]

    def _add_tokens(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.now is None or self.now.tokens is None:
            return None
        return _with(module, args, kwargs, "hidden_states", partial(_before, self.now.tokens))

    def _widen(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        rows, tokens = self._rows(number), self._tokens
        if not rows + tokens:
            return None
        args, kwargs = _with(module, args, kwargs, "hidden_states", lambda x: F.pad(x, (0, 0, rows, 0)))
        return _with(module, args, kwargs, "attention_mask", lambda mask: widened(mask, rows + tokens))

    def _replace(self, number: int, which: int, _module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        found = self._prefix(number)
        return out if found is None else _before(found[which], out[:, found[which].shape[1] :])

    def _narrow(self, number: int, _module: nn.Module, _args: Any, out: Any) -> Any:
        rows = self._rows(number)
        return (out[0][:, rows:], *out[1:]) if isinstance(out, tuple) else out[:, rows:]


def _before(rows: Tensor, others: Tensor) -> Tensor:
    """[B or 1, n, d] and [B, T, d] -> [B, n + T, d]"""
    return torch.cat([rows.to(others.dtype).expand(len(others), -1, -1), others], dim=1)


def _with(module: nn.Module, args: Any, kwargs: Any, name: str, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Arguments of a call to a module, of which one is changed where it is given."""
    place = _places(type(module)).index(name)
    if name in kwargs:
        return args, {**kwargs, name: change(kwargs[name])}
    return (*args[:place], change(args[place]), *args[place + 1 :]) if place < len(args) else args, kwargs


def _places(module: type[nn.Module]) -> list[str]:
    """Names of what a class of modules is called with."""
    return list(inspect.signature(module.forward).parameters)[1:]


def widened(mask: Tensor | None, rows: int) -> Tensor | None:
    """A mask of padding, in which so many more tokens stand in front and are seen by all."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ModelError("this kind of attention cannot be given prompts: set model.attention to sdpa or eager")
    if mask.dim() == 2:  # [B, T], 1 where there is a token
        return F.pad(mask, (rows, 0), value=1)
    mask = F.pad(mask, (rows, 0), value=float(mask.dtype == torch.bool))  # [B, 1, T or 1, T] true, or 0, where seen
    return torch.cat([mask[:, :, :1].expand(-1, -1, rows, -1), mask], dim=2)


def find_blocks(model: Model) -> list[Block]:
    """The blocks of an encoder, in order; models in which prompts would not mean the same are refused."""
    net = model.net.base_model.model
    kind = str(net.config.model_type)
    if kind not in KNOWN or getattr(net.config, "is_decoder", False):
        raise ModelError(
            f"{model.config.backbone} is a model of type {kind!r}, into which prompts cannot be put; models of these "
            f"types take them: {', '.join(KNOWN)}. Name one of them as model.backbone, or another method.name"
        )
    modules: dict[str, nn.Module] = dict(net.named_modules())
    found = []
    for name, module in modules.items():
        for key, value in PAIRS:
            inside, _, last = name.rpartition(".")
            if last == key and f"{inside}.{value}" in modules and (block := re.match(r".*?\.\d+(?=\.)", name)):
                found.append(Block(modules[block.group()], modules[inside], module, modules[f"{inside}.{value}"]))
    if not found or len({id(block.whole) for block in found}) < len(found):
        raise ModelError(f"{type(net).__name__} of {model.config.backbone} is not built of blocks with one attention")
    return found


def _width(model: Model, blocks: list[Block]) -> int:
    """Of the keys and values of all blocks."""
    parts: list[Any] = [part for block in blocks for part in (block.key, block.value)]
    found: set[int] = {getattr(part, "base_layer", part).out_features for part in parts}
    if len(found) > 1:
        raise ModelError(f"keys and values of {model.config.backbone} have several widths: {sorted(found)}")
    return found.pop()
