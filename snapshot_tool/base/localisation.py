"""Where a fault is: the module whose input is still right and whose output is not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import msgspec

from snapshot_tool.base.errors import Place


@dataclass(frozen=True, slots=True)
class ModuleMapping:
    """How modules were matched.

    Args:
        names: the candidate's name of each module that has a partner, by the reference's.
        inferred: whether shapes, order of execution and values matched them, not names.
        by: whose names matched them.
        confirmed: how many partners computed the same values.
        modules: how many modules of the reference looked for a partner.
    """

    names: Mapping[str, str]
    inferred: bool = False
    confirmed: int = 0
    modules: int = 0
    by: str = "the family's names"

    def __str__(self) -> str:
        """Return how they were matched, in words."""
        return str(self.summary()) if self.inferred else f"modules matched by {self.by}"

    def summary(self, not_compared: tuple[str, ...] = ()) -> MappingSummary:
        """Return the numbers; not_compared: the reference's modules that have no figure."""
        return MappingSummary(
            self.inferred, len(self.names), self.confirmed, self.modules, not_compared
        )


class MappingSummary(msgspec.Struct, frozen=True):
    """How the modules of a check were matched.

    Args:
        inferred: whether shapes, order of execution and values matched them, not the family's
            names.
        matched: how many modules of the reference have a partner.
        confirmed: how many partners computed the same values, if inferred.
        modules: how many modules of the reference looked for a partner, if inferred.
        not_compared: the reference's modules that have no figure.
    """

    inferred: bool
    matched: int
    confirmed: int
    modules: int
    not_compared: tuple[str, ...]

    def __str__(self) -> str:
        """Return how they were matched, in words."""
        if not self.inferred:
            return "modules matched by the family's names"
        return (
            "modules inferred from shapes and order, "
            f"{self.confirmed} of {self.modules} confirmed by values"
        )


# Errors are relative to the golden tensor's root mean square. Rounding alone stays near 1e-6 in
# float32; one weight off by a thousandth shows as 1e-3 or more.
ERROR_LIMIT = 3e-5
ERROR_LIMIT_ULPS = 256  # the same in units in the last place, for other dtypes
# The greatest error of a module that what is added to its output may hide.
HIDDEN_BY_RESIDUAL = 1e-2
# The most of its limit that a module of a right port was seen to use is 0.23.
USED_BY_ROUNDING = 0.3
# With an oracle every module has a limit of its own: so many times what rounding does to it there.
NOISE_FACTOR = 8.0
NO_NOISE = -1.0
NOISE_FLOOR_ULPS = 2.0  # if the reference's rounding happens to be none


def noise_limit(noise: float, *, eps: float) -> float:
    """Return the limit of a module's error, from the reference's own; eps: of the dtype.

    NO_NOISE stands for a side that the oracle does not have.
    """
    return ERROR_LIMIT if noise == NO_NOISE else max(NOISE_FACTOR * noise, NOISE_FLOOR_ULPS * eps)


class ModuleErrors(msgspec.Struct, frozen=True, rename={"candidate": "candidate_module"}):
    """How far a module's input and output are from the golden's.

    Args:
        module: the reference's name.
        candidate: the candidate's name of it; "" if it has no such module.
        input_error: relative to the golden's root mean square; None if nothing can be compared.
        output_error: the same.
        input_limit: the greatest error of a right input.
        output_limit: the greatest error of a right output.
    """

    module: str
    candidate: str
    input_error: float | None
    output_error: float | None
    input_limit: float = ERROR_LIMIT
    output_limit: float = ERROR_LIMIT

    @property
    def input_within(self) -> bool:
        """Whether the input is right, or not known to be wrong."""
        return self.input_error is None or self.input_error <= self.input_limit

    @property
    def output_beyond(self) -> bool:
        """Whether the output is not the golden's."""
        return self.output_error is not None and not self.output_error <= self.output_limit

    @property
    def input_used(self) -> float:
        """The part of its limit that the input's error uses; 0 if it is not known."""
        return (self.input_error or 0.0) / self.input_limit

    @property
    def output_used(self) -> float:
        """The part of its limit that the output's error uses; 0 if it is not known."""
        return (self.output_error or 0.0) / self.output_limit


class Finding(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename={"first_bad": "culprit", "between": "between_modules", "recovers": "heals"},
):
    """Where in the modules of one case's forward pass an error arises.

    Args:
        case: the case that was run.
        first_bad: the innermost module in which the error arises; None if no module has it.
        own_code: whether that module's own code is at fault, since none of its children is.
        between: whether modules differ, and the error arises outside of all of them.
        recovers: whether everything after it agrees again: a spike, not a step that stays.
        neighbours: of own code or between, the last module that is right and the next one; "" if
            there is none.
        skipped: whether that module was not run, though the candidate has it.
        raised: whether the candidate raised, in that module or between modules.
        guess: whether no module is beyond its limit, and `first_bad` is where the error rises most.
        module_class: the class of the candidate's module; "" if it is not known.
        source: where that class is declared, or the closest one around it that is not torch's.
    """

    case: str
    first_bad: str | None
    own_code: bool
    between: bool
    recovers: bool
    neighbours: tuple[str, str] = ("", "")
    skipped: bool = False
    raised: bool = False
    guess: bool = False
    module_class: str = ""
    source: Place | None = None


