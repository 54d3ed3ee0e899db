"""The one description of a run: nested, typed, checked all at once, written as YAML.

load(path, overrides) -> RunConfig     the file, then `key.path=value` overrides, then one check of everything
config.to_yaml()                       the effective config with every default: itself a valid config
config.digest                          identity of what the results depend on
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from treelora_ray.store import problem, with_secrets

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StreamConfig(Section):
    source: Literal["digits", "parquet", "split", "trace", "labels"] = "digits"
    """digits: built in. parquet: a folder `task/train.parquet`, `task/test.parquet`. split: one labelled data set cut
    into tasks by class. trace: folders `train.json`, `test.json` of prompt and answer. labels: folders `train.json`,
    `test.json` of sentence and label, with `labels.json`."""
    path: str | None = None
    """Folder, file, or address: `hf://`, `s3://`, `gs://`; digits needs none."""
    tasks: int | list[str] | None = None
    """The first so many tasks, or these tasks in this order; all where it is left out (digits: 12)."""
    order: Literal["given", "random"] = "given"
    """Order of learning: as given by `tasks` or the source, or shuffled by the seed."""
    rows: Positive | None = None
    """At most so many training rows a task, drawn by the seed."""
    test_rows: Positive | None = None
    """At most so many test rows a task, drawn by the seed."""
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each task's training rows, drawn by the seed, that is held out and takes the place of its test rows,
    which are not opened: what is tuned is judged on these. `rows` and `test_rows` count after the cut (digits: `rows`
    before)."""
    watch: Positive | None = None
    """Training rows of each task, drawn by the seed, that are left out of training: while the task is learnt, its
    accuracy on them is looked at every `evaluate.every` steps. Counted after `holdout`."""
    preset: str | None = None
    """A known data set to split (source split): cifar100, imagenet-r, cub200."""
    classes_per_task: Positive | None = None
    """Source split: classes of one task."""
    class_order: Literal["given", "random"] = "random"
    """Source split: which classes come together; random draws by the seed."""
    image: str = "image"
    """Column of images."""
    text: str = "text"
    """Column of texts."""
    label: str = "label"
    """Column of labels."""
    prompt: str = "prompt"
    """Column of prompts."""
    answer: str = "answer"
    """Column of answers."""
    score: str | dict[str, str] = "accuracy"
    """Prompt and answer tasks: how generated answers are scored; one name, or one a task."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row or row group that cannot be read: stop and name it, or leave it out and count."""


class LoraConfig(Section):
    rank: Positive = 8
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of what goes into an adapter, in training."""
    targets: Literal["auto"] | list[str] = "auto"
    """Linear modules that get an adapter, by the end of their names; auto: query and value of every attention."""
    layers: list[int] | None = None
    """Numbers of the blocks that get adapters; all where it is left out."""


class ModelConfig(Section):
    backbone: str = "builtin:digits-vit"
    """Hub id or local folder of a transformers model, or `builtin:digits-vit`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen weights; adapters and heads are float32."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Implementation of attention; auto: what transformers chooses."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    max_length: Positive = 128
    """Tokens a text or a prompt with its answer may have."""
    on_long: Literal["truncate", "fail"] = "truncate"
    """Texts longer than that: cut (counted and said), or refused."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """Features from the first token or the mean of all; auto: cls for images, mean for texts."""
    quantize: Literal["none", "4bit"] = "none"
    """Not supported yet; 4bit is refused."""
    shard: Literal["none", "fsdp"] = "none"
    """Not supported yet; fsdp is refused."""
    lora: LoraConfig = LoraConfig()
    """The adapters."""


class ObjectiveConfig(Section):
    kind: Literal["auto", "classification", "causal-lm"] = "auto"
    """auto: causal-lm for prompt and answer streams, else classification."""
    ce_scope: Literal["current", "seen"] = "current"
    """Classes that compete in the training loss: those of the row's own task, or all seen so far."""
    routing: Literal["inferred", "oracle", "last"] = "inferred"
    """Which adapter answers at test: of the task inferred from frozen features, of the true task, the last one."""
    router: Literal["class", "lse"] = "class"
    """Inferred routing, by Gaussians of frozen features with one covariance: the task of the likeliest class, or the
    task whose classes are likeliest in the mean (log-sum-exp, less the log of their number). Of prompts each task is
    one Gaussian, and the two are the same."""
    label_match: Literal["class", "string"] = "class"
    """A class is a pair (task, label), or labels match across tasks by their names."""
    max_new_tokens: Positive = 32
    """Tokens generated for an answer at most."""
    packing: bool = False
    """Not supported yet; several answers in one sequence."""


