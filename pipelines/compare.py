"""Compares methods on one stream; made for jobs of a Ray cluster. `treelora submit --compare` sends this file, by hand:

ray job submit --working-dir . -- python pipelines/compare.py --config quickstart --methods all folder=/shared/runs

A job runs in a temporary folder: give `folder` an absolute path on storage that all nodes share.
"""

from __future__ import annotations

import argparse

from treelora_ray.cli import main


def arguments(given: list[str] | None = None) -> list[str]:
    """As `treelora compare` takes them."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config X [key=value ...] [options of `treelora compare`]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a preset")
    found, rest = parser.parse_known_args(given)
    return ["compare", found.config, *rest]


if __name__ == "__main__":
    main(arguments())
