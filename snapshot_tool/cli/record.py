"""`snap record`."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.checkpoint import DEFAULT_CHECKPOINT
from snapshot_tool.cli.options import goldens_option, parse_phases, phase_option
from snapshot_tool.devices import DEVICES


@click.command(
    "record",
    short_help="Record a golden set.",
    epilog="Example: snap record --checkpoint ./my-checkpoint --variants 12",
)
@click.option(
    "--checkpoint",
    default=DEFAULT_CHECKPOINT,
    show_default=True,
    help="Hub id, or a folder with config.json and weights.",
)
@click.option(
    "--revision",
    help="Commit SHA of a hub checkpoint; a branch or tag is resolved to one. A folder's revision "
    "is computed from its files; given, it must match.",
)
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32"]), default="float32", show_default=True)
@phase_option
@click.option("--variants", type=click.IntRange(0, 10_000), help="Inputs to draw.  [default: 12]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Seed of all draws.  [default: 42]")
@click.option(
    "--max-new-tokens", type=click.IntRange(1, 100_000), help="Greedy tokens.  [default: 20]"
)
@goldens_option
@click.option("--update", is_flag=True, help="Replace a recorded set by a new version.")
@click.option("--reason", default="", help="Why; kept in the set's history.")
@click.option("--resume", is_flag=True, help="Go on with a recording that was cut short.")
@click.option("--fresh", is_flag=True, help="Throw away a recording that was cut short.")
def record_command(
    *,
    checkpoint: str,
    revision: str | None,
    device: str,
    dtype: str,
    phases: tuple[str, ...],
    variants: int | None,
    seed: int | None,
    max_new_tokens: int | None,
    goldens: Path,
    update: bool,
    reason: str,
    resume: bool,
    fresh: bool,
) -> int:
    """Run the Hugging Face reference and keep what it computes as a golden set.

    Needs the record environment: pip install 'snapshot-tool[record]'. Seed, variants and new tokens
    not given are those of the set that is replaced, or of the same revision on another device.
    """
    from snapshot_tool.cli.progress import TerminalProgress
    from snapshot_tool.workflows.record import RecordRequest, record

    request = RecordRequest(
        checkpoint=checkpoint,
        goldens=goldens,
        revision=revision,
        device=device,
        dtype=dtype,
        phases=parse_phases(phases),
        variants=variants,
        seed=seed,
        max_new_tokens=max_new_tokens,
        update=update,
        reason=reason,
        resume=resume,
        fresh=fresh,
    )
    outcome = record(request, TerminalProgress())
    manifest = outcome.manifest
    if not outcome.changed:
        click.echo(f"unchanged: {manifest.title}: the new recording has the same bytes")
        return 0
    size = sum(entry.size for entry in manifest.files.values())
    click.echo(f"recorded {manifest.title}")
    click.echo(f"in {outcome.location.folder}: {len(manifest.cases)} cases, {size / 1e6:.1f} MB")
    draws = manifest.draws
    if draws.refused:
        click.echo(f"{draws.refused} drawn inputs were refused by the reference and drawn again")
    for line in manifest.history[-1].moved:
        click.echo(f"moved: {line}")
    return 0
