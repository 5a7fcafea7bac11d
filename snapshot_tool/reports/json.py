"""A check as JSON, written and read. docs/json.md explains the fields.

`CheckDocument` declares the file's top level; its parts are the classes of `snapshot_tool.base`.
JSON has no NaN or infinity: such figures are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import msgspec

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.localisation import (
    Finding,
    Localisation,
    MappingSummary,
    ModuleErrors,
    ModuleTrials,
)
from snapshot_tool.base.protocol import CandidateInfo
from snapshot_tool.base.report import (
    CheckReport,
    Coverage,
    Exploration,
    ExploredKind,
    GoldenIdentity,
    Graft,
    PathDifference,
    Shard,
    Transformers,
    WeightReport,
)
from snapshot_tool.base.results import SIZE_BOUNDS, Judgement, Result, Verdict
from snapshot_tool.base.tolerance import Rule

_CANDIDATE, _DEVICE = "candidate", "checked_on"
_IMPORTABLE, _IMPORTED = "transformers_importable", "transformers_imported"


@dataclass(frozen=True, slots=True)
class FirstDivergence(Judgement):
    """The first failure in the order of phases, and where it arises; see `CheckReport.location`."""

    module: str | None = None
    candidate_module: str | None = None
    place: str | None = None
    guess: bool = False


class KindSummary(msgspec.Struct, kw_only=True):
    """One kind of derived question; `smallest_failure` is a question for `--replay`."""

    kind: str
    asked: int
    verdict: Verdict
    smallest_failure: str | None


class ExplorationSummary(msgspec.Struct, kw_only=True):
    """The derived questions; their results are in the report's `results`."""

    seed: int | None
    asked: int
    kinds: tuple[KindSummary, ...]


class CheckDocument(msgspec.Struct, kw_only=True):
    """The file that `snap check --json` writes."""

    schema: Literal["snap-check/1"] = "snap-check/1"
    snap: str = ""
    date: str = ""
    command: str = "snap check ..."
    seconds: float = 0.0
    verdict: Verdict
    exit_code: int
    counts: dict[Verdict, int] = {}
    quick: bool
    answered: bool = False
    dtype: str
    tolerance: Rule
    near_ties_allowed: bool
    golden: GoldenIdentity
    environment: dict[str, str | bool | CandidateInfo]
    warnings: tuple[str, ...] = ()
    recorded_elsewhere: tuple[str, ...] = ()
    results: tuple[Result, ...]
    error_size_bounds: tuple[float, ...] = SIZE_BOUNDS
    weights: WeightReport | None = None
    unmet_requirements: tuple[str, ...]
    coverage: tuple[Coverage, ...] = ()
    first_divergence: FirstDivergence | None = None
    graft: Graft | None = None
    probes: ModuleTrials | None = None
    isolated: ModuleTrials | None = None
    modules: tuple[ModuleErrors, ...] | None = None
    module_mapping: MappingSummary | None = None
    localisation: Finding | None = None
    exploration: ExplorationSummary | None = None
    shard: Shard | None = None
    next: tuple[str, ...] = ()
    path: str = "eager"
    path_difference: PathDifference | None = None


# Parts that are written with other names or in another form.
_OTHER = ("environment", "exploration", "localisation", "results")
_SAME = tuple(
    field.name
    for field in fields(CheckReport)
    if field.name in CheckDocument.__struct_fields__ and field.name not in _OTHER
)


