"""Writes docs/config.md from the code: `python -m treelora_ray.reference > docs/config.md`.

With `--all` the page also has the methods of other packages that are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from treelora_ray.config import FREE_KEYS, RunConfig
from treelora_ray.methods import outside
from treelora_ray.methods.options import BUILT_IN, METHOD_OPTIONS

HEAD = """\
# All settings of a run

A config is a YAML file; what it leaves out has the defaults below. On the command line `key.path=value` overrides it,
the value read as YAML: `treelora train quickstart train.lr=1e-3 method.lambda=0.3 stream.tasks='[a, b]'`. A mistyped
key or a wrong value is refused, all of them in one report. `treelora config show CONFIG` prints the effective config,
which lies in the run's folder too and is itself a valid config.
"""


def reference(methods: Iterable[str] = BUILT_IN) -> str:
    """The page: a table for each section, and one for the options of each method."""
    parts = [HEAD]
    plain = {k: f for k, f in RunConfig.model_fields.items() if not _section(f) and k != "method"}
    parts.append(_table("The run", plain, ""))
    for key, field in RunConfig.model_fields.items():
        if (inner := _section(field)) is not None:
            own = {f.alias or k: f for k, f in inner.model_fields.items() if _section(f) is None}
            parts.append(_table(f"`{key}`", own, f"{key}."))
            for name, nested in inner.model_fields.items():
                if (below := _section(nested)) is not None:
                    parts.append(_table(f"`{key}.{name}`", below.model_fields, f"{key}.{name}."))
    for name in methods:
        options = METHOD_OPTIONS[name]
        fields = {field.alias or key: field for key, field in options.model_fields.items() if key != "name"}
        text = " ".join((options.__doc__ or "").split())
        parts.append(_table(f"`method` with `name: {name}`", fields, "method.", text))
    free = ", ".join(f"`{key}`" for key in (*FREE_KEYS, "cluster.*", "tracking.*"))
    parts.append(
        "## Which settings are a run's identity\n\nAll of them, so that a run goes on under the settings it began"
        f" with; but for {free}, on which results do not depend. `--allow-change KEY` lets `train.*`, `evaluate.*`, "
        "`objective.routing`, `objective.router`, `objective.max_new_tokens`, `method.lambda` and `stream.path` differ "
        "from then on. Tasks may always be added at the end of the stream.\n"
    )
    return "\n".join(parts)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.__name__ != "Options" else None


def _table(title: str, fields: dict[str, FieldInfo], above: str, text: str = "") -> str:
    rows = [f"| `{above}{key}` | {_default(field)} | {_words(field)} |" for key, field in fields.items()]
    table = "\n".join(["| key | default | |", "|---|---|---|", *rows]) if rows else "No options."
    return f"## {title}\n\n" + (f"{text}\n\n" if text else "") + table + "\n"


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{value}`".lower() if isinstance(value, bool) else f"`{value}`"


def _words(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    choices = [str(value) for value in getattr(field.annotation, "__args__", ()) if isinstance(value, str)]
    return f"{text} ({', '.join(choices)})" if choices and not any(c in text for c in choices[:1]) else text


if __name__ == "__main__":
    if "--all" in sys.argv[1:]:
        for problem in outside.load_all():
            print(problem, file=sys.stderr)
        print(reference(METHOD_OPTIONS), end="")
    else:
        print(reference(), end="")
