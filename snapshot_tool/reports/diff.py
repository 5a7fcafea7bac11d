"""Differences between two golden sets as text, Markdown and HTML, and of two traces as text."""

from __future__ import annotations

from snapshot_tool.base.localisation import Metric, TraceComparison, TraceRow
from snapshot_tool.diagnose.diff import PartDiff, SetDiff
from snapshot_tool.reports.markdown import escape
from snapshot_tool.reports.text import list_names, wrap_worst

_SHOWN = 12
_SHOWN_IN_PAGE = 500
_TEXT_WIDTH = 60
_ROWS_BEFORE = 5  # rows of traces shown before the first one that differs


def diff_lines(diff: SetDiff) -> list[str]:
    """Return versions, parts that moved in units of tolerance, tokens as text, worst tensors."""
    lines = [
        f"one    {diff.one.title}  {diff.one.folder}",
        f"other  {diff.other.title}  {diff.other.folder}",
    ]
    lines += [
        f"       {name}: {change.one or '-'} -> {change.other or '-'}"
        for name, change in diff.environment.items()
    ]
    lines += [f"       {line}" for line in diff.files]
    if diff.same:
        return [*lines, "the same: every tensor has the same bytes"]
    if not diff.parts:
        return lines
    lines += ["", f"{'part':<14}{'tensors':>8}{'moved':>7}{'beyond':>8}  worst"]
    for part in diff.parts:
        figures = f"{part.part:<14}{part.tensors:>8}{part.moved:>7}{part.beyond:>8}"
        lines.append(f"{figures}  {_worst(diff, part)}")
    lines += ["0.5x: the worst element moved by half of its tolerance", ""]
    for text in diff.tokens:
        lines += [
            f"tokens of {text.case} change from step {text.step}:",
            f"  - {_short(text.one, text.other)}",
            f"  + {_short(text.other, text.one)}",
        ]
    lines += [
        f"{found.part} / {found.case} / {found.tensor}: {wrap_worst(found.reason)}"
        for found in diff.beyond[:_SHOWN]
    ]
    if len(diff.beyond) > _SHOWN:
        lines.append(f"… and {len(diff.beyond) - _SHOWN} more: --json FILE has them all")
    return lines


def _worst(diff: SetDiff, part: PartDiff) -> str:
    """Return a part's worst tensor, and by how many tolerances it moved."""
    worst = diff.worst(part)
    return f"{_used(part.tolerances)} {worst.case} / {worst.tensor}".strip()


def _used(tolerances: float | None) -> str:
    return "" if tolerances is None else f"{tolerances:.2g}x"


