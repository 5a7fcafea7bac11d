"""Check releases of FMS, and its main branch, against every family's golden set.

    .venv-check/bin/python -m tests.families.versions --fms-repo CLONE [--out build/families]

The golden sets come from tests/families/record.py. The releases come from PyPI, once. The table of
what passes becomes a part of docs/families.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

# FMS imports these, in each forked process anew if they are not here already.
import torch._dynamo
import torch.distributed.checkpoint  # noqa: F401

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.candidates.fms.importing import import_fms
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check
from snapshot_tool.families import FAMILIES
from snapshot_tool.reports.json import run_to_json
from tests.families.findings import FINDINGS, REPAIRS
from tests.families.own_loading import install
from tests.families.table import RELEASES, ROOT, recorded, replace_part
from tests.mutants.forked import Crash, run_forked

T = TypeVar("T")

LACKS = "-"
REPAIRED = " (repaired)"
_SEES_PADDING = "FMS's pad_input_ids lets tokens attend to padding"
_PADDING = (
    "  FMS fixed this in 32bfbc89. With the golden sets of llama and roberta, whose pad token is "
    "1, that commit passes, and its parent 61b614ec fails only for the three prompts with padding "
    "on the left."
)
VERSIONS = ("1.7.0", "1.9.0", "1.11.2", "1.12.1", "1.13.1")


@dataclass(frozen=True, slots=True)
class Release:
    """An FMS to check: its name in the table, its folder, and the architectures that it has."""

    name: str
    folder: Path
    architectures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check found: a cell of the table, what the report notes of FMS, why none ran."""

    cell: str
    notes: tuple[str, ...] = ()
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether FMS passed, or does not have the family."""
        return self.cell in ("pass", LACKS)


def lay_out(repository: Path, commit: str, folder: Path) -> Path:
    """Write the package of FMS at a commit into a folder, if it is not there yet."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        archive = git(repository, "archive", commit, "fms")
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(part, filter="data")
        part.rename(folder)
    return folder


def git(repository: Path, *arguments: str) -> bytes:
    """Return what git writes."""
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def find_release(name: str, folder: Path) -> Release:
    """Return a release with the architectures that it has; it stays imported in this process."""
    import_fms(folder)
    from fms import models

    return Release(name, folder, tuple(models.list_models()))


