"""`snap bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from snapshot_tool.check.bisect import BisectOutcome, Trial

_INCONCLUSIVE = 3


@click.command(
    "bisect",
    short_help="Find the commit that broke a port.",
    epilog="Example: snap bisect --fms-path ./foundation-model-stack --good v1.0 --bad HEAD",
)
@click.option(
    "--fms-path",
    type=click.Path(path_type=Path),
    required=True,
    help="An FMS checkout. Its commits are run, in a worktree elsewhere; it is left as it is.",
)
@click.option("--good", required=True, help="A commit that passes.")
@click.option("--bad", required=True, help="A later commit that does not.")
@click.argument("check_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- CHECK OPTIONS]")
def bisect_command(*, fms_path: Path, good: str, bad: str, check_options: tuple[str, ...]) -> int:
    """Let git bisect search an FMS repository with snap check --quick.

    What stands after -- is given to snap check, e.g. -- --case one-image --phase vision. Commits
    that do not import are skipped. Exit code 0: found; 3: it could not be told.
    """
    from snapshot_tool.check.bisect import BisectRequest, bisect
    from snapshot_tool.cli.progress import TerminalProgress

    outcome = bisect(BisectRequest(fms_path, good, bad, check_options), TerminalProgress())
    if outcome.first_bad is None:
        return _tell_suspects(outcome)
    _tell_found(outcome.first_bad, outcome.trials)
    return 0


def _tell_found(found: Trial, trials: int) -> None:
    commit = found.commit
    click.echo(f"first bad commit, of {trials} checked: {commit.sha}")
    click.echo(f"    {commit.subject} ({commit.author}, {commit.day})")
    click.echo(f"phase   {found.phase}, case {found.case}: {found.reason}")
    click.echo(f"module  {found.module or 'none: the error arises outside of all modules'}")


def _tell_suspects(outcome: BisectOutcome) -> int:
    click.echo("it is one of these commits; those between cannot be checked:")
    for commit in outcome.suspects:
        click.echo(f"    {commit.sha} {commit.subject}")
    return _INCONCLUSIVE