def _short(text: str, other: str) -> str:
    """Return a text in quotes, cut around the first difference to the other text."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    start = max(0, (min(len(text), len(other)) if same is None else same) - _TEXT_WIDTH // 3)
    part = text[start : start + _TEXT_WIDTH]
    before, after = "…" if start else "", "…" if start + _TEXT_WIDTH < len(text) else ""
    return f"{before}{part!r}{after}"


def diff_to_markdown(diff: SetDiff) -> str:
    """Return a table by part and one by case, to review an update in a pull request."""
    lines = [f"### snap diff: {escape(diff.one.title)} → {escape(diff.other.title)}", ""]
    changes = [f"{n}: {c.one or '-'} → {c.other or '-'}" for n, c in diff.environment.items()]
    lines += [f"- {escape(line)}" for line in (*changes, *diff.files)]
    if diff.same:
        lines += ["", "The same: every tensor has the same bytes."]
    if not diff.parts:
        return "\n".join(lines) + "\n"
    lines += ["", "| part | tensors | moved | beyond tolerance | worst |"]
    lines.append("| --- | ---: | ---: | ---: | --- |")
    for part in diff.parts:
        where = escape(_worst(diff, part))
        lines.append(f"| {part.part} | {part.tensors} | {part.moved} | {part.beyond} | {where} |")
    lines += ["", "| case | moved | beyond tolerance |", "| --- | --- | --- |"]
    for case in dict.fromkeys(found.case for found in diff.moved):
        moved = [found for found in diff.moved if found.case == case]
        beyond = [f"{found.part} / {found.tensor}" for found in moved if found in diff.beyond]
        parts = ", ".join(dict.fromkeys(found.part for found in moved))
        lines.append(f"| {escape(case)} | {parts} | {escape(', '.join(beyond))} |")
    for text in diff.tokens:
        lines += ["", f"Tokens of {escape(text.case)} from step {text.step}:", ""]
        lines += [f"- {escape(text.one)}", f"- {escape(text.other)}"]
    return "\n".join(lines) + "\n"


def diff_to_html(diff: SetDiff) -> str:
    """Return the page."""
    # Imported here, because text does not need Jinja2.
    from snapshot_tool.reports.html import page_environment

    environment = page_environment()
    environment.filters["used"] = _used
    return environment.get_template("diff.html").render(
        diff=diff, shown=diff.moved[:_SHOWN_IN_PAGE]
    )


def comparison_lines(found: TraceComparison, *, metric: Metric, limit: int) -> list[str]:
    """Return both traces and the differences of their tensors, at most `limit` rows."""
    lines = [
        f"reference  {found.reference}",
        f"other      {found.other}",
        found.mapping,
        "",
        *_rows_table(found, metric, limit),
        "",
    ]
    unmeasured = [r for r in found.rows if r.relative_error is None and not r.beyond]
    for title, names in (
        ("missing in the other trace", found.missing),
        ("of the reference without a match", found.reference_alone),
        ("of the other without a match", found.other_alone),
        ("tensors without a match", found.tensors_alone),
        ("not measured", [f"{row.module} ({row.problem})" for row in unmeasured]),
    ):
        if names:
            lines.append(f"{len(names)} {title}: {list_names(names)}")
    return [*lines, _summary_of_rows(found)]


def _rows_table(found: TraceComparison, metric: Metric, limit: int) -> list[str]:
    first = next((i for i, row in enumerate(found.rows) if row.beyond), 0)
    start = max(0, min(first - _ROWS_BEFORE, len(found.rows) - limit))
    shown = found.rows[start : start + limit]
    lines = [f"  pass  {'relative':>9}  {metric.value:>9}  module (the other's)"]
    if start:
        lines.append(f"  … {start} rows before agree")
    lines += [_row_line(row, metric) for row in shown]
    if left := len(found.rows) - start - len(shown):
        lines.append(f"  … {left} more rows: --limit {len(found.rows)} shows all")
    return lines


def _row_line(row: TraceRow, metric: Metric) -> str:
    mark = ">" if row.beyond else " "
    about = "~" if row.sampled else " "
    value: float | None = getattr(row, metric.value)
    figure = "-" if value is None else f"{value:.3g}"
    error = "-" if row.relative_error is None else f"{row.relative_error:.1e}"
    name = f"{row.module} {row.tensor}" + (f" call {row.call}" if row.call else "")
    problem = f": {row.problem}" if row.problem else ""
    return (
        f"{mark} {row.run:>4} {about}{error:>9} {about}{figure:>9}  {name} ({row.partner}){problem}"
    )


def _summary_of_rows(found: TraceComparison) -> str:
    compared = sum(row.relative_error is not None for row in found.rows)
    if found.exit_code == 0:
        return f"PASS: {compared} tensors agree (relative error up to {found.limit:.0e})"
    if not compared:
        return "nothing was compared"
    if not found.differing:
        return f"FAIL: {compared} tensors agree, {len(found.missing)} missing"
    first = found.differing[0]
    return (
        f"FAIL: {len(found.differing)} of {len(found.rows)} tensors differ (relative error above "
        f"{found.limit:.0e}); the first is {first.module} {first.tensor}"
    )
