"""`snap demo`: check a correct and a faulty port, in seconds and offline."""

from __future__ import annotations

from pathlib import Path

import click

_DATA = Path(__file__).parent.parent / "demo"


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
    from snapshot_tool.check.session import check
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
