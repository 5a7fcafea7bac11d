"""Build and record the families' tiny checkpoints that this release of transformers has.

    .venv-record/bin/python -m tests.families.record [--out DIR] [--variants N] [NAME ...]

What is recorded already stays: run with a second release, it adds what the first one lacks. Seconds
are kept beside the goldens, for the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from snapshot_tool.core.progress import SilentProgress
from snapshot_tool.workflows.record import RecordRequest, record

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "tests" / "checkpoints" / "build_families.py"
SECONDS = "seconds.json"


def build_checkpoints(out: Path, names: list[str]) -> list[Path]:
    """Build the checkpoints that are not there; return the folders of those that are new."""
    before = {path.name for path in out.glob("*")}
    subprocess.run([sys.executable, str(BUILD), "--new", str(out), *names], check=True)
    return sorted(path for path in out.iterdir() if path.name not in before)


def record_checkpoint(checkpoint: Path, goldens: Path, *, variants: int) -> float:
    """Record one checkpoint; return the seconds that it took."""
    began = time.perf_counter()
    request = RecordRequest(str(checkpoint), goldens, variants=variants, fresh=True)
    record(request, SilentProgress(), lambda _drift: "")
    return time.perf_counter() - began


def main() -> int:
    """Parse the arguments, build, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/families"))
    parser.add_argument("--variants", type=int, default=6)
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    out: Path = arguments.out
    seconds_file = out / SECONDS
    seconds = json.loads(seconds_file.read_text("utf-8")) if seconds_file.exists() else {}
    for checkpoint in build_checkpoints(out / "checkpoints", arguments.names):
        took = record_checkpoint(checkpoint, out / "goldens", variants=arguments.variants)
        seconds[checkpoint.name] = took
        seconds_file.write_text(json.dumps(seconds), encoding="utf-8")
        print(f"recorded {checkpoint.name} in {took:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
