"""Find the first bad module from recorded sketches, without the reference.

This is the first module to finish with a right input and a wrong output. Children finish before the
module around them, so it is the innermost one, even if a residual connection hides the error from
the module around it. If it has children and none is bad, its own code is: the code between its
children, or a child that it does not run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch

from snapshot_tool.base.errors import place_of_class
from snapshot_tool.base.localisation import (
    ERROR_LIMIT,
    HIDDEN_BY_RESIDUAL,
    USED_BY_ROUNDING,
    Localisation,
    ModuleErrors,
    ModuleMapping,
)
from snapshot_tool.base.protocol import Candidate, CaseInputs, Side
from snapshot_tool.diagnose.align import enclosing, pair_modules
from snapshot_tool.goldens.golden import Golden, tap_limits
from snapshot_tool.taps.hooks import tap_modules
from snapshot_tool.taps.sketches import Sketch, Tap, TapRecorder, relative_error, shapes_of


def localise_case(
    candidate: Candidate, golden: Golden, case: str, *, dtype: str, failed: bool = False
) -> Localisation | None:
    """Compare the modules of a case; return None if the set or the candidate has none.

    dtype: the candidate's, which selects the oracle's limits. failed: see `localise`.
    """
    golden_taps = golden.taps(case)
    if not golden_taps:
        return None
    limits = tap_limits(golden, case, dtype=dtype)
    inputs = golden.inputs(case)
    recorder = TapRecorder(golden.manifest.taps.seed, inputs.attention_mask, shapes_of(golden_taps))
    try:
        with torch.inference_mode():
            seen = observe(candidate, inputs, golden_taps, recorder)
    except Exception:  # the results already have it as an error of its phase
        if not candidate.supports("observe_forward"):
            return None
        unfinished = recorder.unfinished()
        return localise(
            case, golden_taps, recorder.by_module(), {}, unfinished=unfinished, limits=limits
        )
    if seen is None:
        return None
    found = localise(case, golden_taps, seen.taps, seen.mapping.names, failed=failed, limits=limits)
    mapping = seen.mapping.summary(found.not_compared)
    return _with_source(msgspec.structs.replace(found, mapping=mapping), candidate)


def name_wrong_module(
    found: Localisation, wrong: Sequence[str], candidate: Candidate
) -> Localisation:
    """Return where the error arises if some modules are wrong by themselves.

    The first of them is named if the recorded inputs show only a guess, or a module after it: a
    small error inside of a block is beyond a limit only later.

    wrong: their names.
    """
    order = [errors.module for errors in found.modules]
    first = min((order.index(name) for name in wrong if name in order), default=None)
    if first is None or found.first_bad is None or found.raised:
        return found
    if not found.guess and first >= order.index(found.first_bad):
        return found
    named = msgspec.structs.replace(
        found,
        first_bad=order[first],
        own_code=False,
        skipped=False,
        guess=False,
        neighbours=("", ""),
    )
    return _with_source(named, candidate)


def _with_source(found: Localisation, candidate: Candidate) -> Localisation:
    """Add the class of the first bad module and its source line."""
    bad = found.first_bad_module
    if bad is None or not bad.candidate or not candidate.supports("modules"):
        return found
    modules = dict(candidate.modules().named_modules())
    parts = bad.candidate.partition("[")[0].split(".")  # [0:64] is a part of an output
    around = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    kinds = [type(modules[name]) for name in around if name in modules]
    places = [place for kind in kinds if (place := place_of_class(kind))]
    return msgspec.structs.replace(
        found,
        module_class=kinds[0].__name__ if kinds else "",
        source=next(iter(places), None),
    )


@dataclass(frozen=True, slots=True)
class Observation:
    """A candidate's taps by the reference's names, and how the modules were matched."""

    taps: Mapping[str, Tap]
    mapping: ModuleMapping


def observe(
    candidate: Candidate, inputs: CaseInputs, golden: Sequence[Tap], recorder: TapRecorder
) -> Observation | None:
    """Run forward and return the taps of its modules, or None if the candidate has none.

    golden: the reference's taps on the same inputs, in order of execution.
    recorder: collects the taps, under the candidate's own names if modules are inferred.
    """
    if candidate.supports("observe_forward"):
        names = candidate.observe_forward(inputs, recorder)
        # An older FMS may name no module as the family declares.
        if names or not candidate.supports("modules"):
            return Observation(recorder.by_module(), ModuleMapping(names))
    if not candidate.supports("modules"):
        return None
    widths, shapes = fused_widths(golden), output_shapes(golden)

    def record(module: str, side: Side, tensor: torch.Tensor) -> None:
        if side is Side.INPUT:
            recorder(module, side, tensor)
            return
        recorder(module, side, as_batch(tensor, shapes))
        for columns, part in fused_parts(tensor, widths):
            recorder(f"{module}{columns}", side, part)

    with tap_modules(candidate.modules(), record):
        candidate.forward(inputs)
    taps = recorder.taps()
    given = {tap.module: tap.input for tap in taps}
    # A part of an output has the input of its module.
    taps = [replace(tap, input=given.get(tap.module.partition("[")[0])) for tap in taps]
    return infer(golden, taps)


def infer(golden: Sequence[Tap], other: Sequence[Tap]) -> Observation:
    """Match the modules of a run with the reference's, both in order of execution.

    Outputs with the same values in another order are not errors and are left out of the taps. So
    are inputs of another shape, because the first argument is then another one.
    """
    pairs = pair_modules(golden, other)
    taps = {}
    for pair in pairs:
        mine, theirs = pair.golden.input, pair.other.input
        other_argument = mine is not None and theirs is not None and mine.shape != theirs.shape
        taps[pair.golden.module] = replace(
            pair.other,
            input=None if other_argument else theirs,
            output=None if pair.reordered else pair.other.output,
        )
    mapping = ModuleMapping(
        names={pair.golden.module: pair.other.module for pair in pairs},
        inferred=True,
        confirmed=sum(pair.confirmed for pair in pairs),
        modules=len(golden),
    )
    return Observation(taps, mapping)


def output_shapes(golden: Sequence[Tap]) -> set[tuple[int, ...]]:
    """Return the shapes of all outputs."""
    return {tap.output.shape for tap in golden if tap.output is not None}


def as_batch(tensor: torch.Tensor, shapes: Collection[tuple[int, ...]]) -> torch.Tensor:
    """Expand a single row that applies to a whole batch, such as position embeddings."""
    one = tuple(tensor.shape)
    batches = [shape for shape in shapes if shape[1:] == one[1:]]
    if one[:1] != (1,) or one in shapes or len(batches) != 1:
        return tensor
    return tensor.expand(batches[0])


FusedWidths = Mapping[int, Sequence[tuple[int, ...]]]


def fused_widths(golden: Sequence[Tap]) -> FusedWidths:
    """Return the output widths of modules that could be fused into one, by their sum.

    These are siblings with the same input, such as query, key and value.
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


