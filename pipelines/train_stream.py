"""Learns a stream; made for jobs of a Ray cluster. `treelora submit` sends this file, and by hand it is

ray job submit --working-dir . -- python pipelines/train_stream.py --config quickstart cluster.workers=2

A job runs in a temporary folder: give `folder` an absolute path on storage that all nodes share.
"""

from __future__ import annotations

from treelora_ray.cli import main
from treelora_ray.cluster.submit import of_pipeline


def arguments(given: list[str] | None = None) -> list[str]:
    """As `treelora train` takes them."""
    return of_pipeline("train", __doc__, given)


if __name__ == "__main__":
    main(arguments())
