"""Build the families' tiny checkpoints, each in a folder of its own.

usage: python tests/checkpoints/build_families.py [--new] OUT [NAME ...]

It needs torch and transformers (the record environment), no network. The same machine and the same
release of transformers give the same bytes. What this release does not have is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
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


def main() -> int:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--new", action="store_true", help="leave what is there as it is")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    for name in arguments.names or TINY:
        if arguments.new and (arguments.out / name).exists():
            continue
        if available(name):
            build(name, arguments.out / name)
        else:
            print(f"{name}: not in this release of transformers", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
