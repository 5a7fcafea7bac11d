"""`make history`: check the commits of FMS that mend a fault, and the commits before them.

    .venv-check/bin/python -m tests.history.run --fms-repo CLONE [--out build/families]

Golden sets come from tests/families/record.py, commits from fixes.csv, releases from tags. What the
rules of other projects find is written to rules.json, for docs/detection.md.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from tests.check.test_torchrun import launch, said
from tests.families import versions
from tests.families.findings import REPAIRS
from tests.families.table import recorded
from tests.families.versions import (
    LACKS,
    REPAIRED,
    argument_parser,
    check_folder,
    check_releases,
    failure_cell,
    find_release,
    git,
    lay_out,
    outcome_table,
    run_apart,
)
from tests.history.rules import Trial, rules_that_fail_on, write_trials
from tests.mutants.report import interval

# Tags of FMS before those that docs/families.md is about.
RELEASES = ("v0.0.8", "v1.0.0", "v1.2.0", "v1.4.0", "v1.5.0", "v1.6.0")
PASS, REFUSED = "pass", "refused"
_NOT_DECLARED = """\
Commits whose effect these checks cannot show: for GPUs, quantised weights, training, tests, \
types, batches of images and Spyre's paged cache; and all before August 2024, which import triton \
or use functions that torch no longer has."""


@dataclass(frozen=True, slots=True)
class Fix:
    """A commit of FMS that mends a fault of its first parent: a row of fixes.csv.

    Args:
        commit, checkpoint: its first digits; one of tests/families/record.py.
        ranks: processes of tensor parallelism.
        wrong: the fault.
        place: pattern of its place, from the diff: module, weight, or what fails in loading.
        left: another fault, with which the commit itself still differs; "" if it passes.
        missed: why the parent passes, or another place is named; "" if its own is named.
        other: the commit in this file that mends the fault that is named instead, or "".
    """

    commit: str
    checkpoint: str
    ranks: int
    wrong: str
    place: str
    left: str
    missed: str
    other: str = ""


