"""What a check is asked to do: which golden set, which cases, on what, judged by which rule."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.errors import GoldenNotFound, UsageError
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import Loading
from snapshot_tool.base.questions import Question
from snapshot_tool.base.report import Shard, Share
from snapshot_tool.base.tolerance import Rule, default_rule
from snapshot_tool.candidates import FMS
from snapshot_tool.goldens.choice import GoldenChoice
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import ORACLE
from snapshot_tool.goldens.manifest import CaseEntry, Manifest, Storage
from snapshot_tool.goldens.oracle import has_coarse_oracle


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """What to check. None: whatever the golden says, or anything that is there."""

    goldens: Path
    candidate: str = FMS
    fms_path: Path | None = None
    checkpoint: str | None = None
    revision: str | None = None
    device: str = "cpu"
    golden_device: str | None = None
    phases: tuple[Phase, ...] = PHASES
    case: str = "*"
    localise: bool = False
    quick: bool = False
    atol: float | None = None
    rtol: float | None = None
    dtype: str | None = None
    rule: Rule | None = None
    allow_near_ties: bool = False
    graft: str = ""
    required: tuple[str, ...] = ()
    repeat: int = 1
    explore: int = 0
    seed: int | None = None
    replay: tuple[Question, ...] = ()
    share: Share | None = None
    loading: Loading = Loading.SNAP

    @property
    def needs_weights(self) -> bool:
        """Whether the model as a whole is asked; a replay asks what it names and nothing else."""
        return not self.replay and self.phases != (Phase.PREPROCESSING,)

    @property
    def golden_choice(self) -> GoldenChoice:
        """Which golden set is meant."""
        return GoldenChoice(
            self.goldens,
            self.checkpoint,
            self.revision,
            self.device,
            self.golden_device,
            self.dtype,
        )


def select_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    """Return the share asked for of the cases that `--case` names; raise UsageError for none."""
    cases = matching_cases(manifest, request)
    share = request.share
    if share is None:
        return cases
    if request.replay:
        raise UsageError("--replay asks what it names, of no share", "leave out --shard")
    if share.count > len(cases):
        raise UsageError(
            f"--shard {share}: there are {len(cases)} cases", f"use at most {len(cases)} shards"
        )
    return list(share.of(cases))


def matching_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    """Return the cases that `--case` names, of all shards; raise UsageError for none."""
    names = [case.name for case in manifest.cases]
    chosen = set(fnmatch.filter(names, request.case))
    if not chosen:
        raise UsageError(
            f"--case {request.case} matches none of the {len(names)} cases",
            f"there are: {', '.join(names)}",
        )
    return [case for case in manifest.cases if case.name in chosen]


def shard_of(manifest: Manifest, request: CheckRequest) -> Shard | None:
    """Return which share this is, with all that another one must have in common with it."""
    if request.share is None:
        return None
    asked = {
        "--case": request.case,
        "--phase": " ".join(request.phases),
        "--require": " ".join(request.required),
        "--atol": str(request.atol),
        "--rtol": str(request.rtol),
        "--repeat": str(request.repeat),
        "--explore": str(request.explore),
        "--seed": str(request.seed),
        "--graft": request.graft,
        "--loading": request.loading.value,
    }
    cases = tuple(case.name for case in select_cases(manifest, request))
    all_cases = len(matching_cases(manifest, request))
    return Shard(request.share.index, request.share.count, cases, all_cases, asked)


def choose_rule(request: CheckRequest, golden: Golden) -> tuple[str, Rule]:
    """Return the candidate's dtype and what judges it.

    Raises UsageError if the table is to judge half precision, which it is not made for, and
    GoldenNotFound if there is no oracle, or one that is too coarse.
    """
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
