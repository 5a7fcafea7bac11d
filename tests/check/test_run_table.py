"""How a check looks on terminals of any width, with few cases and many."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict, Worst
from snapshot_tool.cli.commands import cli
from snapshot_tool.reports.json import read_run, run_to_json
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
    return replace(result, verdict=Verdict.FAIL, reason="1 differs", worst=worst, mismatched=1)


def shown(report: CheckReport, folder: Path, *, columns: int) -> list[str]:
    """Return the lines that `snap report` prints of it in a window of this width."""
    path = folder / "run.json"
    path.write_text(run_to_json(report), encoding="utf-8")
    printed = CliRunner().invoke(cli, ["report", str(path)], env={"COLUMNS": str(columns)})
    return printed.output.splitlines()


def table(lines: list[str]) -> list[str]:
    """Return the rows of the table, without its heading."""
    start = next(i for i, line in enumerate(lines) if line.startswith("case "))
    end = next(i for i, line in enumerate(lines) if line.startswith("0.5x"))
    return lines[start + 1 : end]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_long_names_give_way_and_figures_stay(
    report: CheckReport, tmp_path: Path, columns: int
) -> None:
    """No row is wider than the window, every row begins with its name, and 80 show all figures."""
    names = [f"{name}-{'very-' * 10}long" for name in ("first", "second")]
    results = tuple(result for name in names for result in renamed(report, name))
    rows = table(shown(replace(report, results=results), tmp_path, columns=columns))
    assert [row[:5] for row in rows] == ["first", "secon"]
    assert max(map(len, rows)) <= columns
    if columns >= 80:
        figures = re.compile(r"pass (?:equal|0\.\d+x)")  # which of them, rounding decides
        assert [len(figures.findall(row)) for row in rows] == [2, 2]


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
    assert lines[-1].endswith("(tensors of 501 cases); first divergence: connector, case fails")
