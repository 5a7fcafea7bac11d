"""The request of a check: golden set, candidate, cases, device and rule."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import UsageError, suggest
from snapshot_tool.base.options import (
    DEVICES,
    command_line,
    family_field,
    goldens_field,
    normalise_options,
    option,
    options_of,
)
from snapshot_tool.base.protocol import (
    COVERAGE_NAMES,
    EAGER,
    PHASES,
    ExecutionPath,
    Phase,
    named_phases,
    parse_path,
)
from snapshot_tool.base.tolerance import ORACLE_DTYPES, Rule

if TYPE_CHECKING:
    from snapshot_tool.base.report import Shard, Share
    from snapshot_tool.explore.questions import Question
    from snapshot_tool.goldens.find import GoldenChoice
    from snapshot_tool.goldens.manifest import CaseEntry, Manifest

# Options that mean nothing for answers from elsewhere.
_OF_CANDIDATES = (
    *("fms_path", "candidate", "loading", "path", "checkpoint", "revision", "device"),
    *("golden_device", "dtype", "shard", "localise", "isolate", "quick", "repeat"),
    *("explore", "replay", "graft"),
)

# The plugin reads these declarations in every pytest session, so only the functions that need torch
# and msgspec import them.


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """The options of `snap check`. None means the golden set's value, or any."""

    goldens: str | Path = goldens_field()
    _: KW_ONLY
    fms_path: str | Path | None = option(
        None,
        "Root of an FMS checkout, used in place of an installed FMS. Its code is run.",
        metavar="CHECKOUT",
    )
    candidate: str = option(
        "fms",
        "'fms', or 'module:factory' for another implementation. Its code is run.",
        metavar="SPEC",
    )
    loading: str = option(
        "snap",
        "Load the model with snap's mapping of the configuration, or with FMS's own "
        "get_model('hf_pretrained'), which needs transformers and is compared with snap's.",
        choices=("snap", "own"),
    )
    family: Sequence[str] = family_field()
    checkpoint: str | None = option(
        None,
        "Golden set: its name in snap list or a part of it, or the folder or hub id of its "
        "checkpoint.",
        metavar="NAME",
    )
    revision: str | None = option(None, "Revision of the golden set, or its first digits.")
    path: Sequence[str] = option(
        (),
        "How FMS runs the model: eager, static (prompts padded to multiples of 64), "
        "compiled[:BACKEND] (the same, with torch.compile), paged (paged attention) or chunked[:N] "
        "(the same, N tokens at a time). Several are compared.  [default: eager]",
        commas=True,
        metavar="PATH",
    )
    device: str = option("cpu", "Device of the candidate.", choices=DEVICES)
    golden_device: str | None = option(
        None, "Device of the golden set, if different from --device.", choices=DEVICES
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
        "Check only what failed in the last check of the golden set on this path; everything if "
        "nothing failed.",
        in_pytest=False,
    )
    fail_fast: bool = option(False, "Stop at the first failure.", short="-x", in_pytest=False)
    shard: str | None = option(
        None,
        "Check the K-th of N parts of the cases; `snap merge` merges the N reports.",
        metavar="K/N",
    )
    localise: bool = option(
        False, "Compare module by module even if everything passes.", in_pytest=False
    )
    isolate: bool = option(
        False,
        "Run every module on the reference's own input, and list those that are wrong by "
        "themselves.",
        in_pytest=False,
    )
    quick: bool = option(
        False,
        "Verify generation in one pass over prompt and recorded tokens; the cache is not tested.",
    )
    repeat: int = option(
        1,
        "Run every phase N times and report outputs that differ between runs.",
        limits=(1, 100),
        metavar="N",
    )
    explore: int | None = option(
        None,
        "Run N questions derived from the golden set: prefixes, padding, batches, tiles …",
        limits=(1, None),
        metavar="N",
        in_pytest=False,
    )
    seed: int | None = option(
        None,
        "Seed of --explore; by default the golden set's seed.",
        limits=(0, None),
        in_pytest=False,
    )
    replay: Sequence[str] = option(
        (),
        "Run only this question of an --explore again.",
        metavar="QUESTION",
        in_pytest=False,
    )
    dtype: str | None = option(
        None,
        "Dtype of the candidate; by default the dtype of the golden set.",
        choices=ORACLE_DTYPES,
    )
    tolerance: str | None = option(
        None,
        "Judge by the golden set's table of tolerances, or by its oracle.  [default: table; "
        "oracle for half precision]",
        choices=tuple(Rule),
    )
    allow_near_ties: bool = option(
        False, "Let a generation pass if its tokens differ only by rounding."
    )
    graft: str = option(
        "",
        "Replace this module's output by the recorded one, to test whether it is the only fault.",
        metavar="MODULE",
        in_pytest=False,
    )
    atol: float | None = option(
        None, "Absolute tolerance in place of the golden set's.", limits=(0, 1e30)
    )
    rtol: float | None = option(
        None, "Relative tolerance in place of the golden set's.", limits=(0, 1e30)
    )
    answers: str | Path | None = option(
        None,
        "Judge the answers in this folder (snap ask) in place of a candidate.",
        metavar="ANSWERS",
    )
    require: Sequence[str] = option(
        (),
        "Exit with 3 if this phase is skipped in any case, or if no case reaches this feature of "
        "the model.",
        commas=True,
        choices=(*PHASES, *COVERAGE_NAMES),
        in_pytest=False,
    )

    def __post_init__(self) -> None:
        """Raise UsageError for a value that an option does not take."""
        normalise_options(self)
        _ = self.share, self.questions, self.paths  # these also raise it
        if self.answers:
            for field in _OF_CANDIDATES:
                option = options_of(CheckRequest)[field]
                if getattr(self, field) not in (option.default, ()):
                    raise UsageError(f"answers are judged without {option.flag}", "leave it out")
        if self.paths == (EAGER,):
            return
        if self.candidate != "fms":
            raise UsageError("--path goes with --candidate fms", "leave one of the two out")
        if self.graft or self.isolate:
            raise UsageError(
                "--graft and --isolate replace tensors on the eager path only", "leave out --path"
            )

    @property
    def case_text(self) -> str:
        """The globs of --case, separated by commas."""
        return ",".join(self.case) or "*"

    @property
    def command(self) -> str:
        """The command line of this request."""
        if self.answers:
            command = shlex.join(("snap", "judge", str(self.answers)))
            return command_line(command, replace(self, answers=None))
        return command_line("snap check", self)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases to run, in their order."""
        return named_phases(self.phase) or PHASES

    @property
    def paths(self) -> tuple[ExecutionPath, ...]:
        """The paths to check, each once; raise UsageError for an invalid name."""
        return tuple(dict.fromkeys(map(parse_path, self.path))) or (EAGER,)

    @property
    def required(self) -> tuple[str, ...]:
        """The phases and features that --require names, each once."""
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
        """The questions that --replay names; raise UsageError for an invalid one."""
        if not self.replay:
            return ()
        from snapshot_tool.explore.questions import parse_question

        return tuple(map(parse_question, self.replay))

    @property
    def needs_weights(self) -> bool:
        """Whether anything but preprocessing runs."""
        if self.answers:
            return False
        more = self.replay or self.explore or self.localise or self.graft
        return bool(more) or self.phases != (Phase.PREPROCESSING,)

    @property
    def golden_choice(self) -> GoldenChoice:
        """The options that select the golden set."""
        from snapshot_tool.goldens.find import GoldenChoice

        if self.answers:
            from snapshot_tool.candidates.answers import read_header

            asked = read_header(Path(self.answers)).golden
            return GoldenChoice(
                Path(self.goldens),
                asked.checkpoint,
                asked.revision,
                asked.device,
                dtype=asked.dtype,
            )
        return GoldenChoice(
            Path(self.goldens),
            self.checkpoint,
            self.revision,
            self.device,
            self.golden_device,
            self.dtype,
        )


def select_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    """Return the cases that --case and --shard select; raise UsageError if there are none."""
    cases = matching_cases(manifest, request)
    share = request.share
    if share is None:
        return cases
    if request.replay:
        raise UsageError("--replay and --shard cannot be combined", "leave out --shard")
    if share.count > len(cases):
        raise UsageError(
            f"--shard {share}: there are {len(cases)} cases", f"use at most {len(cases)} shards"
        )
    return list(share.of(cases))


def matching_cases(manifest: Manifest, request: CheckRequest) -> list[CaseEntry]:
    """Return the cases that --case selects; raise UsageError for a glob without a match."""
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
            f"its phases: {', '.join(manifest.tolerances)}",
        )


def shard_of(manifest: Manifest, request: CheckRequest) -> Shard | None:
    """Return the shard of this check, with the options that all shards must share."""
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
        "--graft": request.graft,
        "--loading": request.loading,
        "--path": ",".join(map(str, request.paths)),
    }
    cases = tuple(case.name for case in select_cases(manifest, request))
    all_cases = len(matching_cases(manifest, request))
    return Shard(request.share.index, request.share.count, cases, all_cases, asked)
