"""`snap check`, and the commands around it: `report`, `merge` and `bisect`."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.base.results import Verdict
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.cli.configuration import configured_options
from snapshot_tool.cli.options import html_option, json_option, request_options, write_text

if TYPE_CHECKING:
    from snapshot_tool.base.report import CheckReport
    from snapshot_tool.check.run import CheckRun

_CANNOT_RUN = 3
# Options that select the questions or the output. A replay needs only the others.
_NOT_REPLAYED = {
    *("explore", "seed", "replay", "phase", "case", "shard", "quick", "repeat", "localise"),
    *("json_path", "html_path", "graft", "every", "quiet", "last_failed", "fail_fast"),
}


_GROUPS = {
    "Golden set": ("goldens", "checkpoint", "revision", "golden_device", "every"),
    "Candidate": ("fms_path", "candidate", "loading", "family", "device", "dtype"),
    "Selection": ("phase", "case", "shard", "last_failed", "fail_fast", "require"),
    "Judgement": ("tolerance", "atol", "rtol", "allow_near_ties", "quick", "repeat"),
    "Derived questions and modules": ("explore", "seed", "replay", "localise", "graft"),
    "Output": ("quiet", "json_path", "html_path"),
}


class _GroupedCommand(click.Command):
    """A command whose help has its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group."""
        left = {option.name: option.get_help_record(ctx) for option in self.get_params(ctx)}
        for title, names in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := left.pop(name))])
        with formatter.section("Help"):
            formatter.write_dl([record for record in left.values() if record])


@click.command(
    "check",
    cls=_GroupedCommand,
    short_help="Check an FMS model.",
    epilog="Example: snap check --fms-path ./foundation-model-stack --device cuda",
)
@request_options(CheckRequest)
@click.option("--all", "every", is_flag=True, is_eager=True, help="Check all golden sets.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the last line.")
@json_option
@html_option
def check_command(
    *,
    every: bool,
    quiet: bool,
    json_path: Path | None,
    html_path: Path | None,
    **options: Any,
) -> int:
    """Run FMS (or another candidate) on the inputs of a golden set and judge its outputs.

    Hugging Face is not needed and never imported. Exit code 0: all passed; 1: something differs
    or raised; 3: the check could not run, or nothing was compared. With --all, --json and --html
    name folders, with a file for each golden set.
    """
    from snapshot_tool.check.run import CheckRun
    from snapshot_tool.check.session import check
    from snapshot_tool.check.shards import follow_leader, is_follower, leading
    from snapshot_tool.cli.console import draw_report, draw_verdict
    from snapshot_tool.families.own import name_families
    from snapshot_tool.reports.plots import require_plotting

    request = CheckRequest(**options)
    name_families(request.family)
    if is_follower():
        follow_leader(request.device)
        return 0
    if html_path is not None:
        require_plotting()  # before the check, which may take an hour
    if every:
        return _check_all(request, json_path, html_path, quiet=quiet)
    with leading(request.device):
        report = _with_options(check(request, _progress(quiet=quiet)))
    run = CheckRun(report, Path(request.goldens))
    if quiet and str(json_path) != "-":
        draw_verdict(report)
    elif str(json_path) != "-":
        draw_report(report, replay=_replay_command())
    _write(run, json_path, html_path)
    return run.exit_code


def _with_options(report: CheckReport) -> CheckReport:
    """Return the report with the options that come from variables or pyproject.toml."""
    options = configured_options(click.get_current_context())
    if not options:
        return report
    return dataclasses.replace(report, environment={**report.environment, "options": options})


def _progress(*, quiet: bool) -> Progress:
    from snapshot_tool.cli.console import TerminalProgress

    return Progress() if quiet else TerminalProgress()


def _check_all(
    request: CheckRequest, json_path: Path | None, html_path: Path | None, *, quiet: bool
) -> int:
    """Check all golden sets, and print a table of their verdicts."""
    from snapshot_tool.check.every import check_all, exit_code_of_all
    from snapshot_tool.check.run import CheckRun
    from snapshot_tool.cli.console import draw_checks, draw_report

    if str(json_path) == "-":
        raise UsageError("--all writes a file for each golden set", "name a folder: --json DIR")
    for folder in filter(None, (json_path, html_path)):
        folder.mkdir(parents=True, exist_ok=True)
    checks = []
    for one in check_all(request, _progress(quiet=quiet)):
        checks.append(one)
        if one.report:
            report = _with_options(one.report)
            if not quiet:
                draw_report(report, replay=f"{_replay_command()} --checkpoint {one.name}")
                click.echo()
            file = one.name.replace("/", "_")
            json_file = json_path and json_path / f"{file}.json"
            html_file = html_path and html_path / f"{file}.html"
            run = CheckRun(report, Path(request.goldens))
            _write(run, json_file, html_file)
        if request.fail_fast and one.verdict in (Verdict.FAIL, Verdict.ERROR):
            break
    draw_checks(checks)
    return exit_code_of_all(checks)


def _replay_command() -> str:
    """Return this command as a line for a shell, without its question."""
    context = click.get_current_context()
    words = context.command_path.split()
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name not in _NOT_REPLAYED:
            value = context.params[str(option.name)]
            for single in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0], *([] if single is True else [str(single)])]
    return shlex.join(words)


def _write(run: CheckRun, json_path: Path | None, html_path: Path | None) -> None:
    """Write the files of a finished check."""
    if json_path is not None:
        write_text(json_path, run.to_json())
    if html_path is not None:
        write_text(html_path, run.to_html())


_prompts_option = click.option(
    "--goldens",
    type=click.Path(path_type=Path),
    help="Folder of the golden set; its prompts and images are shown in the HTML.",
)


@click.command(
    "report",
    short_help="Show a finished check.",
    epilog="Example: snap report run.json --html report.html --goldens goldens",
)
@click.argument("run", type=click.Path(path_type=Path))
@html_option
@_prompts_option
def report_command(*, run: Path, html_path: Path | None, goldens: Path | None) -> int:
    """Show a check again from RUN, the file that `snap check --json` wrote.

    It is shown as text, or with --html as one file that opens offline in any browser. No model
    runs. The exit code is that of the check.
    """
    from snapshot_tool.check.run import CheckRun
    from snapshot_tool.cli.console import draw_report
    from snapshot_tool.reports.json import read_run

    found = CheckRun(read_run(run), goldens)
    if html_path is None:
        draw_report(found.report, replay="snap check ...")
    else:
        write_text(html_path, found.to_html())
    return found.exit_code


@click.command(
    "merge",
    short_help="Merge the reports of shards into one.",
    epilog="Example: snap merge shard-*.json --json run.json",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@html_option
@_prompts_option
def merge_command(
    *,
    runs: tuple[Path, ...],
    json_path: Path | None,
    html_path: Path | None,
    goldens: Path | None,
) -> int:
    """Merge RUNS, the files that `snap check --shard K/N --json` wrote, into one report.

    Report and exit code are those of one check of all cases. Exit code 3: a shard is missing or
    duplicate, or two shards belong to different checks.
    """
    from snapshot_tool.check.run import CheckRun
    from snapshot_tool.check.shards import merge_reports
    from snapshot_tool.cli.console import draw_report
    from snapshot_tool.reports.json import read_run

    report = merge_reports([(str(run), read_run(run)) for run in runs])
    found = CheckRun(report, goldens)
    if str(json_path) != "-":
        draw_report(report, replay="snap check ...")
    _write(found, json_path, html_path)
    return found.exit_code


@click.command(
    "bisect",
    short_help="Find the commit that broke a port.",
    epilog="Example: snap bisect --fms-path ./foundation-model-stack --good v1.0 --bad HEAD",
)
@click.option(
    "--fms-path",
    type=click.Path(path_type=Path),
    required=True,
    help="An FMS checkout. Its commits are run in a temporary worktree; the checkout is unchanged.",
)
@click.option("--good", required=True, help="A commit that passes.")
@click.option("--bad", required=True, help="A later commit that fails.")
@click.argument("check_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- CHECK OPTIONS]")
def bisect_command(*, fms_path: Path, good: str, bad: str, check_options: tuple[str, ...]) -> int:
    """Let git bisect search an FMS repository with snap check --quick.

    Options after -- are passed to snap check, for example -- --case one-image --phase vision.
    Commits that cannot be imported are skipped. Exit code 0: found; 3: not found, because of
    commits that cannot be checked.
    """
    from snapshot_tool.check.bisect import bisect
    from snapshot_tool.cli.console import TerminalProgress

    outcome = bisect(fms_path, good, bad, options=check_options, progress=TerminalProgress())
    found = outcome.first_bad
    if found is None:
        click.echo("the first bad commit is one of these; commits between them cannot be checked:")
        for commit in outcome.suspects:
            click.echo(f"    {commit.sha} {commit.subject}")
        return _CANNOT_RUN
    commit = found.commit
    click.echo(f"first bad commit, of {outcome.trials} checked: {commit.sha}")
    click.echo(f"    {commit.subject} ({commit.author}, {commit.day})")
    click.echo(f"phase   {found.phase}, case {found.case}: {found.reason}")
    click.echo(f"module  {found.module or 'none: the error arises outside of all modules'}")
    return 0
