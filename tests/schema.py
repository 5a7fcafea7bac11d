"""Writes docs/run.schema.json: the JSON Schema of the report, from the package's declarations."""

from __future__ import annotations

import json
from pathlib import Path

from snapshot_tool.reports.json import check_schema

PATH = Path(__file__).parent.parent / "docs" / "run.schema.json"


def schema_text() -> str:
    """Return the file's text."""
    return json.dumps(check_schema(), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(schema_text(), encoding="utf-8")