def run_apart(jobs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Run jobs in forked processes, each of which imports an FMS of its own.

    Exits if one of them ends without a result.
    """
    results: dict[str, T] = {}
    for name, result in run_forked(jobs, workers=os.cpu_count() or 1, seconds=600):
        if isinstance(result, Crash):
            sys.exit(f"{name}: {result.why}")
        results[name] = result
        print(f"{len(results)} of {len(jobs)}: {name}", flush=True)
    return results


def check_release(release: Release, row: str, family: str, out: Path) -> Outcome:
    """Check one golden set with one release, which stays imported in this process.

    row: the checkpoint's name, with REPAIRED after it if a repair is to load it.
    """
    if FAMILIES[family].fms.architecture not in release.architectures:
        return Outcome(LACKS)
    name = row.removesuffix(REPAIRED)
    candidate = "fms" if row == name else REPAIRS[name]
    report, problem = check_folder(release.folder, name, out, candidate=candidate)
    if report is None:
        return Outcome("**not loaded**", problem=problem)
    return Outcome(failure_cell(report), tuple(report["environment"]["candidate"]["notes"]))


def check_folder(fms: Path, name: str, out: Path, *, candidate: str = "fms") -> tuple[Any, str]:
    """Check one golden set with the FMS in a folder, which stays imported in this process.

    Returns the report, or None and why FMS could not be checked.
    """
    if candidate != "fms":
        sys.path.insert(0, str(fms))
    request = CheckRequest(
        out / "goldens",
        candidate=candidate,
        fms_path=fms if candidate == "fms" else None,
        checkpoint=str(out / "checkpoints" / name),
    )
    try:
        return json.loads(run_to_json(check(request, Progress()))), ""
    except SnapError as error:
        return None, error.problem


def failure_cell(report: Any) -> str:
    """Return the verdict; of a failure its first phase, its share of the cases, its module."""
    if report["verdict"] == "pass":
        return "pass"
    first = report["first_divergence"]
    if first is None:
        return "**weights**"
    own = [result for result in report["results"] if result["phase"] == first["phase"]]
    failed = {result["case"] for result in own if result["verdict"] in ("fail", "error")}
    share = f"**{first['phase']}** {len(failed)}/{len({result['case'] for result in own})}"
    return f"{share} `{first['module']}`" if first.get("module") else share


def check_releases(
    releases: Sequence[Release], families: Mapping[str, str], out: Path
) -> dict[str, list[Outcome]]:
    """Check golden sets with releases; return the outcomes in their order, by row.

    families: the family of each row, see check_release.
    """
    checks = {
        f"{row} {release.name}": partial(check_release, release, row, family, out)
        for row, family in families.items()
        for release in releases
    }
    done = run_apart(checks)
    return {row: [done[f"{row} {release.name}"] for release in releases] for row in families}


def section(releases: Sequence[Release], rows: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the part of the page: the table, and what is known of each failure."""
    lines = [
        RELEASES,
        "",
        "`make versions` writes this part. It checks the golden sets of the first table on "
        "releases of ibm-fms from PyPI and on FMS's main branch. A failure has the first phase "
        "that differs, the number of cases, and the module that `snap` names.",
        "",
        *outcome_table([release.name for release in releases], rows),
        "",
        f"`{LACKS}`: the release does not have the family.{REPAIRED}: loaded by a repair of the "
        "tests. The reasons of the other failures are above.",
        "",
        *note_lines(releases, rows),
        *(
            [_PADDING]
            if any(_SEES_PADDING in o.notes for row in rows.values() for o in row)
            else []
        ),
    ]
    return "\n".join(lines) + "\n"


def note_lines(releases: Sequence[Release], rows: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Return what the reports note of FMS, each with the releases in which it is seen."""
    found: dict[str, dict[str, None]] = {}
    for row in rows.values():
        for release, outcome in zip(releases, row, strict=True):
            for note in outcome.notes:
                found.setdefault(note, {})[release.name] = None
    return [f"- {', '.join(names)}: {note}." for note, names in found.items()]


def unexpected(row: str, outcomes: Sequence[Outcome]) -> bool:
    """Whether a row has a failure that neither a finding nor a note of the report is about."""
    return row not in FINDINGS and not all(outcome.passed or outcome.notes for outcome in outcomes)


def argument_parser(description: str, *, docs: str) -> argparse.ArgumentParser:
    """Return the parser of a command that checks releases or commits and writes a page."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--fms-repo", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/families"))
    parser.add_argument("--versions", type=Path, default=Path("build/versions"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / docs)
    return parser


def outcome_table(columns: Sequence[str], rows: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Return a table of checkpoints by release."""
    return [
        f"| checkpoint | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        *(f"| {name} | {' | '.join(o.cell for o in row)} |" for name, row in rows.items()),
    ]


def main() -> int:
    """Check everything, write the part of the page; 1 if a failure is not known."""
    parser = argument_parser(__doc__ or "", docs="families.md")
    arguments = parser.parse_args()
    out, versions = arguments.out.resolve(), arguments.versions.resolve()
    commit = git(arguments.fms_repo, "rev-parse", "main^{commit}").decode().strip()
    print(f"FMS main is {commit}", flush=True)
    folders = {version: install(version, versions / version) for version in VERSIONS}
    main_folder = lay_out(arguments.fms_repo, commit, versions / commit[:12])
    folders[f"main ({commit[:8]})"] = main_folder
    found = run_apart({name: partial(find_release, name, of) for name, of in folders.items()})
    releases = [found[name] for name in folders]
    families = {name: manifest.checkpoint.family for name, manifest in recorded(out)}
    if not families:
        parser.error(f"{out} has no golden sets: run make families first")
    families |= {f"{name}{REPAIRED}": families[name] for name in REPAIRS if name in families}
    rows = check_releases(releases, dict(sorted(families.items())), out)
    for row, outcomes in rows.items():
        print(f"{row}: {', '.join(o.problem or o.cell for o in outcomes)}", flush=True)
    replace_part(arguments.docs, section(releases, rows))
    wrong = [row for row, outcomes in rows.items() if unexpected(row, outcomes)]
    if wrong:
        print(f"unexpected: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
