"""How a check looks on terminals of any width, with few cases and many."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from snapshot_tool.base.errors import Place
from snapshot_tool.base.protocol import PHASES
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict, Worst
from snapshot_tool.cli.commands import cli
from snapshot_tool.reports.json import read_run, run_to_json
from snapshot_tool.reports.markdown import annotation_lines, run_to_markdown
from tests.conftest import CHECKOUT, Snap


@pytest.fixture(scope="module")
def report(snap: Snap, tmp_path_factory: pytest.TempPathFactory) -> CheckReport:
    """Check one case and read the run back."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    options = ("--case", "one-image", "--phase", "connector", "--phase", "forward")
    assert snap("check", "--fms-path", CHECKOUT, *options, "--json", path).code == 0
    return read_run(path)


def renamed(report: CheckReport, name: str, *, excess: float = 0) -> list[Result]:
    """Return the results of the one case under another name; with an excess it fails by that."""
    results = [replace(result, case=name) for result in report.results]
    return [spoil(result, excess) for result in results] if excess else results


def spoil(result: Result, excess: float) -> Result:
    """Return a failure whose worst element is so many tolerances off."""
    assert result.atol is not None
    worst = Worst((0,), 0.0, result.atol * excess)
    failed = replace(result, verdict=Verdict.FAIL, reason="1 differs", worst=worst, mismatched=1)
    return replace(failed, tolerance_used=excess)


def shown(
    report: CheckReport, folder: Path, *options: str, columns: int | None = None
) -> list[str]:
    """Return the lines that `snap report` prints of it in a window of this width, or in a pipe."""
    path = folder / "run.json"
    path.write_text(run_to_json(report), encoding="utf-8")
    environment = {"COLUMNS": str(columns) if columns else None}
    printed = CliRunner().invoke(cli, ["report", str(path), *options], env=environment)
    return printed.output.splitlines()


def table(lines: list[str]) -> list[str]:
    """Return the rows of the table, without its heading."""
    start = next(i for i, line in enumerate(lines) if line.startswith("case "))
    end = next(i for i, line in enumerate(lines) if line.startswith("0.5x"))
    return lines[start + 1 : end]


@pytest.mark.parametrize("columns", [40, 50, 60, 72, 80, 120])
def test_no_name_and_no_column_goes_in_any_window(
    report: CheckReport, tmp_path: Path, columns: int
) -> None:
    """Five phases fit into 40 columns; figures are there from 80 on, whole headings from 72."""
    one, *_ = report.results
    results = [
        replace(one, case=case, phase=phase) for case in ("one-image", "two-images")
        for phase in PHASES
    ]  # fmt: skip
    lines = shown(replace(report, results=tuple(results)), tmp_path, columns=columns)
    heading = next(line for line in lines if line.startswith("case "))
    assert heading.split() == ["case", *(p if columns >= 72 else p[:3] for p in PHASES)]
    rows = table(lines)
    assert [row.split()[0] for row in rows] == ["one-image", "two-images"]
    assert [row.count("pass") for row in rows] == [5, 5]
    assert max(map(len, [heading, *rows])) <= columns
    if columns >= 80:
        figures = re.compile(r"pass (?:equal|0\.\d+x)")  # which of them, rounding decides
        assert [len(figures.findall(row)) for row in rows] == [5, 5]


def test_long_names_stay_whole_in_a_pipe(report: CheckReport, tmp_path: Path) -> None:
    """No name is cut, however long."""
    name = f"{'very-' * 30}long"
    (row,) = table(shown(replace(report, results=tuple(renamed(report, name))), tmp_path))
    assert row.startswith(f"{name}  pass")


def test_each_phase_shows_its_worst_failure_and_verbose_all(
    report: CheckReport, tmp_path: Path
) -> None:
    """At most ten lines; the last line says phase and cases."""
    results = [r for n in range(1, 30) for r in renamed(report, f"case-{n}", excess=n)]
    spoilt = replace(report, results=tuple(results))
    lines = shown(spoilt, tmp_path)
    failures = [line for line in lines[:-1] if line.startswith("FAIL ")]
    assert [line.split()[1:4] for line in failures] == [
        ["connector", "/", "case-29"],
        ["forward", "/", "case-29"],
    ]
    assert lines[-1].startswith("FAIL connector in 29 of 29 cases")
    everything = shown(spoilt, tmp_path, "--verbose")
    assert sum(line.startswith("FAIL ") for line in everything) == len(results) + 1


def test_the_worst_cases_come_first(report: CheckReport, tmp_path: Path) -> None:
    """Failures by how far they are beyond, then the rest in the order of the run."""
    results = (
        *renamed(report, "passes-b"),
        *renamed(report, "fails", excess=2),
        *renamed(report, "passes-a"),
        *renamed(report, "fails-worst", excess=30),
    )
    lines = shown(replace(report, results=results), tmp_path, columns=80)
    assert [row.split()[0] for row in table(lines)] == [
        *("fails-worst", "fails", "passes-b", "passes-a")
    ]
    assert "fail 30x" in table(lines)[0]
    problems = [line for line in lines if line.startswith("FAIL ")]
    assert "fails-worst" in problems[0]


def test_of_many_cases_the_worst_are_shown_and_the_rest_counted(
    report: CheckReport, tmp_path: Path
) -> None:
    """Five hundred cases do not scroll the verdict away, and none is passed over in silence."""
    names = [f"variant-{number:03}" for number in range(500)]
    results = [result for name in names for result in renamed(report, name)]
    results += renamed(report, "fails", excess=3)
    lines = shown(replace(report, results=tuple(results)), tmp_path, columns=80)
    assert len(lines) < 80
    assert table(lines)[0].startswith("fails ")
    assert table(lines)[-1] == "… and 461 more cases: all passed"
    assert lines[-1] == "FAIL connector in 1 of 501 cases"


def test_what_a_report_says_stays_text_in_markdown(report: CheckReport) -> None:
    """A name with Markdown's and HTML's own signs breaks neither the table nor the page."""
    spoilt = replace(report, results=tuple(renamed(report, "a|<b>`*", excess=2)))
    text = run_to_markdown(spoilt, base="/")
    assert "<b>" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("| a"))
    assert row.count(" | ") == len(spoilt.phases)


def test_an_annotation_names_file_and_line_on_one_line(report: CheckReport) -> None:
    """Signs that end a field of GitHub's workflow commands are escaped; a pass has none."""
    assert list(annotation_lines(report)) == []
    bad = replace(
        report.results[0],
        verdict=Verdict.ERROR,
        reason="50%\nof it",
        place=Place("a,b:c.py", 3, "f"),
    )
    (line,) = annotation_lines(replace(report, results=(bad,)))
    assert line == "::error file=a%2Cb%3Ac.py,line=3::50%25%0Aof it"
