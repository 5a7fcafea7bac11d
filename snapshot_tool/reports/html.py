"""A check as one HTML file that opens offline: the same record as the text and the JSON.

Everything that comes from a golden set or a candidate is escaped by Jinja2. The page's policy lets
no script run but its own, so that a prompt that got past the escaping would still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.localisation import ModuleErrors
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import ErrorMap, Result, TokenChoice, Verdict, tolerance_used
from snapshot_tool.reports import plots
from snapshot_tool.reports import text as run_text
from snapshot_tool.reports.preview import CaseStory

if TYPE_CHECKING:
    from jinja2 import Environment


_COLUMNS = (
    *("differ", "of", "max abs", "max rel", "rms", "cosine", "tolerance used", "atol", "rtol"),
    *("error, oracle", "reference's own", "allowed"),
)


def run_to_html(report: CheckReport, stories: Mapping[str, CaseStory], *, base: str) -> str:
    """Return the page.

    stories: what is known of the cases, by name; base: a folder, below which paths are shortened.
    """
    plots.require_plotting()
    environment = _environment()
    script = _source(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    cases = [
        _case(row, f"c{place}", stories.get(row.case))
        for place, row in enumerate(run_text.grid(report))
    ]
    return environment.get_template("check.html").render(
        report=report,
        summary=run_text.summary_line(report),
        head=[(line[:14].strip(), line[14:]) for line in run_text.header_lines(report, base=base)],
        first=_first(report, cases),
        conclusion=_conclusion(report),
        weights=run_text.weight_lines(report),
        verdicts=[v.value for v in Verdict if any(r.verdict is v for r in report.results)],
        phases=[phase.value for phase in PHASES],
        cases=cases,
        legend=run_text.LEGEND,
        modules=_modules(report),
        exploration=_exploration(report),
        columns=_COLUMNS,
        environment=sorted(report.environment.items()),
        style=_markup(_source(environment, "report.css")),
        script=_markup(script),
        script_digest=digest,
    )


def _environment() -> Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("snapshot_tool.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None  # noqa: S101 - set above
    return environment.loader.get_source(environment, name)[0]


def _markup(text: str) -> Any:
    """Mark what this package itself wrote as needing no escape."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - our own style, script and plots


@dataclass(frozen=True, slots=True)
class _Cell:
    """One phase of one case in the grid; verdict is empty where there is nothing."""

    anchor: str
    verdict: str
    text: str


@dataclass(frozen=True, slots=True)
class _Sides:
    """Both generations, token by token, the step at which they part, and whether by chance."""

    golden: tuple[str, ...]
    candidate: tuple[str, ...]
    step: int
    kind: str


@dataclass(frozen=True, slots=True)
class _Plots:
    """An error map's plots."""

    map: Any
    sizes: Any


@dataclass(frozen=True, slots=True)
class _Axes:
    """What rows and columns of an error map are."""

    rows: str
    columns: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One result of a phase."""

    name: str
    verdict: Verdict
    reason: str
    figures: tuple[str, ...]
    axes: _Axes
    plots: _Plots | None
    sides: _Sides | None


@dataclass(frozen=True, slots=True)
class _Phase:
    """One phase of one case."""

    name: str
    anchor: str
    verdict: Verdict
    tensors: tuple[_Tensor, ...]

    @property
    def has_figures(self) -> bool:
        """Whether anything was measured."""
        return any(tensor.figures for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class _Case:
    """One case: its row in the grid and its details."""

    name: str
    anchor: str
    verdict: Verdict
    verdicts: str
    search: str
    facts: str
    story: CaseStory | None
    cells: tuple[_Cell, ...]
    phases: tuple[_Phase, ...]


def _case(row: run_text.Row, anchor: str, story: CaseStory | None) -> _Case:
    reasons = " ".join(result.reason for result in row.results)
    return _Case(
        name=row.case,
        anchor=anchor,
        verdict=row.verdict,
        verdicts=" ".join(sorted({result.verdict.value for result in row.results})),
        search=f"{row.case} {story.text if story else ''} {reasons}",
        facts=_facts(story) if story else "",
        story=story,
        cells=tuple(
            _Cell(f"{anchor}-{cell.phase}", cell.verdict or "", cell.text) for cell in row.cells
        ),
        phases=tuple(_phases(row, anchor)),
    )


def _facts(story: CaseStory) -> str:
    counts = ((len(story.pictures), "image"), (story.tiles, "tile"), (story.tokens, "token"))
    return ", ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts)


def _phases(row: run_text.Row, anchor: str) -> Iterator[_Phase]:
    for phase in PHASES:
        found = [result for result in row.results if result.phase is phase]
        if found:
            tensors = tuple(_tensor(result) for result in found)
            verdict = run_text.worst_verdict(found)
            yield _Phase(phase.value, f"{anchor}-{phase}", verdict, tensors)


def _tensor(result: Result) -> _Tensor:
    errors = result.comparison.errors if result.comparison else None
    axes = _axes(result)
    return _Tensor(
        result.tensor,
        result.verdict,
        result.reason,
        _figures(result),
        axes,
        _draw(errors, axes),
        _sides(result),
    )


def _sides(result: Result) -> _Sides | None:
    found = result.divergence
    if found is None:
        return None
    return _Sides(_texts(found.golden), _texts(found.candidate), found.step, found.kind.value)


def _texts(tokens: Sequence[TokenChoice]) -> tuple[str, ...]:
    """Return the tokens' texts, or their numbers, each with a blank, where they have none."""
    return tuple(f"{token.token} " if token.text is None else token.text for token in tokens)


