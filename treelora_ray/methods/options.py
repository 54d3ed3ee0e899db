"""The options of each method: what may stand beside `name` in the `method` section of a run's config.

Imports pydantic only, so that a config can be checked without the libraries that train.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from treelora_ray.config import Options

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0)]


class SeqLoraOptions(Options):
    """One adapter for all tasks, one after the other."""

    variant: Literal["continue", "merge_new"] = "continue"
    """continue: one adapter goes on through all tasks. merge_new: after each task it is folded into the weights, and
    another one is drawn for the next."""


class IndependentOptions(Options):
    """An adapter of its own for each task, from the same start; nothing is shared."""


class JointOptions(Options):
    """One adapter on all tasks at once: no continual learning, but the bound that others are measured against."""

    classes: Literal["own", "all"] | None = None
    """Classes that compete in training: those of a row's own task, or of all tasks. Left out: as for an answer, own
    where its task is inferred or told, all with `routing: last`; and all with `ce_scope: seen`."""


class ReplayOptions(Options):
    """One adapter, and a memory of past rows, some of which each step also looks at."""

    memory: Annotated[int, Field(ge=0)] | None = None
    """Rows remembered in all; 100 for each task of the stream where it is left out."""
    policy: Literal["balanced", "reservoir"] = "balanced"
    """balanced: each class (task, for language models) has an equal share. reservoir: each row has an equal chance."""
    replay_batch: Annotated[int, Field(ge=0)] | None = None
    """Remembered rows a step looks at; as many as `train.batch` where it is left out."""
    weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the loss on remembered rows, that on the step's own having the rest; their share of the rows of both where it
    is left out."""
    scope: Literal["past", "all"] = "past"
    """past: rows of finished tasks are replayed. all: of the task in progress too, from the step after they were
    trained on."""


class EwcOptions(Options):
    """One adapter; what mattered to earlier tasks is held near where they left it."""

    model_config = ConfigDict(populate_by_name=True)

    lambda_: Share | None = Field(default=None, alias="lambda")
    """Strength: half of it times importance times the square of the displacement is added to the loss; 0 turns it off.
    Left out: 50 in classification, 400 for language models."""
    online: bool = False
    """One importance and one anchor for all tasks, renewed after each, in place of one of each for every task."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Online: what is left of the earlier importance after each task."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """Importance is the mean squared gradient of log p(y | x): y as labelled, or drawn from the model (of an answer:
    each token, given those that stand before it)."""
    rows: Positive | None = None
    """Rows of a task over which that mean is taken, drawn by the seed; all where it is left out."""


class LwfOptions(Options):
    """One adapter; what the model said of old classes before a task, it is to say still."""

    model_config = ConfigDict(populate_by_name=True)

    lambda_: Share = Field(default=1.0, alias="lambda")
    """Strength of the distillation; 0 turns it off."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Both sides' logits are divided by it; the term is multiplied by its square."""


class GemOptions(Options):
    """One adapter; no step may raise the loss on what is remembered of any earlier task, to first order."""

    memory: Annotated[int, Field(ge=0)] = 100
    """Rows remembered of each task, drawn uniformly by the seed."""
    margin: Share | None = None
    """Least multiplier of each earlier task's gradient where a step is edited. Left out: 0.05 in classification, 0.5
    for language models."""
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    """Added to the diagonal of the gradients' products, relative to its mean."""


class AgemOptions(Options):
    """One adapter; no step may raise the loss on a few remembered rows of all earlier tasks, to first order."""

    memory: Annotated[int, Field(ge=0)] = 100
    """Rows remembered of each task, drawn uniformly by the seed."""
    memory_batch: Positive | None = None
    """Remembered rows a step looks at; as many as `train.batch` where it is left out."""


class OgdOptions(Options):
    """One adapter; steps keep to what is orthogonal to the gradients of earlier tasks' logits."""

    memory: Annotated[int, Field(ge=0)] = 150
    """Rows of each task whose gradients are kept, drawn uniformly by the seed."""


