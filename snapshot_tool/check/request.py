"""What to check: which golden set, which cases, on which device, judged by which rule."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenNotFound, UsageError, suggest
from snapshot_tool.base.options import (
    DEVICES,
    family_field,
    goldens_field,
    normalise_options,
    option,
)
from snapshot_tool.base.phases import COVERAGE_NAMES, PHASES, Phase, named_phases
from snapshot_tool.base.tolerance import ORACLE_DTYPES, Rule, default_rule

if TYPE_CHECKING:
    from snapshot_tool.base.report import Shard, Share
    from snapshot_tool.explore.questions import Question
    from snapshot_tool.goldens.find import GoldenChoice
    from snapshot_tool.goldens.golden import Golden
    from snapshot_tool.goldens.manifest import CaseEntry, Manifest

# The plugin reads these declarations in every pytest session, also in those that check nothing, so
# torch and msgspec are imported only by the functions that need them.


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """The options of `snap check`. None: as the golden set says, or any."""

    goldens: str | Path = goldens_field()
    _: KW_ONLY
    fms_path: str | Path | None = option(
        None,
        "Root of an FMS checkout; wins over an installed FMS. Its code is run.",
        metavar="CHECKOUT",
    )
    candidate: str = option(
        "fms", "'fms', or 'module:factory' for anything else. Its code is run.", metavar="SPEC"
    )
    loading: str = option(
        "snap",
        "Map the configuration by snap, or load by FMS's own get_model('hf_pretrained'), which "
        "needs transformers; fields that FMS maps differently are reported.",
        choices=("snap", "own"),
    )
    family: Sequence[str] = family_field()
    checkpoint: str | None = option(
        None,
        "Golden set, by a name of snap list or a part of it; or the folder or hub id of its "
        "checkpoint.",
        metavar="NAME",
    )
    revision: str | None = option(None, "Revision of the golden set, or its first digits.")
    device: str = option("cpu", "Where the candidate runs.", choices=DEVICES)
    golden_device: str | None = option(
        None, "Device of the golden set, if it is not --device.", choices=DEVICES
    )
    phase: Sequence[str] = option(
        (),
        "Phases to run, separated by commas.  [default: all]",
        commas=True,
        choices=("all", *PHASES),
    )
    case: Sequence[str] = option(
        (), "Cases to run, as globs separated by commas.  [default: *]", commas=True, metavar="GLOB"
    )
    last_failed: bool = option(
        False,
        "Check only what failed in the last check of the golden set; everything if nothing did.",
        in_pytest=False,
    )
    fail_fast: bool = option(False, "Stop at the first failure.", short="-x", in_pytest=False)
    shard: str | None = option(
        None,
        "Check the K-th of N shares of the cases; `snap merge` makes one report of all N.",
        metavar="K/N",
    )
    localise: bool = option(
        False, "Compare module by module even if everything passes.", in_pytest=False
    )
    quick: bool = option(
        False,
        "Verify generation in one pass over prompt and golden tokens; its cache is not tested.",
    )
    repeat: int = option(
        1,
        "Run every phase N times and report outputs that differ between runs.",
        limits=(1, 100),
        metavar="N",
    )
    explore: int | None = option(
        None,
        "Run N more queries that the golden set answers: prefixes, padding, batches, tiles …",
        limits=(1, None),
        metavar="N",
        in_pytest=False,
    )
    seed: int | None = option(
        None,
        "Seed of the queries of --explore; by default the golden set's seed.",
        limits=(0, None),
        in_pytest=False,
    )
    replay: Sequence[str] = option(
        (),
        "Run this query of an --explore again, and nothing else.",
        metavar="QUESTION",
        in_pytest=False,
    )
    dtype: str | None = option(
        None,
        "What the candidate computes in; by default the dtype of the golden set.",
        choices=ORACLE_DTYPES,
    )
    tolerance: str | None = option(
        None,
        "Judge by the golden set's table of tolerances, or by its oracle.  [default: table; "
        "oracle if --dtype is not the golden set's]",
        choices=tuple(Rule),
    )
    allow_near_ties: bool = option(
        False, "Let a generation pass that differs only if rounding could have chosen."
    )
    graft: str = option(
        "",
        "Put the golden output in this module's place and run on, to test whether the fault is "
        "only there.",
        metavar="MODULE",
        in_pytest=False,
    )
    atol: float | None = option(
        None, "Absolute tolerance in place of the golden set's.", limits=(0, 1e30)
    )
    rtol: float | None = option(
        None, "Relative tolerance in place of the golden set's.", limits=(0, 1e30)
    )
    require: Sequence[str] = option(
        (),
        "Exit with 3 if this phase is skipped anywhere, or if no case reaches this feature of the "
        "model.",
        commas=True,
        choices=(*PHASES, *COVERAGE_NAMES),
        in_pytest=False,
    )

    def __post_init__(self) -> None:
        """Raise UsageError for a value that an option does not take."""
        normalise_options(self)
        _ = self.share, self.questions  # they raise it, too

    @property
    def case_text(self) -> str:
        """The globs of --case as one text."""
        return ",".join(self.case) or "*"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases to run, in their order."""
        return named_phases(self.phase) or PHASES

    @property
    def required(self) -> tuple[str, ...]:
        """What must be compared or reached, each once."""
        return tuple(dict.fromkeys(self.require))

    @property
    def rule(self) -> Rule | None:
        """The rule that --tolerance names."""
        return Rule(self.tolerance) if self.tolerance else None

    @property
    def share(self) -> Share | None:
        """The share that --shard names; raise UsageError if it is not K/N."""
        from snapshot_tool.base.report import parse_share

        return parse_share(self.shard) if self.shard else None

    @property
    def questions(self) -> tuple[Question, ...]:
        """The queries that --replay names; raise UsageError for an unknown one."""
        from snapshot_tool.explore.questions import parse_question

        return tuple(map(parse_question, self.replay))

    @property
    def needs_weights(self) -> bool:
        """Whether anything but preprocessing runs."""
        more = self.replay or self.explore or self.localise or self.graft
        return bool(more) or self.phases != (Phase.PREPROCESSING,)

    @property
    def golden_choice(self) -> GoldenChoice:
        """Which golden set is meant."""
        from snapshot_tool.goldens.find import GoldenChoice

        return GoldenChoice(
            Path(self.goldens),
            self.checkpoint,
            self.revision,
            self.device,
            self.golden_device,
            self.dtype,
        )


