"""The modules of a check for the page: a curve of their errors, and a tree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from snapshot_tool.base.localisation import ERROR_LIMIT, Localisation, ModuleErrors

# The area of the curve, in percent of the picture; the rest is for the labels of the axis.
_LEFT, _RIGHT, _TOP, _BOTTOM = 11.0, 99.0, 4.0, 96.0
_MOST_LABELS = 7


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A module on the curve.

    Args:
        index: its index in the order of execution.
        module: its errors.
        x: its position, in percent of the picture's width.
        y: the error of its output, in percent of the picture's height from the top.
        limit: the limit of this error, in the same unit.
    """

    index: int
    module: ModuleErrors
    x: float
    y: float
    limit: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The errors of all modules that were compared, on a logarithmic scale.

    Args:
        points: in order of execution.
        labels: the labels of the axis: text and position, like `CurvePoint.y`.
    """

    points: tuple[CurvePoint, ...]
    labels: tuple[tuple[str, float], ...]

    @property
    def pairs(self) -> Iterator[tuple[CurvePoint, CurvePoint]]:
        """Pairs of consecutive points."""
        return itertools.pairwise(self.points)


def draw_curve(found: Localisation) -> Curve:
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
    """A module in the tree, or a list of them.

    Args:
        name: the last part of its name.
        index: its place in the order of execution; None if it has no errors of its own.
        errors: its errors, or None.
        holds_first_bad: whether the first bad module is inside.
        children: the modules inside, by the next part of their names.
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


def build_tree(found: Localisation) -> ModuleNode:
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