class TrainConfig(Section):
    epochs: Positive | list[Positive] = 3
    """Passes over a task's rows; a list has a number for each task."""
    steps: Positive | None = None
    """Optimizer steps a task, in place of epochs."""
    batch: Positive = 32
    """Rows of one optimizer step over all workers."""
    micro_batch: Positive | None = None
    """Rows of one forward pass; the gradients of several add up to one step."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-3
    """Learning rate of adapters."""
    head_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the head; that of the adapter where it is left out."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate over a task."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a task's steps over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of adapters, decoupled (AdamW); never of the head, nor under a proximal pull."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the computation; bf16: autocast."""
    checkpoint_every: Positive | None = 200
    """Steps between checkpoints within a task; there is always one at the end of an epoch and of a task."""
    threads: Positive | None = None
    """CPU threads of torch; its own choice where it is left out."""


class EvaluateConfig(Section):
    batch: Positive = 64
    """Rows of one forward pass where nothing is trained."""
    future: bool = False
    """Also score tasks not learnt yet (forward transfer)."""
    every: Positive | None = None
    """Steps between two looks at the accuracy of the task being learnt, on the rows of `stream.watch`, with the task
    known."""


class ClusterConfig(Section):
    workers: Annotated[int, Field(ge=0)] | tuple[Positive, Positive] = 0
    """Ray workers that train together; 0: learn in this process, without Ray. [least, most]: as many as there is room
    for, changing while the run goes on. `train.batch` counts over all of them."""
    cpus_per_worker: Positive = 1
    """CPUs each worker asks for; also its threads, unless `train.threads` says otherwise."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    """GPUs each worker asks for."""
    address: str = "auto"
    """auto: the cluster this machine belongs to, else one started here for the run. local: always one started here.
    Or host:port of a cluster's head, or ray://host:port."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How workers are placed on nodes."""
    wait: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for resources that an autoscaler may bring; without one a run that cannot start ends at once."""
    max_failures: Annotated[int, Field(ge=0)] = 8
    """Failures of workers, guide or controller after which the run gives up; each is resumed from the last
    checkpoint."""
    guide_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds a worker waits for an answer of the guide."""

    @field_validator("workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[{value[0]}, {value[1]}] is no range: write the smaller number first")
        return value


class TrackingConfig(Section):
    to: Literal["mlflow", "journal", "none"] = "mlflow"
    """mlflow: a journal in the run's folder, delivered to MLflow. journal: that alone. The variable TREELORA_TRACKING
    wins over it."""
    uri: str | None = None
    """MLflow's store or server; left out: MLFLOW_TRACKING_URI, else a database beside the run's folder. Without user or
    password: these come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: str | None = None
    """The experiment runs are compared in; left out: the name of the data."""
    group: Annotated[str, Field(pattern=r"^[^'`\"]+$")] | None = None
    """Runs of one group are shown below a common parent."""
    required: bool = False
    """End the run where MLflow does not answer at its start; else it goes on with the journal."""
    every: Positive = 10
    """Steps that share one entry: the mean of their losses, the speed, the learning rate."""
    wait: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that a finished run may take to deliver what is left."""
    report: bool = True
    """Log figures and a report of the finished stream."""
    model: bool = True
    """Log the finished stream as a model that MLflow can load."""
    register_as: str | None = Field(default=None, alias="register")
    """Register that model under this name."""


class Options(Section):
    """Options of a method; `methods/options.py` has those of each."""

    name: str
    """Which method learns the stream."""


