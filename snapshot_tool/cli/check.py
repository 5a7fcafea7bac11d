"""`snap check`, and the commands around it: `judge`, `report`, `merge` and `bisect`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.files import make_folder
from snapshot_tool.base.options import options_of
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.check.bisect import bisect
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.run import CheckRun
from snapshot_tool.cli.configuration import configured_options
from snapshot_tool.cli.console import (
    TerminalProgress,
    draw_checks,
    draw_combined,
    draw_report,
    draw_table,
    draw_verdict,
)
from snapshot_tool.cli.options import (
    Outputs,
    report_options,
    request_options,
    require_files,
    write_files,
)
from snapshot_tool.families import name_families
from snapshot_tool.reports.json import read_run
from snapshot_tool.reports.markdown import annotation_lines
from snapshot_tool.reports.plots import require_plotting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapshot_tool.check.workflow import SetCheck

_CANNOT_RUN = 3
# The options of `snap judge`, which runs nothing.
_JUDGES = ("goldens", "family", "phase", "case", "tolerance", "atol", "rtol", "allow_near_ties")
_LEFT_OUT = [name for name in options_of(CheckRequest) if name not in (*_JUDGES, "require")]
_GROUPS = {
    "Golden set": ("goldens", "checkpoint", "revision", "golden_device", "every"),
    "Candidate": ("fms_path", "candidate", "loading", "family", "path", "device", "dtype"),
    "Selection": ("phase", "case", "shard", "last_failed", "fail_fast", "require"),
    "Judgement": ("tolerance", "atol", "rtol", "allow_near_ties", "quick", "repeat"),
    "Derived questions and modules": ("explore", "seed", "replay", "localise", "isolate", "graft"),
    "Output": ("quiet", "verbose", "json_path", "html_path", "markdown_path", "annotations"),
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
@request_options(CheckRequest, "answers")
@click.option("--all", "every", is_flag=True, help="Check all golden sets.")
@report_options
def check_command(*, every: bool, **options: Any) -> int:
    """Run FMS (or another candidate) on the inputs of a golden set and judge its outputs.

    Hugging Face is not needed and never imported. Exit code 0: all passed; 1: something differs
    or raised; 3: the check could not run, or nothing was compared. With --all, --json, --html and
    --markdown name folders, with a file for each golden set.
    """
    from snapshot_tool.check.shards import follow_leader, is_follower, leading
    from snapshot_tool.check.workflow import check, check_all, check_paths

    request, outputs = _prepare(options)
    if is_follower():
        follow_leader(request.device)
        return 0
    if every:
        return _show_several(check_all(request, outputs.progress), "golden sets", request, outputs)
    if len(request.paths) > 1:
        return _show_several(check_paths(request, outputs.progress), "paths", request, outputs)
    require_files(*outputs.paths)
    with leading(request.device):
        report = _with_configuration(check(request, outputs.progress))
    return _show_run(CheckRun(report, Path(request.goldens)), outputs)


@click.command(
    "judge",
    short_help="Judge answers to the questions of snap ask.",
    epilog="Example: snap judge answers --html report.html",
)
@click.argument("answers", type=click.Path(path_type=Path))
@request_options(CheckRequest, *_LEFT_OUT)
@report_options
def judge_command(*, answers: Path, **options: Any) -> int:
    """Judge the answers in a folder as `snap check` judges a candidate. Nothing runs.

    Neither FMS nor the checkpoint is needed. A phase that was not answered is skipped. Exit code 3:
    the answers are of another checkpoint or golden version, or nothing was answered.
    """
    from snapshot_tool.check.workflow import check

    request, outputs = _prepare({"answers": answers, **options})
    require_files(*outputs.paths)
    report = _with_configuration(check(request, outputs.progress))
    return _show_run(CheckRun(report, Path(request.goldens)), outputs)


def _prepare(options: dict[str, Any]) -> tuple[CheckRequest, Outputs]:
    """Return the request and the outputs; raise now what would end a check of an hour."""
    outputs = Outputs.taken_from(options)
    request = CheckRequest(**options)
    name_families(request.family)
    if outputs.html_path is not None:
        require_plotting()
    return request, outputs


def _show_run(run: CheckRun, outputs: Outputs) -> int:
    """Print a finished check, write its files, and return its exit code."""
    _print(run, outputs)
    _write(run, outputs)
    return run.exit_code


def _with_configuration(report: CheckReport) -> CheckReport:
    """Return the report with the options that come from variables or pyproject.toml."""
    options = configured_options(click.get_current_context())
    if not options:
        return report
    return dataclasses.replace(report, environment={**report.environment, "options": options})


def _show_several(
    found: Iterator[SetCheck], what: str, request: CheckRequest, outputs: Outputs
) -> int:
    """Print each of several checks and a table, write their files, and return the exit code.

    what: "golden sets" or "paths".
    """
    from snapshot_tool.check.workflow import exit_code_of_all
    from snapshot_tool.reports.history import paths_table

    if outputs.printed:
        raise UsageError("several checks write a file each", "name a folder: --json DIR")
    for folder in outputs.paths:
        make_folder(folder)
    checks = []
    for one in found:
        checks.append(one)
        if one.report:
            run = CheckRun(_with_configuration(one.report), Path(request.goldens))
            own = outputs.in_folders(one.name.replace("/", "_").replace(":", "-"))
            if not outputs.quiet:
                _print(run, own)
                click.echo()
            _write(run, own)
        if request.fail_fast and one.verdict.is_bad:
            break
    if what == "paths":
        draw_table(paths_table([one.report for one in checks if one.report]))
        draw_checks([one for one in checks if not one.report])
    else:
        draw_checks(checks)
    draw_combined(checks, what)
    return exit_code_of_all(checks)


def _print(run: CheckRun, outputs: Outputs) -> None:
    """Print a finished check, unless a file is printed instead."""
    if outputs.annotations:
        for line in annotation_lines(run.report):
            click.echo(line)
    if outputs.printed:
        return
    if outputs.quiet:
        draw_verdict(run.report)
    else:
        draw_report(run.report, verbose=outputs.verbose, page=outputs.html_path)


def _write(run: CheckRun, outputs: Outputs) -> None:
    """Write the files of a finished check."""
    write_files(
        (outputs.json_path, run.to_json),
        (outputs.html_path, run.to_html),
        (outputs.markdown_path, run.to_markdown),
    )


_prompts_option = click.option(
    "--goldens",
    type=click.Path(path_type=Path),
    help="Folder of the golden set; its prompts and images are shown in the HTML.",
)


@click.command(
    "report",
    short_help="Show finished checks.",
    epilog="Example: snap report run.json --html report.html --goldens goldens",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--tolerance",
    type=click.Choice([rule.value for rule in Rule]),
    help="Judge by the table of tolerances or by the oracle.  [default: as the check did]",
)
@click.option("--atol", type=click.FloatRange(0, 1e30), help="Judge by this absolute tolerance.")
@click.option("--rtol", type=click.FloatRange(0, 1e30), help="Judge by this relative tolerance.")
@report_options
@_prompts_option
def report_command(
    *,
    runs: tuple[Path, ...],
    tolerance: str | None,
    atol: float | None,
    rtol: float | None,
    goldens: Path | None,
    **options: Any,
) -> int:
    """Show a check again from RUN, the file that `snap check --json` wrote.

    It is shown as text, or written as one file that opens offline in any browser. No model runs.
    Several RUNS are shown as a table, for example the history of a port. The exit code is that of
    the last one. With --tolerance, --atol or --rtol, the results are judged again. Exit code 3: the
    kept figures do not decide.
    """
    outputs = Outputs.taken_from(options)
    require_files(*outputs.paths)
    if len(runs) > 1 and (outputs.json_path or outputs.markdown_path):
        raise UsageError("several runs are written as HTML only", "leave out --json and --markdown")
    reports = [read_run(run) for run in runs]
    if (tolerance, atol, rtol) != (None, None, None):
        from snapshot_tool.judge.judge import judge_again  # it imports torch

        rule = Rule(tolerance) if tolerance else None
        reports = [judge_again(one, rule=rule, atol=atol, rtol=rtol) for one in reports]
    if len(reports) == 1:
        return _show_run(CheckRun(reports[0], goldens), outputs)
    from snapshot_tool.reports.history import history_table, history_to_html

    past = [(str(path), report) for path, report in zip(runs, reports, strict=True)]
    if not outputs.printed:
        draw_table(history_table(past))
    write_files((outputs.html_path, partial(history_to_html, past)))
    return reports[-1].exit_code


@click.command(
    "merge",
    short_help="Merge the reports of shards into one.",
    epilog="Example: snap merge shard-*.json --json run.json",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@report_options
@_prompts_option
def merge_command(*, runs: tuple[Path, ...], goldens: Path | None, **options: Any) -> int:
    """Merge RUNS, the files that `snap check --shard K/N --json` wrote, into one report.

    Report and exit code are those of one check of all cases. Exit code 3: a shard is missing or
    duplicate, or two shards belong to different checks.
    """
    from snapshot_tool.check.shards import merge_reports

    outputs = Outputs.taken_from(options)
    require_files(*outputs.paths)
    report = merge_reports([(str(run), read_run(run)) for run in runs])
    return _show_run(CheckRun(report, goldens), outputs)


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
