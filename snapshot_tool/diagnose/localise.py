"""Finding the first module that goes wrong, from recorded sketches: no reference is needed.

Parents come first: only the first module whose input is within and whose output is beyond the limit
is looked into, and the same holds for its children in turn. When no child is at fault, the parent's
own code is: what it does between its children, or that it leaves one of them out.

A fault in code that every layer runs may stay hidden in the first of them, where a large residual
covers it: once it is found, the same module of an earlier layer is named if it errs already.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from snapshot_tool.base.localisation import ERROR_LIMIT, Localisation, ModuleErrors, ModuleMapping
from snapshot_tool.base.protocol import Candidate, CaseInputs
from snapshot_tool.base.sketch import Sketch, relative_error
from snapshot_tool.base.tap import Side, Sketchbook, Tap
from snapshot_tool.diagnose.align import Pair, pair_modules
from snapshot_tool.taps.hooks import tap_modules

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Observation:
    """A candidate's taps, by the reference's names, and how these were found."""

    taps: Mapping[str, Tap]
    mapping: ModuleMapping


def observe(
    candidate: Candidate, inputs: CaseInputs, golden: Sequence[Tap], book: Sketchbook
) -> Observation | None:
    """Run forward and return what the modules did; None where the candidate shows none.

    golden: the reference's taps on the same inputs, in order of execution.
    book: keeps what is seen, under the candidate's own names where these are all it knows.
    """
    look = getattr(candidate, "observe_forward", None)
    if callable(look):
        names = look(inputs, book)
        return Observation(book.by_module(), ModuleMapping(names))
    show = getattr(candidate, "modules", None)
    if not callable(show):
        return None
    with tap_modules(show(), PartsObserver(book, fused_widths(golden), output_shapes(golden))):
        candidate.forward(inputs)
    return infer(golden, with_inputs(book.taps()))


def infer(golden: Sequence[Tap], other: Sequence[Tap]) -> Observation:
    """Match the modules of a run with the reference's, both in order of execution."""
    pairs = pair_modules(golden, other)
    mapping = ModuleMapping(
        names={pair.golden.module: pair.other.module for pair in pairs},
        inferred=True,
        confirmed=sum(pair.confirmed for pair in pairs),
        modules=len(golden),
    )
    return Observation({pair.golden.module: _comparable(pair) for pair in pairs}, mapping)


def _comparable(pair: Pair) -> Tap:
    """Return the partner's tap without what says nothing of it.

    Values in another order are no error, and a first argument of another shape is another argument.
    """
    given, wanted = pair.other.input, pair.golden.input
    other_argument = given is not None and wanted is not None and given.shape != wanted.shape
    return replace(
        pair.other,
        input=None if other_argument else given,
        output=None if pair.reordered else pair.other.output,
    )


@dataclass(frozen=True, slots=True)
class PartsObserver:
    """An observer that also shows the parts of outputs that several modules may be fused into.

    A part is shown as "<module>[<first column>:<end>]".

    Args:
        book: what keeps the sketches.
        widths: into what an output of a width may fall (see `fused_widths`).
        shapes: of the reference's outputs.
    """

    book: Sketchbook
    widths: Mapping[int, Sequence[tuple[int, ...]]]
    shapes: Collection[tuple[int, ...]]

    def __call__(self, module: str, side: Side, tensor: torch.Tensor) -> None:
        """Show the whole, then its parts."""
        if side is Side.INPUT or not tensor.dim():
            self.book(module, side, tensor)
            return
        self.book(module, side, as_batch(tensor, self.shapes))
        for widths in self.widths.get(tensor.shape[-1], ()):
            ends = list(itertools.accumulate(widths))
            for start, end in zip([0, *ends], ends, strict=False):
                self.book(f"{module}[{start}:{end}]", side, tensor[..., start:end])


def output_shapes(golden: Sequence[Tap]) -> set[tuple[int, ...]]:
    """Return the shapes of all outputs."""
    return {tap.output.shape for tap in golden if tap.output is not None}


