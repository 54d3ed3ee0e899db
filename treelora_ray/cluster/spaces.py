"""Spaces: which settings a sweep searches, as functions in Python files, those of the package or a user's own.

    load_space("treelora")              the only function of treelora_ray/tune_spaces/treelora.py
    load_space("baselines:replay")      one of several
    load_space("mine.py"), load_space("mine.py:second")

A function takes nothing and returns a mapping from dotted keys of the config to what Tune searches (`tune.choice`,
`tune.loguniform`, ...) or to a plain value, which replaces that of the base config.
"""

from __future__ import annotations

import json
import math
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from ray.tune.search import sample

from treelora_ray.cluster.errors import SpaceError
from treelora_ray.cluster.parameters import Kind, Parameter, Space


def known() -> list[str]:
    """Spaces of the package."""
    names = (path.name for path in (files("treelora_ray") / "tune_spaces").iterdir())
    return sorted(name.removesuffix(".py") for name in names if re.fullmatch(r"[a-z]\w*\.py", name))


def load_space(wanted: str) -> Space:
    name, _, function = wanted.partition(":")
    path = _path(name)
    functions = _functions(path)
    if not function and len(functions) == 1:
        function = next(iter(functions))
    if function not in functions:
        near = get_close_matches(function, functions, 1)
        listed = ", ".join(f"{name}:{each}" for each in functions) or "none: write `def space() -> dict: ...`"
        hint = f"did you mean {name}:{near[0]}?" if near else f"its spaces are {listed}"
        raise SpaceError(f"{path} has no space {function!r}: {hint}" if function else f"say which space: {listed}")
    found = _called(path, functions[function])
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise SpaceError(f"{path}: {function}() must return a mapping of dotted keys, got {type(found).__name__}")
    searched = {key: parameter for key, value in found.items() if (parameter := _parameter(key, value, path))}
    fixed = {key: value for key, value in found.items() if key not in searched}
    stem = path.stem if len(functions) == 1 else f"{path.stem}-{function}"
    return Space(stem, fixed, searched)


def _path(name: str) -> Path:
    if name.endswith(".py") or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise SpaceError(f"there is no file {name} with a space: check the path, or name one of {', '.join(known())}")
    if name in known():
        return Path(str(files("treelora_ray") / "tune_spaces" / f"{name}.py"))
    near = get_close_matches(name, known(), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SpaceError(
        f"there is no space {name!r}; {hint}known: {', '.join(known())}; a file of your own is named by its path, such "
        "as ./mine.py"
    )


def _functions(path: Path) -> dict[str, Callable[[], Any]]:
    """Public functions that the file itself defines."""
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        raise _explained(path, error) from error
    own = vars(module).items()
    return {
        name: value
        for name, value in own
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == path.stem
    }


def _called(path: Path, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: Exception) -> SpaceError:
    """With the line of the file that is to blame."""
    if isinstance(error, SyntaxError) and error.lineno:
        line = error.lineno
    else:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        line = next((frame.lineno or 0 for frame in frames if frame.filename == str(path)), 0)
    lines = path.read_text().splitlines()
    shown = f"\n    {lines[line - 1].strip()}" if line and line <= len(lines) else ""
    said = error.msg if isinstance(error, SyntaxError) else error
    return SpaceError(f"space file {path}, line {line}: {type(error).__name__}: {said}{shown}")


def _parameter(key: str, value: Any, path: Path) -> Parameter | None:
    """What Tune's description of a range or of choices comes to; None for a plain value."""
    if isinstance(value, Mapping) and set(value) == {"grid_search"}:
        return _choice(key, value["grid_search"], path)
    if not isinstance(value, sample.Domain):
        return None
    sampler, step = value.get_sampler(), None
    if isinstance(sampler, sample.Quantized):
        sampler, step = sampler.get_sampler(), sampler.q
    log = isinstance(sampler, sample.LogUniform)
    if isinstance(value, sample.Categorical):
        return _choice(key, value.categories, path)
    if isinstance(value, sample.Integer) and (log or isinstance(sampler, sample.Uniform)):
        # Tune leaves out the upper end, but for one of a wider grid.
        step = None if step == 1 else step
        return _range(key, "lograndint" if log else "randint", value.lower, value.upper - (step is None), step, path)
    if isinstance(value, sample.Float) and (log or isinstance(sampler, sample.Uniform)):
        return _range(key, "loguniform" if log else "uniform", value.lower, value.upper, step, path)
    raise SpaceError(
        f"{path}: {key} is drawn by {type(value).__name__} and {type(sampler).__name__}, which cannot be repeated or "
        "has no ends: use tune.choice, grid_search, uniform, loguniform, randint, lograndint or their q… forms"
    )


def _choice(key: str, values: Sequence[Any], path: Path) -> Parameter:
    if not values:
        raise SpaceError(f"{path}: {key} has no values to choose from")
    try:
        json.dumps(values)
    except TypeError as error:
        raise SpaceError(f"{path}: values of {key} must be such as a config has: {error}") from error
    return Parameter("choice", tuple(values))


def _range(key: str, kind: Kind, low: float, high: float, step: float | None, path: Path) -> Parameter:
    if not low <= high:
        raise SpaceError(f"{path}: {key} goes from {low} to {high}: write the smaller end first")
    if step is not None and math.floor(high / step + 1e-9) < math.ceil(low / step - 1e-9):
        raise SpaceError(f"{path}: {key} has no multiple of {step} between {low} and {high}")
    return Parameter(kind, (), low, high, step)
