"""`snap push` and `snap pull`."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.cli.options import goldens_option

remote_argument = click.argument("remote", required=False)
only_option = click.option(
    "--only",
    default="",
    metavar="TEXT",
    help="Only sets with this in owner/name/revision/device-dtype.",
)


@click.command(
    "push",
    short_help="Send golden sets to a remote.",
    epilog="Example: snap push hf://datasets/owner/goldens",
)
@remote_argument
@only_option
@click.option("--again", is_flag=True, help="Send also the files that the remote has.")
@goldens_option
def push_command(*, remote: str | None, only: str, again: bool, goldens: Path) -> int:
    """Send what the remote lacks of the golden sets here, and write goldens.lock.

    REMOTE is hf://datasets/OWNER/NAME, s3://BUCKET/PREFIX or file:///FOLDER; by default the one in
    goldens.lock, which lies beside the goldens folder. Commit that file: snap pull reads it.
    """
    from snapshot_tool.cli.progress import TerminalProgress
    from snapshot_tool.goldens.lock import lock_path
    from snapshot_tool.goldens.push import PushRequest, push

    shared = push(PushRequest(goldens, remote, only, again), TerminalProgress())
    for item in shared.sets:
        word = "pushed" if item in shared.moved else "same"
        click.echo(f"{word:<8}{item.title}")
    click.echo(f"{shared.sent / 1e6:.1f} MB sent to {shared.remote}")
    click.echo(f"{lock_path(goldens)} says what lies there: keep it in git")
    return 0


@click.command("pull", short_help="Fetch golden sets from a remote.", epilog="Example: snap pull")
@remote_argument
@only_option
@click.option("--replace", is_flag=True, help="Replace a set that was recorded here, too.")
@goldens_option
def pull_command(*, remote: str | None, only: str, replace: bool, goldens: Path) -> int:
    """Fetch what is missing here of the golden sets that goldens.lock names.

    REMOTE is by default the one in goldens.lock. Every byte is compared with the digests there:
    other bytes are refused with exit code 3, and nothing is put in place.
    """
    from snapshot_tool.cli.progress import TerminalProgress
    from snapshot_tool.goldens.pull import PullRequest, pull

    shared = pull(PullRequest(goldens, remote, only, replace), TerminalProgress())
    for item in shared.sets:
        word = "pulled" if item in shared.moved else "here"
        click.echo(f"{word:<8}{item.title}")
    click.echo(f"{shared.sent / 1e6:.1f} MB fetched from {shared.remote}")
    return 0
