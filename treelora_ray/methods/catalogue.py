"""All methods that come with the package, by name."""

from treelora_ray.methods import (
    agem,
    derpp,
    ewc,
    gem,
    independent,
    inflora,
    joint,
    lwf,
    ncm,
    ogd,
    olora,
    replay,
    seqlora,
    slao,
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
    "inflora",
    "joint",
    "lwf",
    "make",
    "ncm",
    "ogd",
    "olora",
    "register",
    "replay",
    "seqlora",
    "slao",
    "treelora",
]
