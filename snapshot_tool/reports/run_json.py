"""A check as JSON: the field names are a contract, listed in docs/json.md.

JSON has no NaN or infinity: such figures are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.report import CheckReport, Exploration, Graft, Shard, WeightReport
from snapshot_tool.base.results import (
    SIZE_BOUNDS,
    Comparison,
    ErrorMap,
    Result,
    TokenChoice,
    TokenDivergence,
    Worst,
)
from snapshot_tool.base.tolerance import OracleComparison

SCHEMA = "snap-check/1"


def run_to_json(report: CheckReport) -> str:
    """Return the report as JSON text."""
    return json.dumps(run_to_dict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def run_to_dict(report: CheckReport) -> dict[str, Any]:
    """Return the report as plain JSON values."""
    golden = report.golden
    candidate = report.candidate
    return {
        "schema": SCHEMA,
        "verdict": report.verdict.value,
        "exit_code": report.exit_code,
        "quick": report.quick,
        "dtype": report.dtype,
        "tolerance": report.rule.value,
        "near_ties_allowed": report.near_ties_allowed,
        "golden": {
            "checkpoint": golden.checkpoint,
            "revision": golden.revision,
            "device": golden.device,
            "dtype": golden.dtype,
            "golden_version": golden.golden_version,
            "folder": golden.folder,
        },
        "environment": {
            **report.environment,
            "candidate": {
                "name": candidate.name,
                "path": candidate.path,
                "version": candidate.version,
                "commit": candidate.commit,
                "dirty": candidate.dirty,
                "notes": list(candidate.notes),
                "loading": candidate.loading.value,
                "mapping": [dataclasses.asdict(difference) for difference in candidate.mapping],
            },
            "transformers_importable": report.transformers.importable,
            "transformers_imported": report.transformers.imported_by_candidate,
            "checked_on": report.device,
        },
        "warnings": list(report.warnings),
        "recorded_elsewhere": list(report.surroundings),
        "results": [_result(result) for result in report.all_results],
        "error_size_bounds": list(SIZE_BOUNDS),
        "weights": _weights(report.weights),
        "unmet_requirements": list(report.unmet),
        "coverage": [
            {"name": one.name, "reached": one.reached, "text": one.text} for one in report.coverage
        ],
        "first_divergence": _divergence(report),
        "graft": _graft(report.graft),
        "modules": _modules(report.localisation),
        "module_mapping": _mapping(report.localisation),
        "localisation": _localisation(report.localisation),
        "exploration": _exploration(report.exploration),
        "shard": _shard(report.shard),
    }


def _shard(shard: Shard | None) -> dict[str, Any] | None:
    if shard is None:
        return None
    return {
        "index": shard.share.index,
        "count": shard.share.count,
        "cases": list(shard.cases),
        "all_cases": shard.all_cases,
        "asked": dict(shard.asked),
    }


def _weights(found: WeightReport | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "compared": found.compared,
        "not_compared": list(found.not_compared),
        "unset": list(found.unset),
        "harmful": None if found.harmful is None else list(found.harmful),
        "differing": [
            {
                "name": weight.name,
                "modules": list(weight.modules),
                "mismatched": weight.mismatched,
                "numel": weight.numel,
                "max_abs": _number(weight.max_abs),
            }
            for weight in found.differing
        ],
    }


def _exploration(found: Exploration | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "seed": found.seed,
        "asked": found.asked,
        "kinds": [
            {
                "kind": kind.kind,
                "asked": kind.asked,
                "verdict": kind.verdict.value,
                "smallest_failure": kind.failure.tensor if kind.failure else None,
            }
            for kind in found.kinds
        ],
    }


def _judged(result: Result) -> dict[str, Any]:
    return {
        "case": result.case,
        "phase": result.phase.value,
        "tensor": result.tensor,
        "verdict": result.verdict.value,
        "reason": result.reason,
    }


def _result(result: Result) -> dict[str, Any]:
    tolerance = result.tolerance
    return {
        **_judged(result),
        **_figures(result.comparison),
        "atol": tolerance.atol if tolerance else None,
        "rtol": tolerance.rtol if tolerance else None,
        "worst": _worst(result.comparison.worst if result.comparison else None),
        "seconds": round(result.seconds, 6),
        "error_map": _error_map(result.comparison.errors if result.comparison else None),
        "oracle": _oracle(result.oracle),
        "divergence": _token_divergence(result.divergence),
    }


def _figures(comparison: Comparison | None) -> dict[str, Any]:
    names = ("max_abs", "max_rel", "mean_abs", "rmse", "cosine")
    if comparison is None:
        return dict.fromkeys((*names, "mismatched", "numel"))
    figures: dict[str, Any] = {name: _number(getattr(comparison, name)) for name in names}
    figures["mismatched"] = comparison.mismatched
    figures["numel"] = comparison.numel
    return figures


def _worst(worst: Worst | None) -> dict[str, Any] | None:
    if worst is None:
        return None
    return {
        "index": list(worst.index),
        "expected": _number(worst.expected),
        "actual": _number(worst.actual),
    }


def _error_map(errors: ErrorMap | None) -> dict[str, Any] | None:
    if errors is None:
        return None
    return {
        "shape": list(errors.shape),
        # One string a row: a list would fill a line for each of its numbers.
        "cells": [" ".join(f"{cell:.3g}" for cell in row) for row in errors.cells],
        "counts": list(errors.counts),
    }


def _oracle(figures: OracleComparison | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    return {
        "within": figures.within,
        "error": _number(figures.error),
        "reference_error": _number(figures.reference_error),
        "limit": _number(figures.limit),
        "position": list(figures.position),
        "position_error": _number(figures.position_error),
        "position_limit": _number(figures.position_limit),
    }


def _token_divergence(found: TokenDivergence | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "step": found.step,
        "expected": found.expected.token,
        "expected_text": found.expected.text,
        "actual": found.actual.token,
        "actual_text": found.actual.text,
        "kind": found.kind.name.lower(),
        "margin": found.margin,
        "margin_above": found.margin_above,
        "rounding": found.rounding,
        "candidate_margin": _optional(found.candidate_margin),
        "golden": [_token(choice) for choice in found.golden],
        "candidate": [_token(choice) for choice in found.candidate],
    }


def _token(choice: TokenChoice) -> str:
    """Write a token on one line, as "ID" or "ID text"."""
    return str(choice.token) if choice.text is None else f"{choice.token} {choice.text}"


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _modules(found: Localisation | None) -> list[dict[str, Any]] | None:
    if found is None:
        return None
    return [
        {
            "module": module.module,
            "candidate_module": module.candidate,
            "input_error": _optional(module.input_error),
            "output_error": _optional(module.output_error),
            "input_limit": _number(module.input_limit),
            "output_limit": _number(module.output_limit),
        }
        for module in found.modules
    ]


def _mapping(found: Localisation | None) -> dict[str, Any] | None:
    if found is None or found.mapping is None:
        return None
    return {
        "inferred": found.mapping.inferred,
        "matched": len(found.mapping.names),
        "confirmed": found.mapping.confirmed,
        "modules": found.mapping.modules,
        "not_compared": list(found.not_compared),
    }


def _localisation(found: Localisation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "case": found.case,
        "culprit": found.first_bad,
        "own_code": found.own_code,
        "between_modules": found.between,
        "heals": found.recovers,
        "neighbours": list(found.neighbours),
        "skipped": found.skipped,
        "raised": found.raised,
    }


def _graft(graft: Graft | None) -> dict[str, Any] | None:
    if graft is None:
        return None
    found = graft.localisation
    return {
        "module": graft.module,
        "candidate_module": graft.candidate,
        "case": graft.case,
        "proved": graft.proved,
        "conclusion": str(graft),
        "next_module": found.module if found and found.module else None,
        "before": [_judged(result) for result in graft.before],
        "results": [_judged(result) for result in graft.after],
    }


def _optional(value: float | None) -> float | str | None:
    return None if value is None else _number(value)


def _divergence(report: CheckReport) -> dict[str, Any] | None:
    result, found = report.divergence, report.localisation
    if result is None:
        return None
    bad = found.first_bad_module if found else None
    return {
        **_judged(result),
        "module": (found.module or None) if found else None,
        "candidate_module": bad.candidate if bad else None,
        "place": report.place or None,
    }
