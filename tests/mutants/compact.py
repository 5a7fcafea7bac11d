"""`make mutants-compact`: does a compact golden set show every fault that a full one shows?

    python -m tests.mutants.compact --compact build/compact [--workers 2] [--mutants NAMES]

Both are judged by the table of tolerances. Exits with 1 if the compact one misses a fault.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import Progress
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check
from tests.mutants.candidates import SPEC
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash
from tests.mutants.measure import planted
from tests.mutants.mutant import LOADING, Mutant
from tests.mutants.run import run_all

_CHECKPOINT = "tests/checkpoints/tiny-idefics3"
NOTHING = "nothing"


def first_phases(
    mutant: Mutant, checkout: Path, goldens: tuple[Path, ...], case: str
) -> tuple[str, ...]:
    """Return the first phase that shows a mutant, for each golden set; in a process of its own."""
    shown = []
    with planted(mutant, checkout):
        for folder in goldens:
            request = CheckRequest(folder, candidate=SPEC, checkpoint=_CHECKPOINT, case=case)
            try:
                divergence = check(request, Progress()).divergence
            except CandidateUnavailable:
                shown.append(LOADING)
            else:
                shown.append(divergence.phase.value if divergence else NOTHING)
    return tuple(shown)


def main() -> int:
    """Run every mutant against both sets, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", type=Path, default=Path("goldens"))
    parser.add_argument("--compact", type=Path, required=True)
    parser.add_argument("--checkout", type=Path, default=Path("build/fms-checkout"))
    parser.add_argument("--case", default="*", help="glob of the cases to check")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mutants", help="names with commas between (default: all)")
    arguments = parser.parse_args()
    goldens = (arguments.full, arguments.compact)
    names = arguments.mutants.split(",") if arguments.mutants else list(MUTANTS)
    checkout = arguments.checkout.resolve()
    jobs = {
        name: partial(first_phases, MUTANTS[name], checkout, goldens, arguments.case)
        for name in names
    }
    results = run_all(jobs, workers=arguments.workers)
    shown = {name: pair for name, pair in results.items() if not isinstance(pair, Crash)}
    crashed = [name for name in results if name not in shown]
    missed = [name for name, (full, compact) in shown.items() if compact == NOTHING != full]
    print("| first shown by | full | compact |\n| --- | --- | --- |")
    counts = [Counter(pair[side] for pair in shown.values()) for side in (0, 1)]
    for phase in sorted(counts[0].keys() | counts[1].keys()):
        print(f"| {phase} | {counts[0][phase]} | {counts[1][phase]} |")
    for name, (full, compact) in shown.items():
        if full != compact:
            print(f"{name}: {full} with the full set, {compact} with the compact one")
    for name in crashed:
        print(f"{name} crashed: {results[name]}")
    print(f"{len(shown)} mutants, missed by the compact set alone: {', '.join(missed) or 'none'}")
    return 1 if missed or crashed else 0


if __name__ == "__main__":
    sys.exit(main())
