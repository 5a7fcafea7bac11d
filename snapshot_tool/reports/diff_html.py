"""What differs between two golden sets, as one HTML file that opens offline."""

from __future__ import annotations

from snapshot_tool.base.diff import SetDrift

_SHOWN = 500


def diff_to_html(drift: SetDrift) -> str:
    """Return the page. Nothing of a golden set is trusted: Jinja2 escapes every text."""
    # Only here: the other reports start without it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("snapshot_tool.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["used"] = lambda used: "" if used is None else f"{used:.2g}x"
    template = environment.get_template("diff.html")
    return template.render(drift=drift, parts=drift.parts(), shown=drift.drifts[:_SHOWN])