def as_batch(tensor: torch.Tensor, shapes: Collection[tuple[int, ...]]) -> torch.Tensor:
    """Return one row that stands for a batch, such as position embeddings, as that batch."""
    one = tuple(tensor.shape)
    batches = [shape for shape in shapes if shape[1:] == one[1:]]
    if one[:1] != (1,) or one in shapes or len(batches) != 1:
        return tensor
    return tensor.expand(batches[0])


def fused_widths(golden: Sequence[Tap]) -> dict[int, list[tuple[int, ...]]]:
    """Return the output widths of modules that could be fused into one, by their sum.

    They are those side by side that are given the very same, such as query, key and value.
    """
    groups: dict[object, list[int]] = {}
    for tap in golden:
        if tap.input is not None and tap.output is not None:
            parent = tap.module.rpartition(".")[0]
            key = parent, tap.input.shape, tuple(tap.input.projection.tolist())
            groups.setdefault(key, []).append(tap.output.shape[-1])
    found: dict[int, list[tuple[int, ...]]] = {}
    for widths in dict.fromkeys(tuple(group) for group in groups.values() if len(group) > 1):
        found.setdefault(sum(widths), []).append(widths)
    return found


def with_inputs(taps: Sequence[Tap]) -> list[Tap]:
    """Give the parts of a module the module's own input."""
    inputs = {tap.module: tap.input for tap in taps}
    return [replace(tap, input=inputs.get(tap.module.partition("[")[0])) for tap in taps]


Limits = Mapping[str, tuple[float, float]]
_LIMITS = (ERROR_LIMIT, ERROR_LIMIT)


