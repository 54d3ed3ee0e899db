"""HiDe: answers within a task, which task it is, and answers over all classes, each learnt by itself.

Wang et al. 2023, arXiv 2310.07234 (HiDe-Prompt), and 2024, arXiv 2407.05229 (HiDe-PET).

    a step        loss ─► + contrast with stored classes          so that new features keep off old ones
    after_task    what was trained ─► averaged with earlier tasks'
                  ─► features of the task's rows ─► Summaries, of the frozen model and of the one just trained
                  ─► pseudo-features of all classes seen ─► a head that infers the task, from frozen features
                                                         ─► the rows of the classifier, from the others

`Decomposition` is all of it but the step and the mean, whatever a method trains with a task; `Hide` is what methods of
this name have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from treelora_ray.config import ConfigError, Options
from treelora_ray.files import part
from treelora_ray.methods import memory
from treelora_ray.methods.base import Method
from treelora_ray.methods.learner import Learner
from treelora_ray.methods.options import FitOptions, HideOptions
from treelora_ray.models.head import nearest_mean, origin_of_means
from treelora_ray.objectives.base import Batch

MOMENTUM, DECAY = 0.9, 5e-4  # of a head's fit, as in the papers
ROUNDS = 100  # of k-means at most; it ends when no row changes its group
SAME = 1e-10  # of the mean square distance from the mean: rows nearer than that are one point

Component = tuple[int, Tensor, Tensor]  # rows, mean [d], spread: deviations [d] or the covariance's root [d, d]


class Summaries:
    """Classes of all tasks as mixtures of Gaussians of their features; a class of several tasks is there for each."""

    def __init__(self, width: int) -> None:
        self.entries = torch.zeros(0, 2, dtype=torch.long)  # [E, 2] task, and row of the head
        self.owner = torch.zeros(0, dtype=torch.long)  # [K] entry of each component
        self.counts = torch.zeros(0)  # [K] rows
        self.means = torch.zeros(0, width)  # [K, d]
        self.spread = torch.zeros(0)  # [K, d], or [K, d, d]

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, task: int, row: int, components: Sequence[Component]) -> None:
        counts, means, spread = zip(*components, strict=True)
        self.owner = torch.cat([self.owner, torch.full((len(components),), len(self))])
        self.entries = torch.cat([self.entries, torch.tensor([[task, row]])])
        self.counts = torch.cat([self.counts, torch.tensor(counts, dtype=torch.float32)])
        self.means = torch.cat([self.means, torch.stack(means).float()])
        more = torch.stack(spread).float()
        self.spread = torch.cat([self.spread, more]) if len(self.spread) else more

    def centres(self) -> Tensor:
        """[E, d] the mean of each entry."""
        counts = torch.zeros(len(self)).index_add_(0, self.owner, self.counts)
        sums = torch.zeros(len(self), self.means.shape[1])
        sums.index_add_(0, self.owner, self.means * self.counts.unsqueeze(1))
        return sums / counts.unsqueeze(1)

    def draw(self, samples: int, key: str) -> tuple[Tensor, Tensor]:
        """Pseudo-features [E samples, d] and their entries, in an order of their own: a function of the key.

        Of an entry's samples each component has its share of rows, but for one.
        """
        generator = memory.generator(key)
        chosen = []
        for entry in range(len(self)):
            (own,) = torch.nonzero(self.owner == entry, as_tuple=True)
            ends = self.counts[own].double().cumsum(0)
            places = (torch.arange(samples) + torch.rand(1, generator=generator)) / samples
            chosen.append(own[torch.searchsorted(ends / ends[-1], places.double()).clamp(max=len(own) - 1)])
        components = torch.cat(chosen)[torch.randperm(len(self) * samples, generator=generator)]
        noise = torch.randn(len(components), self.means.shape[1], generator=generator)
        if self.spread.ndim == 2:
            moved = noise * self.spread[components]
        else:
            moved = torch.empty_like(noise)
            for component in components.unique().tolist():
                here = components == component
                moved[here] = noise[here] @ self.spread[component]
        return self.means[components] + moved, self.owner[components]

    def tensors(self) -> dict[str, Tensor]:
        names = ("entries", "owner", "counts", "means", "spread")
        return {name: getattr(self, name) for name in names}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            setattr(self, name, value)


def summarised(features: Tensor, kind: str, most: int, key: str) -> list[Component]:
    """Rows [n, d] of one class as Gaussians: one for each of `most` groups of near rows, or a single one."""
    exact = features.double()
    if kind == "covariance":
        mean = exact.mean(0)
        away = exact - mean
        values, vectors = torch.linalg.eigh(away.T @ away / len(exact))
        # The symmetric root: any other would turn with the rounding of the features.
        return [(len(exact), mean, (vectors * values.clamp(min=0).sqrt()) @ vectors.T)]
    groups = kmeans(exact, most, key)
    found = []
    for group in groups.unique().tolist():
        rows = exact[groups == group]
        found.append((len(rows), rows.mean(0), rows.std(0, unbiased=False)))
    return found


def kmeans(points: Tensor, most: int, key: str) -> Tensor:
    """[n] the group of each point [n, d]; fewer than `most` where points are alike. A function of points and key."""
    generator = memory.generator(key)
    least = SAME * float((points - points.mean(0)).square().sum(1).mean())
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < min(most, len(points)):
        nearest = _distances(points, centres).min(1).values
        if float(nearest.max()) <= least:
            break
        place = torch.multinomial(nearest, 1, generator=generator)  # k-means++: far points are likelier
        centres = torch.cat([centres, points[place]])
    groups = _distances(points, centres).argmin(1)
    for _ in range(ROUNDS):
        members = F.one_hot(groups, len(centres)).to(points)
        counts = members.sum(0)
        moved = members.T @ points / counts.clamp(min=1).unsqueeze(1)
        centres = torch.where(counts.unsqueeze(1) > 0, moved, centres)
        now = _distances(points, centres).argmin(1)
        if torch.equal(now, groups):
            break
        groups = now
    return groups


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """[n, k] squared, of differences: those of equal points are 0 exactly."""
    return torch.stack([(points - centre).square().sum(1) for centre in centres], dim=1)


def fit(weight: Tensor, bias: Tensor, drawn: Callable[[int], tuple[Tensor, Tensor]], options: FitOptions) -> Tensor:
    """[C, d + 1] a linear head after some epochs of SGD, from weights [C, d] and biases [C].

    `drawn(epoch)` gives the epoch's features and targets, each of which is used once.
    """
    head = torch.cat([weight, bias.unsqueeze(1)], dim=1).detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([head], lr=options.fit_lr, momentum=MOMENTUM, weight_decay=DECAY)
    for epoch in range(options.fit_epochs):
        optimizer.param_groups[0]["lr"] = options.fit_lr * (1 + math.cos(math.pi * epoch / options.fit_epochs)) / 2
        features, targets = (part.to(head.device) for part in drawn(epoch))
        for at in range(0, len(features), options.samples):
            rows = slice(at, at + options.samples)
            optimizer.zero_grad()
            F.cross_entropy(F.linear(features[rows], head[:, :-1], head[:, -1]), targets[rows]).backward()
            optimizer.step()
    return head.detach()


def averaged(own: Tensor, earlier: Sequence[Tensor], share: float) -> Tensor:
    """(1 - m) of a task's values and m of the mean of earlier tasks': of LoRA's A and B each by itself."""
    if not earlier or not share:
        return own
    return (1 - share) * own + share * torch.stack([each.to(own) for each in earlier]).mean(0)


