"""Manifests drawn from the manifest's own schema: valid on their face, senseless within."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from snapshot_tool.goldens.manifest import Manifest

_SCHEMA = msgspec.json.schema(Manifest)
_LARGEST = 2**53
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


def changed_manifests(valid: Mapping[str, Any]) -> SearchStrategy[dict[str, Any]]:
    """Draw a valid manifest of which one to three fields are others that the schema allows."""
    fields = _SCHEMA["$defs"]["Manifest"]["properties"]
    return st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries(
            {
                **{name: st.just(value) for name, value in valid.items()},
                **{name: _drawn(fields[name]) for name in names},
            }
        )
    )


def _drawn(schema: Mapping[str, Any]) -> SearchStrategy[Any]:
    """Return a strategy of what a part of the schema allows."""
    if "$ref" in schema:
        return _drawn(_SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return st.one_of(*map(_drawn, schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    draw = _BY_TYPE.get(schema.get("type", ""))
    return draw(schema) if draw else _JSON


def _objects(schema: Mapping[str, Any]) -> SearchStrategy[Any]:
    if "properties" in schema:
        fields = {name: _drawn(part) for name, part in schema["properties"].items()}
        required = {name: fields.pop(name) for name in schema["required"]}
        return st.fixed_dictionaries(required, optional=fields)
    names = _strings(schema.get("propertyNames", {}))
    return st.dictionaries(names, _drawn(schema.get("additionalProperties", {})), max_size=3)


def _strings(schema: Mapping[str, Any]) -> SearchStrategy[str]:
    if "pattern" not in schema:
        return st.text(max_size=20)
    longest = schema.get("maxLength", _LARGEST)
    return st.from_regex(schema["pattern"]).filter(lambda text: len(text) <= longest)


def _integers(schema: Mapping[str, Any]) -> SearchStrategy[int]:
    least, most = schema.get("minimum", -_LARGEST), schema.get("maximum", _LARGEST)
    return st.integers(least, least + 4) | st.integers(least, most)


_BY_TYPE: dict[str, Callable[[Mapping[str, Any]], SearchStrategy[Any]]] = {
    "object": _objects,
    "array": lambda schema: st.lists(_drawn(schema["items"]), max_size=3),
    "string": _strings,
    "integer": _integers,
    "number": lambda schema: st.floats(schema.get("minimum"), allow_infinity=False),
    "boolean": lambda _schema: st.booleans(),
    "null": lambda _schema: st.none(),
}
