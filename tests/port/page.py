"""docs/port-503.md, from the results of the runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("preprocessing", "vision", "connector", "forward", "generate")
TRUE_SHAPE = "## SmolVLM-256M-Instruct, with random weights"


@dataclass(frozen=True, slots=True)
class Row:
    """One commit: its reports, the suite's verdict, and failing questions with their fault."""

    sha: str
    suite: str
    report: Any
    preprocessing: str
    faults: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """The verdict of `snap check`."""
        results = self.report["results"]
        failed = {r["case"] for r in results if r["verdict"] in ("fail", "error")}
        cases = {r["case"] for r in results}
        return f"fail, {len(failed)} of {len(cases)} cases" if failed else "pass"


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has ended.

    Args:
        code: its exit code.
        out: its output, both streams.
        seconds: its wall time.
        peak: its peak memory, in bytes.
    """

    code: int
    out: str
    seconds: float
    peak: int


@dataclass(frozen=True, slots=True)
class TrueShape:
    """One commit on the true shape: the report, and the processes of snap and of the suite."""

    sha: str
    report: Any
    process: Process
    suite: Process | None

    def cells(self) -> list[str]:
        """Return its row of the table."""
        cases = len({r["case"] for r in self.report["results"]})
        ratios = "-"
        if self.suite:
            seconds, peak = self.suite.seconds, self.suite.peak
            ratios = f"{self.process.seconds / seconds:.2f} and {self.process.peak / peak:.2f}"
            ratios += f" of {seconds:.0f} s and {peak / 2**30:.2f} GiB"
        return [
            self.sha,
            f"{self.report['verdict']}, {cases} cases",
            *(_used(self.report, phase) for phase in PHASES),
            f"{self.process.seconds:.0f} s",
            f"{self.process.peak / 2**30:.2f} GiB",
            ratios,
        ]


def _used(report: Any, phase: str) -> str:
    """Return the greatest share of its tolerance that a phase used, or its verdict."""
    results = [r for r in report["results"] if r["phase"] == phase]
    verdicts = {r["verdict"] for r in results}
    if verdicts != {"pass"}:
        return ", ".join(sorted(verdicts))
    ratios = [
        abs(float(w["actual"]) - float(w["expected"])) / allowed
        for r in results
        if (w := r["worst"]) and (allowed := r["atol"] + r["rtol"] * abs(float(w["expected"])))
    ]
    return f"{max(ratios):.2g}" if any(ratios) else "equal"


def write(path: Path, rows: Sequence[Row], found: Sequence[TrueShape]) -> None:
    """Write the page; without results of the true shape, keep the part about it."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    part = "\n" + old[old.index(TRUE_SHAPE) :] if TRUE_SHAPE in old else ""
    if found:
        header = ["commit", "verdict", *PHASES, "time", "memory", "of the suite's"]
        part = _TRUE_SHAPE + _table(header, [row.cells() for row in found])
    commits = [_commit(row) for row in rows]
    header = ["commit", "suite", "snap", "first wrong phase", "module", "preprocessing"]
    text = _INTRODUCTION + _table(header, commits)
    text += _QUESTIONS + _table(["kind", "commits", "fault"], _questions(rows)) + part
    path.write_text(text, encoding="utf-8")


def _commit(row: Row) -> list[str]:
    first = row.report["first_divergence"] or {}
    suite = re.sub(r"\s+", " ", row.suite).replace("|", "\\|")[:80]
    place = first.get("place") or "-"
    if module := first.get("candidate_module"):
        place += f" ({module})"
    return [row.sha, suite, row.verdict, first.get("phase") or "-", place, row.preprocessing]


def _questions(rows: Sequence[Row]) -> list[list[str]]:
    """Return each kind of failing question with its fault and the commits that have it."""
    commits: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for kind, fault in row.faults.items():
            commits.setdefault((kind, fault), []).append(row.sha)
    return [
        [kind, "all" if len(shas) == len(rows) else ", ".join(shas), fault]
        for (kind, fault), shas in commits.items()
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_INTRODUCTION = """\
# FMS's own idefics3: pull request 503

`make port FMS_REPO=<clone of FMS> SUITE=<clone of the parity suite>` writes this page. It checks \
every commit of foundation-model-stack's pull request 503 that changes idefics3 against the \
committed golden set, in the environment without transformers. The pull request's preprocessing \
uses Hugging Face's processor, so it is checked in the environment with transformers. The parity \
suite runs on the same checkpoint. The command fails if a verdict is not the expected \
one, or if the interface of the tests' checkout differs from that of the pull request's head.

"""
_QUESTIONS = """
The suite has no padded prompt, so 08a7f5b2 passes it. From 7ee2249f on, forward returns a tensor, \
but the suite expects a mapping. Before 2603441a, preprocessing fails for images in the modes \
RGBA, L, 1 and CMYK (examined at cff04250).

## Derived questions that fail
These fail with `--explore 200`. Commits before 7ee2249f skip `split`: their forward takes no \
position ids, so a second part of a prompt cannot be added to the cache.

"""
_TRUE_SHAPE = f"""
{TRUE_SHAPE}
`make port … SMOLVLM=DIR` writes this part. DIR has the published configuration, tokenizer and \
processor, and random weights with the published names, shapes and dtype. The golden set has two \
fixed cases and three variants. A figure is the greatest share of its tolerance that a phase used. \
Time and memory are those of a process that checks the two fixed cases, which the suite runs as \
well. The suite runs at cff04250, since it cannot read the output of later commits.

"""
