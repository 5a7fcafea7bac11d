"""Runs `snap` for the tests, in processes forked from one that has imported everything except FMS.

A request is a line of JSON on standard input: arguments, folder, variables and the files for both
streams. The answer is a line with the exit code. Each process imports an FMS of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import tests.preloaded  # noqa: F401 - for its imports
from snapshot_tool.cli import program

SECONDS = 600


def run_snap(request: dict[str, Any]) -> NoReturn:
    """Run one command in this process, and end it."""
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT),
        (2, request["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), number)
    sys.argv[1:] = request["arguments"]
    code: object = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal end would take torch apart, which costs two seconds in a forked process.
    os._exit(code if isinstance(code, int) else 0)


def serve() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_snap(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
