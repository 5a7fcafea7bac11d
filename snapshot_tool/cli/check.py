"""`snap check`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from snapshot_tool.base.environment import DEVICES
from snapshot_tool.base.protocol import Loading
from snapshot_tool.base.report import COVERAGE_NAMES
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.cli.options import (
    PHASE_NAMES,
    family_option,
    fms_path_option,
    goldens_option,
    html_option,
    parse_phases,
    phase_option,
    write_text,
)

if TYPE_CHECKING:
    from snapshot_tool.base.report import CheckReport
    from snapshot_tool.check.bisect import BisectOutcome, Trial


_TOLERANCE = click.FloatRange(min=0, max=1e30)


@click.command(
    "check",
    short_help="Check an FMS model.",
    epilog="Example: snap check --fms-path ./foundation-model-stack --device cuda",
)
@fms_path_option
@click.option(
    "--candidate",
    default="fms",
    show_default=True,
    help="'fms', or 'module:factory' for anything else. Its code is run.",
)
@click.option(
    "--loading",
    type=click.Choice([loading.value for loading in Loading]),
    default=Loading.SNAP.value,
    show_default=True,
    help="Map the configuration by snap, or load by FMS's own get_model('hf_pretrained'), which "
    "needs transformers; fields that it maps otherwise are reported.",
)
@family_option
@click.option("--checkpoint", help="Folder or hub id; by default the one that the golden names.")
@click.option("--revision", help="Revision of the golden set, or its first digits.")
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True)
@click.option(
    "--golden-device",
    type=click.Choice(DEVICES),
    help="Check against a golden recorded on another device than --device.",
)
@phase_option
@click.option("--case", default="*", show_default=True, help="Cases to run, as a glob.")
@click.option(
    "--shard",
    metavar="K/N",
    help="Check the K-th of N shares of the cases; `snap merge` makes one report of all N.",
)
@click.option("--localise", is_flag=True, help="Look into the modules even where nothing differs.")
@click.option(
    "--quick",
    is_flag=True,
    help="Verify generation in one pass over prompt and golden tokens; its cache is not tried.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Run every phase so often, and say where the answers are not the same.",
)
@click.option(
    "--explore",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ask N more questions that the golden answers: prefixes, padding, batches, tiles …",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="What the questions of --explore are drawn from; by default the golden's seed.",
)
@click.option(
    "--replay",
    multiple=True,
    metavar="QUESTION",
    help="Ask this question of an --explore again, and nothing else.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the candidate computes in; by default what the golden was recorded in.",
)
@click.option(
    "--tolerance",
    type=click.Choice([rule.value for rule in Rule]),
    help="Judge by the golden's table of tolerances, or by its oracle.  [default: table; oracle "
    "where --dtype is not the golden's]",
)
@click.option(
    "--allow-near-ties",
    is_flag=True,
    help="Let a generation pass that differs only where rounding could have chosen.",
)
@click.option(
    "--graft",
    metavar="MODULE",
    default="",
    help="Put the golden's output in this module's place and run on: is the fault there alone?",
)
@click.option("--atol", type=_TOLERANCE, help="Absolute tolerance in place of the golden's.")
@click.option("--rtol", type=_TOLERANCE, help="Relative tolerance in place of the golden's.")
@click.option(
    "--require",
    type=click.Choice([*PHASE_NAMES, *COVERAGE_NAMES]),
    multiple=True,
    help="Exit with 3 if this phase is skipped anywhere, or no case reaches this of the model.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@html_option
@goldens_option
def check_command(
    *,
    fms_path: Path | None,
    candidate: str,
    loading: str,
    families: tuple[str, ...],
    checkpoint: str | None,
    revision: str | None,
    device: str,
    golden_device: str | None,
    phases: tuple[str, ...],
    case: str,
    shard: str | None,
    localise: bool,
    quick: bool,
    repeat: int,
    explore: int | None,
    seed: int | None,
    replay: tuple[str, ...],
    dtype: str | None,
    tolerance: str | None,
    allow_near_ties: bool,
    graft: str,
    atol: float | None,
    rtol: float | None,
    require: tuple[str, ...],
    json_path: Path | None,
    html_path: Path | None,
    goldens: Path,
) -> int:
    """Run FMS (or another candidate) on a golden's inputs and judge what comes out.

    Hugging Face is not needed and never imported. Exit code 0: all passed; 1: something differs
    or raised; 3: it could not run, or nothing was compared.
    """
    from snapshot_tool.base.questions import parse_question
    from snapshot_tool.base.report import parse_share
    from snapshot_tool.check.request import CheckRequest
    from snapshot_tool.check.session import check
    from snapshot_tool.check.shards import follow_leader, is_follower, leading
    from snapshot_tool.cli.console import TerminalProgress
    from snapshot_tool.families.own import name_families
    from snapshot_tool.reports.json import run_to_json
    from snapshot_tool.reports.plots import require_plotting

    name_families(families)
    if is_follower():
        follow_leader(device)
        return 0
    if html_path is not None:
        require_plotting()  # not after an hour of checking
    request = CheckRequest(
        goldens=goldens,
        candidate=candidate,
        fms_path=fms_path,
        loading=Loading(loading),
        checkpoint=checkpoint,
        revision=revision,
        device=device,
        golden_device=golden_device,
        phases=parse_phases(phases),
        case=case,
        localise=localise,
        quick=quick,
        repeat=repeat,
        dtype=dtype,
        rule=Rule(tolerance) if tolerance else None,
        allow_near_ties=allow_near_ties,
        graft=graft,
        atol=atol,
        rtol=rtol,
        required=tuple(dict.fromkeys(require)),
        explore=explore or 0,
        seed=seed,
        replay=tuple(map(parse_question, replay)),
        share=parse_share(shard) if shard else None,
    )
    with leading(device):
        report = check(request, TerminalProgress())
    if str(json_path) != "-":
        from snapshot_tool.cli.console import draw_report

        draw_report(report, replay=_replay_command())
    if json_path is not None:
        write_text(json_path, run_to_json(report))
    if html_path is not None:
        write_html(html_path, report, goldens)
    return report.exit_code


# What says how often to ask and what to show; everything else decides what is asked.
_NOT_REPLAYED = {
    *("explore", "seed", "replay", "phases", "case", "shard", "quick", "repeat", "localise"),
    *("json_path", "html_path", "graft"),
}


def _replay_command() -> str:
    """Return this very command without its question: one line for a shell."""
    context = click.get_current_context()
    words = context.command_path.split()
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name not in _NOT_REPLAYED:
            value = context.params[str(option.name)]
            for single in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0], str(single)]
    return shlex.join(words)


_INCONCLUSIVE = 3


@click.command(
    "bisect",
    short_help="Find the commit that broke a port.",
    epilog="Example: snap bisect --fms-path ./foundation-model-stack --good v1.0 --bad HEAD",
)
@click.option(
    "--fms-path",
    type=click.Path(path_type=Path),
    required=True,
    help="An FMS checkout. Its commits are run, in a worktree elsewhere; it is left as it is.",
)
@click.option("--good", required=True, help="A commit that passes.")
@click.option("--bad", required=True, help="A later commit that does not.")
@click.argument("check_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- CHECK OPTIONS]")
def bisect_command(*, fms_path: Path, good: str, bad: str, check_options: tuple[str, ...]) -> int:
    """Let git bisect search an FMS repository with snap check --quick.

    What stands after -- is given to snap check, e.g. -- --case one-image --phase vision. Commits
    that do not import are skipped. Exit code 0: found; 3: it could not be told.
    """
    from snapshot_tool.check.bisect import BisectRequest, bisect
    from snapshot_tool.cli.console import TerminalProgress

    outcome = bisect(BisectRequest(fms_path, good, bad, check_options), TerminalProgress())
    if outcome.first_bad is None:
        return _tell_suspects(outcome)
    _tell_found(outcome.first_bad, outcome.trials)
    return 0


def _tell_found(found: Trial, trials: int) -> None:
    commit = found.commit
    click.echo(f"first bad commit, of {trials} checked: {commit.sha}")
    click.echo(f"    {commit.subject} ({commit.author}, {commit.day})")
    click.echo(f"phase   {found.phase}, case {found.case}: {found.reason}")
    click.echo(f"module  {found.module or 'none: the error arises outside of all modules'}")


def _tell_suspects(outcome: BisectOutcome) -> int:
    click.echo("it is one of these commits; those between cannot be checked:")
    for commit in outcome.suspects:
        click.echo(f"    {commit.sha} {commit.subject}")
    return _INCONCLUSIVE


@click.command(
    "merge",
    short_help="Make one report of the shards of a check.",
    epilog="Example: snap merge shard-*.json --json run.json",
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures.")
@html_option
@click.option(
    "--goldens",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the run's golden set, whose prompts and images go into the HTML.",
)
def merge_command(
    *,
    runs: tuple[Path, ...],
    json_path: Path | None,
    html_path: Path | None,
    goldens: Path | None,
) -> int:
    """Make one report of RUNS, the files that `snap check --shard K/N --json` wrote.

    It is the report that one process would have made of all cases, and so is the exit code. Exit
    code 3: a shard is missing or there twice, or two are not of one check.
    """
    from snapshot_tool.check.shards import merge_reports
    from snapshot_tool.reports.json import read_run, run_to_json

    report = merge_reports([(str(run), read_run(run)) for run in runs])
    if str(json_path) != "-":
        from snapshot_tool.cli.console import draw_report

        draw_report(report, replay="snap check ...")
    if json_path is not None:
        write_text(json_path, run_to_json(report))
    if html_path is not None:
        write_html(html_path, report, goldens)
    return report.exit_code


@click.command(
    "report",
    short_help="Show a finished check.",
    epilog="Example: snap report run.json --html report.html --goldens goldens",
)
@click.argument("run", type=click.Path(path_type=Path))
@html_option
@click.option(
    "--goldens",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with the run's golden set, whose prompts and images go into the HTML.",
)
def report_command(*, run: Path, html_path: Path | None, goldens: Path | None) -> int:
    """Show a check again from RUN, the file that `snap check --json` wrote.

    As text, or with --html as one file that opens offline in any browser. No model runs. The exit
    code is that of the check.
    """
    from snapshot_tool.reports.json import read_run

    report = read_run(run)
    if html_path is None:
        from snapshot_tool.cli.console import draw_report

        draw_report(report, replay="snap check ...")
    else:
        write_html(html_path, report, goldens)
    return report.exit_code


def write_html(path: Path, report: CheckReport, goldens: Path | None) -> None:
    """Write the HTML report of a check, with what its golden set tells of the cases."""
    from snapshot_tool.reports.html import run_to_html
    from snapshot_tool.reports.preview import find_previews

    previews = find_previews(report, goldens) if goldens else {}
    write_text(path, run_to_html(report, previews, base=str(Path.cwd())))
