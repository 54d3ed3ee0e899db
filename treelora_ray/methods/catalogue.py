"""All methods that come with the package, by name."""

from treelora_ray.methods import (
    agem,
    derpp,
    ewc,
    gem,
    independent,
    joint,
    lwf,
    ncm,
    ogd,
    olora,
    osf,
    replay,
    sapt,
    seqlora,
    treelora,
)
from treelora_ray.methods.base import METHODS, Method, make, register

__all__ = [
    "METHODS",
    "Method",
    "agem",
    "derpp",
    "ewc",
    "gem",
    "independent",
    "joint",
    "lwf",
    "make",
    "ncm",
    "ogd",
    "olora",
    "osf",
    "register",
    "replay",
    "sapt",
    "seqlora",
    "treelora",
]
