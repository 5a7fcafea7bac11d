"""`snap doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from snapshot_tool.cli.options import fms_path_option, goldens_option

_CANNOT_RUN = 3


@click.command(
    "doctor",
    short_help="Say what works here.",
    epilog="Example: snap doctor --fms-path ./foundation-model-stack",
)
@fms_path_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@goldens_option
def doctor_command(*, fms_path: Path | None, as_json: bool, goldens: Path) -> int:
    """Look at packages, devices, FMS and golden sets, and say what can be done here.

    No model runs. Exit code 0 where checking or recording is possible, 3 where neither is.
    """
    from snapshot_tool.check.doctor import diagnose

    diagnosis = diagnose(goldens, fms_path=fms_path)
    works = diagnosis.can_check or diagnosis.can_record
    if as_json:
        findings = [
            {"subject": f.subject, "good": f.good, "detail": f.detail} for f in diagnosis.findings
        ]
        answer = {
            "can_check": diagnosis.can_check,
            "can_record": diagnosis.can_record,
            "findings": findings,
        }
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return 0 if works else _CANNOT_RUN
    for finding in diagnosis.findings:
        mark = click.style("ok", fg="green") if finding.good else click.style("--", fg="yellow")
        click.echo(f"{mark}  {finding.subject}: {finding.detail}")
    click.echo(f"snap check works here: {'yes' if diagnosis.can_check else 'no'}")
    click.echo(f"snap record works here: {'yes' if diagnosis.can_record else 'no'}")
    return 0 if works else _CANNOT_RUN
