"""`snap trace`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.options import DEVICES
from snapshot_tool.cli.options import (
    case_names,
    complete_names,
    device_option,
    family_option,
    fms_path_option,
    goldens_option,
    json_option,
    require_files,
    write_files,
)

_DTYPES = ["float32", "float64", "bfloat16", "float16"]


@click.command(
    "trace",
    short_help="Write every module's inputs and outputs.",
    epilog="Example: snap trace --impl fms --case one-image --out fms.safetensors",
)
@click.option(
    "--impl",
    type=click.Choice(["hf", "fms"]),
    default="fms",
    show_default=True,
    help="hf needs the record environment.",
)
@click.option("--candidate", help="'module:factory' in place of FMS. Its code is run.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The trace."
)
@click.option("--force", is_flag=True, help="Replace the file --out.")
@click.option(
    "--case",
    shell_complete=complete_names(case_names),
    help="Use the inputs of this case of a golden set.",
)
@click.option("--inputs", type=click.Path(path_type=Path), help="Use the inputs of another trace.")
@click.option("--prompt", help="Run this prompt, with <image> for each --image; --impl hf only.")
@click.option("--image", "images", type=click.Path(path_type=Path), multiple=True)
@click.option("--checkpoint", help="Folder or hub id; by default that of the golden set or trace.")
@click.option("--revision", help="Revision of the golden set, or of the prompt's checkpoint.")
@click.option("--mode", type=click.Choice(["forward", "generate"]), default="forward")
@click.option("--first-pass-only", is_flag=True, help="Stop a generation after one token.")
@click.option("--max-new-tokens", type=click.IntRange(1, 100_000), help="Greedy tokens.")
@click.option(
    "--max-elements",
    type=click.IntRange(0, 2**40),
    default=65_536,
    show_default=True,
    help="Write tensors up to this size whole, and a sketch of larger ones.",
)
@device_option
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True)
@click.option(
    "--golden-device", type=click.Choice(DEVICES), help="Device of the golden set of --case."
)
@fms_path_option
@family_option
@goldens_option
def trace_command(
    *,
    impl: str,
    candidate: str | None,
    out: Path,
    force: bool,
    case: str | None,
    inputs: Path | None,
    prompt: str | None,
    images: tuple[Path, ...],
    checkpoint: str | None,
    revision: str | None,
    mode: str,
    device: str,
    golden_device: str | None,
    fms_path: Path | None,
    family: tuple[str, ...],
    goldens: Path,
    **how: Any,
) -> int:
    """Run a model and write the inputs and outputs of every module to a safetensors file.

    snap compare-traces compares two traces of the same inputs. The inputs are those of a golden
    set's --case, of another trace (--inputs), or, for --impl hf, a --prompt with --image files.
    """
    from snapshot_tool.cli.console import TerminalProgress
    from snapshot_tool.families import name_families
    from snapshot_tool.goldens.find import GoldenChoice
    from snapshot_tool.traces.workflow import (
        Mode,
        Prompt,
        TraceOptions,
        choose_subject,
        require_free,
        trace_candidate,
        trace_reference,
    )

    if impl == "hf" and (candidate or fms_path):
        raise UsageError("--candidate and --fms-path need --impl fms", "leave them out")
    if prompt is not None and impl == "fms":
        raise UsageError(
            "--prompt needs Hugging Face's processor: --impl hf",
            "trace it with --impl hf first, then pass that trace: --inputs TRACE",
        )
    require_free(out, force=force)
    name_families(family)
    given = choose_subject(
        GoldenChoice(goldens, checkpoint, revision, device, golden_device),
        case=case,
        inputs=inputs,
        prompt=None if prompt is None else Prompt(prompt, images, checkpoint, revision),
    )
    options = TraceOptions(Mode(mode), device=device, **how)
    if isinstance(given, Prompt) or impl == "hf":
        header = trace_reference(out, given, options, TerminalProgress())
    else:
        header = trace_candidate(
            out, given, options, TerminalProgress(), candidate=candidate or "fms", fms_path=fms_path
        )
    tensors = sum(len(call.inputs) + len(call.outputs) for call in header.calls)
    click.echo(f"traced {header.implementation}, {header.question}")
    click.echo(
        f"in {out}: passes {header.runs}, calls {len(header.calls)}, tensors {tensors}, "
        f"{out.stat().st_size / 1e6:.1f} MB"
    )
    return 0


_TRACE = click.Path(path_type=Path)


@click.command(
    "compare-traces",
    short_help="Compare two traces.",
    epilog="Example: snap compare-traces hf.safetensors fms.safetensors",
)
@click.argument("one", type=_TRACE)
@click.argument("two", type=_TRACE)
@click.option(
    "--map", "map_path", type=_TRACE, help="JSON object of module prefixes, ONE's to TWO's."
)
@family_option
@click.option(
    "--compare", type=click.Choice(["inputs", "outputs"]), default="outputs", show_default=True
)
@click.option(
    "--metric",
    type=click.Choice(["max_abs", "mean_abs", "sum_abs", "cosine"]),
    default="max_abs",
    show_default=True,
    help="Figure shown beside the relative error.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=40, show_default=True, help="Rows to show."
)
@click.option(
    "--error-limit",
    type=click.FloatRange(min=0),
    help="Greatest relative error that counts as equal.  [default: 3e-5]",
)
@json_option
def compare_traces_command(
    *,
    one: Path,
    two: Path,
    map_path: Path | None,
    family: tuple[str, ...],
    compare: str,
    metric: str,
    limit: int,
    error_limit: float | None,
    json_path: Path | None,
) -> int:
    """Compare each module of a trace with the matching module of another trace.

    Rows are in the reference's order of execution. Modules are matched by --map, by equal names, by
    the family's names, or by shapes, order and values. Exit code 0: all agree; 1: a shape or a
    value differs, or --map names a module that the other trace lacks; 3: nothing was compared.
    """
    from snapshot_tool.base.localisation import ERROR_LIMIT, Metric
    from snapshot_tool.base.protocol import Side
    from snapshot_tool.families import name_families
    from snapshot_tool.reports.diff import comparison_lines
    from snapshot_tool.reports.json import write_json
    from snapshot_tool.traces.compare import compare_traces

    name_families(family)
    require_files(json_path)
    found = compare_traces(
        one,
        two,
        map_path=map_path,
        side=Side.INPUT if compare == "inputs" else Side.OUTPUT,
        limit=ERROR_LIMIT if error_limit is None else error_limit,
    )
    if str(json_path) != "-":
        for line in comparison_lines(found, metric=Metric(metric), limit=limit):
            click.echo(line)
    write_files((json_path, partial(write_json, found)))
    return found.exit_code
