"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.phases import PHASES, Phase

PHASE_NAMES = [phase.value for phase in PHASES]

goldens_option = click.option(
    "--goldens",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("goldens"),
    show_default=True,
    help="Folder of the golden sets.",
)
html_option = click.option(
    "--html", "html_path", type=click.Path(path_type=Path), help="Write a report to look at."
)
fms_path_option = click.option(
    "--fms-path",
    type=click.Path(path_type=Path),
    help="Root of an FMS checkout; wins over an installed FMS. Its code is run.",
)
family_option = click.option(
    "--family",
    "families",
    multiple=True,
    metavar="FILE.py",
    help="A file that declares a model family, or an entry point's name. Its code is run.",
)
phase_option = click.option(
    "--phase",
    "phases",
    type=click.Choice(["all", *PHASE_NAMES]),
    multiple=True,
    default=["all"],
    show_default=True,
    help="Phase to run; repeat it for several.",
)


def parse_phases(names: tuple[str, ...]) -> tuple[Phase, ...]:
    """Return the phases that were named, in the order of execution."""
    return tuple(phase for phase in PHASES if "all" in names or phase.value in names)


def write_text(path: Path, text: str) -> None:
    """Write a report to a file, or to standard output for "-"."""
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SnapError(f"cannot write {path}: {error.strerror}", "name another file") from error
