"""Comparing two trace files: no model runs, and neither implementation is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.localisation import ERROR_LIMIT
from snapshot_tool.base.tap import Side
from snapshot_tool.base.trace_comparison import TraceComparison
from snapshot_tool.traces.compare import compare_traces
from snapshot_tool.traces.format import open_trace
from snapshot_tool.traces.match import read_map


@dataclass(frozen=True, slots=True)
class CompareTracesRequest:
    """Which traces to compare, and how; `limit` is the relative error that is no difference."""

    one: Path
    two: Path
    map_path: Path | None = None
    side: Side = Side.OUTPUT
    limit: float = ERROR_LIMIT


def compare_trace_files(request: CompareTracesRequest) -> TraceComparison:
    """Read two traces and compare them."""
    prefixes = None if request.map_path is None else read_map(request.map_path)
    one, two = open_trace(request.one), open_trace(request.two)
    return compare_traces(one, two, prefixes=prefixes, side=request.side, limit=request.limit)
