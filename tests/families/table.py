"""Check FMS against every family's golden set and write docs/families.md.

    .venv-check/bin/python -m tests.families.table [--out build/families] [--docs docs/families.md]

The golden sets come from tests/families/record.py. FMS is the installed one, as it is; of idefics3,
which it does not have, the tests' checkout.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot_tool.base.environment import package_version
from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.protocol import PHASES, Progress
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.manifest import Manifest, load_manifest
from snapshot_tool.reports.json import run_to_json
from tests.families.findings import FINDINGS, FINDINGS_AGAIN, REPAIRS
from tests.families.own_loading import (
    OwnLoading,
    check_checkout,
    check_own_loading,
    problem_lines,
)
from tests.families.record import AGAIN, REFUSED, SECONDS

ROOT = Path(__file__).parent.parent.parent
# The last parts of the page, which make questions, make versions and make real write.
QUESTIONS = "## Derived questions"
RELEASES = "## FMS's releases"
REAL = "## Real weights"


NOT_CHECKED = OwnLoading("-")


@dataclass(frozen=True, slots=True)
class Row:
    """What came out for one checkpoint; `report` is None where FMS could not load it."""

    name: str
    manifest: Manifest
    report: Any
    problem: str
    seconds: float
    repair: str = ""
    own: OwnLoading = NOT_CHECKED

    @property
    def passed(self) -> bool:
        """Whether FMS as it is passed all that was compared."""
        return bool(self.report) and self.report["verdict"] == "pass" and not self.repair

    @property
    def outcome(self) -> str:
        """The verdict on FMS as it is, in a word."""
        return str(self.report["verdict"]) if self.report else "cannot be loaded"

    @property
    def ratio(self) -> float:
        """The greatest difference of any tensor, in units of its tolerance."""
        found = [_ratio(result) for result in self.report["results"]] if self.report else []
        return max(found, default=float("nan"))

    def phases(self, verdict: str) -> list[str]:
        """Return the phases of the family with this verdict on any of its cases."""
        own = [phase.value for phase in PHASES if phase in self.manifest.tolerances]
        found = {r["phase"] for r in self.report["results"] if r["verdict"] == verdict}
        return [phase for phase in own if phase in found]


def check_set(
    name: str, manifest: Manifest, out: Path, *, candidate: str = "fms", below: str = ""
) -> Row:
    """Check one golden set, of those in `out` or in a folder there, with the installed FMS.

    Those in `out` itself are also checked as FMS loads them by itself.
    """
    began = time.perf_counter()
    request = CheckRequest(
        out / below / "goldens", candidate=candidate, checkpoint=str(out / "checkpoints" / name)
    )
    repair = "" if candidate == "fms" else candidate
    try:
        report = json.loads(run_to_json(check(request, Progress())))
        problem = ""
    except SnapError as error:
        report, problem = None, error.problem.replace(f"{ROOT}/", "")
    seconds = time.perf_counter() - began
    if below:
        return Row(name, manifest, report, problem, seconds, repair)
    own = check_own_loading(name, manifest.environment["transformers"], out, candidate=repair)
    return Row(name, manifest, report, problem, seconds, repair, own)


def check_embedded() -> Row:
    """Check the tests' FMS checkout, which another process must import."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "snapshot_tool", "check", "--fms-path", "build/fms-checkout"]
    answer = subprocess.run(
        [*command, "--json", "-"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (found,) = (load_manifest(s.folder) for s in find_goldens(ROOT / "goldens"))
    seconds = time.perf_counter() - began
    report = json.loads(answer.stdout)
    return Row("tiny-idefics3", found, report, "", seconds, own=check_checkout())


def _ratio(result: Any) -> float:
    worst = result["worst"]
    if worst is None or result["atol"] in (None, 0):
        return 0.0
    allowed: float = result["atol"] + result["rtol"] * abs(float(worst["expected"]))
    return abs(float(worst["actual"]) - float(worst["expected"])) / allowed


def table_lines(rows: list[Row], record_seconds: dict[str, float]) -> list[str]:
    """Return the table of all rows; with a column of FMS's own loading if that was checked."""
    own = any(row.own is not NOT_CHECKED for row in rows)
    head = (
        "| checkpoint | family | transformers | phases compared | cases | verdict "
        f"| worst, in tolerances |{' own loading |' * own} seconds to record, to check |"
    )
    lines = [head, "| --- " * (8 + own) + "|"]
    for row in rows:
        took = record_seconds.get(row.name)
        cells = [
            row.name,
            row.manifest.checkpoint.family,
            row.manifest.environment["transformers"],
            _compared(row),
            str(len(row.manifest.cases)),
            _verdict(row),
            "-" if row.report is None else f"{row.ratio:.2g}",
            *([row.own.cell] if own else []),
            f"{'-' if took is None else f'{took:.1f}'}, {row.seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _compared(row: Row) -> str:
    if row.report is None:
        return "none"
    skipped = row.phases("skip")
    compared = [p.value for p in PHASES if p in row.manifest.tolerances and p not in skipped]
    lacking = f" (FMS has no {', '.join(skipped)})" if skipped else ""
    return ", ".join(compared) + lacking


def _verdict(row: Row) -> str:
    if row.report is None:
        return "**FMS's own loading fails**"
    verdict = "pass" if row.report["verdict"] == "pass" else f"**{row.report['verdict']}**"
    return f"{verdict}, loaded by the repair `{row.repair}`" if row.repair else verdict


def difference_lines(rows: list[Row], findings: Mapping[str, str]) -> list[str]:
    """Return for each row that did not pass what differs, by how much, and in which module."""
    lines = []
    for row in rows:
        if row.passed or (row.repair and row.report["verdict"] == "pass"):
            continue
        lines += [f"- **{row.name}**: {findings.get(row.name, 'not examined yet')}."]
        if row.report is None:
            lines += [f"  FMS's own loading fails: `{_shortened(row.problem)}`"]
        elif row.report["verdict"] != "pass":
            lines += [f"  {_worst(row)}"]
    return lines


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]} …"


def _worst(row: Row) -> str:
    first = row.report["first_divergence"]
    if first is None:
        names = [weight["name"] for weight in row.report["weights"]["differing"]]
        return f"Weights that are not the checkpoint's: {', '.join(names)}."
    failed = [r for r in row.report["results"] if r["verdict"] in ("fail", "error")]
    cases = sorted({result["case"] for result in failed})
    figures = [r for r in failed if r["max_abs"] is not None]
    worst = max(figures, key=_ratio, default=None)
    figure = f"largest difference {float(worst['max_abs']):.3g}" if worst else first["reason"]
    module = first.get("module")
    where = (
        f"`{module}`"
        if module
        else "none (the fault is between modules, or in the generation loop)"
    )
    return (
        f"Fails first in {first['phase']}, {len(cases)} of {len(row.manifest.cases)} cases "
        f"({figure}, {row.ratio:.2g} tolerances). Module that `snap` names: {where}."
    )


def page(rows: list[Row], record_seconds: dict[str, float]) -> str:
    """Return docs/families.md."""
    passed = sorted({row.manifest.checkpoint.family for row in rows if row.passed})
    fms = package_version("ibm-fms")
    lines = [
        "# Families",
        "",
        "`make families` writes this page. It records a tiny checkpoint of each family, with "
        f"random weights, and checks it on ibm-fms {fms} from PyPI without transformers; idefics3 "
        "on the tests' FMS checkout. For new families see "
        "[adding-a-family.md](adding-a-family.md).",
        "",
        f"{len(passed)} families pass in all phases that FMS has: {', '.join(passed)}.",
        "",
        *table_lines(rows, record_seconds),
        "",
        "Encoders have no generate: forward compares their hidden states and the output of their "
        "head. Text families have no preprocessing, vision and connector. If FMS has no "
        "preprocessing, vision runs on Hugging Face's pixel values.",
        "",
        "## Where FMS differs",
        "",
        *difference_lines(rows, FINDINGS),
        "",
        "## FMS's own loading",
        "",
        "With `snap check --loading own`, FMS loads the checkpoint by "
        '`get_model("hf_pretrained")`, with transformers 4.57.6, or 5.24.0 if only that has the '
        "model. The other columns use snap's mapping. A tiny checkpoint can fail although a "
        "published one passes, for example because its sizes are not multiples of 256.",
        "",
        *problem_lines([(row.name + (" (repaired)" * bool(row.repair)), row.own) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def changed_rows(rows: list[Row], again: list[Row]) -> list[Row]:
    """Return those recorded again whose verdict is not the one of the first recording."""
    before = {row.name: row.outcome for row in rows if not row.repair}
    return [row for row in again if row.outcome != before[row.name]]


def again_section(changed: list[Row], again: list[Row], refused: Mapping[str, str]) -> str:
    """Return the part on another release of transformers: the rows whose verdict changes."""
    release = again[0].manifest.environment["transformers"]
    same = len(again) - len(changed)
    lines = [
        "",
        f"## The same with transformers {release}",
        "",
        f"Recorded with that release, {same} of {len(again)} checkpoints have the verdict above. "
        "The others are:",
        "",
        *table_lines(changed, {}),
        "",
        *difference_lines(changed, FINDINGS_AGAIN),
        *(f"- **{name}** cannot be recorded with it: `{why}`" for name, why in refused.items()),
    ]
    return "\n".join(lines) + "\n"


def replace_part(path: Path, text: str) -> None:
    """Write the first part of the page, or the one that a text's heading names; keep the rest."""
    headings = ("", QUESTIONS, RELEASES, REAL)
    page = path.read_text("utf-8") if path.exists() else ""
    later = "|".join(re.escape(heading) for heading in headings if heading)
    parts = {}
    for part in (*re.split(rf"(?m)^(?={later})", page), text):
        heading = part.partition("\n")[0]
        parts[heading if heading in headings else ""] = part.strip()
    path.write_text("\n\n".join(parts[h] for h in headings if h in parts) + "\n", "utf-8")


def recorded(folder: Path) -> list[tuple[str, Manifest]]:
    """Return the golden sets below a folder, by the names of their checkpoints."""
    found = [load_manifest(s.folder) for s in find_goldens(folder / "goldens")]
    return sorted((m.checkpoint.name.removeprefix("local/"), m) for m in found)


def main() -> int:
    """Check everything, write the page and print it; return 1 for an unexpected failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/families"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "families.md")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # FMS's remarks on tied heads
    out: Path = arguments.out.resolve()
    rows = [check_embedded()]
    for name, manifest in recorded(out):
        rows.append(check_set(name, manifest, out))
        if rows[-1].name in REPAIRS:
            rows.append(check_set(rows[-1].name, manifest, out, candidate=REPAIRS[rows[-1].name]))
    seconds = json.loads((out / SECONDS).read_text("utf-8"))
    again = [
        check_set(name, manifest, out, below=AGAIN) for name, manifest in recorded(out / AGAIN)
    ]
    changed = changed_rows(rows, again)
    refused = json.loads((out / AGAIN / REFUSED).read_text("utf-8"))
    text = page(rows, seconds) + again_section(changed, again, refused)
    replace_part(arguments.docs, text)
    print(text)
    unexpected = [r.name for r in rows if not r.passed and r.name not in FINDINGS]
    unexpected += [r.name for r in changed if r.name not in FINDINGS_AGAIN]
    if unexpected:
        print(f"unexpected: {', '.join(unexpected)}", file=sys.stderr)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
