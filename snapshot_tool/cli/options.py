"""click options made from the declarations of requests, and options of several commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from snapshot_tool.base.files import require_writable, write_report
from snapshot_tool.base.options import Option, options_of
from snapshot_tool.base.protocol import Progress
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.cli.configuration import environment_variable

if TYPE_CHECKING:
    from snapshot_tool.goldens.manifest import Manifest

_Command = TypeVar("_Command", bound=Callable[..., Any])


def click_option(option: Option) -> Callable[[_Command], _Command]:
    """Return the decorator that gives a command an option."""
    if option.kind is bool:
        both = f"{option.flag}/--no-{option.flag[2:]}"  # without a default, both forms exist
        return click.option(
            both if option.default is None else option.flag,
            *filter(None, [option.short]),
            option.field,
            is_flag=True,
            default=option.default,
            envvar=environment_variable(option),
            help=option.help,
        )
    kind: Any = option.kind
    metavar = option.metavar
    complete = None
    if option.field in _COMPLETED:
        complete = complete_names(_COMPLETED[option.field])
    if option.commas and option.choices:
        metavar = f"[{'|'.join(option.choices)}]"
        complete = complete_names(lambda _goldens: option.choices)
    elif option.choices:
        kind = click.Choice(option.choices)
    elif option.kind is Path:
        kind = click.Path(path_type=Path, file_okay=option.metavar != "DIR")
    elif option.limits != (None, None):
        kind = (click.IntRange if option.kind is int else click.FloatRange)(*option.limits)
    return click.option(
        option.flag,
        option.field,
        type=kind,
        default=None if option.repeated else option.default,
        show_default=bool(option.default),
        multiple=option.repeated,
        envvar=environment_variable(option),
        metavar=metavar or None,
        help=option.help,
        shell_complete=complete,
    )


Completion = Callable[[click.Context, click.Parameter, str], list[str]]


def complete_names(names: Callable[[Path], Iterable[str]]) -> Completion:
    """Return a completion for the last name of a list; `names` gets the goldens folder."""

    def complete(context: click.Context, _parameter: click.Parameter, text: str) -> list[str]:
        goldens = context.params.get("goldens") or "goldens"
        before, comma, start = text.rpartition(",")
        found = dict.fromkeys(names(Path(goldens)))
        return [f"{before}{comma}{name}" for name in found if name.startswith(start)]

    return complete


def golden_names(goldens: Path) -> Iterator[str]:
    """Yield the names of the checkpoints that have golden sets."""
    return (manifest.checkpoint.name for manifest in _manifests(goldens))


def case_names(goldens: Path) -> Iterator[str]:
    """Yield the names of all cases of the golden sets."""
    return (case.name for manifest in _manifests(goldens) for case in manifest.cases)


def _manifests(goldens: Path) -> Iterator[Manifest]:
    from snapshot_tool.goldens.find import iterate_goldens

    return (found.manifest for found in iterate_goldens(goldens) if found.manifest)


def golden_argument(name: str, *, required: bool = True) -> Callable[[_Command], _Command]:
    """Return the decorator for an argument that names a golden set."""
    complete = complete_names(golden_names)
    return click.argument(name, required=required, shell_complete=complete)


_COMPLETED = {"case": case_names, "checkpoint": golden_names}


def request_options(request: type, *left_out: str) -> Callable[[_Command], _Command]:
    """Return the decorator that gives a command the options of a request, except some fields."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options_of(request).values()):
            if option.field not in left_out:
                command = click_option(option)(command)
        return command

    return decorate


_CHECK = options_of(CheckRequest)
goldens_option = click_option(_CHECK["goldens"])
fms_path_option = click_option(_CHECK["fms_path"])
family_option = click_option(_CHECK["family"])
device_option = click_option(_CHECK["device"])


def _report_option(flag: str, name: str, text: str) -> Callable[[_Command], _Command]:
    return click.option(flag, name, type=click.Path(path_type=Path), help=text)


json_option = _report_option("--json", "json_path", "Write all figures; - prints them.")
html_option = _report_option("--html", "html_path", "Write a page for the browser.")
markdown_option = _report_option(
    "--markdown", "markdown_path", "Write Markdown for the summary of a CI run or a comment."
)


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of a check: files, annotations, and how much text."""

    json_path: Path | None
    html_path: Path | None
    markdown_path: Path | None
    annotations: bool
    verbose: bool
    quiet: bool

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Outputs:
        """Take the outputs out of a command's options."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    @property
    def paths(self) -> list[Path]:
        """The paths that are given; of several checks they are folders."""
        every = (self.json_path, self.html_path, self.markdown_path)
        return [path for path in every if path is not None]

    @property
    def printed(self) -> bool:
        """Whether one of the files is standard output."""
        return Path("-") in self.paths

    @property
    def progress(self) -> Progress:
        """The object that shows the progress of the check."""
        from snapshot_tool.cli.console import TerminalProgress

        return Progress() if self.quiet else TerminalProgress()

    def in_folders(self, name: str) -> Outputs:
        """Return the outputs of one of several checks: files in the folders."""

        def inside(folder: Path | None, ending: str) -> Path | None:
            return None if folder is None else folder / f"{name}.{ending}"

        return replace(
            self,
            json_path=inside(self.json_path, "json"),
            html_path=inside(self.html_path, "html"),
            markdown_path=inside(self.markdown_path, "md"),
        )


def report_options(command: _Command) -> _Command:
    """Give a command the options of Outputs; see Outputs.taken_from."""
    quiet = click.option("-q", "--quiet", is_flag=True, help="Print only the last line.")
    verbose = click.option(
        "--verbose",
        "-v",
        is_flag=True,
        help="Print every failure, not only the worst of each phase.",
    )
    annotations = click.option(
        "--annotations",
        is_flag=True,
        help="Print GitHub's workflow commands, which show a failure at its line of code.",
    )
    for option in (quiet, verbose, annotations, markdown_option, html_option, json_option):
        command = option(command)
    return command


def require_files(*paths: Path | None) -> None:
    """Raise SnapError, before the work starts, if one of the files cannot be written."""
    for path in paths:
        if path not in (None, Path("-")):
            require_writable(path)


def write_files(*files: tuple[Path | None, Callable[[], str]]) -> None:
    """Write each report that has a path, to standard output for "-"; only these are made."""
    for path, text in files:
        if path == Path("-"):
            click.echo(text(), nl=False)
        elif path is not None:
            write_report(path, text())
