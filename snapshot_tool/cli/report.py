"""`snap report`, and the HTML file that `snap check` writes, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from snapshot_tool.cli.options import write_text

if TYPE_CHECKING:
    from snapshot_tool.base.report import CheckReport

html_option = click.option(
    "--html", "html_path", type=click.Path(path_type=Path), help="Write a report to look at."
)


@click.command(
    "report",
    short_help="Show a finished check.",
    epilog="Example: snap report run.json --html report.html --goldens goldens",
)
@click.argument("run", type=click.Path(path_type=Path))
@html_option
@click.option(
    "--goldens",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the run's golden set, whose prompts and images go into the HTML.",
)
def report_command(*, run: Path, html_path: Path | None, goldens: Path | None) -> int:
    """Show a check again from RUN, the file that `snap check --json` wrote.

    As text, or with --html as one file that opens offline in any browser. No model runs. The exit
    code is that of the check.
    """
    from snapshot_tool.reports.run_reader import read_run

    report = read_run(run)
    if html_path is None:
        from snapshot_tool.cli.drawing import draw_report

        draw_report(report, replay="snap check ...")
    else:
        write_html(html_path, report, goldens)
    return report.exit_code


def write_html(path: Path, report: CheckReport, goldens: Path | None) -> None:
    """Write the HTML report of a check, with what its golden set tells of the cases."""
    from snapshot_tool.reports.run_html import run_to_html
    from snapshot_tool.reports.saved import find_stories

    stories = find_stories(report, goldens) if goldens else {}
    write_text(path, run_to_html(report, stories, base=str(Path.cwd())))
