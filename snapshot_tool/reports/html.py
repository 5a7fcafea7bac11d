"""A check as one HTML file that opens offline; templates/check.html reads the report.

Jinja2 escapes all text of a golden set or a candidate. The page's policy allows only its own
script, so even text that is not escaped cannot run one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from snapshot_tool.base.errors import GoldenNotFound
from snapshot_tool.base.localisation import ERROR_LIMIT, Localisation, ModuleErrors
from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.report import CheckReport, GoldenIdentity
from snapshot_tool.base.results import Result, overall_verdict
from snapshot_tool.goldens.find import Selection, find_goldens
from snapshot_tool.goldens.manifest import case_recipe
from snapshot_tool.reports import plots, text

if TYPE_CHECKING:
    from PIL import Image

    from snapshot_tool.goldens.golden import Golden

_COLUMNS = (
    *("differ", "of", "max abs", "max rel", "rms", "cosine", "tolerance used", "atol", "rtol"),
    *("error, oracle", "reference's own", "allowed"),
)
# The area of the curve, in percent of the picture; the rest is for the labels of the axis.
_LEFT, _RIGHT, _TOP, _BOTTOM = 11.0, 99.0, 4.0, 96.0
_MOST_LABELS = 7
_SIDE = 192  # pixels, so that a report with many cases stays small


@dataclass(frozen=True, slots=True)
class Picture:
    """A small version of an image as a data: address, with the original size in pixels."""

    data: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True, slots=True)
class CasePreview:
    """A case for a page.

    text: the tokenizer's input, before image placeholders were expanded. generated: the reference's
    new tokens as text. tokens: the length of the prompt. tiles: those of all images.
    """

    text: str
    generated: str
    tokens: int
    tiles: int
    pictures: tuple[Picture, ...]


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
    script = (resources.files("snapshot_tool.reports") / "templates/report.js").read_text("utf-8")
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
        overall=overall_verdict,
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
        verdicts=sorted({overall_verdict(results).value for _, results in cases}),
        columns=columns,
        text=text,
        facts=text.header_facts(report, base=base),
        conclusion=_conclusion(report),
        summary=text.summary_line(report).partition(" ")[2],
        candidate=text.candidate_text(report.candidate, base=base),
        curve=_draw_curve(found) if found else None,
        modules=_build_tree(found) if found else None,
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


def find_previews(report: CheckReport, goldens: Path) -> Mapping[str, CasePreview]:
    """Return previews of a check's cases by name, from its golden set.

    Raises GoldenNotFound if the set, or its version, is not in the folder.
    """
    # This imports torch, which a page without previews does not need.
    from snapshot_tool.goldens.golden import open_golden

    golden = open_golden(_find_folder(report.golden, goldens))
    names = {result.case for result in report.results}
    return {
        case.name: CasePreview(
            case.text, case.generated, case.tokens, case.tiles, tuple(_pictures(golden, case.name))
        )
        for case in golden.manifest.cases
        if case.name in names
    }


def _find_folder(identity: GoldenIdentity, goldens: Path) -> Path:
    selection = Selection(identity.checkpoint, identity.revision, identity.device, identity.dtype)
    for found in find_goldens(goldens):
        manifest, version = found.manifest, identity.golden_version
        if manifest and selection.matches(manifest) and manifest.golden_version == version:
            return found.folder
    raise GoldenNotFound(
        f"{goldens} does not have the golden set of the check, {identity}",
        "pass its folder: --goldens DIR",
    )


def _pictures(golden: Golden, case: str) -> Iterator[Picture]:
    recipes = case_recipe(golden.case(case)).recipe.images
    for image, recipe in zip(golden.images(case), recipes, strict=True):
        yield Picture(_data(image), image.width, image.height, f"{recipe.kind}, {recipe.mode}")


def _data(image: Image.Image) -> str:
    """Return a small version as a data: address; WebP, since noise makes large PNGs."""
    small = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P") else "RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A module on the curve, by its index in the order of execution.

    x is in percent of the picture's width. y, the error of its output, and the limit of this error
    are in percent of its height from the top.
    """

    index: int
    module: ModuleErrors
    x: float
    y: float
    limit: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The errors of all compared modules, on a logarithmic scale, in order of execution.

    labels: text and position on the axis, like `CurvePoint.y`.
    """

    points: tuple[CurvePoint, ...]
    labels: tuple[tuple[str, float], ...]

    @property
    def pairs(self) -> Iterator[tuple[CurvePoint, CurvePoint]]:
        """Pairs of consecutive points."""
        return itertools.pairwise(self.points)


def _draw_curve(found: Localisation) -> Curve:
    """Return the curve; NaN and infinite errors are drawn at its upper end."""
    compared = [(i, m) for i, m in enumerate(found.modules) if m.output_error is not None]
    values = [m.output_error or 0.0 for _, m in compared] + [m.output_limit for _, m in compared]
    known = [value for value in values if 0 < value < math.inf] or [ERROR_LIMIT]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1

    def height(value: float) -> float:
        if not value < 10.0**high:
            return _TOP
        above = high - max(math.log10(value) if value > 0 else low, low)
        return round(_TOP + above / (high - low) * (_BOTTOM - _TOP), 2)

    across = (_RIGHT - _LEFT) / max(len(compared) - 1, 1)
    points = tuple(
        CurvePoint(
            index,
            module,
            round(_LEFT + place * across, 2),
            height(module.output_error or 0.0),
            height(module.output_limit),
        )
        for place, (index, module) in enumerate(compared)
    )
    step = math.ceil((high - low) / _MOST_LABELS)
    labels = tuple((f"1e{power}", height(10.0**power)) for power in range(low, high, step))
    return Curve(points, labels)


@dataclass(slots=True)
class ModuleNode:
    """A module in the tree, or a list of them, by the last part of its name.

    index: its place in the order of execution; None if it has no errors of its own.
    holds_first_bad: whether the first bad module is inside. children: by the next part of their
    names.
    """

    name: str
    index: int | None = None
    errors: ModuleErrors | None = None
    holds_first_bad: bool = False
    children: dict[str, ModuleNode] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The colour: "fail" if its output, or one inside, is wrong; "pass"; "" if not compared."""
        states = {child.state for child in self.children.values()}
        if self.errors is not None and self.errors.output_error is not None:
            states.add("fail" if self.errors.output_beyond else "pass")
        return "fail" if "fail" in states else "pass" if "pass" in states else ""


def _build_tree(found: Localisation) -> ModuleNode:
    """Return the modules by the parts of their names; the root has no name."""
    root = ModuleNode("")
    for index, errors in enumerate(found.modules):
        node = root
        for part in errors.module.split("."):
            node = node.children.setdefault(part, ModuleNode(part))
        node.index, node.errors = index, errors
    node, root.holds_first_bad = root, True
    for part in found.module.split(".") if found.module else []:
        if part not in node.children:
            break
        node = node.children[part]
        node.holds_first_bad = True
    return root
