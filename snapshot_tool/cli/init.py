"""`snap init`."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.cli.options import fms_path_option, goldens_option
from snapshot_tool.goldens.layout import lock_path

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
