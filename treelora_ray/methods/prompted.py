"""What methods have in common that train prompts in place of adapters: the adapter stays as drawn and adds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method
from treelora_ray.methods.learner import Learner
from treelora_ray.models.backbone import Inputs
from treelora_ray.models.prompting import Inserted, Prompting


class Prompted(Method):
    """A sample's query is what the model says of it without prompts, and is never trained."""

    objectives = ("classification",)
    adapts = False
    unexported = "prompts within the model answer, for which no LoRA adapter stands; `treelora model` writes the whole"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        self.task: int | None = None  # that answers, with what was kept of it; None: what is in training does
        self.prompting = learner.model.prompting = Prompting(learner.model, self.inserted)

    def inserted(self, inputs: Inputs) -> Inserted:
        """What stands before these inputs."""
        raise NotImplementedError

    @torch.no_grad()
    def query(self, inputs: Inputs) -> Tensor:
        """[B, d] frozen features, as the router has them."""
        with self.learner.model.plain():
            return self.learner.model.features(inputs).float()

    def drawn(self, what: str, shape: Sequence[int], spread: float = 1.0) -> Tensor:
        """Uniform between -spread and spread, from the run's seed; of a key, 1 sets how far a step turns it."""
        generator = memory.generator(f"{self.learner.config.seed}/{what}")
        return torch.empty(*shape).uniform_(-spread, spread, generator=generator).to(self.learner.device)

    @property
    def finished(self) -> int:
        """Tasks of which prompts of their own are kept; one in training may be looked at, too."""
        return 0

    @contextmanager
    def answering(self, task: int) -> Iterator[None]:
        self.task = task if task < self.finished else None
        try:
            yield
        finally:
            self.task = None

    def blocks(self, key: str, given: Sequence[int] | None, usual: Sequence[int] = ()) -> list[int]:
        """Numbers of the blocks that a setting names; left out, the usual ones that the model has."""
        count, model = len(self.prompting.blocks), self.learner.config.model
        has = f"{model.backbone} has {count} blocks: 0 to {count - 1}"
        if beyond := [layer for layer in given or () if layer >= count]:
            raise ConfigError(f"method.{key} has {beyond}, but {has}")
        found = [layer for layer in usual if layer < count] if given is None else list(given)
        if given is None and not found:
            raise ConfigError(f"method.{key} is left out, and is {list(usual)} then, but {has}: name some of these")
        return found


def prefixes(layers: Sequence[int], prompt: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """For all samples the same, of a prompt [layers, 2, rows, width]: keys, then values."""
    return {
        layer: (keys.unsqueeze(0), values.unsqueeze(0)) for layer, (keys, values) in zip(layers, prompt, strict=True)
    }


def nearness(query: Tensor, keys: Tensor) -> Tensor:
    """[B, M] cosines of queries [B, d] and keys [M, d]."""
    return F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T


def nearest(found: Tensor, count: int) -> Tensor:
    """[B, count] places of the largest of [B, M]; equal ones, to 6 digits, in the order in which they stand."""
    return (-found.detach().double().round(decimals=6)).argsort(dim=-1, stable=True)[:, :count]