def select_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    """Return the cases that --case and --shard select; raise UsageError for none."""
    cases = matching_cases(manifest, request)
    share = request.share
    if share is None:
        return cases
    if request.replay:
        raise UsageError("--replay runs only what it names, not a share", "leave out --shard")
    if share.count > len(cases):
        raise UsageError(
            f"--shard {share}: there are {len(cases)} cases", f"use at most {len(cases)} shards"
        )
    return list(share.of(cases))


def matching_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    """Return the cases that --case selects, of all shards; raise UsageError for a useless glob."""
    names = [case.name for case in manifest.cases]
    chosen = set()
    for glob in request.case or ("*",):
        matching = fnmatch.filter(names, glob)
        if not matching:
            raise UsageError(
                f"--case {glob} matches none of the {len(names)} cases", suggest(glob, names)
            )
        chosen.update(matching)
    return [case for case in manifest.cases if case.name in chosen]


def require_phases(manifest: Manifest, request: CheckRequest) -> None:
    """Raise UsageError if --phase names a phase that the model's family does not have."""
    missing = [phase for phase in request.phase if phase not in ("all", *manifest.tolerances)]
    if missing:
        raise UsageError(
            f"--phase {missing[0]}: {manifest.checkpoint.family} has no such phase",
            f"there are: {', '.join(manifest.tolerances)}",
        )


def shard_of(manifest: Manifest, request: CheckRequest) -> Shard | None:
    """Return the share of this check, and all that another one must have in common with it."""
    from snapshot_tool.base.report import Shard

    if request.share is None:
        return None
    asked = {
        "--case": request.case_text,
        "--phase": " ".join(request.phases),
        "--require": " ".join(request.required),
        "--atol": str(request.atol),
        "--rtol": str(request.rtol),
        "--repeat": str(request.repeat),
        "--explore": str(request.explore or 0),
        "--seed": str(request.seed),
        "--graft": request.graft or "",
        "--loading": request.loading,
    }
    cases = tuple(case.name for case in select_cases(manifest, request))
    all_cases = len(matching_cases(manifest, request))
    return Shard(request.share.index, request.share.count, cases, all_cases, asked)


def choose_rule(request: CheckRequest, golden: Golden) -> tuple[str, Rule]:
    """Return the candidate's dtype and the rule that judges it.

    Raises UsageError if the table is to judge half precision, which it is not made for, and
    GoldenNotFound if there is no oracle, or one that is too coarse.
    """
    from snapshot_tool.goldens.layout import ORACLE
    from snapshot_tool.goldens.manifest import Storage
    from snapshot_tool.goldens.oracle import has_coarse_oracle

    own = golden.manifest.dtype
    dtype = request.dtype or own
    rule = request.rule or default_rule(own, dtype)
    own_tolerance = request.atol is not None and request.rtol is not None
    if rule is Rule.TABLE and default_rule(own, dtype) is Rule.ORACLE and not own_tolerance:
        raise UsageError(
            f"the table of tolerances is made for float32, not for {dtype} against {own}",
            "leave out --tolerance table, or pass --atol and --rtol",
        )
    needed = rule is Rule.ORACLE or request.allow_near_ties
    if needed and ORACLE not in golden.manifest.files:
        use = f"judging {dtype}" if rule is Rule.ORACLE else "--allow-near-ties"
        compact = golden.manifest.storage is Storage.COMPACT
        storage = " --storage full" if compact else ""
        raise GoldenNotFound(
            f"{golden.manifest.title} has no oracle, which is needed for {use}",
            f"record it with: snap record ... --update --reason TEXT{storage} --oracle",
        )
    if rule is Rule.ORACLE and own != dtype == "float32" and has_coarse_oracle(golden.manifest):
        raise GoldenNotFound(
            f"the oracle of {golden.manifest.title} is too coarse to judge {dtype}",
            "record the set again with this snap: snap record ... --update --reason TEXT --oracle",
        )
    return dtype, rule
