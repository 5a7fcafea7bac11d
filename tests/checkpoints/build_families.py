"""Build the families' tiny checkpoints, each in a folder of its own.

usage: python tests/checkpoints/build_families.py [--new] OUT [NAME ...]

It needs torch and transformers (the record environment), no network. The same machine and the same
release of transformers give the same bytes. What this release does not have is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

from builder.families import TINY, available, build_checkpoint

SEED = 0


def build(name: str, folder: Path) -> None:
    """Write one checkpoint."""
    model, processor = build_checkpoint(name, seed=SEED)
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, {size} bytes")


def build_all(out: Path, names: Sequence[str], *, new: bool = False) -> None:
    """Write checkpoints below a folder, all of them by default.

    new: leave what is there as it is.
    """
    for name in names or TINY:
        if new and (out / name).exists():
            continue
        if available(name):
            build(name, out / name)
        else:
            print(f"{name}: not in this release of transformers", file=sys.stderr)


def main() -> int:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--new", action="store_true", help="leave what is there as it is")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    build_all(arguments.out, arguments.names, new=arguments.new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
