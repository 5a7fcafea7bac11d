"""The group of all commands, and the exit codes of errors.

Commands are imported when they are called, so `snap --help` needs only click.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from snapshot_tool.base import __version__
from snapshot_tool.base.errors import SnapError, UsageError, is_out_of_memory, printable, suggest
from snapshot_tool.cli.configuration import read_defaults

_COMMANDS = {
    "record": ("record", "Record a golden set from the Hugging Face reference."),
    "check": ("check", "Check an FMS model against a golden set."),
    "ask": ("goldens", "Write the questions of a golden set, to be answered anywhere."),
    "judge": ("check", "Judge answers to the questions of snap ask."),
    "report": ("check", "Show a finished check again, as text or as HTML."),
    "merge": ("check", "Merge the reports of the shards of a check into one."),
    "list": ("goldens", "List the golden sets."),
    "show": ("goldens", "Show the source and contents of a golden set."),
    "verify": ("goldens", "Compare the files of golden sets with their digests."),
    "diff": ("goldens", "Show what differs between two golden sets."),
    "push": ("goldens", "Upload golden sets to a remote."),
    "pull": ("goldens", "Download golden sets from a remote."),
    "bisect": ("check", "Find the commit of FMS that broke a port."),
    "trace": ("trace", "Write the inputs and outputs of every module of a model."),
    "compare-traces": ("trace", "Compare two traces, module by module."),
    "demo": ("start", "Check a correct and a faulty port of a tiny model, offline."),
    "init": ("start", "Write [tool.snap] and a workflow file into a repository."),
    "doctor": ("start", "Report what works in this environment, and what does not."),
}
_CANNOT_RUN = 3
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_LONGEST_PATH = 200  # characters
# Some libraries put the system's message into other exceptions than OSError.
_SYSTEM_WORDS = tuple(
    os.strerror(number)
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO)
)


class _LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module and return it; raise UsageError for an unknown one."""
        if cmd_name.startswith("-") or (ctx.resilient_parsing and cmd_name not in _COMMANDS):
            return None  # click reports an unknown option itself
        if cmd_name not in _COMMANDS:
            raise UsageError(f"unknown command {cmd_name}", suggest(cmd_name, list(_COMMANDS)))
        module = importlib.import_module(f"snapshot_tool.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all passed, 1 something differs, 2 wrong usage, 3 cannot run.",
)
@click.version_option(__version__, prog_name="snap")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(*, debug: bool) -> None:
    """Prove a model port right against golden references.

    \b
    Record once, in an environment with Hugging Face's pinned packages:
        snap record --revision SHA
    Check anywhere, without Hugging Face:
        snap check --fms-path ./foundation-model-stack --device cuda
    A golden set has the reference's inputs and outputs of each phase
    (preprocessing, vision, connector, forward, generate) for fixed and random
    inputs, at one pinned revision. A check runs each phase on the recorded
    inputs, so the first phase that differs has the fault.
    """  # noqa: D301 - \b is click's sign to keep the lines


def run(arguments: list[str]) -> NoReturn:
    """Run `snap` and end the process. Exit code 1 only means that something differs.

    It raises SystemExit itself, because a candidate may have replaced sys.exit.
    """
    keep_writing_to_closed_pipes()
    try:
        code = cli.main(
            arguments,
            prog_name="fms-snap" if Path(sys.argv[0]).stem == "fms-snap" else "snap",
            standalone_mode=False,
            default_map=read_defaults(_COMMANDS),
            color=False if os.environ.get("NO_COLOR") else None,
        )
    except click.ClickException as error:
        error.show()
        raise SystemExit(2) from None
    except (click.Abort, KeyboardInterrupt):
        click.echo("snap: interrupted", err=True)
        raise SystemExit(_INTERRUPTED) from None
    except Exception as error:  # no traceback without --debug
        if "--debug" in arguments:
            raise
        first, *rest = _describe(error).splitlines() or [""]
        click.echo("\n".join([f"snap: {first}", *(f"      {line}" for line in rest)]), err=True)
        raise SystemExit(error.exit_code if isinstance(error, SnapError) else _CANNOT_RUN) from None
    raise SystemExit(code if isinstance(code, int) else 0)


def _describe(error: Exception) -> str:
    """Return what is wrong and what to do, on one or two lines."""
    if isinstance(error, SnapError):
        return str(error)
    if is_out_of_memory(error):
        return "not enough memory\nraise the limit, or check fewer cases at once: --case GLOB"
    if isinstance(error, OSError) and error.strerror:
        where = f": {str(error.filename)[:_LONGEST_PATH]}" if error.filename else ""
        return f"{printable(error.strerror + where)}\noperating system error"
    text = printable(f"{type(error).__name__}: {error}")
    if any(words in text for words in _SYSTEM_WORDS):
        return f"{text}\noperating system error"
    return f"{text}\nthis is a bug in snap: --debug shows the traceback"


class _Pipe(io.FileIO):
    """Standard output or standard error that drops text if the reader has closed the pipe."""

    def write(self, data: Any) -> int:
        """Write to the pipe; drop the data if it is closed."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def keep_writing_to_closed_pipes() -> None:
    """Keep the exit code of a command whose reader closes the pipe, as in `snap show | head`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream.isatty():
                continue
            pipe = _Pipe(stream.fileno(), "w", closefd=False)
        except (OSError, ValueError, AttributeError):
            continue  # closed, or not a file, as in tests
        stream.flush()
        kept = {"encoding": stream.encoding, "errors": stream.errors}
        buffer = io.BufferedWriter(pipe)
        setattr(sys, name, io.TextIOWrapper(buffer, line_buffering=name == "stderr", **kept))
