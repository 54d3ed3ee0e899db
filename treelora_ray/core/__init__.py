"""TreeLoRA's algorithm: signatures, the tree over tasks, the search on it, the pull, and the guide.

Imports torch, numpy, scipy and the standard library only.
"""

from treelora_ray.core.config import GuideConfig
from treelora_ray.core.errors import GuideError, LayoutError, SettingError, SnapshotError
from treelora_ray.core.guide import Guide
from treelora_ray.core.layout import Layout
from treelora_ray.core.merge import AdapterBank, Merge, merge_low_rank
from treelora_ray.core.penalty import AdapterPull, DirectionPull, InnerPull, Strength
from treelora_ray.core.signature import Accumulator, Sketch
from treelora_ray.core.state import Choice, Inserted, Snapshot
from treelora_ray.core.tree import Tree

__all__ = [
    "Accumulator",
    "AdapterBank",
    "AdapterPull",
    "Choice",
    "DirectionPull",
    "Guide",
    "GuideConfig",
    "GuideError",
    "InnerPull",
    "Inserted",
    "Layout",
    "LayoutError",
    "Merge",
    "SettingError",
    "Sketch",
    "Snapshot",
    "SnapshotError",
    "Strength",
    "Tree",
    "merge_low_rank",
]