class RunConfig(Section):
    name: Name | None = None
    """Name of the run and of its folder; made of method, source and seed where it is left out."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of adapters, batches, row limits, dropout and orders."""
    folder: str = "runs"
    """Where run folders lie: a folder, or an address `s3://BUCKET/FOLDER`, `gs://BUCKET/FOLDER`."""
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    method: SerializeAsAny[Options] = Field(default_factory=lambda: _method({}), validate_default=True)
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("method", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any) -> Options:
        return value if isinstance(value, Options) else _method(value)

    def to_yaml(self) -> str:
        """With every default filled in; itself a valid config."""
        data = self.model_dump(mode="json", by_alias=True)
        return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True))

    @property
    def digest(self) -> str:
        """Of all that results depend on."""
        data = {k: v for k, v in flat(self.model_dump(mode="json", by_alias=True)).items() if not free_key(k)}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _method(value: Any) -> Options:
    """The options of the method that `name` says, with their defaults."""
    from treelora_ray.methods import outside
    from treelora_ray.methods.options import METHOD_OPTIONS  # which needs this module

    if not isinstance(value, Mapping):
        raise ValueError(f"method is {value!r}: write its options below it, like `method: {{name: treelora}}`")
    name = value.get("name", "treelora")
    if not isinstance(name, str) or (name not in METHOD_OPTIONS and not outside.load(name)):
        known = list(dict.fromkeys([*METHOD_OPTIONS, *outside.names()]))
        near = get_close_matches(str(name), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method.name {name!r} is unknown{hint}; known: {', '.join(known)}")
    kind = METHOD_OPTIONS[name]
    try:
        return kind.model_validate({**value, "name": name})
    except ValidationError as error:
        known = [field.alias or key for key, field in kind.model_fields.items()]
        raise ValueError("\n  ".join(_describe(problem, "method.", known) for problem in error.errors())) from None


class ConfigError(ValueError):
    """A config that cannot be used; the message lists everything that is wrong with it."""


# What results do not depend on: these may differ when a run goes on, and are not part of its identity.
FREE_KEYS = (
    "name", "folder",  # where it lies
    "train.checkpoint_every", "train.threads",  # when it is saved, how fast it runs
    "evaluate.batch", "model.device",  # how it is computed; likewise all of `cluster` and `tracking`
)  # fmt: skip


def free_key(key: str) -> bool:
    """Whether results do not depend on a dotted key."""
    return key in FREE_KEYS or key.startswith(("cluster.", "tracking."))


def presets() -> list[str]:
    """Configs that come with the package, by name."""
    root = files("treelora_ray") / "configs"
    names = []
    for folder, prefix in ((root, ""), (root / "paper", "paper/")):
        names += [prefix + item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")]
    return sorted(names)


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A config from a file or preset, with `key.path=value` overrides, checked all at once."""
    data, wrong = _read(source), []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            wrong.append(f"{text!r} is no override: write key.path=value")
            continue
        if problem := _set(data, key.strip().split("."), _value(value)):
            wrong.append(problem)
    return _checked(data, wrong, str(source))


def overridden(overrides: Sequence[str]) -> dict[str, Any]:
    """What `key.path=value` overrides that `load` takes say, by key."""
    pairs = (text.partition("=")[::2] for text in overrides)
    return {key.strip(): _value(value) for key, value in pairs}


def from_mapping(data: Mapping[str, Any]) -> RunConfig:
    return _checked(dict(data), [], "the config")


def with_values(config: RunConfig, values: Mapping[str, Any], source: str) -> RunConfig:
    """A config with other values at dotted keys, in their order, checked all at once; `source` is who asks for them."""
    data, wrong = config.model_dump(mode="json", by_alias=True), []
    for key, value in values.items():
        if problem := _set(data, key.split("."), deepcopy(value)):
            wrong.append(problem)
    return _checked(data, wrong, source)


def _checked(data: Any, wrong: list[str], source: str) -> RunConfig:
    found = None
    try:
        found = RunConfig.model_validate(data)
    except ValidationError as error:
        wrong += [_describe(problem) for problem in error.errors()]
    if found is not None and not wrong:
        wrong += _conflicts(found)
    if wrong or found is None:
        raise ConfigError(f"{source} cannot be used:\n  " + "\n  ".join(wrong))
    return found


def _read(source: str | Path) -> Any:
    path = Path(source)
    if not path.is_file() and str(source) in presets():
        text = (files("treelora_ray") / "configs" / f"{source}.yaml").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        near = get_close_matches(str(source), presets(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"there is no config file {source}, and no preset of that name{hint}; presets: {', '.join(presets())}"
        )
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{source} must hold keys and values, like `seed: 0`; it holds {type(data).__name__}")
    return data or {}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and reads 2e-3 as a number, which YAML 1.1 does not."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


class _Dumper(yaml.SafeDumper):
    """Quotes texts that would be read as such numbers."""


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _set(data: dict[str, Any], path: list[str], value: Any) -> str | None:
    """Sets a key below others; what is wrong where it cannot."""
    at = data
    for place, key in enumerate(path[:-1]):
        inner = at.setdefault(key, {})
        if not isinstance(inner, dict):
            above = ".".join(path[: place + 1])
            return f"{'.'.join(path)} cannot be set: {above} is {inner!r}, which has nothing below it"
        at = inner
    at[path[-1]] = value
    return None


def _describe(problem: Any, above: str = "", known: Sequence[str] = ()) -> str:
    """One wrong field: its place, its value, what is allowed, and the nearest spelling of an unknown key."""
    key = above + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = _nearest(key) if not above else next(iter(get_close_matches(key, [above + k for k in known], 1)), None)
        return f"{key} is unknown" + (f"; did you mean {near}?" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if key in ("method", "") else f"{key}: {message}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    return f"{key} is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def keys() -> list[str]:
    """All dotted keys, without those of methods."""
    return [key for key in flat(RunConfig().model_dump(by_alias=True)) if not key.startswith("method.")]


def _nearest(key: str) -> str | None:
    known = keys()
    last = key.split(".")[-1]
    same = [other for other in known if other.split(".")[-1] == last]
    near = same[:1] or get_close_matches(key, known, 1, 0.75)
    if not near:
        ends = get_close_matches(last, [other.split(".")[-1] for other in known], 1, 0.75)
        near = [other for other in known if ends and other.split(".")[-1] == ends[0]][:1]
    return near[0] if near else None


def _conflicts(config: RunConfig) -> list[str]:
    """What is wrong between fields that are right by themselves."""
    stream, train, model, objective = config.stream, config.train, config.model, config.objective
    wrong = []
    if said := problem(config.folder):
        wrong.append(f"folder {said}")
    if stream.path and with_secrets(stream.path):
        wrong.append("stream.path holds a user, a password or a key, which would be kept with the run: leave them out")
    if stream.source not in ("digits", "split") and stream.path is None:
        wrong.append(f"stream.path is missing: source {stream.source} needs the folder to read")
    if stream.source == "split" and stream.path is None and stream.preset is None:
        wrong.append("stream.path is missing: source split needs a data set, or a stream.preset")
    if stream.source == "split" and stream.preset is None and stream.classes_per_task is None:
        wrong.append("stream.classes_per_task is missing: source split cuts a data set into tasks of so many classes")
    if (stream.watch is None) != (config.evaluate.every is None):
        wrong.append(
            "stream.watch says on how many rows a task is watched, evaluate.every after how many steps: give both, or "
            "leave both out"
        )
    if train.micro_batch is not None and train.micro_batch > train.batch:
        wrong.append(f"train.micro_batch is {train.micro_batch}, more than train.batch, which is {train.batch}")
    if model.quantize != "none":
        wrong.append("model.quantize is 4bit, which is not supported: leave it out; dtype bfloat16 halves the memory")
    if model.shard != "none":
        wrong.append("model.shard is fsdp, which is not supported: leave it out; each worker holds the frozen model")
    if objective.packing:
        wrong.append("objective.packing is true, which is not supported: leave it out")
    if objective.kind == "causal-lm" and objective.ce_scope == "seen":
        wrong.append("objective.ce_scope is 'seen', but causal-lm has no classes that compete: leave it out")
    if config.tracking.uri and re.search("//[^/]*@", config.tracking.uri):
        wrong.append(
            "tracking.uri holds a user or a password, which would be kept with the run: set the variables "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give all of it as MLFLOW_TRACKING_URI"
        )
    if config.tracking.register_as and not config.tracking.model:
        wrong.append("tracking.register names a model, but tracking.model is false: leave one of them out")
    return wrong + _objective_conflicts(config) + _guide_conflicts(config)


def _objective_conflicts(config: RunConfig) -> list[str]:
    """Whether the method can be trained for the objective; asked here only where one is named, since it loads torch.

    Where none is named the data say it, and the method refuses them when the run begins.
    """
    if config.objective.kind == "auto":
        return []
    from treelora_ray.methods.base import unfit
    from treelora_ray.methods.catalogue import METHODS

    said = unfit(config.method.name, config.objective.kind) if config.method.name in METHODS else None
    return [said] if said else []


def _guide_conflicts(config: RunConfig) -> list[str]:
    """What the guide of treelora says to its settings; asked only where some are given, since it loads torch."""
    options = config.method.model_dump()
    changed = options.get("guide") or options.get("mode") != "treelora" or options.get("penalty") != "l1"
    if options["name"] != "treelora" or not (changed or options["start"]):
        return []
    from treelora_ray.core.errors import SettingError
    from treelora_ray.methods.treelora import guide_settings

    try:
        guide_settings(config.method, config.seed)
    except SettingError as error:
        return [f"method: {error}"]
    return []


def flat(data: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """By dotted key; what the guide and tasks are told counts as one value a key."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for each key that matters in which two configs differ."""
    one, other = (flat(config.model_dump(mode="json", by_alias=True)) for config in (old, new))
    changed = [key for key in one | other if one.get(key) != other.get(key)]
    return [f"{key}: {one.get(key)!r} -> {other.get(key)!r}" for key in changed if not free_key(key)]


def run_name(config: RunConfig) -> str:
    """The run's name, or one made of what it is."""
    method = re.sub(r"[^A-Za-z0-9._-]", "-", config.method.name.replace("+", "p"))
    return config.name or f"{method}-{config.stream.source}-seed{config.seed}"
