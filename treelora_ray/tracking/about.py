"""What a run is, as MLflow shall know it: parameters, tags and data sets."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from typing import Any

from treelora_ray.config import RunConfig, flat, free_key, from_mapping, run_name


def described(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` as training tells them: config, digest, data, versions and where it runs."""
    config = from_mapping(facts["config"])
    return {
        "name": run_name(config),
        "benchmark": config.tracking.experiment or benchmark(config),
        "config": facts["config"],
        "yaml": config.to_yaml(),
        "params": {key: value for key, value in settings(facts["config"]).items() if not free_key(key)},
        "tags": _tags(config, facts),
        "stream": [each["name"] for each in facts["data"]],
        "data": [_dataset(config, each) for each in facts["data"]],
        "user": _user(),
    }


def benchmark(config: RunConfig) -> str:
    """What runs are compared within: the data they learn."""
    stream = config.stream
    if stream.preset or stream.path is None:
        return stream.preset or stream.source
    return stream.path.rstrip("/").split("/")[-1]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key; without mappings that say nothing."""
    return {key: value for key, value in flat(config).items() if value != {}}


def _tags(config: RunConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    options = config.method.model_dump(by_alias=True)
    found = {
        "method": config.method.name,
        "backbone": config.model.backbone,
        "seed": config.seed,
        "objective": facts["objective"],
        "routing": config.objective.routing,
        "ce_scope": config.objective.ce_scope,
        "rank": config.model.lora.rank,
        "start": options.get("start"),
        "global_batch": config.train.batch,
        "workers": facts["workers"],
        "stream_order": ", ".join(each["name"] for each in facts["data"]),
        "data_digest": facts["data_digest"],
        "config_digest": facts["digest"],
        "git_commit": facts["commit"],
        "submission": facts["submission"],
        "device": facts["device"],
        "folder": facts["folder"],
        **{f"version.{name}": version for name, version in facts["packages"].items()},
        "version.python": facts["python"],
    }
    return {key: value for key, value in found.items() if value is not None}


def _dataset(config: RunConfig, task: Mapping[str, Any]) -> dict[str, Any]:
    source = config.stream
    return {
        "name": task["name"],
        "digest": task["digest"],
        "source_type": source.source,
        "source": {"path": source.path or source.preset or source.source},
        "profile": {"train_rows": task["train"], "test_rows": task["test"], "labels": len(task["labels"])},
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as in containers
        return "unknown"
