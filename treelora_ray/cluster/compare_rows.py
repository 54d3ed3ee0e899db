"""What is compared: rows, each a method with settings of its own. Knows nothing of Ray.

seqlora,ewc:method.lambda=10,routed=seqlora:objective.routing=inferred     on the command line
all                                                                        every method that learns the stream
rows.yaml                                                                  a mapping of labels to settings
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from treelora_ray.cluster.errors import ClusterError
from treelora_ray.config import RunConfig, flat, overridden
from treelora_ray.methods.options import METHOD_OPTIONS

ALL = "all"
# What all rows have in common, so that one is not the better for more data or steps; and where runs lie.
COMMON = (
    "name", "folder", "seed", "train.steps", "train.epochs", "train.batch", "objective.kind", "objective.label_match",
)  # fmt: skip
COMMON_SECTIONS = ("stream", "evaluate", "cluster", "tracking")
LONGEST = 100  # letters of a label, after which a folder is named


@dataclass(frozen=True)
class Row:
    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key; `method`: the whole section

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", self.label.replace("+", "p")).strip("-._") or "row"

    def values(self, base: RunConfig) -> dict[str, Any]:
        """What it changes in the config. A method's settings in the config are those of its rows too."""
        own = {} if "method" in self.settings or base.method.name == self.method else {"method": {"name": self.method}}
        return {**own, **self.settings}


def read_rows(text: str, fitting: Sequence[str]) -> list[Row]:
    """Rows of a list or of a YAML file. `fitting`: the methods that learn the stream, for `all`."""
    return _of_file(Path(text)) if text.endswith((".yaml", ".yml")) else _checked(list(_of_list(text, fitting)))


def rows_of(given: Mapping[str, Any], place: Path) -> list[Row]:
    """Rows that stand in a file of something larger, by their labels."""
    return _checked([_of_mapping(str(label), {} if value is None else value, place) for label, value in given.items()])


def _checked(rows: list[Row]) -> list[Row]:
    wrong = [problem for row in rows for problem in _problems(row)]
    for attribute in ("label", "slug"):
        names = [getattr(row, attribute) for row in rows]
        twice = dict.fromkeys(name for name in names if names.count(name) > 1)
        wrong += [f"two rows are named {name!r}: give one a label, as in LABEL=METHOD:KEY=VALUE" for name in twice]
    if not rows:
        wrong.append("no method is named: give some, as in `--methods seqlora,treelora`, or all")
    if wrong:
        raise ClusterError("the methods cannot be compared:\n  " + "\n  ".join(dict.fromkeys(wrong)))
    return rows


def _of_list(text: str, fitting: Sequence[str]) -> Iterator[Row]:
    for entry in filter(None, map(str.strip, _apart(text, ","))):
        if entry == ALL:
            yield from (Row(name, name) for name in fitting)
            continue
        first, *settings = re.split(r":(?=\s*[A-Za-z_][\w.]*=)", entry)
        label, equals, method = first.partition("=")
        found = overridden(settings)
        yield Row(label.strip(), method.strip(), found) if equals else Row(_label(first, settings), first, found)


def _apart(text: str, mark: str) -> Iterator[str]:
    """Parts between marks that stand in no bracket."""
    start = depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == mark and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _label(method: str, settings: Sequence[str]) -> str:
    """The method, and the last words of what is set, such as `seqlora ce_scope=current`."""
    return " ".join([method, *(re.sub(r"^[\w.]*\.(?=\w+=)", "", each.strip()) for each in settings)])


def _of_file(path: Path) -> list[Row]:
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ClusterError(f"the methods cannot be read from {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ClusterError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(found, Mapping):
        raise ClusterError(
            f"{path} must hold rows, each a label with its settings, like `routed: {{method: seqlora}}`; it holds "
            f"{type(found).__name__}"
        )
    return rows_of(found, path)


def _of_mapping(label: str, value: Any, path: Path) -> Row:
    if not isinstance(value, Mapping):
        raise ClusterError(f"row {label!r} of {path} is {value!r}: write its settings, like `{{method: seqlora}}`")
    rest = dict(value)
    method = rest.pop("method", label)
    settings = flat(rest)
    if isinstance(method, Mapping):
        method = {"name": label, **method}
        settings = {"method": method, **settings}
        method = method["name"]
    return Row(label, str(method), settings)


def _problems(row: Row) -> Iterator[str]:
    if row.method not in METHOD_OPTIONS:
        near = get_close_matches(row.method, METHOD_OPTIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield f"method {row.method!r} is unknown{hint}; known: {', '.join(METHOD_OPTIONS)}, or all"
    if not 0 < len(row.label) <= LONGEST:
        yield f"the label {row.label!r} must have 1 to {LONGEST} letters"
    for key in row.settings:
        if key in COMMON or key.split(".")[0] in COMMON_SECTIONS:
            yield (
                f"row {row.label!r} sets {key}, which all rows have in common, as they are to learn the same with the "
                f"same budget: set it for all ({key}=... beside the config)"
            )
