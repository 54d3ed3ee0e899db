"""All methods that come with the package, by name."""

from treelora_ray.methods import ewc, independent, joint, lwf, replay, seqlora, treelora
from treelora_ray.methods.base import METHODS, Method, make, register

__all__ = [
    "METHODS",
    "Method",
    "ewc",
    "independent",
    "joint",
    "lwf",
    "make",
    "register",
    "replay",
    "seqlora",
    "treelora",
]
