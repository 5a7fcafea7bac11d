"""`make benign`: run the unchanged port in thousands of other ways, and write down every alarm.

    python -m tests.mutants.false_alarms [--runs 3000] [--workers 1]
    python -m tests.mutants.false_alarms --report

Results are kept as they come: a second start runs what is missing. The second form only writes the
section "False alarms" of docs/detection.md, from what was kept. Needs the checkpoint of other
shapes and its golden set in build/benign (see the Makefile).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import msgspec

# FMS imports these, in each forked process anew where they are not here already.
import torch._dynamo
import torch.distributed.checkpoint  # noqa: F401

from tests.mutants.benign import (
    CASES,
    EACH,
    LOCALISED,
    QUESTIONS,
    Alarms,
    Benign,
    benign_runs,
    run_benign,
)
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import Setup
from tests.mutants.report import FALSE_ALARMS, bound, table_lines, write_section
from tests.mutants.ways import OTHER, ROOT, WAYS

RUNS = 3000
_INTRODUCTION = f"""\
`make benign` writes this section. It runs the unchanged port in other ways that compute the same \
(`tests/mutants/ways.py`): every way in turn, together with up to three others that are drawn. A \
run is a check of {CASES} drawn cases in all phases, with {QUESTIONS} derived questions on them \
and the comparison of weights, and in {100 * LOCALISED:.0f} % of the runs with `--localise`. The \
golden set is the committed one unless the kind says otherwise. A port is loaded for {EACH} runs \
with other cases and questions; a compiled one serves more."""
_PORTS = 5  # in one process
_SECONDS = 2400  # of a block: a port takes minutes to compile on a busy machine


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that ended: with `why`, it gave no result."""

    seed: int
    names: tuple[str, ...]
    seconds: float
    alarms: Alarms
    why: str = ""


def run_block(runs: Sequence[Benign], setup: Setup) -> list[Finished]:
    """Do several runs in this process."""
    found = []
    for run in runs:
        began = time.perf_counter()
        try:
            alarms, why = run_benign(run, setup), ""
        except Exception as error:  # a run without a result is reported
            alarms, why = Alarms(), f"{type(error).__name__}: {error}"
        found.append(Finished(run.seed, run.names, time.perf_counter() - began, alarms, why))
    return found


def blocks_of(runs: Iterable[Benign]) -> list[list[Benign]]:
    """Return runs in blocks, each for a process; a compiled port has one of its own."""
    blocks: list[list[Benign]] = []
    shared = 0  # ports that the last block has room for
    for _, group in groupby(runs, lambda run: run.names):
        alike = list(group)
        compiles = any(way.compiles for way in alike[0].ways)
        if compiles or not shared:
            blocks.append(alike)
            shared = 0 if compiles else _PORTS - 1
        else:
            blocks[-1] += alike
            shared -= 1
    return blocks


def read_kept(path: Path) -> list[Finished]:
    """Return the runs that were kept; of a repeated one, the last result."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [msgspec.json.decode(line, type=Finished) for line in lines]
    return list({(run.seed, run.names): run for run in found}.values())


def run_missing(runs: Sequence[Benign], setup: Setup, kept: Path, *, workers: int) -> None:
    """Run what was not kept yet, and keep it."""
    done = {(run.seed, run.names) for run in read_kept(kept) if not run.why}
    blocks = blocks_of(run for run in runs if (run.seed, run.names) not in done)
    jobs = {f"{b[0]} to {b[-1].seed}": partial(run_block, b, setup) for b in blocks}
    kept.parent.mkdir(parents=True, exist_ok=True)
    for name, result in run_forked(jobs, workers=workers, seconds=_SECONDS):
        if isinstance(result, Crash):
            print(f"{name}: {result.why}", flush=True)
            continue
        with kept.open("a", encoding="utf-8") as file:
            file.writelines(f"{msgspec.json.encode(run).decode()}\n" for run in result)
        alarms = sum(finished.alarms != Alarms() for finished in result)
        print(f"{name}: {len(result)} runs, {alarms} alarms", flush=True)


def section(found: Sequence[Finished]) -> list[str]:
    """Return the section "False alarms" of the page."""
    finished = [run for run in found if not run.why]
    raised = {run: run.alarms.table for run in finished if run.alarms.table}
    by_oracle = {run: run.alarms.oracle for run in finished if run.alarms.oracle}
    rows = []
    for kind in dict.fromkeys(way.kind for way in WAYS.values()):
        ways = [name for name, way in WAYS.items() if way.kind == kind]
        runs = [run for run in finished if not set(ways).isdisjoint(run.names)]
        if runs:
            rows.append((kind, ", ".join(ways), len(runs), sum(run in raised for run in runs)))
    without = [run for run in found if run.why]
    hours = sum(run.seconds for run in found) / 3600
    lines = [
        f"- {len(raised)} false alarms in {len(finished)} runs of {len(rows)} kinds "
        f"({bound(len(raised), len(finished))} at 95 %); {len(by_oracle)} by the oracle.",
        f"- They took {hours:.1f} hours of one process on a busy machine of two cores.",
    ]
    if len(found) < RUNS:
        lines.append(f"- {RUNS:,} runs are drawn; the others were not run yet.")
    if without:
        lines.append(f"- {len(without)} more runs gave no result.")
    reasons = [
        *((run, f"{phase}, by the oracle") for run, phase in by_oracle.items()),
        *raised.items(),
        *((run, run.why.splitlines()[0]) for run in without),
    ]
    alarms = [(f"{', '.join(run.names)} (seed {run.seed})", why) for run, why in reasons]
    return [
        _INTRODUCTION,
        "",
        *lines,
        "",
        *table_lines(("kind", "ways", "runs", "false alarms"), rows),
        *(("", *table_lines(("run", "alarm"), alarms)) if alarms else ()),
    ]


def main() -> None:
    """Read the arguments, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kept", type=Path, default=OTHER / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "detection.md")
    parser.add_argument("--goldens", type=Path, default=Path("goldens"))
    parser.add_argument("--checkout", type=Path, default=Path("build/fms-checkout"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if not arguments.report:
        setup = Setup(arguments.goldens, arguments.checkout.resolve())
        runs = benign_runs(arguments.runs)
        run_missing(runs, setup, arguments.kept, workers=arguments.workers)
    lines = section(read_kept(arguments.kept))
    write_section(FALSE_ALARMS, lines, arguments.out)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
