"""Measures a run's scores again; made for jobs of a Ray cluster:

ray job submit --working-dir . -- python pipelines/evaluate.py /shared/runs/first --routing oracle
"""

from __future__ import annotations

import argparse

from treelora_ray.cli import main


def arguments(given: list[str] | None = None) -> list[str]:
    """As `treelora evaluate` takes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--routing", choices=("inferred", "oracle", "last"))
    parser.add_argument("--json", action="store_true", help="JSON for programs")
    found = parser.parse_args(given)
    routing = ["--routing", found.routing] if found.routing else []
    return ["evaluate", found.run, *routing, *(["--json"] if found.json else [])]


if __name__ == "__main__":
    main(arguments())
