"""`make mutants`: plant every fault, run every benign change, and write docs/detection.md.

    python -m tests.mutants.run [--out docs/detection.md] [--workers 2] [--benign 202]
    python -m tests.mutants.run --mutants exact-gelu,rope-base --benign 3 --json FILE
    python -m tests.mutants.run --from FILE --from FILE

The second form runs some and writes their results; the third writes the page from such files. Each
mutant and change runs in a process forked from this one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

# FMS imports these, in each forked process anew where they are not here already.
import torch._dynamo
import torch.distributed.checkpoint  # noqa: F401

from tests.mutants.benign import Benign, benign_runs, run_benign
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import (
    Outcome,
    Setup,
    measure,
    measure_change,
    measure_original,
    measure_references,
)
from tests.mutants.mutant import Mutant
from tests.mutants.report import Detection, read_results, write_report
from tests.mutants.ways import USUAL

_SECONDS = 2400  # a compiled model takes more than twenty minutes on a busy machine

T = TypeVar("T")


def run_all(jobs: Mapping[str, Callable[[], T]], *, workers: int) -> dict[str, T | Crash]:
    """Run jobs in forked processes and print the progress."""
    results: dict[str, T | Crash] = {}
    for name, result in run_forked(jobs, workers=workers, seconds=_SECONDS):
        results[name] = result
        print(f"{len(results)} of {len(jobs)}: {name}", flush=True)
    return {name: results[name] for name in jobs}


def measure_all(
    mutants: Sequence[Mutant], setup: Setup, *, workers: int
) -> dict[str, Outcome | Crash]:
    """Check all mutants; of those that pass, measure whether they change anything."""
    outcomes: dict[str, Outcome | Crash] = {}
    outcomes |= run_all({m.name: partial(measure, m, setup) for m in mutants}, workers=workers)
    quiet = [m for m in mutants if isinstance(o := outcomes[m.name], Outcome) and not o.fails]
    if quiet:
        originals = run_all({"unchanged": partial(measure_original, setup)}, workers=1)["unchanged"]
        if isinstance(originals, Crash):
            sys.exit(originals.why)
        jobs = {m.name: partial(measure_change, m, setup, originals) for m in quiet}
        for name, found in run_all(jobs, workers=workers).items():
            outcome = outcomes[name]
            if isinstance(found, Crash):
                outcomes[name] = found
            elif isinstance(outcome, Outcome):
                outcomes[name] = replace(outcome, change=found[0], question=found[1])
    return outcomes


def run_everything(
    mutants: Sequence[Mutant], ways: Sequence[Benign], setup: Setup, *, workers: int
) -> Detection:
    """Run mutants and benign changes, each also by the rules of other projects."""
    job = {"references": partial(measure_references, setup)}
    references = run_all(job, workers=1)["references"]
    if isinstance(references, Crash):
        sys.exit(references.why)
    setup = replace(setup, references=references)
    runs = {str(way): partial(run_benign, way, setup) for way in ways}
    return Detection(measure_all(mutants, setup, workers=workers), run_all(runs, workers=workers))


def main() -> None:
    """Read the arguments, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/detection.md"))
    parser.add_argument("--goldens", type=Path, default=Path("goldens"))
    parser.add_argument("--checkout", type=Path, default=Path("build/fms-checkout"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--benign", type=int, default=202)
    parser.add_argument("--mutants", help="names with commas between, '' for none (default: all)")
    parser.add_argument("--json", type=Path, help="write the results here, and no report")
    parser.add_argument(
        "--from", type=Path, action="append", dest="files", help="read results, run nothing"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.files:
        detection = read_results(arguments.files)
    else:
        names = list(MUTANTS)
        if arguments.mutants is not None:
            names = [name for name in arguments.mutants.split(",") if name]
        detection = run_everything(
            [MUTANTS[name] for name in names],
            benign_runs(arguments.benign, names=USUAL, each=1),
            Setup(arguments.goldens, arguments.checkout.resolve()),
            workers=arguments.workers,
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
