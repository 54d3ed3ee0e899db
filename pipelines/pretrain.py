"""The offline stage: trains all weights of a backbone on labelled rows, for streams to start from.

python pipelines/pretrain.py --backbone builtin:digits-vit --data initial.parquet --output backbones/mine
treelora train mine.yaml model.backbone=backbones/mine

`--data` is a Parquet file with the columns image and label, or text and label, or a folder with train.parquet and
test.parquet. It shall hold none of the stream's test rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="hub id or folder of a transformers model")
    parser.add_argument("--data", required=True, help="labelled Parquet file, or folder with train.parquet")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="at most so many training rows, drawn by the seed")
    parser.add_argument("--max-length", type=int, default=128, help="tokens a text may have")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    from treelora_ray.training.pretrain import pretrain

    try:
        done = pretrain(**vars(given), tell=print)
    except ValueError as error:
        if not type(error).__module__.startswith("treelora_ray"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {done.folder}; use it: treelora train CONFIG model.backbone={done.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
