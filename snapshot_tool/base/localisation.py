"""Where a fault is: the module whose input is still right and whose output is not."""

import itertools
from dataclasses import dataclass

from snapshot_tool.base.mapping import ModuleMapping

# Errors are relative to the golden tensor's root mean square. Rounding alone stays near 1e-6 in
# float32; one weight off by a thousandth shows as 1e-3 or more.
ERROR_LIMIT = 3e-5
# With an oracle every module has a limit of its own: so many times what rounding does to it there.
NOISE_FACTOR = 8.0
NO_NOISE = -1.0
NOISE_FLOOR_ULPS = 2.0  # where the reference's rounding happens to be none


def noise_limit(noise: float, *, eps: float) -> float:
    """Return the limit of a module's error, from the reference's own; eps: of the dtype.

    NO_NOISE stands for a side that the oracle knows nothing of.
    """
    return ERROR_LIMIT if noise == NO_NOISE else max(NOISE_FACTOR * noise, NOISE_FLOOR_ULPS * eps)


@dataclass(frozen=True, slots=True)
class ModuleErrors:
    """How far a module's input and output are from the golden's.

    Args:
        module: the reference's name.
        candidate: the candidate's name of it; "" where it has no such module.
        input_error: relative to the golden's root mean square; None where nothing can be compared.
        output_error: the same.
        input_limit: up to where the input gives no reason to doubt it.
        output_limit: beyond which the output is not the golden's.
    """

    module: str
    candidate: str
    input_error: float | None
    output_error: float | None
    input_limit: float = ERROR_LIMIT
    output_limit: float = ERROR_LIMIT

    @property
    def input_within(self) -> bool:
        """Whether the input gives no reason to doubt it."""
        return self.input_error is None or self.input_error <= self.input_limit

    @property
    def output_beyond(self) -> bool:
        """Whether the output is not the golden's."""
        return self.output_error is not None and not self.output_error <= self.output_limit

    @property
    def is_culprit(self) -> bool:
        """Whether the error arises between its input and its output."""
        return self.input_within and self.output_beyond


@dataclass(frozen=True, slots=True)
class Localisation:
    """What the modules of one case's forward pass say.

    Args:
        case: the case that was run.
        culprit: the innermost module in which the error arises; None where no module has it.
        own_code: whether the culprit's own code is at fault, since none of its children is.
        between: whether modules differ, and the error arises outside of all of them.
        heals: whether everything after it agrees again: a spike, not a step that stays.
        modules: every module's errors, in the order in which modules finish.
        mapping: how the candidate's modules were matched with the reference's.
        neighbours: of own code or between, the last module that is right and the next one; "" where
            there is none.
        skipped: whether the culprit was not run, though the candidate has it.
        raised: whether the candidate raised, in the culprit or between modules.
    """

    case: str
    culprit: ModuleErrors | None
    own_code: bool
    between: bool
    heals: bool
    modules: tuple[ModuleErrors, ...]
    mapping: ModuleMapping | None = None
    neighbours: tuple[str, str] = ("", "")
    skipped: bool = False
    raised: bool = False

    @property
    def not_compared(self) -> tuple[str, ...]:
        """The reference's modules without a partner, or whose output no partner lays out alike."""
        return tuple(module.module for module in self.modules if module.output_error is None)

    @property
    def module(self) -> str:
        """The culprit's name; between modules, the closest one that holds both; "" for none."""
        if self.culprit:
            return self.culprit.module
        after, before = (name.split(".")[:-1] for name in self.neighbours)
        if not self.between:
            return ""
        if not after or not before:
            return ".".join(after or before)
        pairs = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(after, before, strict=False)
        )
        return ".".join(one for one, _ in pairs)
