"""The command line: options in, one workflow called, its result drawn, an exit code out."""

from __future__ import annotations

import sys


def program() -> None:
    """Run `snap` as a process of its own."""
    main(sys.argv[1:])


def main(arguments: list[str]) -> None:
    """Run `snap` with arguments."""
    from snapshot_tool.cli.main import run

    run(arguments)
