"""`make mutants-compact`: is every fault that a full golden set shows shown by a compact one?

    python -m tests.mutants.compact --compact build/compact [--workers 2] [--mutants NAMES]

Both are judged by the table of tolerances. Prints what each set shows, and exits with 1 where the
compact one misses a fault.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import SilentProgress
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import check
from tests.mutants.candidates import SPEC
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash
from tests.mutants.measure import Setup, planted
from tests.mutants.mutant import LOADING, Mutant
from tests.mutants.run import run_all

_CHECKPOINT = "tests/checkpoints/tiny-idefics3"
NOTHING = "nothing"


def first_phases(mutant: Mutant, setups: tuple[Setup, ...], case: str) -> tuple[str, ...]:
    """Return the first phase that shows a mutant, for each golden set; for a process of its own."""
    shown = []
    with planted(mutant, setups[0].checkout):
        for setup in setups:
            request = CheckRequest(setup.goldens, candidate=SPEC, checkpoint=_CHECKPOINT, case=case)
            try:
                divergence = check(request, SilentProgress()).divergence
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
    parser.add_argument("--mutants", help="some alone, by name, with commas between")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    setups = (Setup(arguments.full, checkout), Setup(arguments.compact, checkout))
    names = arguments.mutants.split(",") if arguments.mutants else list(MUTANTS)
    jobs = {name: partial(first_phases, MUTANTS[name], setups, arguments.case) for name in names}
    results = run_all(jobs, "mutant", workers=arguments.workers)
    crashed = {name: result.why for name, result in results.items() if isinstance(result, Crash)}
    shown = {name: pair for name, pair in results.items() if not isinstance(pair, Crash)}
    print("| first shown by | full | compact |\n| --- | --- | --- |")
    counts = [Counter(pair[side] for pair in shown.values()) for side in (0, 1)]
    for phase in sorted(counts[0].keys() | counts[1].keys()):
        print(f"| {phase} | {counts[0][phase]} | {counts[1][phase]} |")
    for name, (full, compact) in shown.items():
        if full != compact:
            print(f"{name}: {full} with the full set, {compact} with the compact one")
    missed = [name for name, (full, compact) in shown.items() if compact == NOTHING != full]
    print(f"{len(shown)} mutants, missed by the compact set alone: {', '.join(missed) or 'none'}")
    for name, why in crashed.items():
        print(f"{name} crashed: {why.strip().splitlines()[-1]}")
    return 1 if missed or crashed else 0


if __name__ == "__main__":
    sys.exit(main())
