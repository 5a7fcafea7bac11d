"""Run derived questions on every family and write how many raise a false alarm.

    .venv-check/bin/python -m tests.families.questions [--count 3000] [--report]

The golden sets are recorded before (see the Makefile), one for each family: the first that FMS
passes. FMS is the tests' checkout, where a fault of FMS that every family has is mended (see
fms.patch). What was run already is kept in a file and not run again. With --report, only the
section of docs/families.md is written.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from snapshot_tool.base.protocol import Progress
from snapshot_tool.base.report import ExploredKind
from snapshot_tool.base.results import Verdict
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check
from snapshot_tool.goldens.manifest import Manifest
from tests.families.findings import FINDINGS, REPAIRS
from tests.families.table import QUESTIONS, ROOT, recorded, replace_part
from tests.mutants.forked import Crash, run_forked
from tests.mutants.report import bound, table_lines

COUNT = 3000
CHECKOUT = ROOT / "build" / "fms-checkout"
KEPT = "questions.json"
_SECONDS = 7200  # of a family

# FMS is right about some of its cases, and the questions are about these.
_IN_PART = "mistral3"


@dataclass(frozen=True, slots=True)
class Asked:
    """The derived questions of one golden set.

    Args:
        checkpoint: its name.
        family: its family.
        cases: how many cases the questions are about.
        kinds: how many questions were run, by kind.
        alarms: each question that failed, with the reason.
    """

    checkpoint: str
    family: str
    cases: int
    kinds: Mapping[str, int]
    alarms: Mapping[str, str]

    @property
    def count(self) -> int:
        """How many questions were run."""
        return sum(self.kinds.values())


def choose_sets(found: list[tuple[str, Manifest]]) -> dict[str, Manifest]:
    """Return the first golden set of each family that FMS passes, by the checkpoint's name."""
    chosen: dict[str, tuple[str, Manifest]] = {}
    for name, manifest in found:
        if name not in FINDINGS or name in REPAIRS or name == _IN_PART:
            chosen.setdefault(manifest.checkpoint.family, (name, manifest))
    return dict(chosen.values())


def run_questions(name: str, manifest: Manifest, out: Path, count: int) -> Asked:
    """Check one golden set with derived questions, in a process of its own.

    Each kind gets an equal share of the questions. If some kinds have too few of them, more are
    drawn, until there are `count` or no more.
    """
    sys.path.insert(0, str(CHECKOUT))
    logging.disable(logging.WARNING)  # FMS's remarks on tied heads
    own = name == "tiny-idefics3"
    request = CheckRequest(
        ROOT / "goldens" if own else out / "goldens",
        candidate=REPAIRS.get(name, "fms"),
        checkpoint=None if own else str(out / "checkpoints" / name),
        seed=0,
    )
    results = check(request, Progress()).results
    wrong = {result.case for result in results if result.verdict in (Verdict.FAIL, Verdict.ERROR)}
    if wrong and name != _IN_PART:
        raise ValueError(f"FMS is wrong about {', '.join(sorted(wrong))} of {name}")
    cases = [case.name for case in manifest.cases if case.name not in wrong]
    request = replace(request, case=cases, explore=count)
    before, explored = -1, _explore(request)
    while before < _ran(explored) < count:
        before = _ran(explored)
        request = replace(request, explore=2 * (request.explore or count))
        explored = _explore(request)
    return Asked(
        name,
        manifest.checkpoint.family,
        len(cases),
        {kind.kind: _ran([kind]) for kind in explored if _ran([kind])},
        {k.failure.tensor: k.failure.reason for k in explored if k.failure},
    )


def _explore(request: CheckRequest) -> tuple[ExploredKind, ...]:
    report = check(request, Progress())
    assert report.exploration is not None
    return report.exploration.kinds


def _ran(kinds: Iterable[ExploredKind]) -> int:
    """Return how many questions were run, not skipped."""
    results = [result for kind in kinds for result in kind.results]
    return sum(result.verdict is not Verdict.SKIP for result in results)


def section(found: list[Asked], count: int) -> str:
    """Return the section of the page."""
    rows = []
    for one in sorted(found, key=lambda one: one.family):
        kinds = ", ".join(f"{kind} {number}" for kind, number in one.kinds.items())
        names = ", ".join(f"`{question}`: {why}" for question, why in one.alarms.items())
        rows.append((one.family, one.checkpoint, one.cases, one.count, kinds, names or 0))
    total, alarms = sum(one.count for one in found), sum(len(one.alarms) for one in found)
    lines = [
        QUESTIONS,
        "",
        f"`make questions` writes this section: up to {count:,} derived questions on one golden "
        "set of each family, and which of them a right port fails. FMS is the tests' checkout: "
        "1.13.1 without its fault in prompts of as many tokens as there are key/value heads. "
        "mistral3 has only the cases that FMS passes, with at most one image. Text encoders allow "
        "only other padding and batches; an image encoder, other orders of its tiles.",
        "",
        f"{alarms} false alarms in {total:,} questions ({bound(alarms, total)} at 95 %).",
        "",
        *table_lines(("family", "checkpoint", "cases", "questions", "kinds", "false alarms"), rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the section."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--out", type=Path, default=Path("build/questions"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    kept = out / KEPT
    found = msgspec.json.decode(kept.read_bytes(), type=list[Asked]) if kept.exists() else []
    ((_, embedded),) = recorded(ROOT)
    sets = choose_sets([("tiny-idefics3", embedded), *recorded(out)])
    done = {one.checkpoint for one in found}
    jobs = {
        name: partial(run_questions, name, manifest, out, arguments.count)
        for name, manifest in sets.items()
        if name not in done and not arguments.report
    }
    for name, result in run_forked(jobs, workers=arguments.workers, seconds=_SECONDS):
        if isinstance(result, Crash):
            print(f"{name}: {result.why}", flush=True)
            continue
        found.append(result)
        kept.write_bytes(msgspec.json.encode(found))
        print(f"{name}: {result.count} questions, {len(result.alarms)} alarms", flush=True)
    replace_part(arguments.docs, section(found, arguments.count))


if __name__ == "__main__":
    main()
