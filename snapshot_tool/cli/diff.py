"""`snap diff`."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.cli.options import goldens_option, write_text


@click.command(
    "diff",
    short_help="Compare two golden sets.",
    epilog="Example: snap diff goldens/a--b/0123456789ab/cpu-float32 other/a--b/…/cpu-float32",
)
@click.argument("one")
@click.argument("other")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a page.")
@goldens_option
def diff_command(
    *, one: str, other: str, json_path: Path | None, html_path: Path | None, goldens: Path
) -> int:
    """Show which recorded tensors differ between two golden sets, and by how much.

    ONE and OTHER are folders or parts of their paths below --goldens: of two revisions, two
    transformers versions, two devices. Exit code 0 where all differences are within ONE's
    tolerances, 1 where some are not.
    """
    from snapshot_tool.check.sets import find_golden, locate_drift
    from snapshot_tool.diagnose.diff import diff_folders
    from snapshot_tool.reports.diff_html import diff_to_html
    from snapshot_tool.reports.diff_json import diff_to_json
    from snapshot_tool.reports.diff_text import diff_lines
    from snapshot_tool.reports.run_text import localisation_lines

    folders = [find_golden(goldens, spec)[0] for spec in (one, other)]
    drift = diff_folders(*folders)
    if "-" not in (str(json_path), str(html_path)):
        for line in (*diff_lines(drift), *localisation_lines(locate_drift(*folders))):
            click.echo(line)
    if json_path is not None:
        write_text(json_path, diff_to_json(drift))
    if html_path is not None:
        write_text(html_path, diff_to_html(drift))
    return 1 if drift.beyond else 0