def _draw(errors: ErrorMap | None, axes: _Axes) -> _Plots | None:
    if errors is None:
        return None
    return _Plots(
        _markup(plots.plot_error_map(errors, rows=axes.rows, columns=axes.columns)),
        _markup(plots.plot_error_sizes(errors)),
    )


def _axes(result: Result) -> _Axes:
    """Name the axes of a phase's maps: see core.error_map.ErrorMap."""
    if result.phase is Phase.FORWARD:
        if result.tensor == "logits":
            return _Axes("", "vocabulary entry")
        return _Axes("record of a position", "position of the prompt")
    if result.phase is Phase.PREPROCESSING:
        return _Axes("tile", "pixel, row by row", "; every channel")
    return _Axes("tile", "position", "; over the whole width")


def _figures(result: Result) -> tuple[str, ...]:
    comparison, tolerance, oracle = result.comparison, result.tolerance, result.oracle
    if comparison is None or tolerance is None:
        return ()
    used = tolerance_used(result)
    values = (
        *(comparison.mismatched, comparison.numel, comparison.max_abs, comparison.max_rel),
        *(comparison.rmse, comparison.cosine, used, tolerance.atol, tolerance.rtol),
        *((oracle.error, oracle.reference_error, oracle.limit) if oracle else (None,) * 3),
    )
    return tuple(
        "" if v is None else f"{v:d}" if isinstance(v, int) else f"{v:.3g}" for v in values
    )


def _first(report: CheckReport, cases: list[_Case]) -> Mapping[str, str] | None:
    first = report.divergence
    if first is None:
        return None
    anchors = (case.anchor for case in cases if case.name == first.case)
    asked = report.exploration is not None and first in report.exploration.results
    return {
        "anchor": "exploration" if asked else f"{next(anchors)}-{first.phase}",
        "phase": first.phase.value,
        "case": first.case,
    }


def _exploration(report: CheckReport) -> list[Mapping[str, Any]]:
    return [
        {
            "kind": kind.kind,
            "asked": kind.asked,
            "verdict": kind.verdict.value,
            "text": run_text.outcome(kind.results)[0],
            "smallest": kind.failure.tensor if kind.failure else "",
            "reason": kind.failure.reason if kind.failure else "",
        }
        for kind in (report.exploration.kinds if report.exploration else ())
    ]


def _conclusion(report: CheckReport) -> str:
    found = report.localisation
    if found is None:
        return report.place
    label = run_text.curve(found)
    return run_text.conclusion(found, report.place) + (f" ({label})" if label else "")


def _modules(report: CheckReport) -> Mapping[str, Any] | None:
    found = report.localisation
    if found is None:
        return None
    culprit = found.first_bad or ""
    return {
        "case": found.case,
        "conclusion": _conclusion(report),
        "curve": _markup(plots.plot_divergence(found.modules, culprit=culprit)),
        "matched": str(found.mapping or ""),
        "rows": [_module(module, culprit) for module in found.modules],
    }


def _module(module: ModuleErrors, culprit: str) -> Mapping[str, Any]:
    return {
        "module": module.module,
        "candidate": module.candidate,
        "input": run_text.error_text(module.input_error),
        "output": run_text.error_text(module.output_error),
        "culprit": module.module == culprit,
    }