def contrast(stored: Tensor, features: Tensor, temperature: float) -> Tensor:
    """CE(M M^T / temperature, identity), M the stored means [K, d] and below them the features [n, d]: the mean over
    its rows. Each row is drawn to itself and away from all others."""
    rows = torch.cat([stored, features])
    return F.cross_entropy(rows @ rows.T / temperature, torch.arange(len(rows), device=rows.device))


class Decomposition:
    """Summaries of classes, the head that infers tasks, and the fit of the classifier over all classes seen.

    The groups, the pseudo-features and both fits are made by worker 0, which tells the others.
    """

    def __init__(self, method: Method, options: FitOptions) -> None:
        self.method, self.learner, self.options = method, method.learner, options
        self.learner.head.common = True
        width = self.learner.model.width
        self.frozen, self.trained = Summaries(width), Summaries(width)
        self.inference = torch.zeros(0, width + 1, device=self.learner.device)  # [E, d + 1] weights and bias
        self.means = self.trained.means.to(self.learner.device)  # [K, d] what a step's features are contrasted with

    @property
    def tasks(self) -> list[int]:
        """Those that have been learnt."""
        return sorted(set(self.frozen.entries[:, 0].tolist()))

    def learn(self, task: int) -> None:
        """A task is learnt, and the model answers for it as it will from now on."""
        learner = self.learner
        with learner.effort.timed("summaries"):
            with self.method.plain():
                self._summarise(self.frozen, "frozen", task, learner.frozen_features)
            self._summarise(self.trained, "trained", task, learner.features)
        with learner.effort.timed("fits"):
            self._fit_inference()
            self._fit_classifier()
        self.means = self.trained.means.to(learner.device)

    def _summarise(self, found: Summaries, name: str, task: int, features: Callable[[Any], Tensor]) -> None:
        learner, options, more = self.learner, self.options, []
        seen, labels = learner.class_features(task, features)
        for number, row in enumerate(learner.head.rows[task]) if learner.comm.rank == 0 else ():
            own = seen[labels == number].cpu()
            if len(own):  # of a class without rows nothing is known
                key = f"{learner.config.seed}/{learner.tasks[task].name}/{number}/{name}"
                more.append((row, summarised(own, options.summary, options.centroids, key)))
        for row, components in learner.comm.share(more):
            found.add(task, row, components)

    def _fit_inference(self) -> None:
        """A class for each entry; from the class means on, so that it depends on the summaries alone."""

        def fitted() -> Tensor:
            means = self.frozen.centres()
            weight, bias = (
                start.float().to(self.learner.device) for start in nearest_mean(means, origin_of_means(means))
            )
            return fit(weight, bias, self._drawn(self.frozen, "inference"), self.options)

        self.inference = self._told(fitted)

    def _fit_classifier(self) -> None:
        """The rows of the head of all classes seen, and nothing else; of a single task they are left as trained."""
        learner, head = self.learner, self.learner.head
        head.put(learner.rows, learner.head_parameter.detach())
        if len(self.tasks) < 2 or not self.options.fit_epochs:
            return
        rows, targets = self.trained.entries[:, 1].unique(return_inverse=True)
        index, drawn = rows.to(learner.device), self._drawn(self.trained, "classifier", targets)
        new = self._told(lambda: fit(head.weight[index], head.bias[index], drawn, self.options))
        head.put(rows.tolist(), torch.cat([new[:, :-1].reshape(-1), new[:, -1]]))
        with torch.no_grad():
            learner.head_parameter.copy_(head.take(learner.rows))

    def _told(self, make: Callable[[], Tensor]) -> Tensor:
        """What worker 0 makes, on all workers."""
        comm = self.learner.comm
        return comm.share(make().cpu() if comm.rank == 0 else torch.empty(0)).to(self.learner.device)

    def _drawn(
        self, found: Summaries, name: str, targets: Tensor | None = None
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        key = f"{self.learner.config.seed}/{self.learner.unit_name}/{name}"

        def drawn(epoch: int) -> tuple[Tensor, Tensor]:
            features, entries = found.draw(self.options.samples, f"{key}/{epoch}")
            return features, entries if targets is None else targets[entries]

        return drawn

    def route(self, features: Tensor) -> Tensor:
        """Frozen features [B, d] -> the task [B] of the likeliest class."""
        logits = F.linear(features.to(self.inference), self.inference[:, :-1], self.inference[:, -1])
        return self.frozen.entries[:, 0].to(logits.device)[logits.argmax(-1)]

    def among(self, task: int) -> list[int]:
        """The rows of the head of all classes seen."""
        return self.learner.head.of_tasks(sorted({*self.tasks, task}))

    def changed(self, unit: Sequence[int]) -> list[int]:
        """Tasks whose rows of the head, or more, have changed with the unit."""
        return sorted({*unit, *(self.tasks if self.options.fit_epochs else ())})

    def tensors(self) -> dict[str, Tensor]:
        found = {"inference": self.inference}
        for name, summaries in (("frozen", self.frozen), ("trained", self.trained)):
            found |= {f"{name}.{key}": value for key, value in summaries.tensors().items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.inference = tensors["inference"].to(self.learner.device)
        self.frozen.load(part(tensors, "frozen"))
        self.trained.load(part(tensors, "trained"))
        self.means = self.trained.means.to(self.learner.device)


class Hide(Method):
    """What methods have in common that keep for each task what was trained with it, and decompose. Subclasses say what
    that is, where a task starts, and how the model answers with it."""

    keeps = "what a task trains, for each; of a class 2 summaries of its features"
    step_cost = "the contrast: products of a step's features with each other and with stored means"
    reduces = "gradient, a step's features; once a task the features of its rows; what worker 0 fits"

    def __init__(self, learner: Learner, options: Options) -> None:
        super().__init__(learner, options)
        assert isinstance(options, HideOptions)
        self.options = options
        self.decomposition = Decomposition(self, options) if learner.objective.kind == "classification" else None
        self.contrasted: Tensor | None = None  # the term's value in the last step
        train, workers = learner.config.train, learner.comm.workers
        if self.decomposition and options.contrast and (train.micro_batch or train.batch) < -(-train.batch // workers):
            raise ConfigError(
                f"method {options.name} contrasts all rows of a step with each other, but train.micro_batch is "
                f"{train.micro_batch}, less than a worker's share of train.batch: leave it out "
                "(model.gradient_checkpointing saves memory too), or set method.contrast=0"
            )

    # -- what a task trains, as a vector

    def values_trained(self) -> Tensor:
        """[n] a view of what is trained with the unit beside the head."""
        raise NotImplementedError

    def values_kept(self) -> list[Tensor]:
        """[n] each, of tasks learnt before, in their order."""
        raise NotImplementedError

    def keep(self, task: int, values: Tensor) -> None:
        """From now on these values answer for a task."""
        raise NotImplementedError

    # -- a step

    @property
    def contrasts(self) -> bool:
        return bool(self.options.contrast) and self.decomposition is not None and len(self.decomposition.trained) > 0

    def rows(self, step: int, drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:  # noqa: ARG002
        comm = self.learner.comm
        if self.contrasts and not drawn[comm.rank :: comm.workers]:
            self._of_all_workers(None, len(drawn))  # no batch comes, and the others wait for all
        return drawn

    def loss_terms(self, batch: Batch, said: Any) -> Tensor | None:  # noqa: ARG002
        """The contrast of the whole step's features; those of other workers have no gradient here, but theirs have."""
        if not self.contrasts:
            return None
        assert self.decomposition is not None
        count = len(self.learner.drawn)
        features = self._of_all_workers(said["features"].float(), count)
        term = contrast(self.decomposition.means, features, self.options.temperature)
        self.contrasted = term.detach()
        return self.options.contrast * count * term

    def _of_all_workers(self, features: Tensor | None, count: int) -> Tensor:
        """[count, d] of the step's rows in their order, with this worker's own as autograd knows them."""
        comm, device = self.learner.comm, self.learner.device
        own = torch.arange(comm.rank, count, comm.workers, device=device)
        found = torch.zeros(count, self.learner.model.width, device=device)
        if features is not None:
            found[own] = features.detach()
        comm.sum_(found)
        return found if features is None else found.index_copy(0, own, features)

    # -- a task

    @torch.no_grad()
    def _average(self) -> Tensor:
        values = self.values_trained()
        values.copy_(averaged(values, self.values_kept(), self.options.momentum))
        return values

    def after_task(self) -> None:
        (task,) = self.learner.unit
        self.keep(task, self._average().detach().clone())
        if self.decomposition is not None:
            self.decomposition.learn(task)

    def route(self, features: Tensor) -> Tensor:
        return super().route(features) if self.decomposition is None else self.decomposition.route(features)

    def among(self, task: int) -> Sequence[int]:
        return super().among(task) if self.decomposition is None else self.decomposition.among(task)

    def changed(self, unit: Sequence[int]) -> Sequence[int]:
        return unit if self.decomposition is None else self.decomposition.changed(unit)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.decomposition is None else part_of(self.decomposition)

    def load(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:  # noqa: ARG002
        if self.decomposition is not None:
            self.decomposition.load(part(tensors, PART))

    def values(self, step: int) -> dict[str, float]:  # noqa: ARG002
        return {} if self.contrasted is None else {"contrast": float(self.contrasted)}


PART = "decomposition"


def part_of(decomposition: Decomposition) -> dict[str, Tensor]:
    """Its state among that of a method."""
    return {f"{PART}.{name}": value for name, value in decomposition.tensors().items()}