class Localisation(Finding, frozen=True, kw_only=True):
    """Where an error arises, and the errors of all modules.

    Args:
        modules: every module's errors, in the order in which modules finish.
        mapping: how the candidate's modules were matched with the reference's.
    """

    modules: tuple[ModuleErrors, ...]
    mapping: MappingSummary | None = None

    @property
    def first_bad_module(self) -> ModuleErrors | None:
        """The module in which the error arises; None if no module has it."""
        return next((m for m in self.modules if m.module == self.first_bad), None)

    @property
    def not_compared(self) -> tuple[str, ...]:
        """The reference's modules without a partner, or whose output no partner lays out alike."""
        return tuple(module.module for module in self.modules if module.output_error is None)

    @property
    def compared(self) -> bool:
        """Whether any module was compared with its partner."""
        return len(self.not_compared) < len(self.modules)

    @property
    def module(self) -> str:
        """The first bad module; between modules the closest one that holds both; "" for none."""
        if self.first_bad:
            return self.first_bad
        if not self.between:
            return ""
        after, before = (name.split(".")[:-1] for name in self.neighbours)
        if not after or not before:
            return ".".join(after or before)
        pairs = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(after, before, strict=False)
        )
        return ".".join(one for one, _ in pairs)


class ModuleTrial(msgspec.Struct, frozen=True, rename={"candidate": "candidate_module"}):
    """One module of the candidate on the reference's own input.

    Args:
        module: the reference's name; "" for the model's own code.
        candidate: the candidate's name of it; "" if it is not known.
        on: what was compared.
        error: relative to the reference's root mean square.
        limit: the greatest error that rounding explains.
    """

    module: str
    candidate: str
    on: str
    error: float
    limit: float

    def __str__(self) -> str:
        """Return the module and how far it is off, on one line."""
        own = f" ({self.candidate})" if self.candidate else ""
        off = f"{self.on} off by {self.error:.1e}, {self.limit:.1e} allowed"
        return f"{self.module or 'the model'}{own}: {off}"


class ModuleTrials(msgspec.Struct, frozen=True, kw_only=True):
    """Modules that were tried one by one.

    Args:
        tried: how many modules.
        wrong: those that differ by themselves, each where it differs most, in order of execution.
        not_tried: the reference's modules that the candidate lacks, or has in another form.
    """

    tried: int
    wrong: tuple[ModuleTrial, ...]
    not_tried: tuple[str, ...]

    def __str__(self) -> str:
        """Return the numbers in words."""
        left = f", {len(self.not_tried)} without a counterpart" if self.not_tried else ""
        off = f", {len(self.wrong)} of them wrong" if self.wrong else ""
        return f"{self.tried} modules tried by themselves{off}{left}"


class Metric(StrEnum):
    """The figure shown of each tensor, beside its relative error."""

    MAX_ABS = "max_abs"
    MEAN_ABS = "mean_abs"
    SUM_ABS = "sum_abs"
    COSINE = "cosine"


class TraceRow(msgspec.Struct, frozen=True, kw_only=True, rename={"run": "pass"}):
    """One tensor of both traces; figures are None if nothing could be measured.

    Args:
        module: the reference's module.
        partner: the other's.
        run: the pass through the model.
        call: which call of the module in that pass.
        tensor: the tensor's name among the module's inputs or outputs.
        other_tensor: the same in the other trace.
        shape: the reference's.
        other_shape: the other's.
        max_abs: greatest |difference|.
        mean_abs: mean of |difference|.
        sum_abs: sum of |difference|.
        cosine: of both tensors as flat vectors.
        relative_error: root mean square of the difference, by the reference's root mean square.
        sampled: whether figures and error were taken from sketches, not from all elements.
        beyond: whether the shapes or the values differ, by more than the limit.
        problem: why nothing could be measured; "" if something was.
    """

    module: str
    partner: str
    run: int
    call: int
    tensor: str
    other_tensor: str
    shape: tuple[int, ...]
    other_shape: tuple[int, ...]
    max_abs: float | None = None
    mean_abs: float | None = None
    sum_abs: float | None = None
    cosine: float | None = None
    relative_error: float | None
    sampled: bool
    beyond: bool
    problem: str


class TraceComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two traces, side by side; the file that `snap compare-traces --json` writes.

    Args:
        schema: name and version of the file's format.
        exit_code: 0: all agree; 1: a row differs or something is missing; 3: nothing was compared.
        reference: what was run for the first trace, on one line.
        other: what was run for the second one.
        mapping: how modules were matched, in words.
        inferred: whether shapes, order of execution and values matched them, not names.
        limit: the greatest relative error that is no difference.
        rows: in order of execution.
        missing: what the mapping or the reference has and the other trace lacks.
        reference_alone: the reference's modules without a partner.
        other_alone: the other's.
        tensors_alone: tensors without a partner, of modules that have one.
    """

    schema: Literal["snap-compare-traces/1"] = "snap-compare-traces/1"
    exit_code: int
    reference: str
    other: str
    mapping: str
    inferred: bool
    limit: float
    rows: tuple[TraceRow, ...]
    missing: tuple[str, ...]
    reference_alone: tuple[str, ...]
    other_alone: tuple[str, ...]
    tensors_alone: tuple[str, ...]

    @property
    def differing(self) -> tuple[TraceRow, ...]:
        """The rows that are beyond the limit."""
        return tuple(row for row in self.rows if row.beyond)
