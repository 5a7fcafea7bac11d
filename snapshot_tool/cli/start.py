"""`snap demo`, `snap init` and `snap doctor`: a first look, a repository, an environment."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from snapshot_tool.cli.options import family_option, fms_path_option, goldens_option
from snapshot_tool.goldens.lock import lock_path

_DATA = Path(__file__).parent.parent / "demo"
_CANNOT_RUN = 3
_TABLE = """
# Defaults of snap's options.
[tool.snap]
goldens = '{goldens}'
fms-path = '{fms_path}'
"""
_WORKFLOW = """\
name: snap
on: [push, pull_request]
jobs:
  check:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      # A check needs the golden sets and the weights of their checkpoints.
      - uses: actions/cache@v4
        with:
          path: |
            ~/.cache/huggingface
            {goldens}
          key: snap-${{{{ hashFiles('{lock}') }}}}
      # Replace OWNER and COMMIT: snap's repository, and a commit of it.
      - uses: OWNER/fms-snap@COMMIT
        with:
          fms-path: {fms_path}
          goldens: {goldens}
          pull: "{pull}"
"""


@click.command(
    "demo",
    short_help="Check a correct and a faulty port.",
    epilog="Example: snap demo --out build/demo",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="snap-demo",
    show_default=True,
    help="Folder for the reports.",
)
def demo_command(*, out: Path) -> int:
    """Check two ports of a tiny Llama, one correct and one with a fault, against its golden set.

    The model, the golden set and the ports are in this package. Nothing is downloaded, and neither
    Hugging Face nor FMS is needed.
    """
    from snapshot_tool.base.errors import SnapError
    from snapshot_tool.check.request import CheckRequest
    from snapshot_tool.check.run import CheckRun
    from snapshot_tool.check.workflow import check
    from snapshot_tool.cli.console import TerminalProgress, draw_report
    from snapshot_tool.reports.plots import require_plotting

    out.mkdir(parents=True, exist_ok=True)
    for title, port in (
        ("correct port", "Right"),
        ("faulty port: wrong activation in the MLP", "Wrong"),
    ):
        click.secho(f"{title}: snapshot_tool.demo.port:{port}", bold=True)
        click.echo()
        request = CheckRequest(
            goldens=_DATA / "goldens",
            checkpoint=str(_DATA / "checkpoint"),
            candidate=f"snapshot_tool.demo.port:{port}",
        )
        run = CheckRun(check(request, TerminalProgress()), _DATA / "goldens")
        draw_report(run.report)
        click.echo()
    run.to_json(out / "report.json")
    try:
        require_plotting()
    except SnapError as error:
        click.echo(f"{out / 'report.json'} has all figures; for an HTML page: {error.remedy}")
    else:
        run.to_html(out / "report.html")
        click.echo(f"open {out / 'report.html'} in a browser to see the second report")
    return 0


@click.command(
    "init",
    short_help="Set up snap in a repository.",
    epilog="Example: snap init --fms-path .",
)
@fms_path_option
@goldens_option
def init_command(*, fms_path: Path | None, goldens: Path) -> int:
    """Write [tool.snap] into pyproject.toml, and a GitHub workflow that checks each commit.

    Existing settings and files are not changed.
    """
    lock = lock_path(goldens)
    values = {
        "fms_path": fms_path or Path(),
        "goldens": goldens,
        "lock": lock,
        "pull": str(lock.is_file()).lower(),
    }
    config = Path("pyproject.toml")
    before = config.read_text(encoding="utf-8") if config.is_file() else ""
    if "[tool.snap" in before:
        click.echo(f"{config} already has [tool.snap]")
    else:
        config.write_text(before + _TABLE.format_map(values), encoding="utf-8")
        click.echo(f"wrote [tool.snap] into {config}")
    workflow = Path(".github", "workflows", "snap.yml")
    if workflow.exists():
        click.echo(f"{workflow} already exists")
    else:
        workflow.parent.mkdir(parents=True, exist_ok=True)
        workflow.write_text(_WORKFLOW.format_map(values), encoding="utf-8")
        click.echo(f"wrote {workflow}: replace OWNER and COMMIT in it")
    click.echo("next: snap doctor")
    return 0


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
    from snapshot_tool.families import name_families

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
