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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot_tool.families import FAMILIES
from tests.families.findings import FINDINGS, REPAIRS
from tests.families.own_loading import install
from tests.families.table import RELEASES, ROOT, recorded, replace_part

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
    """Return a release with the architectures that it knows."""
    code = "import fms.models; print(*fms.models.list_models())"
    answer = _python("-c", code, fms=folder)
    answer.check_returncode()
    return Release(name, folder, tuple(answer.stdout.splitlines()[-1].split()))


def _python(*arguments: str, fms: Path) -> subprocess.CompletedProcess[str]:
    """Run this environment's Python with an FMS in place of the installed one."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(fms)},
        check=False,
        capture_output=True,
        text=True,
    )


def check_release(release: Release, row: str, family: str, out: Path) -> Outcome:
    """Check one golden set with one release.

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


def check_folder(
    fms: Path, name: str, out: Path, *, candidate: str = "fms", ranks: int = 1
) -> tuple[Any, str]:
    """Check one golden set with the FMS in a folder, in processes of its own.

    Returns the report, or None and why FMS could not be checked.
    """
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m")
    which = ["--fms-path", str(fms)] if candidate == "fms" else ["--candidate", candidate]
    where = ["--goldens", str(out / "goldens"), "--checkpoint", str(out / "checkpoints" / name)]
    answer = _python(
        *("-m", *(launcher if ranks > 1 else ()), "snapshot_tool", "check", "--json", "-"),
        *where,
        *which,
        fms=fms,
    )
    # torchrun ends with 1 where a rank ends with 3.
    if answer.stdout.startswith("{"):
        return json.loads(answer.stdout), ""
    lines = [line for line in answer.stderr.splitlines() if line.startswith("snap: ")]
    return None, lines[-1].removeprefix("snap: ") if lines else answer.stderr.strip()[-300:]


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


def section(releases: Sequence[Release], rows: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the part of the page: the table, and what is known of each failure."""
    lines = [
        RELEASES,
        "",
        "`make versions` writes this part. It checks the golden sets of the first table on "
        "releases of ibm-fms from PyPI and on FMS's main branch. A failure has the first phase "
        "that differs, the number of cases, and the module that `snap` names.",
        "",
        f"| checkpoint | {' | '.join(release.name for release in releases)} |",
        f"| --- |{' --- |' * len(releases)}",
        *(f"| {name} | {' | '.join(o.cell for o in row)} |" for name, row in rows.items()),
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


def main() -> int:
    """Check everything, write the part of the page; 1 if a failure is not known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fms-repo", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/families"))
    parser.add_argument("--versions", type=Path, default=Path("build/versions"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "families.md")
    arguments = parser.parse_args()
    out, versions = arguments.out.resolve(), arguments.versions.resolve()
    commit = git(arguments.fms_repo, "rev-parse", "main^{commit}").decode().strip()
    print(f"FMS main is {commit}", flush=True)
    releases = [find_release(v, install(v, versions / v)) for v in VERSIONS]
    main_folder = lay_out(arguments.fms_repo, commit, versions / commit[:12])
    releases.append(find_release(f"main ({commit[:8]})", main_folder))
    families = {name: manifest.checkpoint.family for name, manifest in recorded(out)}
    if not families:
        parser.error(f"{out} has no golden sets: run make families first")
    families |= {f"{name}{REPAIRED}": families[name] for name in REPAIRS if name in families}
    rows: dict[str, list[Outcome]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = {
            row: [
                pool.submit(check_release, release, row, families[row], out) for release in releases
            ]
            for row in sorted(families)
        }
        for row, running in checks.items():
            rows[row] = [check.result() for check in running]
            print(f"{row}: {', '.join(o.problem or o.cell for o in rows[row])}", flush=True)
    replace_part(arguments.docs, section(releases, rows))
    wrong = [row for row, outcomes in rows.items() if unexpected(row, outcomes)]
    if wrong:
        print(f"unexpected: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
