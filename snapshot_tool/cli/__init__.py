"""The command line: options in, one workflow called, its result drawn, an exit code out."""

from __future__ import annotations

import sys

_CANNOT_RUN = 3


def program() -> None:
    """Run `snap` as a process of its own, and end it."""
    from snapshot_tool.cli.ending import Ending

    ending = Ending()
    try:
        main(sys.argv[1:])
    except SystemExit as leaving:
        if isinstance(leaving.code, int):
            ending.code = leaving.code
        raise


def main(arguments: list[str]) -> None:
    """Run `snap` with arguments; say so where memory is too short to begin with."""
    try:
        from snapshot_tool.cli.group import run
    except (MemoryError, SystemError, ImportError, OSError) as error:
        # Whichever library is the first to be refused says so in a way of its own.
        if isinstance(error, ImportError) and "map segment" not in str(error):
            raise
        sys.stderr.write("snap: not enough memory to start\n      raise the memory limit\n")
        sys.exit(_CANNOT_RUN)
    run(arguments)