def write_json(document: object) -> str:
    """Return the JSON text of a report."""
    figures = _spell_figures(msgspec.to_builtins(document))
    return json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _spell_figures(value: Any) -> Any:
    """Return a value with NaN and infinity as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _spell_figures(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_figures(item) for item in value]
    return value


def run_to_json(report: CheckReport) -> str:
    """Return the report as JSON text."""
    found = report.localisation
    document = CheckDocument(
        **{name: getattr(report, name) for name in _SAME},
        verdict=report.verdict,
        exit_code=report.exit_code,
        counts=report.counts,
        tolerance=report.rule,
        environment={
            **report.environment,
            _CANDIDATE: report.candidate,
            _IMPORTABLE: report.transformers.importable,
            _IMPORTED: report.transformers.imported_by_candidate,
            _DEVICE: report.device,
        },
        recorded_elsewhere=report.environment_differences,
        results=report.all_results,
        unmet_requirements=report.unmet,
        first_divergence=_first_divergence(report),
        modules=found.modules if found else None,
        module_mapping=found.mapping if found else None,
        localisation=msgspec.convert(found, Finding, from_attributes=True) if found else None,
        exploration=_exploration_summary(report.exploration),
        next=report.next_commands,
    )
    return write_json(document)


def _first_divergence(report: CheckReport) -> FirstDivergence | None:
    first, found = report.divergence, report.localisation
    if first is None:
        return None
    bad = found.first_bad_module if found else None
    return FirstDivergence(
        case=first.case,
        phase=first.phase,
        tensor=first.tensor,
        verdict=first.verdict,
        reason=first.reason,
        module=(found.module or None) if found else None,
        candidate_module=bad.candidate if bad else None,
        place=report.location or None,
        guess=report.location_is_guess,
    )


def _exploration_summary(found: Exploration | None) -> ExplorationSummary | None:
    if found is None:
        return None
    kinds = tuple(
        KindSummary(
            kind=kind.kind,
            asked=kind.asked,
            verdict=kind.verdict,
            smallest_failure=kind.failure.tensor if kind.failure else None,
        )
        for kind in found.kinds
    )
    return ExplorationSummary(seed=found.seed, asked=found.asked, kinds=kinds)


def read_run(path: Path) -> CheckReport:
    """Return the check in a file of `snap check --json`; raise SnapError for any other file.

    Unknown fields are ignored. Fields that an older version did not write have defaults.
    """
    try:
        # Not strict: figures may be the strings "nan", "inf" and "-inf".
        document = msgspec.json.decode(path.read_bytes(), type=CheckDocument, strict=False)
        return _report(document)
    except OSError as error:
        raise SnapError(f"cannot read {path}: {error.strerror}", "name another file") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SnapError(
            f"{path} is not a report of snap check: {error}", "write one with: snap check --json"
        ) from error


def _report(document: CheckDocument) -> CheckReport:
    environment = dict(document.environment)
    candidate = msgspec.convert(environment.pop(_CANDIDATE, None), CandidateInfo)
    importable, imported = (
        msgspec.convert(environment.pop(name, None), bool) for name in (_IMPORTABLE, _IMPORTED)
    )
    exploration = _exploration(document.exploration, document.results)
    asked = {id(result) for result in exploration.results} if exploration else set()
    return CheckReport(
        **{name: getattr(document, name) for name in _SAME},
        device=str(environment.pop(_DEVICE, "")),
        candidate=candidate,
        transformers=Transformers(importable, imported),
        environment=msgspec.convert(environment, dict[str, str]),
        results=tuple(result for result in document.results if id(result) not in asked),
        unmet=document.unmet_requirements,
        localisation=_localisation(document),
        environment_differences=document.recorded_elsewhere,
        exploration=exploration,
        rule=document.tolerance,
        next_commands=document.next,
    )


def _exploration(
    summary: ExplorationSummary | None, results: Sequence[Result]
) -> Exploration | None:
    """Return the derived questions; the tensor of their results is the question."""
    if summary is None:
        return None
    by_kind: dict[str, list[Result]] = {}
    for result in results:
        by_kind.setdefault(result.tensor.partition(":")[0], []).append(result)
    kinds = tuple(
        ExploredKind(kind.kind, kind.asked, tuple(by_kind.get(kind.kind, ())))
        for kind in summary.kinds
    )
    return Exploration(kinds, summary.seed)


def _localisation(document: CheckDocument) -> Localisation | None:
    if document.localisation is None:
        return None
    return Localisation(
        **msgspec.structs.asdict(document.localisation),
        modules=document.modules or (),
        mapping=document.module_mapping,
    )