def fused_parts(output: torch.Tensor, widths: FusedWidths) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parts of an output of fused modules, each with "[<first column>:<end>]"."""
    if not output.dim():
        return
    for parts in widths.get(output.shape[-1], ()):
        start = 0
        for width in parts:
            end = start + width
            yield f"[{start}:{end}]", output[..., start:end]
            start = end


def localise(
    case: str,
    golden: Sequence[Tap],
    candidate: Mapping[str, Tap],
    names: Mapping[str, str],
    *,
    unfinished: Sequence[str] | None = None,
    failed: bool = False,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> Localisation:
    """Compare a candidate's taps with the golden's, which are in the order modules finish.

    Args:
        case: the case that was run.
        golden: the golden's taps.
        candidate: the candidate's taps, by the reference's names.
        names: the candidate's name of each module, by the reference's.
        unfinished: the modules that were running when the candidate raised, outermost first; None
            if it did not raise.
        failed: whether an output of the forward pass fails. A module is then guessed if all are
            within their limits, but one is nearer to its limit than rounding explains.
        limits: the greatest errors of a module's input and output, by its name; by default
            ERROR_LIMIT.
    """
    limits = limits or {}
    modules = tuple(
        _errors(tap, candidate.get(tap.module), names, limits.get(tap.module, _LIMITS))
        for tap in golden
    )
    bad = _first_bad(modules)
    guess = _steepest_rise(modules) if failed and bad is None and not _beyond(modules) else None
    if guess:
        return Localisation(
            case=case,
            first_bad=guess.module,
            own_code=False,
            between=False,
            recovers=False,
            guess=True,
            modules=modules,
        )
    raised = bad is None and unfinished is not None
    if raised:
        running = {m.module: m for m in modules if m.module in (unfinished or ())}
        bad = next((running[name] for name in reversed(unfinished or ()) if name in running), None)
    parent = bad.module if bad else ""
    skipped = None if raised else _skipped(modules, parent, golden, candidate)
    first_bad = skipped or bad
    return Localisation(
        case=case,
        first_bad=first_bad.module if first_bad else None,
        own_code=skipped is None and bad is not None and bool(_children(modules, parent)),
        between=first_bad is None and (raised or _beyond(modules)),
        recovers=bad is not None and not raised and _recovers(modules, bad),
        modules=modules,
        neighbours=("", "") if skipped else _neighbours(modules, parent),
        skipped=skipped is not None,
        raised=raised,
    )


_LIMITS = (ERROR_LIMIT, ERROR_LIMIT)


def _errors(
    golden: Tap, other: Tap | None, names: Mapping[str, str], limits: tuple[float, float]
) -> ModuleErrors:
    mine, theirs = golden.input, other.input if other else None
    if mine and theirs and len(mine.shape) != len(theirs.shape):
        # The input is ids on one side and embeddings on the other: compare only the output.
        theirs = None
    return ModuleErrors(
        golden.module,
        names.get(golden.module, ""),
        _error(mine, theirs),
        _error(golden.output, other.output if other else None),
        *limits,
    )


def _error(golden: Sketch | None, other: Sketch | None) -> float | None:
    if golden is None or other is None:
        return None
    if other.shape[0] == 1 != golden.shape[0] and other.shape[1:] == golden.shape[1:]:
        # A single row for the whole batch: the sketches cannot be compared, and an error appears in
        # the module that uses the row.
        return None
    return relative_error(golden, other)


def _first_bad(modules: Sequence[ModuleErrors]) -> ModuleErrors | None:
    """Return the innermost module in which the first error arises, or None.

    This is the first module to finish with an error, if its input is right; otherwise a module
    around it, whose own code is wrong. A module with only another layout counts if there is no
    other.
    """
    otherwise = []
    for module in modules:
        if module.input_within and not module.output_beyond:
            continue
        if not _recovers(modules, module):
            return module if module.input_within else _around(modules, module)
        otherwise.append(module)
    return next((module for module in otherwise if module.input_within), None)


def _beyond(modules: Sequence[ModuleErrors]) -> bool:
    return any(module.output_beyond for module in modules)


def _steepest_rise(modules: Sequence[ModuleErrors]) -> ModuleErrors | None:
    """Return the first of the modules with the greatest rise of the error, relative to the limits.

    Returns None if no module uses more of its limit than a correct port.
    """
    known = [m for m in modules if m.input_error is not None and m.output_error is not None]
    if not known or max(module.output_used for module in known) <= USED_BY_ROUNDING:
        return None
    rises = [m.output_used / max(m.input_used, USED_BY_ROUNDING / 4) for m in known]
    return next(m for m, rise in zip(known, rises, strict=True) if rise >= max(rises) / 2)


def _around(modules: Sequence[ModuleErrors], wrong: ModuleErrors) -> ModuleErrors | None:
    """Return the nearest module around `wrong` whose own input is right, or None.

    A module whose input cannot be compared is the second choice.
    """
    around = [m for m in reversed(_enclosing(modules, wrong)) if m.input_within]
    known = (module for module in around if module.input_error is not None)
    return next(known, around[0] if around else None)


def _enclosing(modules: Sequence[ModuleErrors], inner: ModuleErrors) -> list[ModuleErrors]:
    """Return the compared modules that contain a module, outermost first."""
    found = [
        m for m in modules if m.output_error is not None and inner.module.startswith(f"{m.module}.")
    ]
    return sorted(found, key=lambda module: len(module.module))


def _children(
    modules: Sequence[ModuleErrors], parent: str, *, or_known: bool = False
) -> list[ModuleErrors]:
    """Return the compared modules directly below `parent`, in order of execution.

    Modules that were not compared (a list of layers, the whole model) are replaced by their
    children. or_known: also return those that the candidate has but did not run.
    """
    names = {m.module for m in modules if m.output_error is not None or (or_known and m.candidate)}
    return [m for m in modules if m.module in names and enclosing(m.module, names) == parent]


def _skipped(
    modules: Sequence[ModuleErrors],
    parent: str,
    golden: Sequence[Tap],
    candidate: Mapping[str, Tap],
) -> ModuleErrors | None:
    """Return the child of `parent` that the candidate has but did not run, confirmed by values.

    The next module then has the child's input in place of its own.
    """
    taps = {tap.module: tap for tap in golden}
    children = _children(modules, parent, or_known=True)
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
    """Return the last right child of `parent`, and the next child, whose input is wrong.

    The first is "" if the error arises before the first child, the second if after the last one.
    """
    children = _children(modules, parent, or_known=True)
    right = -1
    for place, child in enumerate(children):
        if not child.input_within or child.output_beyond:
            break
        if child.output_error is not None:
            right = place
    names = ["", *(child.module for child in children), ""]
    return names[right + 1], names[right + 2]


def _recovers(modules: Sequence[ModuleErrors], bad: ModuleErrors) -> bool:
    """Return whether everything that finishes later in the parent of a bad module is right.

    An error without consequences is not a fault: the module has another layout. A small error may
    be real but hidden by a residual connection.
    """
    if not max(bad.input_error or 0.0, bad.output_error or 0.0) > HIDDEN_BY_RESIDUAL:
        return False
    holders = [module.module for module in _enclosing(modules, bad)]
    inside = f"{holders[-1]}." if holders else ""
    later = modules[modules.index(bad) + 1 :]
    around = [m for m in later if m.output_error is not None]
    around = [m for m in around if f"{m.module}.".startswith(inside)]
    return bool(around) and all(m.input_within and not m.output_beyond for m in around)
