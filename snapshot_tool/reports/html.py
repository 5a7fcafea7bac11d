"""A check as one HTML file that opens offline; templates/check.html reads the report.

Jinja2 escapes all text of a golden set or a candidate. The page's policy allows only its own
script, so even text that is not escaped cannot run one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources

import jinja2
from markupsafe import Markup

from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Result, overall_verdict
from snapshot_tool.reports import plots, text
from snapshot_tool.reports.modules import build_tree, draw_curve
from snapshot_tool.reports.preview import CasePreview

_COLUMNS = (
    *("differ", "of", "max abs", "max rel", "rms", "cosine", "tolerance used", "atol", "rtol"),
    *("error, oracle", "reference's own", "allowed"),
)


def page_environment() -> jinja2.Environment:
    """Return Jinja2's environment for the templates, which escapes all text."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("snapshot_tool.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def run_to_html(report: CheckReport, previews: Mapping[str, CasePreview], *, base: str) -> str:
    """Return the page.

    previews: prompts and images of the cases, by name. base: paths below this folder are shortened.
    """
    plots.require_plotting()
    templates = resources.files("snapshot_tool.reports") / "templates"
    style, script = ((templates / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    cases = text.grid(report)
    first, found = report.divergence, report.localisation
    anchor = "exploration"
    if first and first in report.results:
        anchor = f"c{[case for case, _ in cases].index(first.case)}-{first.phase}"
    # Without an oracle its three columns would be empty.
    columns = _COLUMNS if any(r.oracle for r in report.results) else _COLUMNS[:-3]
    environment = page_environment()
    environment.filters.update(
        error=text.error_text,
        figures=lambda result: _figures(result)[: len(columns)],
        overall=lambda results: overall_verdict(tuple(results)),
        outcome=text.outcome,
        plot=_plot_errors,
        verdict=text.worst_verdict,
    )
    return environment.get_template("check.html").render(
        report=report,
        cases=cases,
        first_anchor=anchor,
        previews=previews,
        phases=report.phases,
        verdicts=sorted({overall_verdict(tuple(results)).value for _, results in cases}),
        columns=columns,
        text=text,
        facts=text.header_facts(report, base=base),
        conclusion=_conclusion(report),
        summary=text.summary_line(report).partition(" ")[2],
        candidate=text.candidate_text(report.candidate, base=base),
        curve=draw_curve(found) if found else None,
        modules=build_tree(found) if found else None,
        style=Markup(style),  # noqa: S704 - our own style
        script=Markup(script),  # noqa: S704 - our own script
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _conclusion(report: CheckReport) -> str:
    found = report.localisation
    if found is None:
        return report.location
    label = text.curve(found)
    return text.conclusion(found, report.location) + (f" ({label})" if label else "")


def _figures(result: Result) -> list[str]:
    """Return a result's row of figures for _COLUMNS; empty if none were measured."""
    if result.numel is None:
        return []
    oracle = result.oracle
    measured: tuple[float | None, ...]
    measured = (result.max_abs, result.max_rel, result.rmse, result.cosine)
    if result.phase is Phase.GENERATE:
        measured = (None,) * 4  # a difference between token ids has no meaning
    values = (
        *(result.mismatched, result.numel, *measured),
        *(result.tolerance_used, result.atol, result.rtol),
        *((oracle.error, oracle.reference_error, oracle.limit) if oracle else (None,) * 3),
    )
    return ["" if v is None else f"{v:d}" if isinstance(v, int) else f"{v:.3g}" for v in values]


def _plot_errors(result: Result) -> dict[str, str]:
    """Return the plots of a result's error map, and the names of its axes; see ErrorMap.shape."""
    assert result.error_map is not None  # noqa: S101 - the template checks it
    rows, columns, note = "tile", "position", "; over the whole width"
    if result.phase is Phase.FORWARD:
        note = ""
        rows, columns = "record of a position", "position of the prompt"
        if result.tensor == "logits":
            rows, columns = "", "vocabulary entry"
    elif result.phase is Phase.PREPROCESSING:
        columns, note = "pixel, row by row", "; every channel"
    return {
        "map": Markup(plots.plot_error_map(result.error_map, rows=rows, columns=columns)),  # noqa: S704
        "sizes": Markup(plots.plot_error_sizes(result.error_map)),  # noqa: S704
        "rows": rows,
        "columns": columns,
        "note": note,
    }
