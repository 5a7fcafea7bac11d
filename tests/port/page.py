"""docs/port-503.md, from what the runs gave."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PHASES = ("preprocessing", "vision", "connector", "forward", "generate")
TRUE_SHAPE = "## SmolVLM-256M-Instruct, with random weights"


class Process(Protocol):
    """A process that has ended."""

    @property
    def seconds(self) -> float:
        """Its wall time."""

    @property
    def peak(self) -> int:
        """The greatest memory that it held, in bytes."""


@dataclass(frozen=True, slots=True)
class Question:
    """The smallest question of a kind that fails, and whose fault it is."""

    kind: str
    smallest: str
    fault: str


@dataclass(frozen=True, slots=True)
class Row:
    """One commit."""

    sha: str
    suite: str
    verdict: str
    preprocessing: str
    phase: str
    place: str
    questions: tuple[Question, ...]


def row(
    sha: str, report: Any, with_transformers: Any, questions: Sequence[Question], suite: str
) -> Row:
    """Return a commit's row."""
    first = report["first_divergence"] or {}
    failed = {r["case"] for r in report["results"] if r["verdict"] in ("fail", "error")}
    verdict = f"fail, {len(failed)} of {_cases(report)} cases" if failed else "pass"
    module = first.get("candidate_module") or ""
    place = f"{first.get('place', '')}{f' ({module})' if module else ''}"
    return Row(
        sha, suite, verdict, with_transformers["verdict"], first.get("phase", ""), place,
        tuple(questions),
    )  # fmt: skip


def _cases(report: Any) -> int:
    return len({r["case"] for r in report["results"]})


@dataclass(frozen=True, slots=True)
class Figures:
    """One commit on the true shape: the worst ratio of each phase, time and memory."""

    sha: str
    verdict: str
    cases: int
    used: dict[str, str]
    time: str
    memory: str
    ratios: str


def figures(
    sha: str, report: Any, fixed: Any, finished: Process, suites: Sequence[Process]
) -> Figures:
    """Return a commit's figures; those of the fixed cases beside the suite's."""
    ratios = "-"
    if suites:
        suite = suites[0]
        ratios = f"{finished.seconds / suite.seconds:.2f} and {finished.peak / suite.peak:.2f}"
        ratios += f" of {suite.seconds:.0f} s and {suite.peak / 2**30:.2f} GiB"
    verdict = "pass" if report["verdict"] == fixed["verdict"] == "pass" else "fail"
    used = {phase: _used(report, phase) for phase in PHASES}
    return Figures(
        sha, verdict, _cases(report), used,
        f"{finished.seconds:.0f} s", f"{finished.peak / 2**30:.2f} GiB", ratios,
    )  # fmt: skip


def _used(report: Any, phase: str) -> str:
    """Return how much of its tolerance a phase used at most, or its verdict."""
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


def write(path: Path, rows: Sequence[Row], found: Sequence[Figures] | None) -> None:
    """Write the page; without figures of the true shape the part about it stays as it is."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = old[old.index(TRUE_SHAPE) :] if TRUE_SHAPE in old else ""
    text = _commits(rows) + (kept if found is None else _true_shape(found))
    path.write_text(text, encoding="utf-8")


_INTRODUCTION = """\
# FMS's own idefics3: pull request 503

Written by `make port FMS_REPO=<clone of FMS> SUITE=<clone of the parity suite>`. Every commit of \
foundation-model-stack's pull request 503 that changes idefics3 is checked against the committed \
golden set of the embedded checkpoint, in the environment without transformers; preprocessing, \
which is Hugging Face's processor there, in the one with it. The suite runs on the same \
checkpoint. The command fails if a verdict is not the expected one, or if the interface of the \
tests' checkout is not that of the pull request's head.

| commit | suite | snap | first wrong phase | module | preprocessing |
| --- | --- | --- | --- | --- | --- |
"""
_QUESTIONS = """
The suite has no padded prompt, so it passes 08a7f5b2. From 7ee2249f on, forward returns a tensor, \
which the suite indexes by name. Before 2603441a preprocessing fails for images in the modes RGBA, \
L, 1 and CMYK (looked into at cff04250).

## Derived questions that fail
`--explore 200` asks what the golden answers without having been asked. A second part of a prompt \
(`split`) cannot be put on the cache of commits before 7ee2249f, whose forward takes no position \
ids: it is skipped there.

| commit | kind | smallest | fault |
| --- | --- | --- | --- |
"""
_TRUE_SHAPE = f"""
{TRUE_SHAPE}
`make port … SMOLVLM=DIR`, where DIR holds the real configuration, tokenizer and processor with \
random weights of the real names, shapes and dtype. The golden set has two fixed cases and three \
variants. A figure is how much of its tolerance a phase used at most. Time and memory are of the \
two fixed cases, which the suite runs as well: whole processes in one run. The suite runs at \
cff04250, since it cannot read what later commits return.

"""


def _commits(rows: Sequence[Row]) -> str:
    commits = [
        f"| {r.sha} | {_cell(r.suite)} | {r.verdict} | {r.phase or '-'} | {r.place or '-'} | "
        f"{r.preprocessing} |"
        for r in rows
    ]
    questions = [
        f"| {r.sha} | {q.kind} | `{q.smallest}` | {q.fault} |" for r in rows for q in r.questions
    ]
    return "\n".join([_INTRODUCTION + "\n".join(commits), _QUESTIONS + "\n".join(questions), ""])


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")[:80]


def _true_shape(found: Sequence[Figures]) -> str:
    columns = ["commit", "verdict", *PHASES, "time", "memory", "of the suite's"]
    rows = [
        [f.sha, f"{f.verdict}, {f.cases} cases", *f.used.values(), f.time, f.memory, f.ratios]
        for f in found
    ]
    table = [columns, ["---"] * len(columns), *rows]
    return _TRUE_SHAPE + "".join(f"| {' | '.join(row)} |\n" for row in table)