class DerOptions(Options):
    """One adapter, and a memory of past rows with what the model said of them, which it is to say still."""

    alpha: Share = 0.3
    """Weight of the squared difference from what was said of remembered rows."""
    beta: Share = 0.5
    """Weight of the loss on remembered rows."""
    memory: Annotated[int, Field(ge=0)] | None = None
    """Rows remembered in all; 100 for each task of the stream where it is left out."""
    policy: Literal["balanced", "reservoir"] = "balanced"
    """balanced: each class (task, for language models) has an equal share. reservoir: each row has an equal chance."""
    replay_batch: Positive | None = None
    """Remembered rows a step looks at, for each of the two terms; as many as `train.batch` where it is left out."""
    shared_draw: bool = False
    """One draw for both terms, in place of one each: a forward and backward pass less."""
    scope: Literal["all", "past"] = "all"
    """all: rows of the task in progress are replayed too. past: of finished tasks alone."""
    refresh: Literal["last", "first"] = "last"
    """What was said of a row is that of its last presentation, or of its first."""
    logits_at: Literal["presentation", "task_end"] = "presentation"
    """presentation: rows are offered to the memory as they are trained on, with what the model said then. task_end: all
    rows when their task is learnt, with one pass over them."""
    lm_logits: Literal["topk", "off"] = "topk"
    """Language models: log-probabilities of the likeliest tokens at each place of an answer are kept, or nothing, which
    leaves replay."""
    top_k: Positive = 32
    """How many of them."""


class OLoraOptions(Options):
    """An adapter for each task, which reads directions that no earlier one reads; all of them answer together."""

    model_config = ConfigDict(populate_by_name=True)

    lambda_: Share = Field(default=0.5, alias="lambda")
    """Strength of the penalty on products of the task's A with the A of earlier tasks; 0 turns it off."""
    lambda_2: Share = 0.0
    """Strength of a penalty on the length of each of the task's factors, not squared."""
    norm: Literal["magnitudes", "squares"] = "magnitudes"
    """Of the products' entries: the sum of magnitudes, as the published strength asks for, or of squares, as in the
    paper's formula."""


