"""What differs between two golden sets, as JSON; the fields are in docs/json.md."""

from __future__ import annotations

import json
import math
from typing import Any

from snapshot_tool.base.diff import Drift, PartDrift, SetDrift

SCHEMA = "snap-diff/1"


def diff_to_json(drift: SetDrift) -> str:
    """Return the JSON text, with a newline at its end."""
    document = {
        "schema": SCHEMA,
        "same": not drift.drifts,
        "one": {"title": drift.one.title, "folder": drift.one.folder},
        "other": {"title": drift.other.title, "folder": drift.other.folder},
        "environment": {
            name: {"one": one, "other": other} for name, (one, other) in drift.environment.items()
        },
        "parts": [_part(part) for part in drift.parts()],
        "tokens": [
            {"case": t.case, "step": t.step, "one": t.before, "other": t.after} for t in drift.texts
        ],
        "files": list(drift.files),
        "moved": [_drift(found) for found in drift.drifts],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _part(part: PartDrift) -> dict[str, Any]:
    return {
        "part": part.part,
        "tensors": part.tensors,
        "moved": part.moved,
        "beyond": part.beyond,
        "largest": _number(part.largest),
        "tolerances": _number(part.worst.used),
    }


def _drift(drift: Drift) -> dict[str, Any]:
    figures = drift.comparison
    return {
        "part": drift.part,
        "case": drift.case,
        "tensor": drift.tensor,
        "verdict": drift.verdict.value,
        "reason": drift.reason,
        "max_abs": _number(figures.max_abs) if figures else None,
        "mismatched": figures.mismatched if figures else None,
        "numel": figures.numel if figures else None,
        "tolerances": _number(drift.used),
    }


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN or infinity: they are strings."""
    return value if value is None or math.isfinite(value) else str(value)
