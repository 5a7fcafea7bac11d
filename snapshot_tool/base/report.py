"""The report of a check, and its parts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import CandidateInfo, FieldDifference
from snapshot_tool.base.results import Result, Verdict, first_divergence, overall_verdict
from snapshot_tool.base.tolerance import Rule


@dataclass(frozen=True, slots=True)
class ExploredKind:
    """One kind of question.

    Args:
        kind: the first word of the questions' text form.
        asked: how many different questions the candidate was asked, those of shrinking included.
        results: of every question that passed or was unsupported, and of the smallest that failed;
            of a kind that was not asked, one skip.
            Each result's `tensor` is its question's text form.
    """

    kind: str
    asked: int
    results: tuple[Result, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on the kind."""
        return overall_verdict(self.results)

    @property
    def failure(self) -> Result | None:
        """The smallest question that was not answered as recorded."""
        bad = (Verdict.FAIL, Verdict.ERROR)
        return next((result for result in self.results if result.verdict in bad), None)


@dataclass(frozen=True, slots=True)
class Exploration:
    """All kinds that were asked; `seed` is None where the questions were given, not drawn."""

    kinds: tuple[ExploredKind, ...]
    seed: int | None = None

    @property
    def asked(self) -> int:
        """How many questions were asked."""
        return sum(kind.asked for kind in self.kinds)

    @property
    def results(self) -> tuple[Result, ...]:
        """The results of all kinds."""
        return tuple(result for kind in self.kinds for result in kind.results)


@dataclass(frozen=True, slots=True)
class Graft:
    """A run with one module's output replaced by the golden's.

    Args:
        module: the reference's name of it.
        candidate: the candidate's name of it.
        case: the case that was run.
        before: what the case's phases gave without the graft.
        after: the same with it.
        localisation: what the modules say with it; None where the candidate shows none.
    """

    module: str
    candidate: str
    case: str
    before: tuple[Result, ...]
    after: tuple[Result, ...]
    localisation: Localisation | None

    @property
    def proved(self) -> bool:
        """Whether the fault is in that module alone: with it replaced, all passes that did not."""
        return not _passes(self.before) and _passes(self.after)

    def __str__(self) -> str:
        """Say it in a sentence."""
        if _passes(self.before):
            return f"case {self.case} passes without it: it proves nothing"
        if self.proved:
            return f"all phases of case {self.case} pass with it: the fault is there alone"
        failed = next(r for r in self.after if r.verdict is not Verdict.PASS)
        next_module = self.localisation.module if self.localisation else ""
        where = f"; first wrong is now {next_module}" if next_module else ""
        return f"{failed.phase.value} of case {self.case} still fails with it{where}"


def _passes(results: tuple[Result, ...]) -> bool:
    return bool(results) and all(result.verdict is Verdict.PASS for result in results)


END_TOKEN, ALL_END_TOKENS = "end-token", "all-end-tokens"
WINDOW, ROPE = "sliding-window", "rope-length"
LEFT, RIGHT, TOKEN_TYPES = "left-padding", "right-padding", "token-types"
COVERAGE_NAMES = (END_TOKEN, ALL_END_TOKENS, WINDOW, ROPE, LEFT, RIGHT, TOKEN_TYPES)


@dataclass(frozen=True, slots=True)
class Coverage:
    """One thing that a model does only for some inputs.

    Args:
        name: one of COVERAGE_NAMES.
        reached: whether a case reaches it.
        text: what it is and how far the cases go, on one line.
    """

    name: str
    reached: bool
    text: str


