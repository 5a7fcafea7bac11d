"""`snap ask` and `snap judge`: a golden set's questions, and answers from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from snapshot_tool.base.options import options_of
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.cli.check import show_run, with_configuration
from snapshot_tool.cli.options import (
    Outputs,
    golden_argument,
    goldens_option,
    report_options,
    request_options,
)

_JUDGES = ("goldens", "family", "phase", "case", "tolerance", "atol", "rtol", "allow_near_ties")
_LEFT_OUT = [name for name in options_of(CheckRequest) if name not in (*_JUDGES, "require")]


@click.command(
    "ask",
    short_help="Write the questions of a golden set.",
    epilog="Example: snap ask cpu-float32 --out questions",
)
@golden_argument("golden", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the questions; it must be empty or missing.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["snap", "aftu"]),
    default="snap",
    show_default=True,
    help="Format of the files: snap's, or the validation information of aiu-fms-testing-utils.",
)
@click.option("--model-id", metavar="NAME", help="aftu: the model's name there.")
@click.option("--attn-type", default="sdpa", show_default=True, help="aftu: kind of attention.")
@click.option("--aftu-version", default="0.8.1", show_default=True, help="aftu: its version.")
@goldens_option
def ask_command(
    *,
    golden: str | None,
    out: Path,
    kind: str,
    model_id: str | None,
    attn_type: str,
    aftu_version: str,
    goldens: Path,
) -> int:
    """Write the inputs of a golden set as files, for an engine that snap cannot import.

    GOLDEN is its folder, a part of its path, or the checkpoint's name. The files are JSON,
    safetensors and PNG. docs/answers.md describes them, and the files that answer them.
    With --format aftu, the recorded tokens and logits are written as aiu-fms-testing-utils reads
    them, so that its tests compare a device with Hugging Face.
    """
    from snapshot_tool.check.ask import ask
    from snapshot_tool.check.sets import find_golden
    from snapshot_tool.cli.console import TerminalProgress
    from snapshot_tool.goldens.golden import open_golden

    folder, manifest = find_golden(goldens, golden)
    if kind == "aftu":
        from snapshot_tool.check.ask_aftu import ask_aftu

        batches = ask_aftu(
            open_golden(folder, manifest),
            out,
            model_id=model_id or manifest.checkpoint.name,
            attn_type=attn_type,
            version=aftu_version,
        )
        for batch in batches:
            click.echo(f"{batch.folder}: {', '.join(batch.cases)}, padded to {batch.length}")
        return 0
    ask(open_golden(folder, manifest), out, TerminalProgress())
    click.echo(f"asked {len(manifest.cases)} cases of {manifest.title} in {out}")
    click.echo("judge the answers with: snap judge ANSWERS")
    return 0


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
    from snapshot_tool.check.run import CheckRun
    from snapshot_tool.check.session import check
    from snapshot_tool.families.own import name_families
    from snapshot_tool.reports.plots import require_plotting

    outputs = Outputs.taken_from(options)
    request = CheckRequest(answers=answers, **options)
    name_families(request.family)
    if outputs.html_path is not None:
        require_plotting()
    report = with_configuration(check(request, outputs.progress))
    return show_run(CheckRun(report, Path(request.goldens)), outputs)
