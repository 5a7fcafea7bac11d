"""`snap record`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from snapshot_tool.base.errors import UpdateDeclined, UsageError
from snapshot_tool.cli.configuration import configured_options
from snapshot_tool.cli.options import request_options
from snapshot_tool.record.request import RecordRequest

if TYPE_CHECKING:
    from snapshot_tool.diagnose.diff import Review, SetDiff


@click.command(
    "record",
    short_help="Record a golden set.",
    epilog="Example: snap record --checkpoint ./my-checkpoint --variants 12",
)
@request_options(RecordRequest)
@click.option("--yes", is_flag=True, help="Write the new version without confirmation.")
def record_command(*, yes: bool, **options: Any) -> int:
    """Run the Hugging Face reference and write its inputs and outputs as a golden set.

    This needs the record environment, which has transformers. By default, seed, variants, new
    tokens and storage are those of the set that is replaced, or of the same revision on another
    device.

    --update shows the changes before it writes. On a terminal it asks for confirmation; elsewhere
    it needs --yes and --reason. If you decline, the old set is unchanged, and --resume --update
    --yes writes the new one.
    """
    from snapshot_tool.base.environment import rank_here
    from snapshot_tool.cli.console import TerminalProgress
    from snapshot_tool.families import name_families
    from snapshot_tool.goldens.find import check_line, find_goldens
    from snapshot_tool.record.workflow import help_to_record, record
    from snapshot_tool.reports.text import remarks

    request = RecordRequest(**options)
    if options_read := configured_options(click.get_current_context()):
        click.echo(f"options: {options_read}", err=True)
    name_families(request.family)
    if rank_here():
        help_to_record(request.device)
        return 0
    if request.update and not request.reason and (yes or not is_interactive()):
        raise UsageError("--update needs --reason TEXT", "give the reason of the change")
    review = make_review(request.reason, written_unasked=yes)
    outcome = record(request, TerminalProgress(), review)
    manifest = outcome.manifest
    if not outcome.changed:
        click.echo(f"unchanged: {manifest.title}: the new recording has the same bytes")
        return 0
    size = sum(entry.size for entry in manifest.files.values())
    click.echo(f"recorded {manifest.title}")
    click.echo(f"in {outcome.location.folder}: {len(manifest.cases)} cases, {size / 1e6:.1f} MB")
    if refused := manifest.draws.refused:
        click.echo(f"{refused} drawn inputs were refused by the reference and replaced")
    for line in remarks(manifest):
        click.echo(line, err=True)
    for line in manifest.history[-1].moved:
        click.echo(f"moved: {line}")
    name = "/".join(outcome.location.folder.parts[-3:])
    several = len(find_goldens(outcome.location.root)) > 1
    chosen = ["--checkpoint", name] if several else []
    line = check_line(outcome.location.root, "--fms-path", "CHECKOUT", *chosen)
    click.echo(f"next, in the check environment: {line}")
    return 0


def is_interactive() -> bool:
    """Return whether input and output are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def make_review(reason: str, *, written_unasked: bool) -> Review:
    """Return a function that shows an update and asks for confirmation on a terminal."""
    from snapshot_tool.reports.diff import diff_lines

    def review(diff: SetDiff) -> str:
        for line in diff_lines(diff):
            click.echo(line)
        if written_unasked:
            return reason
        if not (is_interactive() and click.confirm(f"write {diff.other.title}?")):
            raise UpdateDeclined(
                f"{diff.one.title} is unchanged; the new outputs are kept",
                "write them with the same command and: --resume --update --yes --reason TEXT; "
                "--case GLOB writes only some of them",
            )
        return reason or str(click.prompt("reason"))

    return review
