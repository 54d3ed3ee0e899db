"""What the other methods have to set: a function for each, named `baselines:METHOD` (der++: derpp, dashes: o_lora).

Each replaces the base config's method whole, and searches rank and learning rate over the ranges of treelora.
"""

from __future__ import annotations

from typing import Any

from ray import tune


def seqlora() -> dict[str, Any]:
    """One adapter for all tasks, kept or folded into the weights."""
    return {**_common("seqlora"), "method.variant": tune.choice(["continue", "merge_new"])}


def independent() -> dict[str, Any]:
    """An adapter of its own for each task."""
    return _common("independent")


def joint() -> dict[str, Any]:
    """All tasks at once. There is one score, at the end: a scheduler has nothing to stop by."""
    return _common("joint")


def replay() -> dict[str, Any]:
    """One adapter and a memory of past rows."""
    return {
        **_common("replay"),
        "method.memory": tune.choice([200, 400, 800, 1600]),
        "method.weight": tune.uniform(0.2, 0.8),
    }


def derpp() -> dict[str, Any]:
    """One adapter, a memory of past rows, and what the model said of them."""
    return {
        **_common("der++"),
        "method.alpha": tune.loguniform(0.01, 1.0),
        "method.beta": tune.loguniform(0.1, 2.0),
        "method.memory": tune.choice([200, 400, 800, 1600]),
    }


def ewc() -> dict[str, Any]:
    """One adapter, held where it mattered."""
    return {
        **_common("ewc"),
        "method.lambda": tune.loguniform(1.0, 5000.0),
        "method.online": tune.choice([False, True]),
    }


def lwf() -> dict[str, Any]:
    """One adapter, which is to say of old classes what it said before."""
    return {
        **_common("lwf"),
        "method.lambda": tune.loguniform(0.1, 10.0),
        "method.temperature": tune.choice([1.0, 2.0, 4.0]),
    }


def agem() -> dict[str, Any]:
    """One adapter, whose steps spare the loss on remembered rows."""
    return {**_common("agem"), "method.memory": tune.choice([25, 50, 100, 200])}


def gem() -> dict[str, Any]:
    """One adapter, whose steps spare the loss on each earlier task's remembered rows."""
    return {
        **_common("gem"),
        "method.memory": tune.choice([25, 50, 100, 200]),
        "method.margin": tune.uniform(0.0, 1.0),
    }


def ogd() -> dict[str, Any]:
    """One adapter, whose steps are orthogonal to remembered gradients."""
    return {**_common("ogd"), "method.memory": tune.choice([50, 150, 300])}


def o_lora() -> dict[str, Any]:
    """An adapter a task, each in directions of its own."""
    return {**_common("o-lora"), "method.lambda": tune.loguniform(0.05, 5.0)}


def hide_lora() -> dict[str, Any]:
    """An adapter a task, a head that infers tasks, and a classifier fit over all classes."""
    return {
        **_common("hide-lora"),
        "method.momentum": tune.choice([0.0, 0.01, 0.1]),
        "method.contrast": tune.choice([0.0, 0.001, 0.01]),
        "method.fit_lr": tune.loguniform(1e-3, 5e-2),
    }


def ncm() -> dict[str, Any]:
    """Nearest class means of frozen features, where nothing is trained."""
    return {"method": {"name": "ncm"}, "method.score": tune.grid_search(["cosine", "euclid", "mahalanobis"])}


def sd_lora() -> dict[str, Any]:
    """A direction a task, along each of which it is learnt how far to go."""
    return {
        **_common("sd-lora"),
        "method.alpha_scope": tune.choice(["task", "module"]),
        "method.alpha_init": tune.choice(["carry", "reset"]),
    }


def tasl() -> dict[str, Any]:
    """One adapter, whose parts are consolidated after each task."""
    return {
        **_common("tasl"),
        "method.unit": tune.choice(["rank", "matrix"]),
        "method.weights": tune.choice(["thresholds", "softmax"]),
        "method.warmup": tune.choice([0, 10, 50]),
    }


def inflora() -> dict[str, Any]:
    """An adapter a task, each in what inputs of earlier tasks leave free."""
    return {**_common("inflora"), "method.epsilon": tune.uniform(0.8, 1.0)}


def slao() -> dict[str, Any]:
    """One adapter that goes on, and a merged one that answers."""
    return {
        **_common("slao"),
        "method.lambda": tune.choice(["sqrt", "mean"]),
        "method.start": tune.choice(["paper", "continuous"]),
    }


def fix() -> dict[str, Any]:
    """Demonstrations before each prompt, where nothing is trained."""
    return {"method": {"name": "fix"}, "method.shots": tune.grid_search([1, 2, 4, 6, 8])}


def sapt() -> dict[str, Any]:
    """All adapters in a mixture that each row chooses, with and without replay of mixtures."""
    return {
        **_common("sapt"),
        "method.replay": tune.choice(["none", "kl"]),
        "method.lambda": tune.loguniform(0.05, 5.0),
        "method.hidden": tune.choice([50, 100, 200]),
    }


def osf() -> dict[str, Any]:
    """The weights themselves, outside of their largest singular directions; rank means nothing here."""
    return {
        "method": {"name": "osf"},
        "train.lr": tune.loguniform(1e-5, 1e-2),
        "method.first": tune.uniform(0.25, 0.75),
        "method.last": tune.uniform(0.75, 0.95),
    }


def l2p() -> dict[str, Any]:
    """A pool of prompts, in place of adapters."""
    return {
        **_prompts("l2p"),
        "method.pool": tune.choice([10, 20, 30]),
        "method.length": tune.choice([5, 10]),
        "method.beta": tune.loguniform(0.05, 1.0),
    }


def dualprompt() -> dict[str, Any]:
    """A prompt for all tasks and one for each, in place of adapters."""
    return {
        **_prompts("dualprompt"),
        "method.e_length": tune.choice([5, 10, 20]),
        "method.beta": tune.loguniform(0.05, 1.0),
    }


def hide_prompt() -> dict[str, Any]:
    """Prompts for each task, a head that infers tasks, and a classifier fit over all classes."""
    return {
        **_prompts("hide-prompt"),
        "method.length": tune.choice([5, 10, 20]),
        "method.momentum": tune.choice([0.0, 0.01, 0.1]),
        "method.contrast": tune.choice([0.0, 0.001, 0.01]),
        "method.fit_lr": tune.loguniform(1e-3, 5e-2),
    }


def _prompts(method: str) -> dict[str, Any]:
    return {
        "method": {"name": method},
        "method.spread": tune.loguniform(0.01, 1.0),
        "train.lr": tune.loguniform(1e-3, 5e-2),
    }


def _common(method: str) -> dict[str, Any]:
    return {
        "method": {"name": method},
        "model.lora.rank": tune.choice([4, 8, 16, 32]),
        "train.lr": tune.loguniform(5e-4, 2e-2),
    }
