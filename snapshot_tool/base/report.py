"""A finished check, as plain data: what the text and the JSON report are made from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from snapshot_tool.base.coverage import Coverage
from snapshot_tool.base.exploration import Exploration
from snapshot_tool.base.graft import Graft
from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import CandidateInfo, FieldDifference
from snapshot_tool.base.results import Result, Verdict, first_divergence, overall_verdict
from snapshot_tool.base.shard import Shard
from snapshot_tool.base.tolerance import Rule
from snapshot_tool.base.weights import WeightReport

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
        if found.culprit is None and not found.between:
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
