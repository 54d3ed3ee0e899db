"""What a sweep searches: which values settings may take, and how they are drawn. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from treelora_ray.cluster.errors import SpaceError
from treelora_ray.config import RunConfig, with_values
from treelora_ray.data.batches import permuted

Kind = Literal["choice", "uniform", "loguniform", "randint", "lograndint"]
DIGITS = 4  # of a drawn number that count: no result depends on more
TRIES = 1000  # draws for one trial that is unlike all before


@dataclass(frozen=True)
class Parameter:
    """`low` and `high` both belong to a range; with `step` its values are multiples of it."""

    kind: Kind
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None

    @property
    def whole(self) -> bool:
        return self.kind in ("randint", "lograndint")

    @property
    def log(self) -> bool:
        return self.kind in ("loguniform", "lograndint")

    def to_json(self) -> dict[str, Any]:
        if self.kind == "choice":
            return {"kind": "choice", "values": list(self.values)}
        found = {"kind": self.kind, "low": self.low, "high": self.high}
        return found if self.step is None else {**found, "step": self.step}

    def ends(self) -> tuple[Any, ...]:
        """Values that, if each is allowed, all are."""
        return self.values if self.kind == "choice" else (self.near(self.low), self.near(self.high))

    def draw(self, rng: np.random.Generator) -> Any:
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.low, self.high
        if self.whole:
            low, high = low - 0.5, high + 0.5  # each whole number has its share
        drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if self.log else rng.uniform(low, high)
        return self.near(float(drawn))

    def near(self, value: float) -> Any:
        """The value of the range that is nearest."""
        if self.step is not None:
            first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
            value = min(max(round(value / self.step), first), last) * self.step
        if self.whole:
            return int(min(max(round(value), self.low), self.high))
        return float(min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high))


@dataclass(frozen=True)
class Space:
    """`fixed` values replace those of the base config, before those of `parameters` are drawn."""

    name: str
    fixed: Mapping[str, Any]
    parameters: Mapping[str, Parameter]

    def under(self, given: Mapping[str, Any]) -> Space:
        """Where the user has set a key, the space does not; what it replaces whole has the user's values below it."""

        def free(key: str) -> bool:
            return not any(key == other or key.startswith(f"{other}.") for other in given)

        fixed = {key: value for key, value in self.fixed.items() if free(key)}
        inner = {key: value for key, value in given.items() if any(key.startswith(f"{whole}.") for whole in fixed)}
        kept = {key: parameter for key, parameter in self.parameters.items() if free(key)}
        return replace(self, fixed=fixed | inner, parameters=kept)

    @property
    def size(self) -> int:
        """Settings there are, if all parameters are choices."""
        return math.prod(len(parameter.values) for parameter in self.parameters.values())

    def require_fits(self, base: RunConfig) -> None:
        """Refuses keys that the config does not have, and values that it does not take."""
        if not self.parameters:
            raise SpaceError(f"space {self.name} leaves nothing to search: all its keys are fixed")
        for setting in variations(self.parameters):
            with_values(base, {**self.fixed, **setting}, f"space {self.name}")


def drawn(parameters: Mapping[str, Parameter], seed: int, number: int, attempt: int = 0) -> dict[str, Any]:
    """The setting of a trial: it depends on seed, number and key alone, not on how many trials there are."""

    def rng(key: str) -> np.random.Generator:
        place = f"{seed}/{number}/{attempt}/{key}"
        return np.random.default_rng(list(hashlib.sha256(place.encode()).digest()))

    return {key: parameter.draw(rng(key)) for key, parameter in parameters.items()}


def random_settings(parameters: Mapping[str, Parameter], count: int, seed: int) -> list[dict[str, Any]]:
    """So many settings, each once; fewer where there are not as many."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(count):
        for attempt in range(TRIES):
            setting = drawn(parameters, seed, number, attempt)
            if _key(setting) not in found:
                found[_key(setting)] = setting
                break
        else:
            break
    return list(found.values())


def grid_settings(parameters: Mapping[str, Parameter], count: int, seed: int) -> list[dict[str, Any]]:
    """All settings in order, or so many of them drawn by the seed."""
    for key, parameter in parameters.items():
        if parameter.kind != "choice":
            raise SpaceError(
                f"{key} is a range, which no grid covers: write tune.choice([...]) or tune.grid_search([...]), or "
                "search at random (--search random)"
            )
    size = math.prod(len(parameter.values) for parameter in parameters.values())
    chosen = set(range(size)) if count >= size else set(permuted(np.arange(count), size, f"{seed}/grid").tolist())
    products = itertools.product(*(parameter.values for parameter in parameters.values()))
    picked = (values for place, values in enumerate(products) if place in chosen)
    return [dict(zip(parameters, values, strict=True)) for values in picked]


def variations(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    """Settings in which each value that has to be checked occurs, few of them."""
    ends: dict[str, Sequence[Any]] = {key: parameter.ends() for key, parameter in parameters.items()}
    for place in range(max((len(values) for values in ends.values()), default=1)):
        yield {key: values[min(place, len(values) - 1)] for key, values in ends.items()}


def _key(setting: Mapping[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)
