"""`make ranks`: compare what a check names in one process and on two ranks, for every mutant.

    python -m tests.mutants.ranks [--whole FILE] [--mutants NAME,NAME] [--seconds N]

A mutant is first checked in one process, unless --whole has its outcome (a file of
`tests.mutants.run --json`). Then two ranks are forked from this process, with the environment and
the store that torchrun gives them. What was run already is kept in --results, and written as a
section of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# FMS imports these, in each forked process anew where they are not here already.
import torch._dynamo
import torch.distributed.checkpoint  # noqa: F401
from torch.distributed.elastic.utils.distributed import create_c10d_store

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import Progress
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.shards import follow_leader, leading
from snapshot_tool.check.workflow import check
from tests.mutants.candidates import SPEC
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import QUESTIONS, Outcome, Setup, check_planted, planted
from tests.mutants.mutant import DERIVED, LOADING, Mutant
from tests.mutants.report import read_results, table_lines, write_section

RANKS = 2
WEIGHTS, MODULES = "weights", "modules by themselves"
_SECONDS = 600
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Named:
    """What a check names.

    Args:
        phase: the first phase that fails, DERIVED, LOADING, WEIGHTS or MODULES; "": it passes.
        place: the module or other place; "" for what is not placed.
    """

    phase: str = ""
    place: str = ""

    @classmethod
    def of_outcome(cls, outcome: Outcome) -> Named:
        """Return what was named in one process."""
        phase = outcome.table or outcome.oracle or (DERIVED if outcome.derived else "")
        if not phase:
            phase = WEIGHTS if outcome.weights else MODULES if outcome.probes else ""
        is_placed = phase not in (DERIVED, LOADING)
        return cls(phase, outcome.place if is_placed else "")

    @classmethod
    def of_report(cls, report: CheckReport) -> Named:
        """Return what a report names."""
        if report.divergence is not None and report.divergence not in report.results:
            return cls(DERIVED)
        if report.divergence is not None:
            return cls(report.divergence.phase.value, report.location)
        wrong = bool(report.weights and report.weights.differing)
        phase = WEIGHTS if wrong else MODULES if report.wrong_modules else ""
        return cls(phase, report.location)

    def __str__(self) -> str:
        """Return the phase and the place."""
        return f"{self.phase or 'pass'}{f': {self.place}' if self.place else ''}"


def check_whole(mutant: Mutant, setup: Setup) -> Outcome:
    """Check a mutant in one process."""
    with planted(mutant, setup.checkout):
        return check_planted(setup)


def check_on_rank(
    mutant: Mutant, setup: Setup, request: CheckRequest, *, rank: int, port: int
) -> Named | None:
    """Check a mutant on one of the ranks, in a process of its own; return None on followers.

    port: that of the store.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with planted(mutant, setup.checkout):
        if rank:
            follow_leader("cpu")
            return None
        try:
            with leading("cpu"):
                return Named.of_report(check(request, Progress()))
        except CandidateUnavailable:
            return Named(LOADING)


def check_split(mutant: Mutant, setup: Setup, outcome: Outcome) -> Named | Crash:
    """Check a mutant on two ranks, in the way that shows it in one process.

    If what the first failure names is another than in one process, all cases are checked.
    """
    request = CheckRequest(
        setup.goldens,
        candidate=SPEC,
        tolerance=Rule.ORACLE if outcome.oracle and not outcome.table else None,
        explore=QUESTIONS if outcome.derived else None,
        seed=0,
        fail_fast=True,
    )
    found = _check_ranks(mutant, setup, request)
    if found == Named.of_outcome(outcome):
        return found
    return _check_ranks(mutant, setup, replace(request, fail_fast=False))


def _check_ranks(mutant: Mutant, setup: Setup, request: CheckRequest) -> Named | Crash:
    store: Any = create_c10d_store(is_server=True, server_addr=_HOST, wait_for_workers=False)
    jobs = {
        str(rank): partial(check_on_rank, mutant, setup, request, rank=rank, port=store.port)
        for rank in range(RANKS)
    }
    found = dict(run_forked(jobs, workers=RANKS, seconds=_SECONDS))
    first = found["0"]
    return first if first is not None else Crash("rank 0 returned nothing")


def compare(
    names: Sequence[str], setup: Setup, whole: Mapping[str, Outcome | Crash], seconds: float
) -> Iterator[tuple[str, Named, Named | Crash]]:
    """Yield what is named of each mutant in one process and on two ranks.

    whole: outcomes in one process that are known. seconds: no mutant is begun after these.
    """
    began = time.monotonic()
    for name in names:
        if time.monotonic() - began > seconds:
            return
        outcome = whole.get(name)
        if outcome is None:
            job = {name: partial(check_whole, MUTANTS[name], setup)}
            ((_, outcome),) = run_forked(job, workers=1, seconds=_SECONDS)
        if isinstance(outcome, Crash):
            print(f"{name}: {outcome.why}", flush=True)
            continue
        yield name, Named.of_outcome(outcome), check_split(MUTANTS[name], setup, outcome)


def write_page(page: Path, results: Mapping[str, Mapping[str, str]]) -> None:
    """Write the section of docs/scale.md."""
    other = {name: found for name, found in results.items() if found["whole"] != found["split"]}
    lines = [
        f"`make ranks` checks the planted faults of [detection.md](detection.md) in one process "
        f"and on {RANKS} ranks. {len(results)} of {len(MUTANTS)} were checked, and "
        f"{len(results) - len(other)} have the same verdict, first phase and module.",
        "",
        *table_lines(
            ("fault", "one process", f"{RANKS} ranks"),
            [(f"`{name}`", found["whole"], found["split"]) for name, found in other.items()],
        ),
        "",
        "Each rank has one of the two key heads, so faults that need several do not arise there. "
        "Changes of a weight are made to each shard; one that is not square cannot be transposed.",
    ]
    write_section("Faults on two ranks", lines, page)


def main() -> int:
    """Read the arguments, check the mutants, write the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/scale.md"))
    parser.add_argument("--results", type=Path, default=Path("build/ranks.json"))
    parser.add_argument("--whole", type=Path, action="append", default=[])
    parser.add_argument("--mutants", help="names with commas between (default: all)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no mutant after these")
    arguments = parser.parse_args()
    setup = Setup(Path("goldens"), Path("build/fms-checkout").resolve())
    file: Path = arguments.results
    results = json.loads(file.read_text("utf-8")) if file.exists() else {}
    names = arguments.mutants.split(",") if arguments.mutants else list(MUTANTS)
    to_run = [name for name in names if name not in results]
    whole = read_results(arguments.whole).outcomes
    for name, outcome in whole.items():
        if name in results and isinstance(outcome, Outcome):
            results[name]["whole"] = str(Named.of_outcome(outcome))
    for name, one, split in compare(to_run, setup, whole, arguments.seconds):
        if isinstance(split, Crash):
            print(f"{name}: {split.why}", flush=True)
            continue
        results[name] = {"whole": str(one), "split": str(split)}
        file.write_text(json.dumps(results, indent=1), "utf-8")
        word = "same" if one == split else "OTHER"
        print(f"{word} {name}: {one} | {split}", flush=True)
    write_page(arguments.out, {name: results[name] for name in MUTANTS if name in results})
    print(f"{len(MUTANTS) - len(results)} of {len(MUTANTS)} are left")
    return int(len(results) < len(MUTANTS))


if __name__ == "__main__":
    sys.exit(main())
