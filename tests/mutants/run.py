"""`make mutants`: plant every fault, run every benign change, and write docs/detection.md.

    python -m tests.mutants.run [--out docs/detection.md] [--workers 2] [--benign 202]
    python -m tests.mutants.run --mutants exact-gelu,rope-base --benign 3 --json FILE

The second form runs some and writes their results. Each runs in a process forked from this one,
which has imported everything except FMS.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from snapshot_tool.base.protocol import SilentProgress
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import check
from tests.mutants.benign import benign_runs, run_benign
from tests.mutants.candidates import SPEC
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import Setup, measure, planted
from tests.mutants.probes import Originals, original_answers
from tests.mutants.report import Detection, write_report

_SECONDS = 2400  # a compiled model takes more than twenty minutes on a busy machine

T = TypeVar("T")


def run_original(setup: Setup) -> tuple[Originals, list[str]]:
    """Check the unchanged port; return its answers, and the modules that this imported."""
    before = set(sys.modules)
    with planted(None, setup.checkout) as plan:
        request = CheckRequest(setup.goldens, candidate=SPEC, localise=True, explore=9)
        report = check(request, SilentProgress())
        if report.divergence:
            raise ValueError(f"the unchanged port fails: {report.divergence}")
        originals = original_answers(plan, setup.golden())
    return originals, [name for name in sys.modules if name not in before]


def run_all(jobs: Mapping[str, Callable[[], T]], *, workers: int) -> dict[str, T | Crash]:
    """Run jobs in forked processes and print the progress."""
    results: dict[str, T | Crash] = {}
    for name, result in run_forked(jobs, workers=workers, seconds=_SECONDS):
        results[name] = result
        print(f"{len(results)} of {len(jobs)}: {name}", flush=True)
    return {name: results[name] for name in jobs}


def main() -> None:
    """Read the arguments, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/detection.md"))
    parser.add_argument("--goldens", type=Path, default=Path("goldens"))
    parser.add_argument("--checkout", type=Path, default=Path("build/fms-checkout"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--benign", type=int, default=202)
    parser.add_argument("--mutants", help="names with commas between (default: all)")
    parser.add_argument("--json", type=Path, help="write the results here, and no report")
    arguments = parser.parse_args()
    began = time.monotonic()
    setup = Setup(arguments.goldens, arguments.checkout.resolve())
    original = run_all({"unchanged": partial(run_original, setup)}, workers=1)["unchanged"]
    if isinstance(original, Crash):
        sys.exit(original.why)
    originals, modules = original
    for name in modules:
        # Each process imports its own FMS. Names that were made up cannot be imported.
        if name.partition(".")[0] != "fms":
            with suppress(ImportError):
                importlib.import_module(name)
    names = arguments.mutants.split(",") if arguments.mutants else list(MUTANTS)
    ways = benign_runs(arguments.benign)
    detection = Detection(
        run_all(
            {name: partial(measure, MUTANTS[name], setup, originals) for name in names},
            workers=arguments.workers,
        ),
        run_all(
            {str(way): partial(run_benign, way, setup) for way in ways}, workers=arguments.workers
        ),
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(detection.verdicts(), indent=1), encoding="utf-8")
    else:
        write_report(detection, arguments.out)
    print(f"{time.monotonic() - began:.0f} s")
    for line in detection.summary():
        print(line)


if __name__ == "__main__":
    main()