class NcmOptions(Options):
    """Nothing is trained: a class is the mean of its features, and the nearest mean answers."""

    score: Literal["cosine", "euclid", "mahalanobis"] = "cosine"
    """What near means; mahalanobis has one covariance for all classes."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["oas"] = "oas"
    """Mahalanobis: the share of the identity in the covariance; oas: estimated."""
    features: Literal["frozen", "first_task"] = "frozen"
    """Features of the model as loaded, or with the adapter that was trained on the first task and is frozen since."""


class SdLoraOptions(Options):
    """An adapter for each task, of which a direction of length 1 is kept; how far to go along each is learnt on."""

    norm: Literal["joint", "module"] = "joint"
    """What has length 1: a direction over all its layers together, or in each of them."""
    alpha_scope: Literal["task", "module"] = "task"
    """One magnitude for a direction, or one for each of its layers."""
    alpha_start: Annotated[float, Field(gt=0)] = 1.0
    """The magnitude of a task's own adapter when it begins."""
    alpha_init: Literal["carry", "reset"] = "carry"
    """Magnitudes of earlier directions go on from task to task, or are set to `alpha_start` at the start of each."""
    rank_schedule: list[tuple[Positive, Positive]] | None = None
    """Ranks of adapters that change over the stream, as [[1, 10], [5, 8], [9, 6]]: from the first task on 10, from the
    fifth on 8, ...; `model.lora.rank` is the largest of them. Left out: it is the rank of all."""
    absorb: Annotated[float, Field(ge=0, le=1)] | None = None
    """A direction of which earlier ones leave out no more than this share of its square length is not kept: their
    magnitudes take it up; 9e-4 in the paper. Left out: all are kept."""

    @field_validator("rank_schedule")
    @classmethod
    def _rising(cls, value: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        first = [task for task, _ in value or [(1, 1)]]
        if first[:1] != [1] or sorted(set(first)) != first:
            raise ValueError(
                f"the first entry is of task 1, each other of a later task than the one before; got {first}"
            )
        return value

    @field_validator("absorb")
    @classmethod
    def _absorbs(cls, value: float | None, others: ValidationInfo) -> float | None:
        found = others.data
        if value is not None and found.get("alpha_init") == "reset":
            raise ValueError("it puts a task into magnitudes, which alpha_init reset forgets: use alpha_init carry")
        if value is not None and found.get("norm") == "module" and found.get("alpha_scope") == "task":
            raise ValueError("with norm module it has weights for each layer: use alpha_scope module, or norm joint")
        return value


class TaslOptions(Options):
    """One adapter; after each task every part of it is the old one, the new one or between, by whom it matters to."""

    unit: Literal["rank", "matrix"] = "rank"
    """The parts: a row of A with its column of B, or a matrix."""
    weights: Literal["thresholds", "softmax"] = "thresholds"
    """How importances make the old part's share: by whether each is among the largest, or by their softmax."""
    quantile: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Thresholds: a part is important whose importance reaches this quantile of all parts'."""
    keep: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Thresholds: the old one's share in a part that is important to the tasks before and to the new one."""
    temperature: Annotated[float, Field(gt=0)] = 0.25
    """Softmax: both importances are divided by it."""
    keep_importance: Annotated[float, Field(ge=0, le=1)] = 0.7
    """The share of the tasks before in the importance that goes on."""
    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """What is left of the running mean of sensitivities at each step."""
    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """The same of the running mean of their distance from the first."""
    warmup: Annotated[int, Field(ge=0)] = 50
    """Steps of a task before sensitivities are measured; of a short task half of its steps at most."""


class InfLoraOptions(Options):
    """An adapter for each task, which reads what earlier tasks' inputs have left free; all of them answer together."""

    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Share of the energy of each layer's inputs whose directions are used up by the first task; with each further task
    of the stream it rises evenly towards 1."""


class SlaoOptions(Options):
    """One adapter that goes on from task to task, and a merged one that answers for all of them."""

    model_config = ConfigDict(populate_by_name=True)

    lambda_: Literal["sqrt", "mean"] | Annotated[float, Field(ge=0, le=1)] = Field(default="sqrt", alias="lambda")
    """How far the merged B goes towards that of the i-th task: 1 / sqrt(i), 1 / i, or so far always; all the way for
    the first task."""
    start: Literal["paper", "continuous"] = "paper"
    """A task starts from the last A with its rows made orthonormal, and from the last B as it was trained (paper), or
    changed so that the function stays the same (continuous)."""
    head: Literal["trained", "ncm"] = "trained"
    """Classification: rows of the head as they were trained, or class means of features through the merged adapter."""


class FixOptions(Options):
    """Nothing is trained: a few worked examples of the task stand before each prompt."""

    shots: Annotated[int, Field(ge=0)] = 6
    """Training rows of each task that are shown, drawn by the seed."""
    max_prompt: Positive = 3584
    """Tokens of these and the prompt together; examples are left out from the front where there are more. The prompt
    is never cut for them."""
    separator: str = "\n\n"
    """Stands after each example."""


class L2pOptions(Options):
    """A pool of prompts, of which each sample takes those whose keys are nearest; the backbone is frozen."""

    pool: Positive = 30
    """Prompts in the pool, each with a key."""
    length: Positive = 5
    """Tokens of a prompt."""
    top_k: Positive = 5
    """Prompts that a sample takes."""
    beta: Share = 0.1
    """Strength with which keys are drawn to the features of the samples that take them; 0 leaves keys as drawn."""
    spread: Annotated[float, Field(gt=0)] = 0.02
    """Values of prompts are drawn uniformly between minus this and this."""

    @model_validator(mode="after")
    def _enough(self) -> L2pOptions:
        if self.top_k > self.pool:
            raise ValueError(f"top_k is {self.top_k}, but pool has {self.pool} prompts: raise pool, or lower top_k")
        return self


class DualPromptOptions(Options):
    """A prompt for all tasks and one for each, before keys and values of some blocks; the backbone is frozen."""

    g_layers: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0, 1])
    """Numbers of the blocks with the prompt of all tasks; none where the list is empty."""
    g_length: Positive = 5
    """Rows of that prompt in a block: so many before the keys, and as many before the values."""
    e_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Numbers of the blocks with the prompt of a task. Left out: 2, 3 and 4, as far as the model has them."""
    e_length: Positive = 20
    """Rows of that prompt in a block: so many before the keys, and as many before the values."""
    beta: Share = 0.1
    """Strength with which a task's key is drawn to the features of its samples; 0 leaves keys as they start."""
    key_start: Literal["mean", "drawn"] = "mean"
    """A task's key before it is trained: the mean of the class means of its frozen features, or drawn."""
    spread: Annotated[float, Field(gt=0)] = 0.02
    """Values of prompts are drawn uniformly between minus this and this."""

    @model_validator(mode="after")
    def _once(self) -> DualPromptOptions:
        both = [*self.g_layers, *(self.e_layers or ())]
        if len(set(both)) < len(both):
            raise ValueError(
                f"g_layers {self.g_layers} and e_layers {self.e_layers} name a block twice: a block has one prompt"
            )
        return self


class FitOptions(Options):
    """What is kept of a class's features, and how heads are fit to what is drawn from it."""

    summary: Literal["centroids", "covariance"] = "centroids"
    """What is kept of the features of a class: centroids, mean and variance of groups of near rows; or covariance, one
    mean and covariance."""
    centroids: Positive = 10
    """Groups of a class, by k-means."""
    samples: Positive = 128
    """Pseudo-features drawn of each class in each epoch of a head's fit; also the rows of one of its steps."""
    fit_epochs: Annotated[int, Field(ge=0)] = 30
    """Epochs of a head's fit; 0: the nearest class mean says the task, and the classifier stays as it was trained."""
    fit_lr: Annotated[float, Field(gt=0)] = 0.005
    """Learning rate of a head's fit: SGD, falling along a cosine."""


class HideOptions(FitOptions):
    """What methods of this name have in common, whatever they train with a task."""

    contrast: Share = 0.001
    """Weight of the contrast: a step's features are drawn away from each other and from stored means of classes; 0
    turns it off."""
    temperature: Annotated[float, Field(gt=0)] = 0.8
    """Products of features are divided by it in the contrast."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.1
    """When a task is learnt, the share of the mean of earlier tasks in what answers for it; 0: its own alone."""
    start: Literal["previous", "fresh"] = "previous"
    """What a task begins with: that of the task before, or a new one."""


class HideLoraOptions(HideOptions):
    """An adapter for each task; one head infers the task, the other is fit over all classes, to pseudo-features."""


class SaptOptions(Options):
    """An adapter for each task; all of them answer each row, in a mixture that its tokens choose."""

    model_config = ConfigDict(populate_by_name=True)

    hidden: Positive = 100
    """Width of the query network between its two layers."""
    replay: Literal["none", "kl"] = "none"
    """kl: what chose the mixtures of earlier tasks is held to them. none: nothing of earlier tasks is looked at."""
    lambda_: Share = Field(default=1.0, alias="lambda")
    """Strength of that (the paper's: 0.5 for T5, 1 for LLaMA); 0 turns it off."""
    memory: Positive = 100
    """Rows of each task whose pooled tokens are kept for it, drawn uniformly by the seed."""
    replay_batch: Positive | None = None
    """How many of them a step looks at, for each earlier task; as many as `train.batch` where it is left out."""


class OsfOptions(Options):
    """The weights themselves are trained, but for their largest singular directions, of which each task keeps more."""

    schedule: Literal["linear", "adaptive"] = "linear"
    """The share of a matrix's singular directions that is frozen: linear over the tasks, or adaptive, by how like the
    output of its block is to its input."""
    first: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Linear: the share with the first task."""
    last: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Linear: the share with the last task of the stream."""
    least: Annotated[float, Field(gt=0, le=0.95)] = 0.1
    """Adaptive: the share of a block whose output has nothing of its input, and the smallest."""
    usual: Annotated[float, Field(gt=0, le=0.95)] = 0.8
    """Adaptive: the share of a block that is as like as the mean of all; the largest share is 0.95."""
    sample: Positive = 64
    """Adaptive: rows of a task on which that is measured, drawn uniformly by the seed."""
    keep_frozen: bool = True
    """Directions once frozen stay so, also where what was learnt has grown above them."""
    retract: bool = True
    """After each step what has come to lie in frozen directions is taken out, for the optimizer's steps are not along
    the gradient. Without it only gradients are projected."""


class HidePromptOptions(HideOptions):
    """Prompts for each task before keys and values of some blocks, in place of an adapter; else as hide-lora."""

    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Numbers of the blocks with prompts. Left out: the first five, as far as the model has them."""
    length: Positive = 20
    """Rows of a prompt in a block: so many before the keys, and as many before the values."""
    spread: Annotated[float, Field(gt=0)] = 0.02
    """Values of prompts are drawn uniformly between minus this and this."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.01
    """When a task is learnt, the share of the mean of earlier tasks in what answers for it; 0: its own alone."""


class TreeLoraOptions(Options):
    """An adapter for each task, started from and pulled towards those of related tasks."""

    model_config = ConfigDict(populate_by_name=True)

    mode: Literal["treelora", "paper", "released"] = "treelora"
    """treelora: as documented. paper: the published algorithm read literally. released: the published code."""
    lambda_: Share = Field(default=0.1, alias="lambda")
    """Strength of the pull towards related tasks; 0 turns it off."""
    penalty: Literal["l1", "prox"] = "l1"
    """l1: a subgradient added to the gradient. prox: a proximal step after the optimizer's, whose zeros are exact."""
    ramp: Literal["constant", "epoch"] | None = None
    """The pull over a task: constant, or rising in each epoch; left out: what the mode does."""
    start: Literal["similar", "previous", "fresh"] | None = None
    """A task's first adapter: layer by layer from related tasks, from the task before, or new; left out: what the
    mode does (similar in treelora, previous in the others)."""
    probe_rounds: Positive = 4
    """Mini-batches at the anchor from which a task's signature is made."""
    probe_batch: Positive | None = None
    """Rows of a probe round; those of a training step where it is left out."""
    query_batch: Positive = 8
    """Rows for comparing gradients at stored adapters (observe: query)."""
    query_every: Positive = 1
    """Steps between two such comparisons."""
    decomposition: Literal["none", "hide"] = "none"
    """hide: as hide-lora does, a head fit to pseudo-features infers the task, and all classes seen compete in a
    classifier fit to them (classification only, without a budget)."""
    prior: str | None = None
    """File with the tree and the adapters of another run (`treelora tree export RUN FILE`), which this one begins with
    as if it had learnt that run's tasks before; needed until the first checkpoint."""
    guide: dict[str, Any] = Field(default_factory=dict)
    """Settings of the guide that differ from the mode's: tree, linkage, search, pulls_per_round, budget, ..."""

    @field_validator("guide")
    @classmethod
    def _no_seed(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in ("mode", "seed", "steps_per_epoch"):
            if key in value:
                raise ValueError(f"{key} of the guide is set by the run: leave it out")
        return value


METHOD_OPTIONS: dict[str, type[Options]] = {
    "seqlora": SeqLoraOptions,
    "independent": IndependentOptions,
    "joint": JointOptions,
    "replay": ReplayOptions,
    "ewc": EwcOptions,
    "lwf": LwfOptions,
    "agem": AgemOptions,
    "gem": GemOptions,
    "ogd": OgdOptions,
    "der++": DerOptions,
    "o-lora": OLoraOptions,
    "ncm": NcmOptions,
    "sd-lora": SdLoraOptions,
    "tasl": TaslOptions,
    "inflora": InfLoraOptions,
    "slao": SlaoOptions,
    "fix": FixOptions,
    "hide-lora": HideLoraOptions,
    "sapt": SaptOptions,
    "osf": OsfOptions,
    "l2p": L2pOptions,
    "dualprompt": DualPromptOptions,
    "hide-prompt": HidePromptOptions,
    "treelora": TreeLoraOptions,
}
BUILT_IN = tuple(METHOD_OPTIONS)  # the others come from outside, and are added when they are asked for
