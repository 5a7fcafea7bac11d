"""`snap compare-traces`."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot_tool.cli.options import family_option, write_text

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
    help="Figure to show beside the relative error.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=40, show_default=True, help="Rows to show."
)
@click.option(
    "--error-limit",
    type=click.FloatRange(min=0),
    help="Greatest relative error that is no difference.  [default: 3e-5]",
)
@click.option("--json", "json_path", type=_TRACE, help="Write all rows.")
def compare_traces_command(
    *,
    one: Path,
    two: Path,
    map_path: Path | None,
    families: tuple[str, ...],
    compare: str,
    metric: str,
    limit: int,
    error_limit: float | None,
    json_path: Path | None,
) -> int:
    """Show how far each module of a trace is from its partner in another one.

    Rows are in the reference's order of execution. Modules are matched by --map, by equal names, by
    the family's names, or else by shapes, order and values. Exit code 0: all agree; 1: a shape or a
    value differs, or the mapping names what the other trace lacks; 3: nothing could be compared.
    """
    from snapshot_tool.base.localisation import ERROR_LIMIT
    from snapshot_tool.base.tap import Side
    from snapshot_tool.base.trace_comparison import Metric
    from snapshot_tool.families.own import name_families
    from snapshot_tool.reports.traces import comparison_lines, comparison_to_json
    from snapshot_tool.traces.compare_files import CompareTracesRequest, compare_trace_files

    name_families(families)
    found = compare_trace_files(
        CompareTracesRequest(
            one,
            two,
            map_path,
            Side.INPUT if compare == "inputs" else Side.OUTPUT,
            ERROR_LIMIT if error_limit is None else error_limit,
        )
    )
    if str(json_path) != "-":
        for line in comparison_lines(found, metric=Metric(metric), limit=limit):
            click.echo(line)
    if json_path is not None:
        write_text(json_path, comparison_to_json(found))
    return found.exit_code
