"""The command line: read the options, call a use case, draw its result, return an exit code."""

from __future__ import annotations

import sys


def program() -> None:
    """Run `snap` with the arguments of this process."""
    main(sys.argv[1:])


def main(arguments: list[str]) -> None:
    """Run `snap` with arguments and end the process with its exit code."""
    from snapshot_tool.cli.commands import run

    run(arguments)
