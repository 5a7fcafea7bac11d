"""Build and record the families' tiny checkpoints that this release of transformers has.

    .venv-record/bin/python -m tests.families.record [--out DIR] [--variants N] [NAME ...]
    .venv-record-5/bin/python -m tests.families.record --again

What is recorded already stays: run with a second release, it adds what the first one lacks. Seconds
are kept beside the goldens, for the table. --again records every checkpoint once more, apart, to
see whether another release answers otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.record.request import RecordRequest
from snapshot_tool.record.workflow import record

ROOT = Path(__file__).parent.parent.parent
SECONDS = "seconds.json"
AGAIN = "again"
REFUSED = "refused.json"


def builder() -> ModuleType:
    """Import the script that builds checkpoints, with the modules beside it."""
    folder = str(ROOT / "tests" / "checkpoints")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("build_families")


def build_checkpoints(out: Path, names: list[str]) -> list[Path]:
    """Build the checkpoints that are not there; return the folders of those that are new."""
    before = {path.name for path in out.glob("*")}
    builder().build_all(out, names, new=True)
    return sorted(path for path in out.iterdir() if path.name not in before)


def record_checkpoint(checkpoint: Path, goldens: Path, *, variants: int) -> float:
    """Record one checkpoint; return the seconds that it took."""
    began = time.perf_counter()
    request = RecordRequest(str(checkpoint), goldens, variants=variants, fresh=True)
    record(request, Progress(), lambda _diff: "")
    return time.perf_counter() - began


def record_again(out: Path, *, variants: int) -> None:
    """Record every checkpoint with this release, and keep why one cannot be."""
    refused = {}
    for checkpoint in sorted((out / "checkpoints").iterdir()):
        try:
            record_checkpoint(checkpoint, out / AGAIN / "goldens", variants=variants)
        except (SnapError, ImportError) as error:
            refused[checkpoint.name] = str(error).strip().splitlines()[0]
        print(f"{checkpoint.name}: {refused.get(checkpoint.name, 'recorded')}", flush=True)
    (out / AGAIN / REFUSED).write_text(json.dumps(refused), encoding="utf-8")


def main() -> int:
    """Parse the arguments, build, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/families"))
    parser.add_argument("--variants", type=int, default=6)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.again:
        record_again(out, variants=arguments.variants)
        return 0
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
