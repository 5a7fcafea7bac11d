"""The command line: options in, one workflow called, its result drawn, an exit code out."""

from __future__ import annotations

import sys

_CANNOT_RUN = 3


def main(arguments: list[str] | None = None) -> None:
    """Run `snap`; say so where memory is too short to begin with.

    Without `arguments` it is the program itself, and ends its process.
    """
    try:
        from snapshot_tool.cli.ending import Ending

        ending = Ending() if arguments is None else None
        from snapshot_tool.cli.group import run
    except (MemoryError, SystemError, ImportError, OSError) as error:
        # Whichever library is the first to be refused says so in a way of its own.
        if isinstance(error, ImportError) and "map segment" not in str(error):
            raise
        sys.stderr.write("snap: not enough memory to start\n      raise the memory limit\n")
        sys.exit(_CANNOT_RUN)
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as leaving:
        if ending is not None and isinstance(leaving.code, int):
            ending.code = leaving.code
        raise
