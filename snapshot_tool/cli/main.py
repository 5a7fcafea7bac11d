"""The group of all commands, and how each way out of one gets a code of its own.

Commands are imported when they are called, so `snap --help` needs click alone.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import Any, TextIO

import click

from snapshot_tool.base.errors import SnapError, is_out_of_memory, printable


class _Pipe(io.FileIO):
    """A file that takes everything once nobody reads it any more."""

    def write(self, data: Any) -> int:
        """Write to the pipe, or to nowhere."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def keep_writing_to_closed_pipes() -> None:
    """Replace standard output and standard error, if they are not a terminal."""
    sys.stdout = _tolerant(sys.stdout)
    sys.stderr = _tolerant(sys.stderr)


def _tolerant(stream: TextIO) -> TextIO:
    """Return a stream of the same file that a missing reader does not break."""
    try:
        number = stream.fileno()
        if stream.isatty():
            return stream
    except (OSError, ValueError, AttributeError):
        return stream  # closed, or no file at all, as in tests
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", None),
        errors=getattr(stream, "errors", None),
        line_buffering=stream is sys.stderr,
    )


_COMMANDS = {
    "record": ("record", "Record a golden set from the Hugging Face reference."),
    "check": ("check", "Check an FMS model against a golden set."),
    "report": ("check", "Show a finished check again, as text or as HTML."),
    "merge": ("check", "Make one report of the shards of a check."),
    "list": ("goldens", "List the golden sets."),
    "show": ("goldens", "Show what a golden set holds."),
    "verify": ("goldens", "Check the files of golden sets against their digests."),
    "diff": ("goldens", "Show what differs between two golden sets."),
    "push": ("goldens", "Send golden sets to a remote."),
    "pull": ("goldens", "Fetch golden sets from a remote."),
    "bisect": ("check", "Find the commit of FMS that broke a port."),
    "trace": ("trace", "Write what every module of a model is given and returns."),
    "compare-traces": ("trace", "Compare two traces, module by module."),
    "doctor": ("doctor", "Say what works in this environment, and why not."),
}
_CANNOT_RUN = 3
_SHOWN = 200  # characters of a path
# What the system says, in the words of a library that raises something else than OSError.
_REFUSALS = tuple(
    os.strerror(number)
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO)
)
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names in the order of a first use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module and return it."""
        if cmd_name not in _COMMANDS:
            return None
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
    epilog="Exit codes: 0 all passed, 1 something differs, 2 wrong usage, 3 it could not run.",
)
@click.version_option(package_name="snapshot-tool", prog_name="snap")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(*, debug: bool) -> None:
    """Prove a model port right against golden references.

    \b
    Record once, where Hugging Face's pinned stack is installed:
        snap record --revision SHA
    Check anywhere, as often as wanted, without Hugging Face:
        snap check --fms-path ./foundation-model-stack --device cuda
    A golden set holds, per phase (preprocessing, vision, connector, forward,
    generate), what the reference computed for fixed and random inputs at one
    pinned revision. A check feeds each phase the golden's own inputs, so the
    first phase that differs is the one with the fault.
    """  # noqa: D301 - \b is click's sign to keep the lines


def run(arguments: list[str]) -> None:
    """Run `snap`. Every way out has a code of its own: 1 means that something differs.

    SystemExit is raised, not sys.exit called: a candidate may have replaced sys.exit.
    """
    keep_writing_to_closed_pipes()
    try:
        code = cli.main(
            arguments,
            prog_name="snap",
            standalone_mode=False,
            color=False if os.environ.get("NO_COLOR") else None,
        )
    except SnapError as error:
        _fail(error, str(error), error.exit_code, arguments)
    except click.ClickException as error:
        error.show()
        raise SystemExit(2) from None
    except (click.Abort, KeyboardInterrupt):
        click.echo("snap: interrupted", err=True)
        raise SystemExit(_INTERRUPTED) from None
    except Exception as error:  # the last line of defence: no traceback unless asked for
        _fail(error, _in_words(error), _CANNOT_RUN, arguments)
    raise SystemExit(code if isinstance(code, int) else 0)


def _in_words(error: Exception) -> str:
    """Return what the system refused, or that the fault is ours, in one or two lines."""
    if is_out_of_memory(error):
        return "not enough memory\nraise the limit, or check fewer cases at a time: --case GLOB"
    if isinstance(error, OSError) and error.strerror:
        where = f": {str(error.filename)[:_SHOWN]}" if error.filename else ""
        return f"{printable(error.strerror + where)}\noperating system error"
    text = printable(f"{type(error).__name__}: {error}")
    if any(refusal in text for refusal in _REFUSALS):
        return f"{text}\noperating system error"
    return f"{text}\nthis is a fault of snap: --debug shows where"


def _fail(error: BaseException, text: str, code: int, arguments: list[str]) -> Any:
    if "--debug" in arguments:
        raise error
    first, *rest = text.splitlines() or [""]
    click.echo(f"snap: {first}", err=True)
    for line in rest:
        click.echo(f"      {line}", err=True)
    raise SystemExit(code)