def read_fixes() -> list[Fix]:
    """Return the declared fixes, in the order of the file."""
    with (Path(__file__).parent / "fixes.csv").open(encoding="utf-8", newline="") as file:
        return [msgspec.convert(row, Fix, strict=False) for row in csv.DictReader(file)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check says: a cell of the table, what it names, how many tensors differ.

    `rules` are the rules of other projects that fail; None if they cannot be tried.
    """

    cell: str
    said: str = ""
    failures: int = 0
    rules: tuple[str, ...] | None = field(default=None, compare=False)

    @property
    def failed(self) -> bool:
        """Whether FMS was loaded and differs."""
        return self.cell not in (PASS, REFUSED)


@dataclass(frozen=True, slots=True)
class Row:
    """A fix, with what was found before it and with it."""

    fix: Fix
    date: str
    before: Outcome
    after: Outcome

    @property
    def named(self) -> bool:
        """Whether the fault's place is named before the fix."""
        return re.search(self.fix.place, self.before.said) is not None

    @property
    def found(self) -> bool:
        """Whether the parent fails, or is refused for this fault and no other reason."""
        return self.before.failed or (self.before.cell == REFUSED and self.named)

    @property
    def other_fault(self) -> bool:
        """Whether the fix differs by another fault, which is declared, and not by its own.

        It is its own if the parent shows it, and the result is the same.
        """
        same = self.named and self.after == self.before
        return bool(self.fix.left) and self.after.cell != PASS and not same


def check_commit(fms: Path, fix: Fix, out: Path) -> Outcome:
    """Check the checkpoint of a fix with the FMS in a folder, which stays imported."""
    if fix.ranks > 1:
        return _outcome(*_check_split(fms, fix, out), fms, out)
    spec = REPAIRS.get(fix.checkpoint, "fms")
    outcome = _outcome(*check_folder(fms, fix.checkpoint, out, candidate=spec), fms, out)
    return replace(outcome, rules=rules_that_fail_on(fms, fix.checkpoint, out, spec=spec))


def _outcome(report: Any, problem: str, fms: Path, out: Path) -> Outcome:
    if report is None:
        return Outcome(REFUSED, problem.replace(str(fms), "FMS").replace(f"{out}/", ""))
    if report["verdict"] == PASS:
        return Outcome(PASS)
    failures = sum(result["verdict"] in ("fail", "error") for result in report["results"])
    return Outcome(failure_cell(report), _said(report), failures)


def _check_split(fms: Path, fix: Fix, out: Path) -> tuple[Any, str]:
    """Check with tensor parallelism, by torchrun; return what check_folder does."""
    where = ("--goldens", out / "goldens", "--checkpoint", out / "checkpoints" / fix.checkpoint)
    with TemporaryDirectory() as folder:
        run = launch(Path(folder), "--fms-path", fms, *where)
    return run.report, "" if run.report else said(run)[-1].removeprefix("snap: ")


def _said(report: Any) -> str:
    """Return what a report names: the module, the weights that differ or are unset, an error."""
    weights, first = report["weights"], report["first_divergence"]
    named = [weight["name"] for weight in weights["differing"]] + weights["unset"]
    if first:
        named += [first["module"] or first["place"] or "", first["reason"]]
    return "; ".join(named)


def check_fixes(repository: Path, fixes: Sequence[Fix], out: Path, folder: Path) -> list[Row]:
    """Check each fix and its first parent; the same sources are checked once for a checkpoint."""
    jobs: dict[str, Callable[[], Outcome]] = {}
    pairs = []
    for fix in fixes:
        pair = []
        for commit in (f"{fix.commit}^", fix.commit):
            tree = git(repository, "rev-parse", f"{commit}:fms").decode().strip()[:12]
            fms = lay_out(repository, commit, folder / tree)
            job = f"{tree} {fix.checkpoint} {fix.ranks}"
            jobs[job] = partial(check_commit, fms, fix, out)
            pair.append(job)
        pairs.append(pair)
    found = run_apart(jobs)
    rows = []
    for fix, (before, after) in zip(fixes, pairs, strict=True):
        date = git(repository, "show", "-s", "--format=%as", fix.commit).decode().strip()
        rows.append(Row(fix, date, found[before], found[after]))
        print(f"{fix.commit} {fix.checkpoint}: {_cells(rows[-1])}", flush=True)
    return rows


def _cells(row: Row) -> str:
    before = row.before.cell if row.before.failed or row.found else f"**{row.before.cell}**"
    named = "yes" if row.named else "**no**"
    return f"{before} | {named if row.found else '-'} | {row.after.cell}"


def check_old_releases(
    repository: Path, families: Mapping[str, str], out: Path, folder: Path
) -> dict[str, list[versions.Outcome]]:
    """Check golden sets with RELEASES; return an outcome for each, by row. See check_releases."""
    finds = {
        tag: partial(find_release, tag, lay_out(repository, tag, folder / tag)) for tag in RELEASES
    }
    found = run_apart(finds)
    return check_releases([found[tag] for tag in RELEASES], families, out)


def trials_of(rows: Sequence[Row]) -> list[Trial]:
    """Return what the rules of other projects find, of the fixes that they can be tried on.

    Not of one whose parent is refused for another reason than its fault.
    """
    return [
        Trial(
            row.fix.commit,
            row.found,
            row.found and row.named,
            row.after.cell == PASS,
            row.before.rules,
            row.after.rules,
        )
        for row in rows
        if row.before.rules is not None and row.after.rules is not None
        if row.found or row.before.cell != REFUSED
    ]


def page(rows: Sequence[Row], releases: Mapping[str, Sequence[versions.Outcome]]) -> str:
    """Return docs/history.md."""
    found, mended = [row for row in rows if row.found], [r for r in rows if r.after.cell == PASS]
    named = [row for row in found if row.named]
    places = {row.fix.commit: row.fix.place for row in rows}
    instead = [
        row
        for row in found
        if not row.named and row.fix.other and re.search(places[row.fix.other], row.before.said)
    ]
    other = [row for row in rows if row.other_fault]
    wrongly = len(rows) - len(mended) - len(other)
    lines = [
        "# FMS's history\n",
        f"`make history` writes this page. tests/history/fixes.csv declares {len(rows)} commits of "
        "FMS that mend a fault, each with the place of the fault, from its diff. Each commit and "
        "its first parent are checked with a tiny checkpoint of the family. The intervals are "
        "Wilson's, at 95 %.",
        "",
        f"- {_share(len(found), len(rows))} parents fail or are refused for the fault: "
        f"{sum(row.before.failed for row in found)} fail, "
        f"{sum(not row.before.failed for row in found)} are refused.",
        f"- {_share(len(named), len(found))} of those are named right. Of the others, "
        f"{len(instead)} are named by another fault of the same parent, which another commit "
        "below mends.",
        f"- {_share(wrongly, len(rows))} fixes differ by what they mend: {len(mended)} pass, "
        f"{len(other)} differ by another fault of FMS, named below.",
        "",
        "A failure has the first phase that differs, the number of cases, and the module that "
        "`snap` names. Ranks: processes of tensor parallelism.",
        "",
        "| commit | date | checkpoint | ranks | wrong before it | parent | named right | fix |",
        f"{'| --- ' * 8}|",
        *(
            f"| {row.fix.commit} | {row.date} | {row.fix.checkpoint} | {row.fix.ranks} "
            f"| {row.fix.wrong} | {_cells(row)} |"
            for row in rows
        ),
        "\n## Missed, or named otherwise\n",
        *(
            f"- **{row.fix.commit}**: {row.fix.missed or 'not looked into yet'}. `snap` says: "
            f"`{(row.before.said or row.before.cell)[:200]}`"
            for row in rows
            if not (row.found and row.named)
        ),
        "\n## What the fixes leave\n",
        *(f"- **{row.fix.commit}**: {row.fix.left}." for row in other),
        "\n## Releases\n",
        "The same checkpoints with releases, from the clone's tags. Newer ones are in "
        "[families.md](families.md#fmss-releases).",
        "",
        *outcome_table(RELEASES, releases),
        "",
        f"`{LACKS}`: the release does not have the family.{REPAIRED}: loaded by a repair of the "
        "tests, since FMS's adapter does not know the names. Why others are not loaded:\n",
        *(
            f"- **{name}**: `{problem}`"
            for name, outcomes in releases.items()
            for problem in dict.fromkeys(o.problem for o in outcomes if o.problem)
        ),
        "\n## Not declared\n",
        _NOT_DECLARED,
    ]
    return "\n".join(lines) + "\n"


def _share(some: int, of: int) -> str:
    return f"{some} of {of} ({interval(some, of)})"


def main() -> int:
    """Check everything and write the page; 1 if a miss or a failing fix has no reason."""
    parser = argument_parser(__doc__ or "", docs="history.md")
    arguments = parser.parse_args()
    out, folder = arguments.out.resolve(), arguments.versions.resolve()
    fixes = read_fixes()
    families = {
        f"{name}{REPAIRED}" if name in REPAIRS else name: manifest.checkpoint.family
        for name, manifest in recorded(out)
        if name in {fix.checkpoint for fix in fixes}
    }
    has = {row.removesuffix(REPAIRED) for row in families}
    if missing := {fix.checkpoint for fix in fixes} - has:
        parser.error(f"{out} lacks {', '.join(sorted(missing))}: run make families first")
    rows = check_fixes(arguments.fms_repo, fixes, out, folder)
    write_trials(trials_of(rows))
    releases = check_old_releases(arguments.fms_repo, families, out, folder)
    text = page(rows, releases).replace(f"{out}/", "").replace(f"{folder}/", "")
    arguments.docs.write_text(text, encoding="utf-8")
    unexplained = [
        row.fix.commit
        for row in rows
        if not ((row.found and row.named) or row.fix.missed)
        or not (row.after.cell == PASS or row.other_fault)
    ]
    print(f"unexplained: {', '.join(unexplained) or 'none'}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
