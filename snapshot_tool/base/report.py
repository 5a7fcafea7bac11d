"""The report of a check, and its parts.

`snapshot_tool.reports.json` writes and reads it; the parts are written as they are declared here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.localisation import Localisation, ModuleTrial, ModuleTrials
from snapshot_tool.base.protocol import PHASES, CandidateInfo, FieldDifference, Phase, phase_order
from snapshot_tool.base.results import Judgement, Result, Verdict, first_divergence, overall_verdict
from snapshot_tool.base.tolerance import Rule


@dataclass(frozen=True, slots=True)
class ExploredKind:
    """One kind of derived question.

    Args:
        kind: the first word of the questions' text form.
        asked: how many different questions were run, those of shrinking included.
        results: of every question that passed or was unsupported, and of the smallest that failed;
            one skip if none was run. Each result's `tensor` is its question's text form.
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
        """The result of the smallest question that failed, or None."""
        return next((result for result in self.results if result.verdict.is_bad), None)


@dataclass(frozen=True, slots=True)
class Exploration:
    """All kinds of questions that were run; `seed` is None if they were given, not drawn."""

    kinds: tuple[ExploredKind, ...]
    seed: int | None = None

    @property
    def asked(self) -> int:
        """How many questions were run."""
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
        candidate_module: the candidate's name of it.
        case: the case that was run.
        before: the verdicts on the case's phases without the graft.
        results: the same with it.
        next_module: the module that is wrong with it; None if there is none.
        proved: whether the fault is in the module alone; derived from the verdicts.
        conclusion: a sentence that says so; derived as well.
    """

    module: str
    candidate_module: str
    case: str
    before: tuple[Judgement, ...]
    results: tuple[Judgement, ...]
    next_module: str | None = None
    proved: bool = False
    conclusion: str = ""

    def __post_init__(self) -> None:
        """Set `proved` and `conclusion`."""
        proved = not _passes(self.before) and _passes(self.results)
        if _passes(self.before):
            conclusion = f"case {self.case} passes without the graft, so the graft proves nothing"
        elif proved:
            conclusion = f"all phases of case {self.case} pass with it, so it is the only fault"
        elif not self.results:
            conclusion = f"no phase of case {self.case} ran with it"
        else:
            failed = next(r for r in self.results if r.verdict is not Verdict.PASS)
            conclusion = f"{failed.phase.value} of case {self.case} still fails with it"
            if self.next_module:
                conclusion += f"; first wrong is now {self.next_module}"
        object.__setattr__(self, "proved", proved)
        object.__setattr__(self, "conclusion", conclusion)


def _passes(results: tuple[Judgement, ...]) -> bool:
    return bool(results) and all(result.verdict is Verdict.PASS for result in results)


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

    Variants drawn one after the other take similar time, so the shares do as well.
    """

    index: int
    count: int

    def __str__(self) -> str:
        """Return the share as `--shard` takes it."""
        return f"{self.index}/{self.count}"

    def of(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this share of some items."""
        return items[self.index - 1 :: self.count]


def parse_share(text: str) -> Share:
    """Return the share K/N; raise UsageError for any other text."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"invalid --shard {text}: expected K/N", "for example: --shard 1/3")
    return Share(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Shard(Share):
    """The share of the cases that was checked.

    Args:
        cases: the names of its cases, in the golden's order.
        all_cases: how many cases the shares have together.
        asked: the options that decide what is checked and how it is judged, as text.
    """

    cases: tuple[str, ...]
    all_cases: int
    asked: Mapping[str, str]

    def __str__(self) -> str:
        """Return the share and its number of cases."""
        return f"{self.index} of {self.count}, {len(self.cases)} of {self.all_cases} cases"


_SHOWN = 3


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """A weight that is not the checkpoint's.

    Args:
        name: the candidate's name of it.
        modules: the reference's modules that it belongs to, if they are known; several if the
            candidate fuses their weights into one.
        mismatched: how many elements differ at all.
        numel: of how many.
        max_abs: the greatest |actual - expected|; NaN if either is.
        rank: the rank of torchrun that has it; None: there is one process.
    """

    name: str
    modules: tuple[str, ...]
    mismatched: int
    numel: int
    max_abs: float
    rank: int | None = None

    def __str__(self) -> str:
        """Return how far it is off, and its modules."""
        share = f"{self.mismatched} of {self.numel} elements differ"
        belongs = f" ({', '.join(self.modules)})" if self.modules else ""
        name = self.name if self.rank is None else f"{self.name} on rank {self.rank}"
        return f"{name}{belongs}: {share} from the checkpoint's, by up to {self.max_abs:.3g}"


@dataclass(frozen=True, slots=True)
class WeightReport:
    """The candidate's weights beside the checkpoint's.

    Args:
        compared: how many were compared.
        differing: those that are not the checkpoint's, by rank, in the checkpoint's order.
        not_compared: those without a partner in the candidate.
        unset: the candidate's weights that the checkpoint leaves unset, by its own names.
        harmful: those of them from which NaN came; None if that is not known.
    """

    compared: int
    differing: tuple[WeightDifference, ...] = ()
    not_compared: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    harmful: tuple[str, ...] | None = ()

    def __str__(self) -> str:
        """Return the numbers in words."""
        differing = len({weight.name for weight in self.differing})
        equal = self.compared - differing
        left = f", {len(self.not_compared)} not compared" if self.not_compared else ""
        off = f", {differing} not" if differing else ""
        return f"{equal} as in the checkpoint{off}{left}"

    @property
    def unset_text(self) -> str:
        """The first of the weights that the checkpoint leaves unset, in words; "" for none."""
        names = self.harmful or self.unset
        if not names:
            return ""
        use = "unused" if self.harmful == () else "and used" if self.harmful else "and NaN came out"
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return f"unset, {use}: {names[0]}{more}"


def find_harmful(
    unset: Sequence[str], results: Sequence[Result], found: Localisation | None
) -> tuple[str, ...] | None:
    """Return the unset weights from which NaN came into a result, or None if that is not known.

    unset: the candidate's names; each weight is NaN.
    """
    if not unset or not any(map(_is_nan, results)):
        return ()
    first = found.first_bad_module if found else None
    if first is None or not first.candidate:
        return None
    inside = tuple(name for name in unset if name.startswith(f"{first.candidate}."))
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
    nan = result.worst is not None and math.isnan(result.worst.actual)
    return nan and result.verdict is Verdict.FAIL


# The locations outside of all modules, by the phase that shows them first.
_OUTSIDE = {Phase.FORWARD: "the model's own code", Phase.GENERATE: "the generation loop"}


@dataclass(frozen=True, slots=True)
class GoldenIdentity:
    """The golden set that was checked against."""

    checkpoint: str
    revision: str
    device: str
    dtype: str
    golden_version: int
    folder: str

    def __str__(self) -> str:
        """Return the set's name, dtype and version."""
        return (
            f"{self.checkpoint} at {self.revision[:12]} ({self.device}-{self.dtype}), "
            f"golden version {self.golden_version}"
        )


@dataclass(frozen=True, slots=True)
class PathDifference:
    """How the outputs on a path differ from those on another one.

    Args:
        path: the other path.
        max_abs: the greatest difference of outputs of forward.
        share: the same in units of the tolerance; None if another rule judges.
        case: the case of the greatest difference; "" if nothing was compared.
        other_tokens: the cases with other new tokens.
    """

    path: str
    max_abs: float = 0.0
    share: float | None = None
    case: str = ""
    other_tokens: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it in words."""
        size = f"{self.max_abs:.2g}" if self.share is None else f"{self.share:.2g}x"
        facts = [size if self.max_abs else "equal"] if self.case else []
        if self.other_tokens:
            facts.append(f"other tokens in {', '.join(self.other_tokens)}")
        return "; ".join(facts) or "nothing compared"


@dataclass(frozen=True, slots=True)
class Transformers:
    """Whether the candidate could use Hugging Face's transformers.

    Args:
        importable: transformers is installed here.
        imported_by_candidate: loading or running the candidate imported it.
    """

    importable: bool
    imported_by_candidate: bool

    def __str__(self) -> str:
        """Return it in words."""
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
        candidate: which implementation ran.
        transformers: whether transformers was installed or imported.
        environment: versions and settings of the process.
        results: every verdict on what was recorded, in the order of cases and phases.
        localisation: in which module the fault is; None if nothing failed or the candidate does
            not show its modules.
        quick: whether generation was verified in one pass instead of step by step.
        dtype: what the candidate computed in.
        rule: what judged floating-point tensors.
        near_ties_allowed: whether a generation may differ if rounding could have chosen.
        graft: what `--graft` proved.
        probes: modules that were run one by one; None if the set has no probes or the candidate
            takes none.
        isolated: modules that were run on the reference's own input, with `--isolate`.
        unmet: what `--require` named, phases that were skipped and coverage that was not reached.
        coverage: what the cases reach of the model.
        warnings: what the candidate did besides computing, each thing once.
        environment_differences: from the machine that recorded: "torch 2.6, here 2.7".
        exploration: the derived questions of `--explore` or `--replay`.
        shard: which share of the cases this is; None for all of them.
        weights: the candidate's weights beside the checkpoint's, after all phases have run; None
            if the candidate shows none, or no selected phase needs them.
        snap: the version of snap that checked.
        date: when the check began, UTC, in ISO 8601.
        seconds: how long it took.
        command: the command that makes the same check.
        next_commands: what to run after a failure.
        answered: whether the outputs are answers from a file; then nothing ran here.
        path: the path on which FMS ran the model.
        path_difference: from the first of several paths.
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
    environment_differences: tuple[str, ...] = ()
    exploration: Exploration | None = None
    dtype: str = "float32"
    rule: Rule = Rule.TABLE
    near_ties_allowed: bool = False
    graft: Graft | None = None
    probes: ModuleTrials | None = None
    isolated: ModuleTrials | None = None
    shard: Shard | None = None
    weights: WeightReport | None = None
    snap: str = ""
    date: str = ""
    seconds: float = 0.0
    command: str = "snap check ..."
    next_commands: tuple[str, ...] = ()
    answered: bool = False
    path: str = "eager"
    path_difference: PathDifference | None = None

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many results have each verdict."""
        verdicts = [result.verdict for result in self.all_results]
        return {verdict: verdicts.count(verdict) for verdict in Verdict}

    @property
    def bad(self) -> tuple[Result, ...]:
        """The results that failed or raised, by phase, the furthest beyond the tolerance first."""
        bad = [r for r in self.all_results if r.verdict.is_bad]
        return tuple(sorted(bad, key=lambda r: (phase_order(r.phase), -(r.tolerance_used or 0.0))))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that were checked or skipped, in their order."""
        return tuple(phase for phase in PHASES if any(r.phase is phase for r in self.results))

    @property
    def all_results(self) -> tuple[Result, ...]:
        """The results and those of the derived questions."""
        return self.results + (self.exploration.results if self.exploration else ())

    @property
    def near_ties(self) -> tuple[Result, ...]:
        """The generations that pass since near-ties are allowed."""
        return tuple(r for r in self.all_results if r.divergence and r.verdict is Verdict.PASS)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the whole run.

        A wrong weight, a module that is wrong by itself or a wrong field of FMS's own mapping fails
        it.
        """
        if (self.weights and self.weights.differing) or self.wrong_fields or self.wrong_modules:
            return Verdict.FAIL
        return overall_verdict(self.all_results)

    @property
    def location_is_guess(self) -> bool:
        """Whether no module shows the first divergence, in the run or by itself."""
        return self.localisation is not None and self.localisation.guess

    @property
    def wrong_modules(self) -> tuple[ModuleTrial, ...]:
        """The modules that are wrong by themselves, each once."""
        wrong: dict[str, ModuleTrial] = {}
        for trials in (self.isolated, self.probes):
            for trial in trials.wrong if trials else ():
                wrong.setdefault(trial.module, trial)
        return tuple(wrong.values())

    @property
    def wrong_fields(self) -> tuple[FieldDifference, ...]:
        """The fields that FMS's own mapping fills wrongly, with an effect on numbers."""
        return tuple(field for field in self.candidate.mapping if not field.harmless)

    @property
    def divergence(self) -> Result | None:
        """The first failure in the order of phases, or None.

        Derived questions come after all that was recorded.
        """
        asked = self.exploration.results if self.exploration else ()
        return first_divergence(self.results) or first_divergence(asked)

    @property
    def location(self) -> str:
        """Where the first divergence arises: a module of the reference, or words if it is in none.

        "" if nothing differs or the candidate has no modules to observe. If no output differs it
        is a weight's module.
        """
        first, found = self.divergence, self.localisation
        if first is None:
            differing = self.weights.differing if self.weights else ()
            places = [", ".join(weight.modules) or weight.name for weight in differing]
            return next(iter([*places, *(trial.module for trial in self.wrong_modules)]), "")
        if first.phase is Phase.PREPROCESSING:
            return first.phase.value
        if found is None or not (found.compared or found.module):
            return ""
        if found.first_bad is None and not found.between:
            # The forward pass agrees, module by module: it is what is done with it.
            is_compiled = self.path.startswith("compiled") and first.phase is not Phase.GENERATE
            outside = _OUTSIDE.get(first.phase, first.phase.value)
            return "the compiled code" if is_compiled else outside
        return found.module or _OUTSIDE[Phase.FORWARD]

    @property
    def exit_code(self) -> int:
        """0 all passed; 1 something differs or raised; 3 nothing compared, or a required skip."""
        if self.verdict.is_bad:
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
