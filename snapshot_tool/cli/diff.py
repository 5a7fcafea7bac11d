"""`snap diff`."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.cli.options import goldens_option

_SHOWN = 20


@click.command(
    "diff",
    short_help="Compare two golden sets.",
    epilog="Example: snap diff goldens/a--b/0123456789ab/cpu-float32 other/a--b/…/cpu-float32",
)
@click.argument("one")
@click.argument("other")
@goldens_option
def diff_command(*, one: str, other: str, goldens: Path) -> int:
    """Show which recorded tensors differ between two golden sets, and by how much.

    ONE and OTHER are folders or parts of their paths below --goldens. Exit code 0 where all
    differences are within ONE's tolerances, 1 where some are not.
    """
    from snapshot_tool.core.results import Verdict
    from snapshot_tool.drift import describe_drift, diff_folders
    from snapshot_tool.workflows.goldens import find_golden

    folders = [find_golden(goldens, spec)[0] for spec in (one, other)]
    first, second, drifts = diff_folders(*folders)
    click.echo(f"one    {first.manifest.title}  {first.folder}")
    click.echo(f"other  {second.manifest.title}  {second.folder}")
    if not drifts:
        click.echo("the same: every tensor has the same bytes")
        return 0
    for line in describe_drift(drifts):
        click.echo(line)
    beyond = [drift for drift in drifts if drift.verdict is not Verdict.PASS]
    for drift in beyond[:_SHOWN]:
        click.echo(f"    {drift.part} / {drift.case} / {drift.tensor}: {drift.reason}")
    if len(beyond) > _SHOWN:
        click.echo(f"    … and {len(beyond) - _SHOWN} more")
    return 1 if beyond else 0
