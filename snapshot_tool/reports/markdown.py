"""A check as Markdown for the summary of a CI run or a comment, and as annotations of code."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

from snapshot_tool.base.errors import Place
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Verdict
from snapshot_tool.reports import text

_SIGNS = {Verdict.PASS: "✅", Verdict.FAIL: "❌", Verdict.ERROR: "💥", Verdict.SKIP: "⚪"}
_SHOWN_PROBLEMS = 100  # a comment on GitHub has at most 65,536 characters


def run_to_markdown(report: CheckReport, *, base: str) -> str:
    """Return verdict, module, commands and grid; failures, modules and facts are collapsed.

    base: paths below this folder are shortened.
    """
    cells = [
        [
            f"{_SIGNS[verdict]} {value.strip()}" if verdict else value.strip()
            for value, verdict in row
        ]
        for row in text.table(report, width=None)
    ]
    width = len(report.phases) + 1
    rows = [row + [""] * (width - len(row)) for row in cells]
    grid = ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    problems = text.problem_lines(report, verbose=True)
    facts = [f"{name:<14}{fact}" for name, fact in text.header_facts(report, base=base)]
    title = f"failures and skips, {len(problems[:_SHOWN_PROBLEMS])} of {len(problems)}"
    parts = [
        f"### {_SIGNS[report.verdict]} {escape(text.summary_line(report))}",
        "\n".join(f"{escape(line)}  " for line in text.source_lines(report)),
        _block([report.command, *report.next_commands]),
        "\n".join([grid[0], "|" + " --- |" * width, *grid[1:]]) if report.results else "",
        _details(title, problems[:_SHOWN_PROBLEMS]),
        _details("modules", text.localisation_lines(report.localisation, report.location)),
        _details("tracebacks", [r.traceback for r in report.bad if r.traceback][:5]),
        _details("what was checked", facts),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def escape(value: str) -> str:
    """Return a text with the special characters of Markdown escaped."""
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", html.escape(value, quote=False))


def _details(title: str, lines: Iterable[str]) -> str:
    """Return lines in a collapsed block; "" if there are none."""
    body = "\n".join(lines).strip("\n")
    return f"<details><summary>{title}</summary>\n\n{_block([body])}\n\n</details>" if body else ""


def _block(lines: Iterable[str]) -> str:
    # Blank lines would end the block.
    body = html.escape("\n".join(lines), quote=False).replace("\n\n", "\n&#8203;\n")
    return f"<pre>{body}</pre>"


def annotation_lines(report: CheckReport) -> Iterator[str]:
    """Yield GitHub's workflow commands: an error for each place that raised, and for the module.

    If no place is known, yield one error without a place. Yield nothing if the check did not fail.
    """
    if not report.verdict.is_bad:
        return
    raised = {result.place: result.reason for result in report.bad if result.place}
    for place, reason in raised.items():
        yield _annotation(place, reason)
    source = report.localisation.source if report.localisation else None
    if source or not raised:
        yield _annotation(source, text.summary_line(report))


def _annotation(place: Place | None, message: str) -> str:
    where = ""
    if place:
        file = _data(place.file).replace(":", "%3A").replace(",", "%2C")
        where = f" file={file},line={place.line}"
    return f"::error{where}::{_data(message)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