_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Share:
    """Share `index` of `count`, from 1: every count-th item, in their own order.

    Dealt out like cards: variants drawn one after the other cost alike, and so do the shares.
    """

    index: int
    count: int

    def __str__(self) -> str:
        """Write the share as `--shard` takes it."""
        return f"{self.index}/{self.count}"

    def of(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this share of some items."""
        return items[self.index - 1 :: self.count]


def parse_share(text: str) -> Share:
    """Return the share that K/N stands for; raise UsageError for anything else."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"{text} is no share K/N of the cases", "for example: --shard 1/3")
    return Share(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Shard:
    """What the check of a share was of.

    Args:
        share: which one.
        cases: the names of its cases, in the golden's order.
        all_cases: how many the shares have together.
        asked: the options that decide what is checked and how it is judged, as text.
    """

    share: Share
    cases: tuple[str, ...]
    all_cases: int
    asked: Mapping[str, str]

    def __str__(self) -> str:
        """Say it as people read it."""
        own = f"{len(self.cases)} of {self.all_cases} cases"
        return f"{self.share.index} of {self.share.count}, {own}"


_SHOWN = 3


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """A weight that is not as the checkpoint has it.

    Args:
        name: the candidate's name of it.
        modules: the reference's modules that it belongs to, where they are known; several where the
            candidate fuses their weights into one.
        mismatched: how many elements differ at all.
        numel: of how many.
        max_abs: the greatest |actual - expected|; NaN where either is.
    """

    name: str
    modules: tuple[str, ...]
    mismatched: int
    numel: int
    max_abs: float

    def __str__(self) -> str:
        """Say how far it is off, and where it belongs."""
        share = f"{self.mismatched} of {self.numel} elements differ"
        belongs = f" ({', '.join(self.modules)})" if self.modules else ""
        return f"{self.name}{belongs}: {share} from the checkpoint's, by up to {self.max_abs:.3g}"


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What became of the weights that a candidate showed.

    Args:
        compared: how many were compared.
        differing: those that are not the checkpoint's, in the checkpoint's order.
        not_compared: those for which the candidate showed no partner.
        unset: the candidate's weights that the checkpoint leaves unset, by its own names.
        harmful: those of them from which NaN came; None where that is not known.
    """

    compared: int
    differing: tuple[WeightDifference, ...] = ()
    not_compared: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    harmful: tuple[str, ...] | None = ()

    def __str__(self) -> str:
        """Count them."""
        equal = self.compared - len(self.differing)
        left = f", {len(self.not_compared)} not compared" if self.not_compared else ""
        off = f", {len(self.differing)} not" if self.differing else ""
        return f"{equal} as in the checkpoint{off}{left}"

    @property
    def unset_text(self) -> str:
        """Name the first of the weights that the checkpoint leaves unset, or return "" for none."""
        names = self.harmful or self.unset
        if not names:
            return ""
        use = "unused" if self.harmful == () else "and used" if self.harmful else "and NaN came out"
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return f"unset, {use}: {names[0]}{more}"


def find_harmful(
    unset: Sequence[str], results: Sequence[Result], found: Localisation | None
) -> tuple[str, ...] | None:
    """Return the unset weights from which NaN came into a result, or None where it is not known.

    unset: the candidate's names; each weight is NaN, and lies in the module named first wrong.
    """
    if not unset or not any(map(_is_nan, results)):
        return ()
    bad = found.first_bad_module if found else None
    module = bad.candidate if bad else ""
    inside = tuple(name for name in unset if module and name.startswith(f"{module}."))
    return inside or None


def name_harmful(results: Sequence[Result], harmful: Sequence[str]) -> tuple[Result, ...]:
    """Return results whose reason says from which unset weight their NaN came."""
    if not harmful:
        return tuple(results)
    source = f"NaN comes from {', '.join(harmful[:_SHOWN])}, which the checkpoint leaves unset"
    return tuple(
        replace(result, reason=f"{source}; {result.reason}") if _is_nan(result) else result
        for result in results
    )


def _is_nan(result: Result) -> bool:
    worst = result.comparison.worst if result.comparison else None
    return result.verdict is Verdict.FAIL and worst is not None and math.isnan(worst.actual)


# What is outside of every module, by the phase that shows it first.
_OUTSIDE = {Phase.FORWARD: "the model's own code", Phase.GENERATE: "the generation loop"}


@dataclass(frozen=True, slots=True)
class GoldenIdentity:
    """Which golden set was checked against."""

    checkpoint: str
    revision: str
    device: str
    dtype: str
    golden_version: int
    folder: str

    def __str__(self) -> str:
        """Name the set as people read it."""
        return (
            f"{self.checkpoint} at {self.revision[:12]} ({self.device}-{self.dtype}), "
            f"golden version {self.golden_version}"
        )


@dataclass(frozen=True, slots=True)
class Transformers:
    """Whether Hugging Face could have answered in the golden's place.

    Args:
        importable: transformers is installed here.
        imported_by_candidate: loading or running the candidate imported it.
    """

    importable: bool
    imported_by_candidate: bool

    def __str__(self) -> str:
        """Say it in a sentence."""
        if self.imported_by_candidate:
            return "imported by the candidate, not by snap"
        installed = "installed here" if self.importable else "not installed here"
        return f"never imported ({installed})"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """A finished check.

    Args:
        golden: the set checked against.
        device: where the candidate ran.
        device_name: that device's model.
        candidate: which implementation ran.
        transformers: whether Hugging Face was in reach.
        environment: versions and settings of the process.
        results: every verdict on what was recorded, in the order of cases and phases.
        localisation: in which module the fault is; None where nothing failed or the candidate
            cannot be looked into.
        quick: whether generation was verified in one pass instead of step by step.
        dtype: what the candidate computed in.
        rule: what judged floating-point tensors.
        near_ties_allowed: whether a generation may differ where rounding could have chosen.
        graft: what `--graft` proved.
        unmet: what `--require` named, phases that were skipped and coverage that was not reached.
        coverage: what the cases reach of the model.
        warnings: what the candidate did besides answering, each thing once.
        surroundings: where this machine is not as the one that recorded: "torch 2.6, here 2.7".
        exploration: what `--explore` or `--replay` asked besides.
        shard: which share of the cases this is; None where it is all of them.
        weights: how the candidate's weights compare with the checkpoint's, after all of it has run;
            None where the candidate shows none, or no phase that needs them was asked for.
    """

    golden: GoldenIdentity
    device: str
    candidate: CandidateInfo
    transformers: Transformers
    environment: Mapping[str, str]
    results: tuple[Result, ...]
    unmet: tuple[str, ...]
    coverage: tuple[Coverage, ...] = ()
    localisation: Localisation | None = None
    quick: bool = False
    warnings: tuple[str, ...] = ()
    surroundings: tuple[str, ...] = ()
    exploration: Exploration | None = None
    dtype: str = "float32"
    rule: Rule = Rule.TABLE
    near_ties_allowed: bool = False
    graft: Graft | None = None
    shard: Shard | None = None
    weights: WeightReport | None = None

    @property
    def all_results(self) -> tuple[Result, ...]:
        """The results and those of the derived questions."""
        return self.results + (self.exploration.results if self.exploration else ())

    @property
    def near_ties(self) -> tuple[Result, ...]:
        """The generations that pass for near-ties alone, since those were allowed."""
        return tuple(r for r in self.all_results if r.divergence and r.verdict is Verdict.PASS)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the whole run.

        A weight that is not the checkpoint's fails it, and so does a wrong field of FMS's own
        mapping.
        """
        if (self.weights and self.weights.differing) or self.wrong_fields:
            return Verdict.FAIL
        return overall_verdict(self.all_results)

    @property
    def wrong_fields(self) -> tuple[FieldDifference, ...]:
        """The fields that FMS's own mapping fills wrongly, with an effect on numbers."""
        return tuple(field for field in self.candidate.mapping if not field.harmless)

    @property
    def divergence(self) -> Result | None:
        """The first result, in the order of phases, that is not as the golden says.

        Derived questions come after all that was recorded.
        """
        asked = self.exploration.results if self.exploration else ()
        return first_divergence(self.results) or first_divergence(asked)

    @property
    def place(self) -> str:
        """Where the first divergence arises: a module of the reference, or words where it is none.

        "" where nothing differs or the candidate cannot be looked into. Where no answer differs it
        is a weight's module.
        """
        first, found = self.divergence, self.localisation
        if first is None:
            differing = self.weights.differing if self.weights else ()
            return next((", ".join(weight.modules) or weight.name for weight in differing), "")
        if first.phase is Phase.PREPROCESSING:
            return first.phase.value
        if found is None:
            return ""
        if found.first_bad is None and not found.between:
            # The forward pass agrees, module by module: it is what is done with it.
            return _OUTSIDE.get(first.phase, first.phase.value)
        return found.module or _OUTSIDE[Phase.FORWARD]

    @property
    def exit_code(self) -> int:
        """0 all passed; 1 something differs or raised; 3 nothing compared, or a required skip."""
        if self.verdict in (Verdict.FAIL, Verdict.ERROR):
            return 1
        return 3 if self.unmet or self.verdict is Verdict.SKIP else 0


def unmet_requirements(
    results: Iterable[Result], reached: Iterable[Coverage], required: Iterable[str]
) -> tuple[str, ...]:
    """Return what is required and was skipped somewhere, ran nowhere, or was not reached."""
    missed = {one.name for one in reached if not one.reached}
    ran: set[str] = set()
    for result in results:
        ran.add(result.phase)
        if result.verdict is Verdict.SKIP:
            missed.add(result.phase)
    lacking = missed | (set(PHASES) - ran)
    return tuple(name for name in required if name in lacking)
