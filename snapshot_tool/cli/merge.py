"""`snap merge`."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.cli.options import write_text
from snapshot_tool.cli.report import html_option, write_html


@click.command(
    "merge",
    short_help="Make one report of the shards of a check.",
    epilog="Example: snap merge shard-*.json --json run.json",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@html_option
@click.option(
    "--goldens",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the run's golden set, whose prompts and images go into the HTML.",
)
def merge_command(
    *,
    runs: tuple[Path, ...],
    json_path: Path | None,
    html_path: Path | None,
    goldens: Path | None,
) -> int:
    """Make one report of RUNS, the files that `snap check --shard K/N --json` wrote.

    It is the report that one process would have made of all cases, and so is the exit code. Exit
    code 3: a shard is missing or there twice, or two are not of one check.
    """
    from snapshot_tool.check.shards import merge_reports
    from snapshot_tool.reports.run_json import run_to_json
    from snapshot_tool.reports.run_reader import read_run

    report = merge_reports([(str(run), read_run(run)) for run in runs])
    if str(json_path) != "-":
        from snapshot_tool.cli.drawing import draw_report

        draw_report(report, replay="snap check ...")
    if json_path is not None:
        write_text(json_path, run_to_json(report))
    if html_path is not None:
        write_html(html_path, report, goldens)
    return report.exit_code
