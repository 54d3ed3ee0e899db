"""Searches settings; made for jobs of a Ray cluster. `treelora submit --sweep` sends this file, and by hand it is

ray job submit --working-dir . -- python pipelines/sweep.py --config quickstart --space treelora folder=/shared/runs

A job runs in a temporary folder: give `folder` an absolute path on storage that all nodes share.
"""

from __future__ import annotations

import argparse

from treelora_ray.cli import main


def arguments(given: list[str] | None = None) -> list[str]:
    """As `treelora sweep` takes them."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config X [key=value ...] [options of `treelora sweep`]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a preset")
    found, rest = parser.parse_known_args(given)
    return ["sweep", found.config, *rest]


if __name__ == "__main__":
    main(arguments())
