"""Finding the first module that goes wrong, from recorded sketches: no reference is needed.

Parents come first: only the first module whose input is within and whose output is beyond the limit
is looked into, and the same holds for its children in turn. When no child is at fault, the parent's
own code is: what it does between its children.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapshot_tool.core.localisation import Localisation, ModuleErrors
from snapshot_tool.core.sketch import Sketch, relative_error
from snapshot_tool.core.taps import Tap


def localise(
    case: str, golden: Sequence[Tap], candidate: Mapping[str, Tap], names: Mapping[str, str]
) -> Localisation:
    """Compare a candidate's taps with the golden's, which are in the order modules finish.

    names: the candidate's name of each module, by the reference's.
    """
    modules = tuple(_errors(tap, candidate.get(tap.module), names) for tap in golden)
    path = _descend(modules, "")
    culprit = path[-1] if path else None
    return Localisation(
        case=case,
        culprit=culprit,
        own_code=culprit is not None and bool(_children(modules, culprit.module)),
        between=culprit is None and any(module.output_beyond for module in modules),
        heals=bool(path) and _heals(modules, path),
        modules=modules,
    )


def _errors(golden: Tap, other: Tap | None, names: Mapping[str, str]) -> ModuleErrors:
    return ModuleErrors(
        golden.module,
        names.get(golden.module, ""),
        _error(golden.input, other.input if other else None),
        _error(golden.output, other.output if other else None),
    )


def _error(golden: Sketch | None, other: Sketch | None) -> float | None:
    if golden is None or other is None:
        return None
    if other.shape[0] == 1 != golden.shape[0] and other.shape[1:] == golden.shape[1:]:
        # One row that stands for the whole batch, such as position embeddings: its sketch says
        # nothing about the batch's, and what it is added to shows whether it is right.
        return None
    return relative_error(golden, other)


def _descend(modules: Sequence[ModuleErrors], parent: str) -> list[ModuleErrors]:
    """Return the way from `parent` down to the innermost culprit."""
    for child in _children(modules, parent):
        if child.is_culprit:
            return [child, *_descend(modules, child.module)]
        # A module may run before the parent that it is named under, as token embeddings do: what
        # the parent is given is then wrong already.
        if not child.input_within and (found := _descend(modules, child.module)):
            return found
    return []


def _children(modules: Sequence[ModuleErrors], parent: str) -> list[ModuleErrors]:
    """Return the compared modules right below `parent`, in order of execution.

    A module that cannot be compared (a list of layers, the model as a whole) is seen through.
    """
    compared = {m.module for m in modules if m.output_error is not None}
    return [m for m in modules if m.module in compared and _parent(m.module, compared) == parent]


def _parent(module: str, compared: set[str]) -> str:
    while "." in module:
        module = module.rpartition(".")[0]
        if module in compared:
            return module
    return ""


def _heals(modules: Sequence[ModuleErrors], path: Sequence[ModuleErrors]) -> bool:
    """Tell whether all that runs after the culprit's outermost module agrees with the golden.

    An error that reaches nothing is no fault of the model: the module is laid out otherwise.
    """
    top = _children(modules, "")
    later = top[top.index(path[0]) + 1 :] if path[0] in top else []
    return bool(later) and all(m.input_within and not m.output_beyond for m in later)
