"""`snap record`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from snapshot_tool.base.checkpoint import DEFAULT_CHECKPOINT
from snapshot_tool.base.environment import DEVICES
from snapshot_tool.base.errors import UpdateDeclined, UsageError
from snapshot_tool.base.tolerance import ORACLE_DTYPES
from snapshot_tool.cli.options import (
    PHASE_NAMES,
    family_option,
    goldens_option,
    parse_phases,
    phase_option,
)

if TYPE_CHECKING:
    from snapshot_tool.diagnose.diff import Review, SetDiff


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
@click.option("--dtype", type=click.Choice(ORACLE_DTYPES), default="float32", show_default=True)
@phase_option
@click.option("--variants", type=click.IntRange(0, 10_000), help="Inputs to draw.  [default: 12]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Seed of all draws.  [default: 42]")
@click.option(
    "--max-new-tokens", type=click.IntRange(1, 100_000), help="Greedy tokens.  [default: 20]"
)
@click.option(
    "--oracle/--no-oracle",
    default=None,
    help="Run the reference in float64, too, and keep how far rounding puts it off.",
)
@click.option(
    "--whole-outputs",
    multiple=True,
    metavar="GLOB",
    help="Cases of which to keep every module's output whole, for --graft.",
)
@click.option(
    "--device-map",
    type=click.Choice(["auto"]),
    help="Let accelerate spread the reference over GPUs, memory and disk.",
)
@click.option(
    "--max-memory",
    multiple=True,
    metavar="DEVICE=SIZE",
    help="With --device-map: the most for a GPU or the CPU, e.g. 0=20GiB, cpu=64GiB.",
)
@click.option(
    "--storage",
    type=click.Choice(["full", "compact"]),
    help="Keep large tensors whole, or a sample, moments and signed sums of them.  [default: full]",
)
@goldens_option
@family_option
@click.option("--redraw", is_flag=True, help="Draw the variants anew, not from stored recipes.")
@click.option("--update", is_flag=True, help="Replace a recorded set by a new version.")
@click.option("--reason", default="", help="Why; kept in the set's history.")
@click.option("--yes", is_flag=True, help="Write the new version without asking.")
@click.option("--resume", is_flag=True, help="Go on with a recording that was cut short.")
@click.option("--fresh", is_flag=True, help="Throw away a recording that was cut short.")
@click.option(
    "--prompt",
    "prompt_files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Record further cases: each line of a text file is a prompt, <image> stands for an image; "
    "a JSON file has a list of prompts.",
)
@click.option(
    "--long",
    multiple=True,
    metavar="N",
    type=click.IntRange(1, 10_000_000),
    help="Record a further case with a prompt of at least N tokens.",
)
@click.option(
    "--drop-phase",
    "dropped",
    type=click.Choice(PHASE_NAMES),
    multiple=True,
    help="With --update: a phase that the new version shall lack.",
)
@click.option("--allow-nan", is_flag=True, help="Record answers with NaN or Inf in them.")
@click.option(
    "--trust-remote-code",
    "trusts_code",
    is_flag=True,
    help="Run the Python files that the checkpoint brings; the manifest says so.",
)
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
    oracle: bool | None,
    whole_outputs: tuple[str, ...],
    device_map: str | None,
    max_memory: tuple[str, ...],
    storage: str | None,
    goldens: Path,
    families: tuple[str, ...],
    redraw: bool,
    update: bool,
    reason: str,
    yes: bool,
    resume: bool,
    fresh: bool,
    prompt_files: tuple[Path, ...],
    long: tuple[int, ...],
    dropped: tuple[str, ...],
    allow_nan: bool,
    trusts_code: bool,
) -> int:
    """Run the Hugging Face reference and keep what it computes as a golden set.

    Needs the record environment: pip install 'snapshot-tool[record]'. Seed, variants, new tokens
    and storage not given are those of the set that is replaced, or of the same revision on another
    device.

    --update shows what moved before it writes: on a terminal it asks, elsewhere it wants --yes and
    --reason. Declined, the old set stays, and --resume --update --yes goes on from what is staged.
    """
    from snapshot_tool.base.environment import rank_here
    from snapshot_tool.cli.console import TerminalProgress
    from snapshot_tool.families.own import name_families
    from snapshot_tool.goldens.manifest import Storage
    from snapshot_tool.record.workflow import RecordRequest, help_to_record, record
    from snapshot_tool.reports.text import remarks

    name_families(families)
    if rank_here():
        help_to_record(device)
        return 0
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
        redraw=redraw,
        update=update,
        reason=reason,
        resume=resume,
        fresh=fresh,
        oracle=oracle,
        whole_outputs=whole_outputs or None,
        storage=Storage(storage) if storage else None,
        prompts=tuple(prompt for path in prompt_files for prompt in read_prompts(path)),
        long=long,
        dropped=parse_phases(dropped),
        allows_nan=allow_nan,
        trusts_code=trusts_code,
        device_map=device_map or "",
        max_memory=_parse_memory(max_memory, device_map),
    )
    if update and not reason and (yes or not _is_interactive()):
        raise UsageError("--update needs --reason TEXT", "say why the golden changes")
    outcome = record(request, TerminalProgress(), _reviewer(reason, written_unasked=yes))
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
    for line in remarks(manifest):
        click.echo(line, err=True)
    for line in manifest.history[-1].moved:
        click.echo(f"moved: {line}")
    return 0


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file: its lines, or the strings of a JSON list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        prompts = json.loads(text) if path.suffix == ".json" else re.split(r"\r?\n", text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--prompt {path} cannot be read: {error}", "name a UTF-8 file") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"--prompt {path} is not a list of prompts", 'write ["first", "second"]')
    found = [prompt for prompt in prompts if prompt.strip()]
    if not found:
        raise UsageError(f"--prompt {path} has no prompts", "write one on each line")
    return found


def _parse_memory(given: tuple[str, ...], device_map: str | None) -> tuple[tuple[str, str], ...]:
    """Return device and size of each DEVICE=SIZE."""
    if given and not device_map:
        raise UsageError("--max-memory goes with --device-map auto", "give both, or neither")
    for text in given:
        if not re.fullmatch(r"(\d+|cpu)=\d+(\.\d+)?[KMG]i?B", text):
            raise UsageError(f"--max-memory {text} is no DEVICE=SIZE", "for example: cpu=64GiB")
    return tuple((device, size) for device, _, size in (text.partition("=") for text in given))


def _is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _reviewer(reason: str, *, written_unasked: bool) -> Review:
    """Return what shows an update, and asks a person where there is one."""
    from snapshot_tool.reports.diff import diff_lines

    def review(drift: SetDiff) -> str:
        for line in diff_lines(drift):
            click.echo(line)
        if written_unasked:
            return reason
        if not (_is_interactive() and click.confirm(f"write {drift.other.title}?")):
            raise UpdateDeclined(
                f"{drift.one.title} stays as it is; the new answers are kept",
                "write them with the same command and: --resume --update --yes --reason TEXT",
            )
        return reason or str(click.prompt("reason"))

    return review
