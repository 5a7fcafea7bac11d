"""The report's plots by matplotlib, as SVG in the colours of the page, without scripts."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.results import SIZE_BOUNDS, ErrorMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# _as_svg replaces this colour by the page's text colour.
_INK = "#010203"
_GOOD, _BAD = "#3b7dd8", "#d8483b"
_BASELINE = 0.7  # elements, on a logarithmic scale
_RANGE = (1e-3, 1e3)  # times the tolerance: the same scale for all maps
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "snap",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def require_plotting() -> None:
    """Raise SnapError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise SnapError(
            "an HTML report needs matplotlib, which is not installed here",
            "in a checkout of snap: pip install '.[report]'",
        )


def plot_error_map(errors: ErrorMap, *, rows: str, columns: str) -> str:
    """Return a map of the greatest errors in units of the tolerance: red is beyond, blue within."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    low, high = _RANGE
    rows_of_cells = errors.rows
    several = len(rows_of_cells) > 1
    with _figure(3.0 if several else 1.2) as (figure, axes):
        image = axes.imshow(
            [[min(max(cell, low), high) for cell in row] for row in rows_of_cells],
            norm=LogNorm(low, high),
            cmap="RdBu_r",
            aspect="auto",
            interpolation="none",
            extent=(-0.5, errors.shape[1] - 0.5, errors.shape[0] - 0.5, -0.5),
        )
        axes.set_xlabel(columns)
        axes.set_ylabel(rows)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(left=several, labelleft=several)
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=12 if several else 5)
        bar.ax.set_yticks([low, 1, high], ["≤ 0.001", "1", "≥ 1000"])
        bar.ax.set_yticks([], minor=True)
        return _as_svg(figure)


def plot_error_sizes(errors: ErrorMap) -> str:
    """Return a histogram of all elements' errors in units of the tolerance."""
    step = math.log10(SIZE_BOUNDS[1] / SIZE_BOUNDS[0])
    edges = [math.log10(bound) for bound in SIZE_BOUNDS]
    edges = [edges[0] - step, *edges, edges[-1] + step]
    within = [edge < -step / 2 for edge in edges[:-1]]
    with _figure(2.4) as (figure, axes):
        for wanted, colour, name in ((True, _GOOD, "within"), (False, _BAD, "beyond")):
            # Not clipped: the page repeats the clip paths' names, and some are folded away.
            counts = [
                max(count, _BASELINE) if inside is wanted else _BASELINE
                for count, inside in zip(errors.counts, within, strict=True)
            ]
            total = sum(c for c, i in zip(errors.counts, within, strict=True) if i is wanted)
            axes.stairs(
                counts,
                edges,
                baseline=_BASELINE,
                fill=True,
                color=colour,
                label=f"{name}: {total}",
            )
        axes.axvline(0, color=_INK, linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        axes.set_ylim(bottom=_BASELINE)
        axes.set_yticks([], minor=True)
        axes.set_xticks([-4, -2, 0, 2, 4], ["≤ 0.0001", "0.01", "1", "100", "≥ 10000"])
        axes.set_xlabel("error in units of the tolerance")
        axes.set_ylabel("elements")
        axes.legend(frameon=False, fontsize=8)
        return _as_svg(figure)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, Axes]]:
    """Open a figure of this height in inches."""
    width = 5.2
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(
            left=0.7 / width, right=1 - 0.25 / width, bottom=0.5 / height, top=1 - 0.1 / height
        )
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        yield figure, axes


def _as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for the inside of a page.

    _INK becomes the page's text colour. Ids of groups are removed, because a page has several
    figures.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
