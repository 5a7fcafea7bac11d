"""Reading a check back from its JSON: a report of any kind can be made long after the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.localisation import Localisation, ModuleErrors, ModuleMapping
from snapshot_tool.base.protocol import CandidateInfo
from snapshot_tool.base.report import (
    CheckReport,
    Coverage,
    Exploration,
    ExploredKind,
    GoldenIdentity,
    Graft,
    Shard,
    Share,
    Transformers,
    WeightReport,
)
from snapshot_tool.base.results import Comparison, ErrorMap, Result, TokenChoice, TokenDivergence
from snapshot_tool.base.tolerance import OracleComparison, Rule, Tolerance
from snapshot_tool.reports.run_json import SCHEMA

_WORDS = ("nan", "inf", "-inf")
_FIGURES = ("max_abs", "max_rel", "mean_abs", "rmse", "cosine", "expected", "actual")
_ORACLE = ("error", "reference_error", "limit", "position_error", "position_limit")
_MARGINS = ("margin", "margin_above", "rounding", "candidate_margin")
_ERRORS = ("input_error", "output_error", "input_limit", "output_limit")


def read_run(path: Path) -> CheckReport:
    """Return the check that a file of `snap check --json` holds; raise SnapError where it is none.

    Fields that it does not know are ignored, those of newer runs that it lacks have defaults.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise SnapError(f"cannot read {path}: {error.strerror}", "name another file") from error
    except ValueError as error:
        raise _not_a_run(path, error) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise _not_a_run(path, f"its schema is not {SCHEMA}")
    try:
        return _report(data)
    except (msgspec.ValidationError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise _not_a_run(path, error) from error


def _not_a_run(path: Path, why: object) -> SnapError:
    return SnapError(f"{path} is no run of snap check: {why}", "write one with: snap check --json")


def _report(data: Mapping[str, Any]) -> CheckReport:
    environment = dict(data["environment"])
    candidate = msgspec.convert(environment.pop("candidate"), CandidateInfo)
    transformers = Transformers(
        bool(environment.pop("transformers_importable")),
        bool(environment.pop("transformers_imported")),
    )
    results = tuple(_result(entry) for entry in data["results"])
    exploration = _exploration(data.get("exploration"), results)
    asked = {id(result) for result in exploration.results} if exploration else set()
    return CheckReport(
        golden=msgspec.convert(data["golden"], GoldenIdentity),
        device=str(environment.pop("checked_on")),
        candidate=candidate,
        transformers=transformers,
        environment={str(name): str(value) for name, value in environment.items()},
        results=tuple(result for result in results if id(result) not in asked),
        unmet=msgspec.convert(data["unmet_requirements"], tuple[str, ...]),
        coverage=msgspec.convert(data.get("coverage", []), tuple[Coverage, ...]),
        localisation=_localisation(data),
        exploration=exploration,
        quick=bool(data["quick"]),
        dtype=str(data["dtype"]),
        rule=Rule(data["tolerance"]),
        near_ties_allowed=bool(data["near_ties_allowed"]),
        graft=_graft(data.get("graft")),
        warnings=msgspec.convert(data.get("warnings", []), tuple[str, ...]),
        weights=_weights(data.get("weights")),
        surroundings=msgspec.convert(data.get("recorded_elsewhere", []), tuple[str, ...]),
        shard=_shard(data.get("shard")),
    )


def _shard(entry: Mapping[str, Any] | None) -> Shard | None:
    if entry is None:
        return None
    return msgspec.convert({**entry, "share": msgspec.convert(entry, Share)}, Shard)


def _weights(entry: Mapping[str, Any] | None) -> WeightReport | None:
    if entry is None:
        return None
    differing = [_with_numbers(weight, _FIGURES) for weight in entry["differing"]]
    return msgspec.convert({**entry, "differing": differing}, WeightReport)


def _exploration(entry: Mapping[str, Any] | None, results: Sequence[Result]) -> Exploration | None:
    """Return what was asked besides; the tensor of its results is the question, KIND:…, asked."""
    if entry is None:
        return None
    kinds = tuple(
        ExploredKind(
            str(kind["kind"]),
            int(kind["asked"]),
            tuple(r for r in results if r.tensor.partition(":")[0] == kind["kind"]),
        )
        for kind in entry["kinds"]
    )
    return Exploration(kinds, msgspec.convert(entry["seed"], int | None))


def _result(entry: Mapping[str, Any]) -> Result:
    oracle, divergence = (entry.get(name) for name in ("oracle", "divergence"))
    fields = {
        "tolerance": None if entry["atol"] is None else msgspec.convert(entry, Tolerance),
        "comparison": _comparison(entry),
        "oracle": oracle and msgspec.convert(_with_numbers(oracle, _ORACLE), OracleComparison),
        "divergence": _divergence(divergence) if divergence else None,
    }
    return msgspec.convert({**entry, **fields}, Result)


def _divergence(entry: Mapping[str, Any]) -> TokenDivergence:
    fields = {
        "expected": TokenChoice(entry["expected"], entry["expected_text"]),
        "actual": TokenChoice(entry["actual"], entry["actual_text"]),
        "golden": [_token(token) for token in entry["golden"]],
        "candidate": [_token(token) for token in entry["candidate"]],
    }
    return msgspec.convert({**_with_numbers(entry, _MARGINS), **fields}, TokenDivergence)


def _token(written: str) -> TokenChoice:
    number, blank, text = written.partition(" ")
    return TokenChoice(int(number), text if blank else None)


def _comparison(entry: Mapping[str, Any]) -> Comparison | None:
    if entry["numel"] is None:
        return None
    worst = entry["worst"] and _with_numbers(entry["worst"], _FIGURES)
    figures = _with_numbers(entry, _FIGURES)
    errors = _error_map(entry.get("error_map"))
    return msgspec.convert(figures | {"worst": worst, "errors": errors}, Comparison)


def _error_map(entry: Mapping[str, Any] | None) -> ErrorMap | None:
    if entry is None:
        return None
    cells = [[float(cell) for cell in row.split()] for row in entry["cells"]]
    return msgspec.convert({**entry, "cells": cells}, ErrorMap)


def _with_numbers(entry: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the entry with the words that stand for infinity and NaN as numbers."""
    return {
        name: float(value) if name in names and value in _WORDS else value
        for name, value in entry.items()
    }


def _localisation(data: Mapping[str, Any]) -> Localisation | None:
    entry = data.get("localisation")
    if entry is None:
        return None
    modules = tuple(_module(module) for module in data["modules"])
    return Localisation(
        case=str(entry["case"]),
        first_bad=entry["culprit"],
        own_code=bool(entry["own_code"]),
        between=bool(entry["between_modules"]),
        recovers=bool(entry["heals"]),
        modules=modules,
        neighbours=msgspec.convert(entry["neighbours"], tuple[str, str]),
        skipped=bool(entry["skipped"]),
        raised=bool(entry["raised"]),
        mapping=_mapping(data.get("module_mapping"), modules),
    )


def _mapping(
    entry: Mapping[str, Any] | None, modules: Sequence[ModuleErrors]
) -> ModuleMapping | None:
    if entry is None:
        return None
    names = {module.module: module.candidate for module in modules if module.candidate}
    return msgspec.convert({**entry, "names": names}, ModuleMapping)


def _graft(entry: Mapping[str, Any] | None) -> Graft | None:
    """Return what a graft proved; of its modules only the one that is wrong next was kept."""
    if entry is None:
        return None
    case, found = str(entry["case"]), None
    if entry["next_module"] is not None:
        found = Localisation(
            case,
            str(entry["next_module"]),
            own_code=False,
            between=False,
            recovers=False,
            modules=(),
        )
    before, after = (
        msgspec.convert(entry[name], tuple[Result, ...]) for name in ("before", "results")
    )
    return Graft(str(entry["module"]), str(entry["candidate_module"]), case, before, after, found)


def _module(entry: Mapping[str, Any]) -> ModuleErrors:
    fields = _with_numbers(entry, _ERRORS)
    return msgspec.convert(fields | {"candidate": entry["candidate_module"]}, ModuleErrors)
