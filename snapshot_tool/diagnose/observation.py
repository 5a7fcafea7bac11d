"""What a candidate's modules compute, under the reference's names.

A candidate that knows the reference's names says so itself (`observe_forward`). Of one that only
shows its modules (`modules`) the names are inferred.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from snapshot_tool.base.mapping import ModuleMapping
from snapshot_tool.base.protocol import Candidate, CaseInputs
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
