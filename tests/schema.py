"""Writes docs/run.schema.json: the JSON Schema of the report, from the package's declarations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from snapshot_tool.reports.json import CheckDocument

PATH = Path(__file__).parent.parent / "docs" / "run.schema.json"


def schema_text() -> str:
    """Return the file's text."""
    schema: dict[str, Any] = describe_written(msgspec.json.schema(CheckDocument))
    figure = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
    schema["$defs"]["Figure"] = figure
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2) + "\n"


def describe_written(node: Any) -> Any:
    """Return a schema in which figures may be strings and all fields are required."""
    if isinstance(node, list):
        return [describe_written(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "number":
        return {"$ref": "#/$defs/Figure"}
    described = {name: describe_written(item) for name, item in node.items() if name != "default"}
    if "properties" in described:
        described["required"] = list(described["properties"])
    return described


if __name__ == "__main__":
    PATH.write_text(schema_text(), encoding="utf-8")