def localise(
    case: str,
    golden: Sequence[Tap],
    candidate: Mapping[str, Tap],
    names: Mapping[str, str],
    *,
    unfinished: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> Localisation:
    """Compare a candidate's taps with the golden's, which are in the order modules finish.

    names: the candidate's name of each module, by the reference's.
    unfinished: the modules that were running, outermost first, when the candidate raised; None
        where it did not.
    limits: what a module's errors may be, by its name: those of the input and of the output; for
        any other module they are ERROR_LIMIT.
    """
    modules = tuple(
        _errors(tap, candidate.get(tap.module), names, (limits or {}).get(tap.module, _LIMITS))
        for tap in golden
    )
    path = _descend(modules, "")
    first = _first_alike(modules, path[-1]) if path else None
    raised = first is None and unfinished is not None
    if raised:
        first = _innermost(modules, unfinished or ())
    parent = first.module if first else ""
    skipped = None if raised else _skipped(modules, parent, golden, candidate)
    neighbours = _neighbours(modules, parent) if skipped is None else ("", "")
    return Localisation(
        case=case,
        first_bad=skipped.module if skipped else first.module if first else None,
        own_code=skipped is None and first is not None and bool(_children(modules, parent)),
        between=skipped is None
        and first is None
        and (raised or any(module.output_beyond for module in modules)),
        recovers=bool(path) and _recovers(modules, path),
        modules=modules,
        neighbours=neighbours,
        skipped=skipped is not None,
        raised=raised,
    )


def _errors(
    golden: Tap, other: Tap | None, names: Mapping[str, str], limits: tuple[float, float]
) -> ModuleErrors:
    given = golden.input, other.input if other else None
    if given[0] and given[1] and len(given[0].shape) != len(given[1].shape):
        # Token ids here and embeddings there: it says nothing, and what comes out of it does.
        given = None, None
    return ModuleErrors(
        golden.module,
        names.get(golden.module, ""),
        _error(*given),
        _error(golden.output, other.output if other else None),
        *limits,
    )


def _error(golden: Sketch | None, other: Sketch | None) -> float | None:
    if golden is None or other is None:
        return None
    if other.shape[0] == 1 != golden.shape[0] and other.shape[1:] == golden.shape[1:]:
        # One row that stands for the whole batch, sketched without knowing of it: its sketch says
        # nothing about the batch's, and what it is added to shows whether it is right.
        return None
    return relative_error(golden, other)


def _descend(modules: Sequence[ModuleErrors], parent: str) -> list[ModuleErrors]:
    """Return the way from `parent` down to the innermost first bad module."""
    for child in _children(modules, parent):
        if child.is_first_bad:
            return [child, *_descend(modules, child.module)]
        if not child.input_within:
            # A module may run before the parent that it is named under, as token embeddings do:
            # what the parent is given is then wrong already. Otherwise the error is older than the
            # child, and all that comes later.
            return _descend(modules, child.module)
    return []


def _first_alike(modules: Sequence[ModuleErrors], bad: ModuleErrors) -> ModuleErrors:
    """Return the first bad module that has the same name but for the numbers of layers."""
    kind = _kind(bad.module)
    return next((m for m in modules if m.is_first_bad and _kind(m.module) == kind), bad)


def _kind(module: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", module)


def _children(modules: Sequence[ModuleErrors], parent: str) -> list[ModuleErrors]:
    """Return the compared modules right below `parent`, in order of execution.

    A module that cannot be compared (a list of layers, the model as a whole) is seen through.
    """
    compared = {m.module for m in modules if m.output_error is not None}
    return [m for m in modules if m.module in compared and _parent(m.module, compared) == parent]


def _known_children(modules: Sequence[ModuleErrors], parent: str) -> list[ModuleErrors]:
    """Return the modules right below `parent` that the candidate has, whether they ran or not."""
    known = {m.module for m in modules if m.output_error is not None or m.candidate}
    return [m for m in modules if m.module in known and _parent(m.module, known) == parent]


def _parent(module: str, known: set[str]) -> str:
    while "." in module:
        module = module.rpartition(".")[0]
        if module in known:
            return module
    return ""


def _innermost(modules: Sequence[ModuleErrors], unfinished: Sequence[str]) -> ModuleErrors | None:
    """Return the innermost module that was running when the candidate raised."""
    by_name = {m.module: m for m in modules}
    running = [by_name[name] for name in unfinished if name in by_name]
    return running[-1] if running else None


def _skipped(
    modules: Sequence[ModuleErrors],
    parent: str,
    golden: Sequence[Tap],
    candidate: Mapping[str, Tap],
) -> ModuleErrors | None:
    """Return the child that the candidate has and passes over, as values confirm.

    What comes after it is then given what it should have been given itself.
    """
    taps = {tap.module: tap for tap in golden}
    children = _known_children(modules, parent)
    for place, child in enumerate(children):
        if child.output_error is not None:
            continue
        after = next((m for m in children[place + 1 :] if m.output_error is not None), None)
        if after:
            right, actual = taps[after.module].input, candidate[after.module].input
        elif parent:
            right, actual = taps[parent].output, candidate[parent].output
        else:
            continue
        given = taps[child.module].input
        if _alike(given, actual) and not _alike(given, right):
            return child
    return None


def _alike(one: Sketch | None, other: Sketch | None) -> bool:
    error = _error(one, other)
    return error is not None and error <= ERROR_LIMIT


def _neighbours(modules: Sequence[ModuleErrors], parent: str) -> tuple[str, str]:
    """Return the last child of `parent` that is right and the next one, which is given an error.

    Either is "" where there is none: the error arises before the first or after the last one.
    """
    children = _known_children(modules, parent)
    right = -1
    for place, child in enumerate(children):
        if not child.input_within or child.output_beyond:
            break
        if child.output_error is not None:
            right = place
    names = ["", *(child.module for child in children), ""]
    return names[right + 1], names[right + 2]


def _recovers(modules: Sequence[ModuleErrors], path: Sequence[ModuleErrors]) -> bool:
    """Tell whether all that runs after the outermost bad module agrees with the golden.

    An error that reaches nothing is no fault of the model: the module is laid out otherwise.
    """
    top = _children(modules, "")
    later = top[top.index(path[0]) + 1 :] if path[0] in top else []
    return bool(later) and all(m.input_within and not m.output_beyond for m in later)
