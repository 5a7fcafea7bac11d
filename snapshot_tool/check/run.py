"""A finished check, for the Python API and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.files import write_report
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, Verdict


@dataclass(frozen=True, slots=True)
class CheckRun:
    """A finished check.

    goldens: the folder of the golden sets, for prompts and images in the HTML page; None: the page
    has none.
    """

    report: CheckReport
    goldens: Path | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict of the check: "pass", "fail", "skip" or "error"."""
        return self.report.verdict

    @property
    def exit_code(self) -> int:
        """The exit code of `snap check`."""
        return self.report.exit_code

    @property
    def results(self) -> Sequence[Result]:
        """The result of each tensor, in the order of cases and phases."""
        return self.report.results

    @property
    def first_divergence(self) -> Result | None:
        """The first result, in the order of phases, that differs from the golden set."""
        return self.report.divergence

    @property
    def first_bad_module(self) -> str:
        """The reference's module in which the first divergence arises; "" if it is not known."""
        return self.report.location

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON (docs/json.md), and write it to a file if a path is given."""
        from snapshot_tool.reports.json import run_to_json

        return _written(run_to_json(self.report), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one HTML page, and write it to a file if a path is given."""
        from snapshot_tool.reports.html import find_previews, run_to_html

        previews = find_previews(self.report, self.goldens) if self.goldens else {}
        return _written(run_to_html(self.report, previews, base=str(Path.cwd())), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the report as Markdown for a summary or a comment, and write it to a file."""
        from snapshot_tool.reports.markdown import run_to_markdown

        return _written(run_to_markdown(self.report, base=str(Path.cwd())), path)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_report(Path(path), text)
    return text
