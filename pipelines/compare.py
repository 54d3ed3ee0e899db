"""Compares methods on one stream; made for jobs of a Ray cluster. `treelora submit --compare` sends this file, by hand:

ray job submit --working-dir . -- python pipelines/compare.py --config quickstart --methods all folder=/shared/runs

A job runs in a temporary folder: give `folder` an absolute path on storage that all nodes share.
"""

from __future__ import annotations

from treelora_ray.cli import main
from treelora_ray.cluster.submit import of_pipeline


def arguments(given: list[str] | None = None) -> list[str]:
    """As `treelora compare` takes them."""
    return of_pipeline("compare", __doc__, given)


if __name__ == "__main__":
    main(arguments())
