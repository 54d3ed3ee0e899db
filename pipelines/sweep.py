"""Searches settings; made for jobs of a Ray cluster. `treelora submit --sweep` sends this file, and by hand it is

ray job submit --working-dir . -- python pipelines/sweep.py --config quickstart --space treelora folder=/shared/runs

A job runs in a temporary folder: give `folder` an absolute path on storage that all nodes share.
"""

from __future__ import annotations

from treelora_ray.cli import main
from treelora_ray.cluster.submit import of_pipeline


def arguments(given: list[str] | None = None) -> list[str]:
    """As `treelora sweep` takes them."""
    return of_pipeline("sweep", __doc__, given)


if __name__ == "__main__":
    main(arguments())
