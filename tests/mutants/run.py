"""`make mutants`: plant every fault, run every benign change, and write docs/detection.md.

    python -m tests.mutants.run [--out docs/detection.md] [--workers 2] [--benign 202]
    python -m tests.mutants.run --mutants exact-gelu,rope-base --benign 3 --json FILE

The second form runs some and writes what came of them. Each runs in a process of its own, forked
from this one, which has imported everything but FMS.
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
from tests.mutants.exact import exact_answers
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import Setup, measure, planted
from tests.mutants.mutant import Change, Mutant
from tests.mutants.probes import Originals, answers, rounding_of
from tests.mutants.report import Detection, write_report

_SECONDS = 2400  # a compiled model takes more than twenty minutes on a busy machine
_UNCHANGED = Mutant("unchanged", "", "", "", Change("nothing", lambda _model: None))

T = TypeVar("T")


def ask_original(setup: Setup) -> Originals:
    """Return what the unchanged port answers; import all that answering it needed but FMS.

    Each process has an FMS of its own, and would otherwise import the rest again.
    """
    originals, modules = alone(partial(_ask_original, setup))
    for name in modules:
        # What is in sys.modules under a made-up name cannot be imported by it.
        with suppress(ImportError):
            importlib.import_module(name)
    return originals


def _ask_original(setup: Setup) -> tuple[Originals, list[str]]:
    before = set(sys.modules)
    with planted(_UNCHANGED, setup.checkout) as plan:
        request = CheckRequest(setup.goldens, candidate=SPEC, localise=True, explore=9)
        report = check(request, SilentProgress())
        if report.divergence or plan.built is None:
            raise ValueError(f"the unchanged port fails: {report.divergence}")
        golden = setup.golden()
        found = answers(plan.built, golden)
        exact = exact_answers(plan, golden)
        originals = Originals(found, rounding_of(found, golden), exact)
    new = [name for name in sys.modules if name not in before]
    return originals, [name for name in new if name.partition(".")[0] != "fms"]


def alone(job: Callable[[], T]) -> T:
    """Run one job in a process of its own."""
    ((_, result),) = run_forked({"": job}, workers=1, seconds=_SECONDS)
    if isinstance(result, Crash):
        sys.exit(result.why)
    return result


def run_all(
    jobs: Mapping[str, Callable[[], T]], title: str, *, workers: int
) -> dict[str, T | Crash]:
    """Run jobs and say how far they are."""
    results: dict[str, T | Crash] = {}
    for name, result in run_forked(jobs, workers=workers, seconds=_SECONDS):
        results[name] = result
        print(f"{title} {len(results)} of {len(jobs)}: {name}", flush=True)
    return {name: results[name] for name in jobs}


def main() -> None:
    """Read the arguments, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/detection.md"))
    parser.add_argument("--goldens", type=Path, default=Path("goldens"))
    parser.add_argument("--checkout", type=Path, default=Path("build/fms-checkout"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--benign", type=int, default=202)
    parser.add_argument("--mutants", help="some alone, by name, with commas between")
    parser.add_argument("--json", type=Path, help="write what came of them, and no report")
    arguments = parser.parse_args()
    began = time.monotonic()
    setup = Setup(arguments.goldens, arguments.checkout.resolve())
    originals = ask_original(setup)
    names = arguments.mutants.split(",") if arguments.mutants else list(MUTANTS)
    faults = {name: partial(measure, MUTANTS[name], setup, originals) for name in names}
    ways = {str(way.seed): way for way in benign_runs(arguments.benign)}
    quiet = {name: partial(run_benign, way, setup) for name, way in ways.items()}
    detection = Detection(
        run_all(faults, "mutant", workers=arguments.workers),
        ways,
        run_all(quiet, "benign", workers=arguments.workers),
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
