"""All methods that come with the package, by name."""

from treelora_ray.methods import (
    agem,
    derpp,
    dualprompt,
    ewc,
    gem,
    independent,
    joint,
    l2p,
    lwf,
    ncm,
    ogd,
    olora,
    replay,
    seqlora,
    treelora,
)
from treelora_ray.methods.base import METHODS, Method, make, register

__all__ = [
    "METHODS",
    "Method",
    "agem",
    "derpp",
    "dualprompt",
    "ewc",
    "gem",
    "independent",
    "joint",
    "l2p",
    "lwf",
    "make",
    "ncm",
    "ogd",
    "olora",
    "register",
    "replay",
    "seqlora",
    "treelora",
]
