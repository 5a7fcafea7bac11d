"""`snap doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from snapshot_tool.cli.options import family_option, fms_path_option, goldens_option

_CANNOT_RUN = 3


@click.command(
    "doctor",
    short_help="Report what works here.",
    epilog="Example: snap doctor --fms-path ./foundation-model-stack",
)
@fms_path_option
@family_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@goldens_option
def doctor_command(
    *, fms_path: Path | None, family: tuple[str, ...], as_json: bool, goldens: Path
) -> int:
    """Report whether checking and recording work here: packages, devices, FMS and golden sets.

    No model runs. Exit code 0: checking or recording works; 3: neither works.
    """
    from snapshot_tool.check.doctor import diagnose
    from snapshot_tool.families.own import name_families

    name_families(family)
    found = diagnose(goldens, fms_path=fms_path)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        for finding in found.findings:
            mark = click.style("ok", fg="green") if finding.good else click.style("--", fg="yellow")
            click.echo(f"{mark}  {finding.subject}: {finding.detail}")
        click.echo(f"snap check works here: {'yes' if found.can_check else 'no'}")
        click.echo(f"snap record works here: {'yes' if found.can_record else 'no'}")
        click.echo(f"next: {found.next_step}")
    return 0 if found.can_check or found.can_record else _CANNOT_RUN
