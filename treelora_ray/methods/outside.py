"""Methods of other packages: entry points of the group `treelora_ray.methods`, each named as its method.

Imports the standard library only. What an entry names is imported when its method is asked for, so that one that is
broken is heard of by those who ask for it, and by nobody else.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

GROUP = "treelora_ray.methods"


class OutsideError(ValueError):
    """A method of another package cannot be used."""


def names() -> list[str]:
    """Of all that are installed; nothing is imported."""
    return sorted(entry_points(group=GROUP).names)


def load(name: str) -> bool:
    """Makes a method of another package known; False where no entry point has its name."""
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        return False
    if len(found) > 1:
        raise OutsideError(
            f"method.name {name!r} is not clear, uninstall all but one: {' and '.join(_words(each) for each in found)}"
        )
    from treelora_ray.methods.catalogue import METHODS  # all of our own, whose names are taken then

    if name not in METHODS:
        _import(found[0])
    if name not in METHODS:
        raise OutsideError(f"{_words(found[0])} registers no method {name!r}: register one, or rename the entry")
    return True


def _import(entry: EntryPoint) -> None:
    from treelora_ray.methods.base import METHODS
    from treelora_ray.methods.options import METHOD_OPTIONS

    before = set(METHODS)
    try:
        entry.load()
    except Exception as error:
        for name in METHODS.keys() - before:
            if METHODS[name].__module__ not in sys.modules:  # it broke after it had registered
                del METHODS[name], METHOD_OPTIONS[name]
        raise OutsideError(
            f"{_words(entry)} cannot be loaded: {type(error).__name__}: {error}; repair or uninstall it"
        ) from error


def load_all() -> list[str]:
    """Makes all methods of other packages known; in words, what is wrong with those that cannot be."""
    from treelora_ray.methods.options import BUILT_IN

    wrong = []
    for name in names():
        if name in BUILT_IN:
            taken = " and ".join(_words(entry) for entry in entry_points(group=GROUP, name=name))
            wrong.append(f"{taken} is never used: treelora-ray has a method {name!r} of its own, so rename the entry")
            continue
        try:
            load(name)
        except OutsideError as error:
            wrong.append(str(error))
    return wrong


def distribution(name: str) -> tuple[str, str] | None:
    """Name and version of the distribution that a method comes from; None for our own."""
    from treelora_ray.methods.options import BUILT_IN

    for entry in () if name in BUILT_IN else entry_points(group=GROUP, name=name):
        if entry.dist is not None:
            return entry.dist.name, entry.dist.version
    return None


def _words(entry: EntryPoint) -> str:
    dist = entry.dist
    origin = f" of distribution {dist.name} {dist.version}" if dist is not None else ""
    return f"entry point `{entry.name} = {entry.value}`{origin}"
